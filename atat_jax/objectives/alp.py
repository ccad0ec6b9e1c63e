"""ALP: adversarial logit pairing (Kannan et al., 2018, Eq. 2).

  L = CE(mixture of clean and adversarial images)
      + weight * mean_k (z_k(x) - z_k(x_adv))^2

As in the method's own code, the square is a mean over classes and gradients
flow to both sides. That code attacks least likely classes; the paper compares
under the untargeted attack of Madry et al., which is ours.
"""

import dataclasses
from typing import Any, ClassVar

from flax import linen as nn

from atat_jax import losses
from atat_jax.objectives.adversarial import (
  Attacked,
  PairedPasses,
  check_weights,
)
from atat_jax.objectives.base import Batch, Outcome
from atat_jax.typing import Array, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALP(PairedPasses):
  """The method.

  Attributes:
    weight: Of logit pairing.
  """

  weight: float = 0.5

  needs_teacher = False
  term_names = ("cross_entropy", "logit_pairing")
  # The paper's, as for ATAT: no other is published for CIFAR.
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 52,
    "batch_size": 32,
  }

  def __post_init__(self) -> None:
    """Refuses values that make no objective."""
    super().__post_init__()
    check_weights(self, "weight")

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> Attacked:
    """Attacks the student."""
    return self.attack(key, model, variables, batch)

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: Attacked,
    batch: Batch,
  ) -> Outcome:
    """Eq. (2) of the method's paper."""
    clean, adversarial, stats = self.logits_pair(
      model, variables, prepared, batch
    )
    cross_entropy = losses.mixture_cross_entropy(
      clean, adversarial, batch.targets
    )
    logit_pairing = losses.mean_square(clean, adversarial)
    return Outcome(
      total=cross_entropy + self.weight * logit_pairing,
      terms={"cross_entropy": cross_entropy, "logit_pairing": logit_pairing},
      batch_stats=stats,
      logits_clean=clean,
      logits_adversarial=adversarial,
    )
