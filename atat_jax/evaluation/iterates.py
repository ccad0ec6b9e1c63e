"""PGD whose iterates are looked at: every one of them, or those of some rounds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from atat_jax import checks, losses, rng
from atat_jax.attacks import balls, projected_gradient
from atat_jax.errors import UserError
from atat_jax.runs import wording
from atat_jax.typing import Array, Classifier, PyTree, Scalar


@dataclasses.dataclass(frozen=True)
class WatchedAttack:
  """PGD that is stopped after some rounds; checked when it is made.

  Attributes:
    rounds: Numbers of steps, increasing; 0 is the attack's start.
    epsilon: Radius of the ball, in the unit of the pixels.
    step_size: Length of a step, in the same unit.
    norm: Norm of the ball: linf, l2 or l1.
    loss: Loss that the attack increases, one of `losses.ATTACK_LOSSES`.
    random_start: Whether the attack starts at a random point of the ball or at
      the clean image.
  """

  rounds: Sequence[int]
  epsilon: float
  step_size: float
  norm: str = "linf"
  loss: str = "cross_entropy"
  random_start: bool = True

  def __post_init__(self) -> None:
    """Refuses numbers that are not allowed, by name."""
    checks.choice("norm", self.norm, balls.BALLS)
    checks.choice("loss", self.loss, losses.ATTACK_LOSSES)
    checks.epsilon(self.epsilon, self.norm)
    checks.positive("step_size", self.step_size)
    checks.boolean("random_start", self.random_start)
    rounds = list(
      checks.sequence("rounds", self.rounds, "integers", empty=True)
    )
    for number in rounds:
      checks.integer("rounds", number, 0)
    if not rounds or rounds != sorted(set(rounds)):
      raise UserError(
        f"rounds: {rounds!r}; allowed: one or more integers >= 0, increasing"
      )

  @property
  def steps(self) -> np.ndarray:
    """The rounds, int32 [r]."""
    return np.array(list(self.rounds), np.int32)

  def describe(self) -> str:
    """Returns the attack in one line for people."""
    numbers = wording.attack(
      norm=self.norm,
      epsilon=self.epsilon,
      step_size=self.step_size,
      num_steps=int(self.steps[-1]),
    )
    start = "random start" if self.random_start else "from the clean image"
    return f"PGD, {numbers}, {start}, {self.loss} loss; running statistics"

  def traced(self) -> dict[str, Array]:
    """Returns the numbers that compile nothing anew, as arrays by name."""
    return {
      "rounds": jnp.asarray(self.steps),
      "epsilon": jnp.asarray(self.epsilon, jnp.float32),
      "step_size": jnp.asarray(self.step_size, jnp.float32),
      "random_start": jnp.asarray(self.random_start, bool),
    }

  def static(self) -> dict[str, str]:
    """Returns what each compiled program is made for, by name."""
    return {"norm": self.norm, "loss": self.loss}


def watch(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  kept: PyTree,
  keep: Callable[[PyTree, Array, Array, Array], PyTree],
  *,
  num_steps: Array | int,
  random_start: Array | bool = True,
  **attack: Any,
) -> PyTree:
  """Runs PGD and keeps something of every iterate, the start and the last too.

  For use inside jit. The iterate after k steps is what `attacks.pgd` with the
  same key and num_steps=k returns.

  Args:
    key: Random key of the start.
    classifier: Callable from images to logits.
    images: [B, H, W, C] in [0, 1].
    labels: int32 [B].
    kept: Initial value of what is kept.
    keep: (kept, number of steps made, iterate, its logits) to the next `kept`.
    num_steps: Number of steps.
    random_start: Whether the start is a random point of the ball; otherwise it
      is the clean image.
    **attack: `epsilon`, `step_size`, `norm` and `loss`, as for `attacks.pgd`.

  Returns:
    The last `kept`.
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
      rng.stream(key, "start", 0),
      images,
      epsilon=attack["epsilon"],
      norm=attack["norm"],
    ),
    lambda: images,
  )
  state = (jnp.zeros((), jnp.int32), kept)
  last, state = projected_gradient.ascend(
    logits_fn, state, start, images, labels, num_steps=num_steps, **attack
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
  """Returns the images after each of some rounds of PGD, in one attack.

  For use inside jit. The images after k rounds are what `attacks.pgd` with the
  same key and num_steps=k returns. Other rounds, as long as they are as many,
  compile nothing.

  Args:
    key: Random key of the start.
    classifier: Callable from images to logits.
    images: [B, H, W, C] in [0, 1].
    labels: int32 [B].
    rounds: int32 [r], increasing; 0 is the attack's start.
    epsilon: See `WatchedAttack`, as the following.
    step_size: Length of a step.
    random_start: Whether the start is random.
    norm: Norm of the ball.
    loss: Loss that the attack increases.

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
    num_steps=rounds[-1],
    random_start=random_start,
    epsilon=epsilon,
    step_size=step_size,
    norm=norm,
    loss=loss,
  )
