"""MART: misclassification-aware adversarial training (Wang et al., 2020).

  Eq. (11)  L = BCE(p(x_adv), y) + beta * KL(p(x) || p(x_adv)) (1 - p_y(x))
  Eq. (8)   BCE = -log p_y(x_adv) - log(1 - max_{k != y} p_k(x_adv))

As in the authors' code, the attack increases cross-entropy from 0.001 * N(0, 1)
beside the clean image, with running statistics; each batch is normalised by
itself; gradients flow everywhere; the second logarithm is of 1.0001 - p.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
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
class MART(PairedPasses):
  """MART, under its authors' attack.

  Attributes:
    beta: Weight of the KL; lambda in the authors' paper.
  """

  beta: float = 6.0
  epsilon: float = 0.031
  step_size: float = 0.007
  num_steps: int = 10
  attack_start: str = "gaussian"
  attack_batch_norm: BatchNormMode = "running"
  attack_moves_statistics: bool = False
  student_batch_norm: str = "in_turn"

  term_names = ("cross_entropy", "margin", "kl")
  # The rate falls in epoch 75 and again in epoch 90.
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 90,
    "boundaries": (74 / 90, 89 / 90),
    "weight_decay": 7e-4,
  }
  cifar_padding: ClassVar[int] = 4

  def __post_init__(self) -> None:
    """Checks the hyperparameters."""
    super().__post_init__()
    check_weights(self, "beta")

  @property
  def term_weights(self) -> dict[str, float]:
    """Weight of the KL in Eq. (11); the margin's is 1."""
    return super().term_weights | {"kl": self.beta}

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: InnerAttackResult,
    batch: Batch,
  ) -> Outcome:
    """Computes Eq. (11) of Wang et al."""
    clean, adversarial, stats = self.logits_pair(
      model, variables, prepared, batch
    )
    is_label = jnp.arange(clean.shape[-1]) == batch.labels[:, None]
    cross_entropy = losses.soft_cross_entropy(adversarial, batch.targets)
    others = jnp.where(is_label, 0.0, jax.nn.softmax(adversarial))
    margin = -jnp.log(1.0001 - others.max(-1))
    doubt = 1.0 - jnp.where(is_label, jax.nn.softmax(clean), 0.0).sum(-1)
    kl = losses.kl_divergence(clean, adversarial) * doubt
    return Outcome(
      total=cross_entropy + margin + self.beta * kl,
      terms={"cross_entropy": cross_entropy, "margin": margin, "kl": kl},
      batch_stats=stats,
      logits_clean=clean,
      logits_adversarial=adversarial,
    )
