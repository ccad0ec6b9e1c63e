"""TRADES (Zhang et al., 2019, Eq. 5).

  L = CE(f(x), y) + beta * KL(p(x) || p(x_adv))

The attack increases the same KL, from 0.001 * N(0, 1) beside the clean image,
where its gradient would be zero. As in the authors' code, the attack uses
running statistics, each batch is normalised by itself, and gradients flow to
both sides of the KL. (That code passes the clean batch twice and so moves the
running statistics twice; here the clean batch is passed once.)
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
from atat_jax.typing import BatchNormMode, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class TRADES(PairedPasses):
  """TRADES, under its authors' attack.

  Attributes:
    beta: Weight of the KL; 1 / lambda in the authors' paper.
  """

  beta: float = 6.0
  epsilon: float = 0.031
  step_size: float = 0.007
  num_steps: int = 10
  attack_loss: str = "kl"
  attack_start: str = "gaussian"
  attack_batch_norm: BatchNormMode = "running"
  attack_moves_statistics: bool = False
  student_batch_norm: str = "in_turn"

  term_names = ("cross_entropy", "kl")
  # The rate falls in epoch 75.
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 76,
    "boundaries": (74 / 76,),
  }
  cifar_padding: ClassVar[int] = 4

  def __post_init__(self) -> None:
    """Checks the hyperparameters."""
    super().__post_init__()
    check_weights(self, "beta")

  @property
  def term_weights(self) -> dict[str, float]:
    """Weight of the KL in Eq. (5)."""
    return super().term_weights | {"kl": self.beta}

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: InnerAttackResult,
    batch: Batch,
  ) -> Outcome:
    """Computes Eq. (5) of Zhang et al."""
    clean, adversarial, stats = self.logits_pair(
      model, variables, prepared, batch
    )
    cross_entropy = losses.soft_cross_entropy(clean, batch.targets)
    kl = losses.kl_divergence(clean, adversarial)
    return Outcome(
      total=cross_entropy + self.beta * kl,
      terms={"cross_entropy": cross_entropy, "kl": kl},
      batch_stats=stats,
      logits_clean=clean,
      logits_adversarial=adversarial,
    )
