"""One attack that is watched: its images at every step, or at some rounds."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from atat_jax import checks, losses, rng
from atat_jax.attacks import balls, projected_gradient
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier, PyTree, Scalar


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
    norm: One of `balls.BALLS`.
    loss: One of `losses.ATTACK_LOSSES`.

  Returns:
    The rounds, int32 [r].

  Raises:
    UserError: One of them is not allowed, by name.
  """
  checks.choice("norm", norm, balls.BALLS)
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


def watch(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  kept: PyTree,
  keep: Callable[[PyTree, Array, Array, Array], PyTree],
  *,
  epsilon: Scalar,
  step_size: Scalar,
  num_steps: Array | int,
  norm: str,
  loss: str,
  random_start: Array | bool = True,
) -> PyTree:
  """Runs PGD and keeps something of every iterate, the start and the last too.

  For use inside jit. The iterate after k steps is what `attacks.pgd` with the
  same key and num_steps=k returns.

  Args:
    key: Random key of the start.
    classifier: Callable from images to logits.
    images: [B, H, W, C] in [0, 1].
    labels: int32 [B].
    kept: What is kept before the first.
    keep: (kept, number of steps made, iterate, its logits) to kept.
    epsilon: Radius.
    step_size: Length of a step.
    num_steps: Of the attack.
    norm: One of `balls.BALLS`.
    loss: One of `losses.ATTACK_LOSSES`.
    random_start: Whether the start is a random point of the ball; otherwise it
      is the clean image.

  Returns:
    What is kept in the end.
  """

  def logits_fn(
    state: tuple[Array, PyTree], images_adv: Array
  ) -> tuple[Array, tuple[Array, PyTree]]:
    step, kept = state
    logits = classifier(images_adv)
    return logits, (step + 1, keep(kept, step, images_adv, logits))

  start = lax.cond(
    random_start,
    lambda: projected_gradient.random_start(
      rng.stream(key, "start", 0), images, epsilon=epsilon, norm=norm
    ),
    lambda: images,
  )
  last, state = projected_gradient.ascend(
    logits_fn,
    (jnp.zeros((), jnp.int32), kept),
    start,
    images,
    labels,
    epsilon=epsilon,
    step_size=step_size,
    num_steps=num_steps,
    norm=norm,
    loss=loss,
  )
  # The loop ends with a step: the pass over the last iterate comes here. Where
  # its logits are not asked for, the compiler leaves it out.
  _, (_, kept) = logits_fn(state, last)
  return kept


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
    norm: One of `balls.BALLS`.
    loss: One of `losses.ATTACK_LOSSES`.

  Returns:
    [r, B, H, W, C].
  """

  def keep(kept: Array, step: Array, images_adv: Array, _: Array) -> Array:
    found = rounds == step
    place = jnp.where(found.any(), found.argmax(), len(rounds))
    return kept.at[place].set(lax.stop_gradient(images_adv), mode="drop")

  return watch(
    key,
    classifier,
    images,
    labels,
    jnp.zeros((len(rounds), *images.shape), images.dtype),
    keep,
    epsilon=epsilon,
    step_size=step_size,
    num_steps=rounds[-1],
    norm=norm,
    loss=loss,
    random_start=random_start,
  )
