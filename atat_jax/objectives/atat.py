"""ATAT: attention-transfer-based adversarial training (Li et al., 2021).

  Eq. (5)  L_at = sum_{l in J} ||v(ATT_T^l(x)) - v(ATT_S^l(x_adv))||_p
                             + ||v(ATT_T^l(x)) - v(ATT_S^l(x))||_p
  Eq. (6)  L_lp = ||p_S(x) - p_S(x_adv)||_2 on logits
  Eq. (7)  L    = L_ce + lambda1 L_at + lambda2 L_lp

L_ce is the cross-entropy of the mixture of clean and adversarial images. The
teacher T is a standardly trained network of the same architecture, frozen,
with running statistics; the student S starts from its parameters. The paper
gives no values of lambda1 and lambda2.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from atat_jax import attention, batch_norm, checks, losses
from atat_jax.attacks import norms, projected_gradient
from atat_jax.errors import UserError
from atat_jax.objectives.base import Batch, Outcome
from atat_jax.typing import Array, BatchNormMode, PyTree, Variables


class Prepared(NamedTuple):
  """Constants of the loss.

  Attributes:
    images_adv: [B, H, W, C].
    batch_stats: The student's running statistics after the attack.
    teacher_maps: {layer: [B, h, w]} of the clean images.
  """

  images_adv: Array
  batch_stats: PyTree
  teacher_maps: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class ATAT:
  """The method and its attack.

  Attributes:
    lambda1: Weight of L_at.
    lambda2: Weight of L_lp.
    p: Of the norm in Eq. (5), 1 or 2. The norm itself, not its square.
    layers: The set J by name; empty: the topmost convolutional tensor.
    epsilon: Radius of the attack in training, pixels in [0, 1].
    step_size: Its step.
    num_steps: Its steps.
    norm: "linf" or "l2".
    attack_loss: "cross_entropy" or "margin".
    attack_batch_norm: Statistics that the student uses while it is attacked:
      "batch" as in the released code, or "running".
    attack_moves_statistics: Whether the attack's passes move the running
      statistics, as in the released code; needs attack_batch_norm="batch".
  """

  lambda1: float
  lambda2: float
  epsilon: float
  step_size: float
  num_steps: int
  p: int = 2
  layers: tuple[str, ...] = ()
  norm: str = "linf"
  attack_loss: str = "cross_entropy"
  attack_batch_norm: BatchNormMode = "batch"
  attack_moves_statistics: bool = False

  needs_teacher = True
  attacks = True
  term_names = ("cross_entropy", "attention", "logit_pairing")

  def __post_init__(self) -> None:
    """Refuses values that make no objective."""
    checks.epsilon(self.epsilon, self.norm)
    checks.positive("step_size", self.step_size)
    checks.positive("num_steps", self.num_steps, integer=True)
    for name in ("lambda1", "lambda2"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise UserError(f"{name}: {getattr(self, name)}; allowed: >= 0")
    if self.p not in (1, 2):
      raise UserError(f"p: {self.p}; allowed: 1, 2")
    checks.choice("norm", self.norm, norms.NORMS)
    checks.choice("attack_loss", self.attack_loss, losses.ATTACK_LOSSES)
    checks.choice(
      "attack_batch_norm", self.attack_batch_norm, ("running", "batch")
    )
    if self.attack_moves_statistics and self.attack_batch_norm == "running":
      raise UserError(
        "attack_moves_statistics: True; allowed: False where"
        " attack_batch_norm='running', which has no batch statistics"
      )

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> Prepared:
    """Attacks the student and asks the teacher for its maps."""
    if teacher is None:
      raise UserError("teacher: None; allowed: a teacher's variables")

    def logits_fn(stats: PyTree, x: Array) -> tuple[Array, PyTree]:
      logits, moved = batch_norm.apply(
        model,
        {"params": variables["params"], "batch_stats": stats},
        x,
        batch_norm=self.attack_batch_norm,
      )
      return logits, moved if self.attack_moves_statistics else stats

    epsilon = batch.epsilon_scale * self.epsilon
    images_adv, stats = projected_gradient.ascend(
      logits_fn,
      variables["batch_stats"],
      projected_gradient.random_start(
        key, batch.images, epsilon=epsilon, norm=self.norm
      ),
      batch.images,
      batch.labels,
      epsilon=epsilon,
      step_size=batch.epsilon_scale * self.step_size,
      num_steps=self.num_steps,
      norm=self.norm,
      loss=self.attack_loss,
    )
    _, teacher_maps, _ = attention.forward(
      model,
      teacher,
      batch.images,
      batch.labels,
      layers=self.layers or None,
    )
    return Prepared(images_adv, stats, teacher_maps)

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: Prepared,
    batch: Batch,
  ) -> Outcome:
    """Eq. (7); one student pass on [clean; adversarial]."""
    logits, maps, stats = attention.forward(
      model,
      {"params": variables["params"], "batch_stats": prepared.batch_stats},
      jnp.concatenate([batch.images, prepared.images_adv]),
      jnp.concatenate([batch.labels, batch.labels]),
      layers=self.layers or None,
      batch_norm="batch",
    )
    clean, adversarial = jnp.split(logits, 2)
    # The mean over the mixture of 2B images, as a value for each of B.
    cross_entropy = 0.5 * (
      losses.soft_cross_entropy(clean, batch.targets)
      + losses.soft_cross_entropy(adversarial, batch.targets)
    )
    attention_transfer = jnp.zeros_like(cross_entropy)
    for layer, teacher_map in prepared.teacher_maps.items():  # Eq. (5)
      for student_map in jnp.split(maps[layer], 2):
        attention_transfer += losses.distance(teacher_map, student_map, self.p)
    logit_pairing = losses.distance(clean, adversarial)  # Eq. (6)
    return Outcome(
      total=cross_entropy
      + self.lambda1 * attention_transfer
      + self.lambda2 * logit_pairing,  # Eq. (7)
      terms={
        "cross_entropy": cross_entropy,
        "attention": attention_transfer,
        "logit_pairing": logit_pairing,
      },
      batch_stats=stats,
      logits_clean=clean,
      logits_adversarial=adversarial,
    )
