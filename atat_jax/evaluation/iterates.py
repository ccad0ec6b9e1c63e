"""The images that one attack passes through, at some of its rounds."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from atat_jax import checks, losses, rng
from atat_jax.attacks import norms, projected_gradient
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier, Scalar


def check_settings(
  *,
  rounds: Sequence[int],
  epsilon: float,
  step_size: float,
  norm: str,
  loss: str,
) -> np.ndarray:
  """Checks the numbers of an attack that is to be watched.

  Args:
    rounds: Numbers of steps, increasing, from 0.
    epsilon: Radius.
    step_size: Length of a step.
    norm: One of `norms.NORMS`.
    loss: One of `losses.ATTACK_LOSSES`.

  Returns:
    The rounds, int32 [r].

  Raises:
    UserError: One of them is not allowed, by name.
  """
  checks.choice("norm", norm, norms.NORMS)
  checks.choice("loss", loss, losses.ATTACK_LOSSES)
  checks.epsilon(epsilon, norm)
  checks.positive("step_size", step_size)
  rounds = list(rounds)
  whole = all(isinstance(k, int | np.integer) and k >= 0 for k in rounds)
  if not rounds or not whole or rounds != sorted(set(rounds)):
    raise UserError(
      f"rounds: {rounds!r}; allowed: one or more integers >= 0, increasing"
    )
  return np.array(rounds, np.int32)


def describe(
  *,
  rounds: np.ndarray,
  epsilon: float,
  step_size: float,
  norm: str,
  loss: str,
  random_start: bool,
) -> str:
  """The attack in one line for people."""
  start = "random start" if random_start else "from the clean image"
  return (
    f"PGD, {norm}, epsilon {epsilon:.4g}, {rounds[-1]} steps of"
    f" {step_size:.4g}, {start}, {loss} loss; running statistics"
  )


def pgd_iterates(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  rounds: Array,
  *,
  epsilon: Scalar,
  step_size: Scalar,
  random_start: Array | bool,
  norm: str,
  loss: str,
) -> Array:
  """What PGD has made of the images after each of some rounds, in one attack.

  For use inside jit. After k rounds it is what `attacks.pgd` with the same key
  and num_steps=k returns. Other rounds, as long as they are as many, compile
  nothing.

  Args:
    key: Random key of the start.
    classifier: Callable from images to logits.
    images: [B, H, W, C] in [0, 1].
    labels: int32 [B].
    rounds: int32 [r], increasing; 0 is the attack's start.
    epsilon: Radius.
    step_size: Length of a step.
    random_start: Whether the start is a random point of the ball; otherwise it
      is the clean image.
    norm: One of `norms.NORMS`.
    loss: One of `losses.ATTACK_LOSSES`.

  Returns:
    [r, B, H, W, C].
  """

  def keep(step: Array, kept: Array, images_adv: Array) -> Array:
    found = rounds == step
    place = jnp.where(found.any(), found.argmax(), len(rounds))
    return kept.at[place].set(lax.stop_gradient(images_adv), mode="drop")

  def logits_fn(
    state: tuple[Array, Array], images_adv: Array
  ) -> tuple[Array, tuple[Array, Array]]:
    step, kept = state
    kept = keep(step, kept, images_adv)
    return classifier(images_adv), (step + 1, kept)

  start = lax.cond(
    random_start,
    lambda: projected_gradient.random_start(
      rng.stream(key, "start", 0), images, epsilon=epsilon, norm=norm
    ),
    lambda: images,
  )
  nothing = jnp.zeros((len(rounds), *images.shape), images.dtype)
  last, (step, kept) = projected_gradient.ascend(
    logits_fn,
    (jnp.zeros((), jnp.int32), nothing),
    start,
    images,
    labels,
    epsilon=epsilon,
    step_size=step_size,
    num_steps=rounds[-1],
    norm=norm,
    loss=loss,
  )
  return keep(step, kept, last)
