"""Standard training: cross-entropy on clean images. Trains the teacher."""

import dataclasses

from flax import linen as nn

from atat_jax import batch_norm, losses
from atat_jax.objectives.base import Batch, Objective, Outcome
from atat_jax.typing import Array, Variables


@dataclasses.dataclass(frozen=True)
class Standard(Objective):
  """Standard training: min E[CE(f(x), y)]."""

  needs_teacher = False
  starts_from_teacher = False
  sees_clean = True
  attacks = False
  term_names = ("cross_entropy",)

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> None:
    """Prepares nothing: there is no attack and no teacher."""

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: None,
    batch: Batch,
  ) -> Outcome:
    """Computes the cross-entropy of the clean images."""
    logits, stats = batch_norm.apply(
      model, variables, batch.images, batch_norm="batch"
    )
    cross_entropy = losses.soft_cross_entropy(logits, batch.targets)
    return Outcome(
      total=cross_entropy,
      terms={"cross_entropy": cross_entropy},
      batch_stats=stats,
      logits_clean=logits,
      logits_adversarial=None,
    )
