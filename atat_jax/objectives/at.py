"""AT-PGD: adversarial training (Madry et al., 2018, Eq. 2.1).

  min E[max_{||d|| <= epsilon} CE(f(x + d), y)]

The student sees adversarial images only.
"""

import dataclasses
from typing import Any, ClassVar

from flax import linen as nn

from atat_jax import batch_norm, losses
from atat_jax.objectives.adversarial import InnerAttack, InnerAttackResult
from atat_jax.objectives.base import Batch, Outcome
from atat_jax.typing import Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class AT(InnerAttack):
  """Adversarial training; its fields are the attack's."""

  sees_clean = False
  term_names = ("cross_entropy",)
  # 80,000 steps of 128 images; the rate falls at 40,000 and at 60,000.
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 209,
    "batch_size": 128,
  }

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: InnerAttackResult,
    batch: Batch,
  ) -> Outcome:
    """Computes the cross-entropy of the adversarial images."""
    logits, stats = batch_norm.apply(
      model,
      {"params": variables["params"], "batch_stats": prepared.batch_stats},
      prepared.images_adv,
      batch_norm="batch",
    )
    cross_entropy = losses.soft_cross_entropy(logits, batch.targets)
    return Outcome(
      total=cross_entropy,
      terms={"cross_entropy": cross_entropy},
      batch_stats=stats,
      logits_clean=None,
      logits_adversarial=logits,
    )
