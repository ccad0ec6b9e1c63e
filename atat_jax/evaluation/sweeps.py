"""Accuracy over an attack's steps, for the analyses that sweep an attack."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import checks, compilation, losses, rng, sharding
from atat_jax.attacks import base, nonfinite
from atat_jax.data import batches
from atat_jax.evaluation import iterates
from atat_jax.evaluation.accuracies import score
from atat_jax.evaluation.networks import (
  Networks,
  classifiers,
  devices,
  refuse_nonfinite,
)
from atat_jax.typing import Array, Classifier


def _watched(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  epsilon: Array,
  step_size: Array,
  *,
  num_steps: int,
  norm: str,
  loss: str,
) -> tuple[Array, Array]:
  """Returns which iterates of PGD are right, and which logits are finite.

  Both bool [num_steps + 1, B].
  """

  def keep(
    kept: tuple[Array, Array], step: Array, _: Array, logits: Array
  ) -> tuple[Array, Array]:
    correct, finite = kept
    return (
      correct.at[step].set(logits.argmax(-1) == labels),
      finite.at[step].set(nonfinite.usable(logits)),
    )

  none = jnp.zeros((num_steps + 1, images.shape[0]), bool)
  return iterates.watch(
    key,
    classifier,
    images,
    labels,
    (none, none),
    keep,
    num_steps=num_steps,
    epsilon=epsilon,
    step_size=step_size,
    norm=norm,
    loss=loss,
  )


_jitted_watched = compilation.jit(
  _watched, static_argnames=("num_steps", "norm", "loss")
)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Networks on the devices, and the images on which they are attacked.

  Attributes:
    classifiers: Name to classifier.
    images: float32 [n, H, W, C], on the host.
    labels: int32 [n], on the host.
    num_classes: Number of classes.
    batch_size: Images at a time, over all devices.
    mesh: The devices.
  """

  classifiers: dict[str, Classifier]
  images: np.ndarray
  labels: np.ndarray
  num_classes: int
  batch_size: int
  mesh: Mesh

  def facts(self) -> dict[str, np.ndarray]:
    """Returns the arrays that every sweep writes: networks, size, chance."""
    return {
      "networks": np.array(list(self.classifiers)),
      "num_examples": np.array(len(self.labels)),
      "chance": np.array(1 / self.num_classes),
    }

  def clean_correct(self, name: str) -> np.ndarray:
    """Returns who is right without attack, bool [n]."""
    correct, finite = batches.map_batches(
      lambda _, x, y: score(self.classifiers[name], x, y),
      self.images,
      self.labels,
      batch_size=self.batch_size,
      mesh=self.mesh,
    )
    refuse_nonfinite(name, "images' logits", finite)
    return correct

  def correct_by_step(
    self,
    name: str,
    key: Array,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    norm: str,
    loss: str,
  ) -> np.ndarray:
    """Returns who is right after each step of PGD, bool [num_steps + 1, n].

    Raises:
      UserError: Logits are not finite.
    """
    correct, finite = batches.map_batches(
      lambda number, x, y: _jitted_watched(
        rng.stream(key, "evaluation", number),
        self.classifiers[name],
        x,
        y,
        jnp.asarray(epsilon, x.dtype),
        jnp.asarray(step_size, x.dtype),
        num_steps=num_steps,
        norm=norm,
        loss=loss,
      ),
      self.images,
      self.labels,
      batch_size=self.batch_size,
      mesh=self.mesh,
      axis=-1,
    )
    refuse_nonfinite(name, "images' logits", finite.all(0))
    return correct


def prepare(
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  num_steps: int,
  loss: str,
  batch_size: int,
  mesh: Mesh | None,
) -> Sweep:
  """Checks what is to be swept and puts the networks on the devices.

  Args:
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1], any number.
    labels: Integers [n]: the true classes.
    num_steps: Number of steps of an attack.
    loss: Loss that the attack increases, one of `losses.ATTACK_LOSSES`.
    batch_size: Images at a time, over all devices.
    mesh: The devices; None: all of them.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  checks.choice("loss", loss, losses.ATTACK_LOSSES)
  for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
    checks.positive(name, value, integer=True)
  named, images, labels, num_classes = classifiers(networks, images, labels)
  base.check_loss(loss, num_classes)
  mesh = devices(mesh)
  return Sweep(
    classifiers={
      name: sharding.put_replicated(mesh, classifier)
      for name, classifier in named.items()
    },
    images=images,
    labels=labels,
    num_classes=num_classes,
    batch_size=min(batch_size, len(labels)),
    mesh=mesh,
  )
