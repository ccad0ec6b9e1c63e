"""Accuracy against the strength of an attack: its steps, its radius (Fig. 8).

A hundred numbers of steps are one attack of a hundred steps that is watched:
the pass that yields a step's gradient also says who is still right, so every
number of steps costs the longest attack and one more forward pass.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import checks, compilation, losses, rng, sharding
from atat_jax.attacks import balls, base
from atat_jax.data import batches
from atat_jax.errors import UserError
from atat_jax.evaluation import iterates
from atat_jax.evaluation.auditing import growing
from atat_jax.evaluation.networks import Networks, classifiers
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
) -> Array:
  """Who is right at each iterate of PGD, bool [num_steps + 1, B]."""

  def keep(correct: Array, step: Array, _: Array, logits: Array) -> Array:
    return correct.at[step].set(logits.argmax(-1) == labels)

  return iterates.watch(
    key,
    classifier,
    images,
    labels,
    jnp.zeros((num_steps + 1, images.shape[0]), bool),
    keep,
    epsilon=epsilon,
    step_size=step_size,
    num_steps=num_steps,
    norm=norm,
    loss=loss,
  )


def _clean(classifier: Classifier, images: Array, labels: Array) -> Array:
  return classifier(images).argmax(-1) == labels


_jitted_watched = compilation.jit(
  _watched, static_argnames=("num_steps", "norm", "loss")
)
_jitted_clean = compilation.jit(_clean)


@dataclasses.dataclass(frozen=True)
class _Data:
  """Images with their labels, on the host, and how they are gone through."""

  images: np.ndarray
  labels: np.ndarray
  batch_size: int
  mesh: Mesh

  def gather(
    self, function: Callable[[int, Array, Array], Array]
  ) -> np.ndarray:
    """(number of the batch, images, labels) to bool [..., B]; all [..., n]."""
    count = len(self.labels)
    indices, _ = batches.eval_batches(count, min(self.batch_size, count))
    found = []
    for number, rows in enumerate(indices):
      x = sharding.put_batch(self.mesh, self.images[rows])
      y = sharding.put_batch(self.mesh, self.labels[rows])
      found.append(sharding.to_host(self.mesh, function(number, x, y)))
    return np.concatenate(found, axis=-1)[..., :count]


def _clean_correct(classifier: Classifier, data: _Data) -> np.ndarray:
  """Who is right without attack, bool [n]."""
  return data.gather(lambda _, x, y: _jitted_clean(classifier, x, y))


def _correct_by_step(
  key: Array,
  classifier: Classifier,
  data: _Data,
  *,
  epsilon: float,
  step_size: float,
  num_steps: int,
  norm: str,
  loss: str,
) -> np.ndarray:
  """Who is right after each step, bool [num_steps + 1, n]."""
  return data.gather(
    lambda number, x, y: _jitted_watched(
      rng.stream(key, "evaluation", number),
      classifier,
      x,
      y,
      jnp.asarray(epsilon, x.dtype),
      jnp.asarray(step_size, x.dtype),
      num_steps=num_steps,
      norm=norm,
      loss=loss,
    )
  )


def _prepare(
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  num_steps: int,
  loss: str,
  batch_size: int,
  mesh: Mesh | None,
) -> tuple[dict[str, Classifier], _Data, dict[str, np.ndarray]]:
  """Checks; classifiers on the devices, the data, what both sweeps return."""
  checks.choice("loss", loss, losses.ATTACK_LOSSES)
  for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
    checks.positive(name, value, integer=True)
  named, images, labels, num_classes = classifiers(networks, images, labels)
  base.check_loss(loss, num_classes)
  mesh = sharding.make_mesh() if mesh is None else mesh
  placed = {
    name: sharding.put_replicated(mesh, classifier)
    for name, classifier in named.items()
  }
  shared = {
    "networks": np.array(list(named)),
    "num_examples": np.array(len(labels)),
    "chance": np.array(1 / num_classes),
  }
  return placed, _Data(images, labels, batch_size, mesh), shared


def attack_steps(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  epsilon: float,
  step_size: float,
  num_steps: int = 100,
  norm: str = "linf",
  loss: str = "cross_entropy",
  batch_size: int = 128,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Accuracy after every step of PGD, in one pass of one attack (Fig. 8).

  What stands after k steps is what `attacks.pgd` with num_steps=k leaves, as
  its step size does not depend on k. Batches draw from the keys from which
  `evaluation.accuracy` draws: with its key and batch size, the accuracy after
  20 steps is that of the protocol pgd20.

  Args:
    key: Random key of the starts.
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1], any number.
    labels: Integers [n]: the true classes.
    epsilon: Radius of the ball, in the unit of the pixels. The paper: 8/255.
    step_size: Length of a step, in the same unit. The paper: 2/255.
    num_steps: Of the longest attack. The paper: 100.
    norm: "linf", "l2" or "l1".
    loss: What the attack increases, one of `losses.ATTACK_LOSSES`.
    batch_size: Images at a time, over all devices.
    mesh: The devices; None: all of them.

  Returns:
    `networks` [m], `num_examples`, `chance` (1 / K), `protocol`, `norm`,
    `epsilon`, `steps` int [num_steps + 1] from 0, the random start, and for
    each network
    `<name>_clean`, the accuracy without attack,
    `<name>_accuracy` float64 [num_steps + 1] at each iterate,
    `<name>_worst_case` float64 [num_steps + 1], the share of images that no
    iterate so far has fooled, and
    `<name>_correct` bool [num_steps + 1, n], image by image.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  checks.choice("norm", norm, balls.BALLS)
  checks.epsilon(epsilon, norm)
  checks.positive("step_size", step_size)
  named, data, found = _prepare(
    networks,
    images,
    labels,
    num_steps=num_steps,
    loss=loss,
    batch_size=batch_size,
    mesh=mesh,
  )
  found |= {
    "protocol": np.array(
      f"PGD, {norm}, epsilon {epsilon:.4g}, steps of {step_size:.4g}, random"
      f" start, {loss} loss; running statistics"
    ),
    "norm": np.array(norm),
    "epsilon": np.array(float(epsilon)),
    "steps": np.arange(num_steps + 1),
  }
  for name, classifier in named.items():
    correct = _correct_by_step(
      key,
      classifier,
      data,
      epsilon=epsilon,
      step_size=step_size,
      num_steps=num_steps,
      norm=norm,
      loss=loss,
    )
    found[f"{name}_clean"] = np.array(_clean_correct(classifier, data).mean())
    found[f"{name}_accuracy"] = correct.mean(-1)
    found[f"{name}_worst_case"] = np.logical_and.accumulate(correct).mean(-1)
    found[f"{name}_correct"] = correct
  return found


def default_epsilons(
  epsilon: float, norm: str, num_pixels: int
) -> tuple[float, ...]:
  """Radii for `attack_epsilons`, about one that matters.

  Args:
    epsilon: That radius, in the unit of the pixels.
    norm: "linf", "l2" or "l1".
    num_pixels: H * W * C of an image.

  Returns:
    0, quarters of epsilon up to it, then one and a half of it and doublings to
    the radius that covers all images.
  """
  first, *larger = growing(epsilon, norm, num_pixels)
  quarters = [first * part for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
  between = [first * 1.5] if larger and first * 1.5 < larger[0] else []
  return (*quarters, *between, *larger)


def attack_epsilons(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  epsilons: Sequence[float],
  num_steps: int = 20,
  norm: str = "linf",
  loss: str = "margin",
  batch_size: int = 128,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Accuracy under PGD against the radius of the ball, without recompilation.

  A step is a quarter of each radius. In a ball that covers all images any
  classifier that has more than one answer can be fooled: accuracy that is left
  there is the attack's failure (vanishing or masked gradients), and casts doubt
  on every smaller radius. So does accuracy that rises with the radius. The
  margin is the default because cross-entropy's own gradient vanishes in float32
  where a network is sure of itself.

  Args:
    key: Random key of the starts, the same for each radius.
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1], any number.
    labels: Integers [n]: the true classes.
    epsilons: Radii in the unit of the pixels, increasing; 0 is no attack. See
      `default_epsilons`.
    num_steps: Of each attack.
    norm: "linf", "l2" or "l1" (whose sparse steps stall at the box).
    loss: What the attack increases, one of `losses.ATTACK_LOSSES`.
    batch_size: Images at a time, over all devices.
    mesh: The devices; None: all of them.

  Returns:
    `networks` [m], `num_examples`, `chance` (1 / K), `protocol`, `norm`,
    `epsilons` float64 [e], and for each network
    `<name>_accuracy` float64 [e] at the last iterate,
    `<name>_worst_case` float64 [e], the share of images that no iterate in this
    or a smaller ball has fooled, and
    `<name>_correct` bool [e, n], image by image, at the last iterate.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  checks.choice("norm", norm, balls.BALLS)
  radii = _increasing(epsilons, norm)
  named, data, found = _prepare(
    networks,
    images,
    labels,
    num_steps=num_steps,
    loss=loss,
    batch_size=batch_size,
    mesh=mesh,
  )
  found |= {
    "protocol": np.array(
      f"PGD, {norm}, {num_steps} steps of a quarter of epsilon, random start,"
      f" {loss} loss; running statistics"
    ),
    "norm": np.array(norm),
    "epsilons": np.array(radii),
  }
  for name, classifier in named.items():
    last, standing = [], []
    for radius in radii:
      if radius == 0:
        correct = _clean_correct(classifier, data)[None]
      else:
        correct = _correct_by_step(
          key,
          classifier,
          data,
          epsilon=radius,
          step_size=radius / 4,
          num_steps=num_steps,
          norm=norm,
          loss=loss,
        )
      last.append(correct[-1])
      standing.append(correct.all(0))
    found[f"{name}_accuracy"] = np.mean(last, axis=-1)
    found[f"{name}_worst_case"] = np.logical_and.accumulate(standing).mean(-1)
    found[f"{name}_correct"] = np.array(last)
  return found


def _increasing(epsilons: Sequence[float], norm: str) -> list[float]:
  radii = [float(radius) for radius in epsilons]
  for radius in radii:
    if radius != 0:
      checks.epsilon(radius, norm, "epsilons")
  if not radii or radii != sorted(set(radii)):
    raise UserError(f"epsilons: {epsilons!r}; allowed: one or more, increasing")
  return radii
