"""ATAT as its released code trains it, which is not Eq. (4) to (7).

  logits (CIFAR-10)   L = CE(mixture) + weight * (MSE(z_S(x), z_T(x))
                                                + MSE(z_S(x_adv), z_T(x)))
  maps   (CIFAR-100)  the same with Grad-CAM maps instead of logits z

MSE is the mean over classes or pixels. The released Grad-CAM differentiates
the mean of the logits over images and classes, so that its maps are those of
Eq. (3) divided by N K: N = B for the teacher, but 2 B for the student's pass on
[clean; adversarial]. Their MSE is of the order of 1e-9 on CIFAR-100 and cannot
influence the training. The weight of 0.5 that the code writes cancels in its
reduction, which divides by the sum of the weights. The student starts from
fresh parameters there.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from flax import linen as nn

from atat_jax import attention, batch_norm, checks, losses
from atat_jax.errors import UserError
from atat_jax.objectives.adversarial import (
  Attacked,
  PairedPasses,
  check_weights,
)
from atat_jax.objectives.base import Batch, Outcome
from atat_jax.typing import Array, PyTree, Variables


class Prepared(NamedTuple):
  """Constants of the loss.

  Attributes:
    attacked: Adversarial images, and the statistics after the attack.
    teacher: Of the clean images: logits [B, K] or maps [B, h, w].
  """

  attacked: Attacked
  teacher: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ATATReleased(PairedPasses):
  """The released variants.

  Attributes:
    variant: What is compared with the teacher's: "logits" or "maps".
    weight: Of each of the two terms.
    starts_from_teacher: Whether the student starts from the teacher's
      parameters, as the paper says, or from fresh ones, as the code does.
  """

  variant: str = "logits"
  weight: float = 1.0
  starts_from_teacher: bool = False

  needs_teacher = True
  term_names = ("cross_entropy", "transfer_clean", "transfer_adversarial")
  # 80,000 steps of 32 images; the rate falls at 40,000 and at 60,000. (The
  # released configuration allows 400,000 steps, the last 340,000 at 0.001.)
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 52,
    "batch_size": 32,
  }

  def __post_init__(self) -> None:
    """Refuses values that make no objective."""
    super().__post_init__()
    checks.choice("variant", self.variant, ("logits", "maps"))
    check_weights(self, "weight")

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> Prepared:
    """Attacks the student and asks the teacher."""
    if teacher is None:
      raise UserError("teacher: None; allowed: a teacher's variables")
    attacked = self.attack(key, model, variables, batch)
    with jax.named_scope("teacher"):
      if self.variant == "logits":
        logits, _ = batch_norm.apply(model, teacher, batch.images)
        return Prepared(attacked, logits)
      logits, maps, _ = attention.forward(
        model, teacher, batch.images, batch.labels
      )
    (teacher_map,) = maps.values()
    return Prepared(attacked, teacher_map / logits.size)  # N K = B K

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: Prepared,
    batch: Batch,
  ) -> Outcome:
    """The released loss."""

    def forward(
      stats: PyTree, images: Array, labels: Array
    ) -> tuple[tuple[Array, Array], PyTree]:
      student = {"params": variables["params"], "batch_stats": stats}
      if self.variant == "logits":
        logits, stats = batch_norm.apply(
          model, student, images, batch_norm="batch"
        )
        return (logits, logits), stats
      logits, maps, stats = attention.forward(
        model, student, images, labels, batch_norm="batch"
      )
      (student_map,) = maps.values()
      scale = 2 * batch.targets.size  # N K = 2 B K
      return (logits, student_map / scale), stats

    (clean, of_clean), (adversarial, of_adversarial), stats = self.forward_pair(
      forward,
      prepared.attacked.batch_stats,
      batch,
      prepared.attacked.images_adv,
    )
    cross_entropy = losses.mixture_cross_entropy(
      clean, adversarial, batch.targets
    )
    transfer_clean = losses.mean_square(of_clean, prepared.teacher)
    transfer_adversarial = losses.mean_square(of_adversarial, prepared.teacher)
    return Outcome(
      total=cross_entropy
      + self.weight * (transfer_clean + transfer_adversarial),
      terms={
        "cross_entropy": cross_entropy,
        "transfer_clean": transfer_clean,
        "transfer_adversarial": transfer_adversarial,
      },
      batch_stats=stats,
      logits_clean=clean,
      logits_adversarial=adversarial,
    )
