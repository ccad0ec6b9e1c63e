"""ALP: adversarial logit pairing (Kannan et al., 2018, Eq. 2).

  L = CE(mixture of clean and adversarial images)
      + weight * mean_k (z_k(x) - z_k(x_adv))^2

As in the authors' code, the square is averaged over the classes and gradients
flow to both sides. That code attacks towards least likely classes; the ATAT
paper compares all methods under the untargeted attack of Madry et al., which is
the attack used here.
"""

import dataclasses
from typing import Any, ClassVar

from flax import linen as nn

from atat_jax import losses
from atat_jax.objectives.adversarial import (
  InnerAttackResult,
  PairedPasses,
  check_weights,
)
from atat_jax.objectives.base import Batch, Outcome
from atat_jax.typing import Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALP(PairedPasses):
  """Adversarial logit pairing.

  Attributes:
    weight: Weight of the logit-pairing term.
  """

  weight: float = 0.5

  term_names = ("cross_entropy", "logit_pairing")
  # The paper's, as for ATAT: no other is published for CIFAR.
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 52,
    "batch_size": 32,
  }

  def __post_init__(self) -> None:
    """Checks the hyperparameters."""
    super().__post_init__()
    check_weights(self, "weight")

  @property
  def term_weights(self) -> dict[str, float]:
    """Weight of the logit pairing in Eq. (2)."""
    return super().term_weights | {"logit_pairing": self.weight}

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: InnerAttackResult,
    batch: Batch,
  ) -> Outcome:
    """Computes Eq. (2) of Kannan et al."""
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
