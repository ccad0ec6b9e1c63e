"""ATAT as trained by its released code, which differs from Eq. (4) to (7).

  logits (CIFAR-10)   L = CE(mixture) + weight * (MSE(z_S(x), z_T(x))
                                                + MSE(z_S(x_adv), z_T(x)))
  maps   (CIFAR-100)  the same with Grad-CAM maps instead of logits z

MSE is the mean over classes or pixels. The released Grad-CAM differentiates
the mean of the logits over images and classes, so that its maps are those of
Eq. (3) divided by N K: N = B for the teacher, but 2 B for the student's pass on
[clean; adversarial]. Their MSE is of the order of 1e-9 on CIFAR-100 and cannot
influence the training. The code's weight of 0.5 cancels in its reduction, which
divides by the sum of the weights. Its student starts from fresh parameters.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
from flax import linen as nn

from atat_jax import attention, batch_norm, checks, losses
from atat_jax.errors import UserError
from atat_jax.objectives.adversarial import (
  InnerAttackResult,
  PairedPasses,
  check_weights,
)
from atat_jax.objectives.base import Batch, Outcome
from atat_jax.typing import Array, PyTree, Variables


class PreparedATATReleased(NamedTuple):
  """Constants of the released loss.

  Attributes:
    attack: Adversarial images, and the statistics after the attack.
    teacher: The teacher's logits [B, K] or maps [B, h, w] of the clean images.
  """

  attack: InnerAttackResult
  teacher: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ATATReleased(PairedPasses):
  """ATAT as released, in two variants.

  Attributes:
    variant: Output that is compared with the teacher's: "logits" (CIFAR-10) or
      "maps" (CIFAR-100).
    weight: Weight of each of the two transfer terms.
  """

  variant: str = "logits"
  weight: float = 1.0

  needs_teacher = True  # the code starts from fresh parameters all the same
  term_names = ("cross_entropy", "transfer_clean", "transfer_adversarial")
  # 80,000 steps of 32 images; the rate falls at 40,000 and at 60,000. (The
  # released configuration allows 400,000 steps, the last 340,000 at 0.001.)
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 52,
    "batch_size": 32,
  }

  def __post_init__(self) -> None:
    """Checks the hyperparameters."""
    super().__post_init__()
    checks.choice("variant", self.variant, ("logits", "maps"))
    check_weights(self, "weight")

  @property
  def term_weights(self) -> dict[str, float]:
    """One weight for both transfer terms."""
    transfer = ("transfer_clean", "transfer_adversarial")
    return super().term_weights | dict.fromkeys(transfer, self.weight)

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> PreparedATATReleased:
    """Attacks the student and computes the teacher's logits or map."""
    if teacher is None:
      raise UserError("teacher: None; allowed: a teacher's variables")
    attack = self.attack(key, model, variables, batch)
    with jax.named_scope("teacher"):
      if self.variant == "logits":
        logits, _ = batch_norm.apply(model, teacher, batch.images)
        return PreparedATATReleased(attack, logits)
      logits, maps, _ = attention.forward(
        model, teacher, batch.images, batch.labels
      )
    (teacher_map,) = maps.values()
    # N K = B K
    return PreparedATATReleased(attack, teacher_map / logits.size)

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: PreparedATATReleased,
    batch: Batch,
  ) -> Outcome:
    """Computes the released loss."""
    forward = functools.partial(
      self._forward, model, variables["params"], 2 * batch.targets.size
    )
    (clean, output_clean), (adversarial, output_adversarial), stats = (
      self.forward_pair(forward, prepared.attack, batch)
    )
    cross_entropy = losses.mixture_cross_entropy(
      clean, adversarial, batch.targets
    )
    transfer_clean = losses.mean_square(output_clean, prepared.teacher)
    transfer_adversarial = losses.mean_square(
      output_adversarial, prepared.teacher
    )
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

  def _forward(
    self,
    model: nn.Module,
    params: PyTree,
    map_divisor: int,
    stats: PyTree,
    images: Array,
    labels: Array,
  ) -> tuple[tuple[Array, Array], PyTree]:
    """Makes the student's pass for logits and the compared output, a `Forward`.

    The output is the logits, or the map divided by N K = 2 B K.
    """
    student = {"params": params, "batch_stats": stats}
    if self.variant == "logits":
      logits, stats = batch_norm.apply(
        model, student, images, batch_norm="batch"
      )
      return (logits, logits), stats
    logits, maps, stats = attention.forward(
      model, student, images, labels, batch_norm="batch"
    )
    (student_map,) = maps.values()
    return (logits, student_map / map_divisor), stats
