"""ATAT: attention-transfer-based adversarial training (Li et al., 2021).

  Eq. (5)  L_at = sum_{l in J} ||v(ATT_T^l(x)) - v(ATT_S^l(x_adv))||_p
                             + ||v(ATT_T^l(x)) - v(ATT_S^l(x))||_p
  Eq. (6)  L_lp = ||p_S(x) - p_S(x_adv)||_2 on logits
  Eq. (7)  L    = L_ce + lambda1 L_at + lambda2 L_lp

L_ce is the cross-entropy of the mixture of clean and adversarial images. The
teacher T is a standardly trained network of the same architecture, frozen,
with running statistics; the student S starts from its parameters. The only
weights that the paper names are 1 and 0, in its ablation (Section 4.3): lambda1 =
lambda2 = 1 is the default here.

Weights of 0 give the controls: lambda1 = lambda2 = 0 leaves adversarial training
on the mixture, lambda1 = 0 logit pairing, lambda2 = 0 attention transfer. Terms
of weight 0 are still measured, and the student still starts from the teacher, so
that only the weights differ. `objectives.SETTINGS` names them.

The raw map of the last tensor, Eq. (3), weights each channel by the mean over
positions of the logit's gradient. Where logits are the linear function of the
pooled tensor, this gradient is the class's weights over the number of positions:
the map sums to the logit of the class less its bias. Eq. (5) on raw maps is then
largely a regression of the true class's logit on the teacher's; normalization
"l2" leaves the place alone.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import attention, checks, losses
from atat_jax.errors import UserError
from atat_jax.objectives.adversarial import (
  InnerAttackResult,
  PairedPasses,
  check_weights,
)
from atat_jax.objectives.base import Batch, Outcome
from atat_jax.typing import Array, PyTree, Variables

PAIRS = ("teacher_adversarial", "teacher_clean", "clean_adversarial")
NORMALIZATIONS = ("raw", "l2", "min_max")
DISTANCES = ("norm", "mean_square")


class PreparedATAT(NamedTuple):
  """Constants of the loss of ATAT.

  Attributes:
    attack: Adversarial images, and the statistics after the attack.
    teacher_maps: {layer: [B, h, w]}, the teacher's maps of the clean images,
      normalised; empty if no pair has the teacher.
  """

  attack: InnerAttackResult
  teacher_maps: dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ATAT(PairedPasses):
  """ATAT, and its variations.

  Attributes:
    lambda1: Weight of L_at.
    lambda2: Weight of L_lp.
    layers: Names of the layers in J; empty: the topmost convolutional tensor.
    pairs: Pairs of maps that Eq. (5) compares: "teacher_adversarial" and
      "teacher_clean" are its two terms; "clean_adversarial" pairs the student
      with itself and alone needs no teacher.
    maps: "grad_cam", Eq. (3), or "channel_sum", which does not depend on the
      class.
    normalization: Normalisation of each map: "raw" (none), "l2" (to length 1)
      or "min_max" (to the range [0, 1]); a map without contrast becomes 0.
    distance: Distance of two maps: "norm" as in Eq. (5), or "mean_square" over
      their pixels.
    p: Order of the norm, 1 or 2. The norm itself, not its square.
    starts_from_teacher: Whether the student starts from the teacher's
      parameters, if there is a teacher.
  """

  lambda1: float = 1.0
  lambda2: float = 1.0
  layers: tuple[str, ...] = ()
  pairs: tuple[str, ...] = ("teacher_adversarial", "teacher_clean")
  maps: str = "grad_cam"
  normalization: str = "raw"
  distance: str = "norm"
  p: int = 2
  starts_from_teacher: bool = True

  term_names = ("cross_entropy", "attention", "logit_pairing")
  # 80,000 steps of 32 images; the rate falls at 40,000 and at 60,000. (The
  # released configuration allows 400,000 steps, the last 340,000 at 0.001.)
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 52,
    "batch_size": 32,
  }

  def __post_init__(self) -> None:
    """Checks the hyperparameters."""
    super().__post_init__()
    check_weights(self, "lambda1", "lambda2")
    if self.p not in (1, 2):
      raise UserError(f"p: {self.p}; allowed: 1, 2")
    for pair in self.pairs:
      checks.choice("pairs", pair, PAIRS)
    if not self.pairs or len(set(self.pairs)) < len(self.pairs):
      raise UserError(
        f"pairs: {self.pairs}; allowed: one or more of {', '.join(PAIRS)}, each"
        " once"
      )
    checks.choice("maps", self.maps, attention.MAPS)
    checks.choice("normalization", self.normalization, NORMALIZATIONS)
    checks.choice("distance", self.distance, DISTANCES)

  @property
  def needs_teacher(self) -> bool:
    """Whether a pair of maps has the teacher's."""
    return any(pair.startswith("teacher") for pair in self.pairs)

  @property
  def term_weights(self) -> dict[str, float]:
    """Weights of Eq. (7)."""
    weights = {"attention": self.lambda1, "logit_pairing": self.lambda2}
    return super().term_weights | weights

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> PreparedATAT:
    """Attacks the student and computes the teacher's maps."""
    if not self.needs_teacher:
      return PreparedATAT(self.attack(key, model, variables, batch), {})
    if teacher is None:
      raise UserError("teacher: None; allowed: a teacher's variables")
    with jax.named_scope("teacher"):
      _, teacher_maps, _ = attention.forward(
        model,
        teacher,
        batch.images,
        batch.labels,
        layers=self.layers or None,
        maps=self.maps,
      )
    return PreparedATAT(
      self.attack(key, model, variables, batch),
      self._normalize_all(teacher_maps),
    )

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: PreparedATAT,
    batch: Batch,
  ) -> Outcome:
    """Computes Eq. (7)."""
    forward = functools.partial(self._forward, model, variables["params"])
    (clean, maps_clean), (adversarial, maps_adversarial), stats = (
      self.forward_pair(forward, prepared.attack, batch)
    )
    cross_entropy = losses.mixture_cross_entropy(
      clean, adversarial, batch.targets
    )
    maps = {
      "teacher": prepared.teacher_maps,
      "clean": maps_clean,
      "adversarial": maps_adversarial,
    }
    attention_transfer = jnp.zeros_like(cross_entropy)
    for pair in self.pairs:  # Eq. (5)
      first, second = pair.split("_")
      for layer in maps_clean:
        attention_transfer += self._distance(
          maps[first][layer], maps[second][layer]
        )
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

  def _forward(
    self,
    model: nn.Module,
    params: PyTree,
    stats: PyTree,
    images: Array,
    labels: Array,
  ) -> tuple[tuple[Array, dict[str, Array]], PyTree]:
    """Makes the student's pass for logits and normalised maps, a `Forward`."""
    logits, maps, stats = attention.forward(
      model,
      {"params": params, "batch_stats": stats},
      images,
      labels,
      layers=self.layers or None,
      batch_norm="batch",
      maps=self.maps,
    )
    return (logits, self._normalize_all(maps)), stats

  def _distance(self, a: Array, b: Array) -> Array:
    """Distance of two maps [B, h, w], [B]."""
    if self.distance == "mean_square":
      return losses.mean_square(a, b)
    return losses.distance(a, b, self.p)

  def _normalize_all(self, maps: dict[str, Array]) -> dict[str, Array]:
    return {layer: self._normalize(one) for layer, one in maps.items()}

  def _normalize(self, maps: Array) -> Array:
    """Normalises maps [B, h, w], each by itself."""
    if self.normalization == "raw":
      return maps
    if self.normalization == "l2":
      size = losses.norm(maps)[:, None, None]
    else:
      maps -= maps.min((1, 2), keepdims=True)
      size = maps.max((1, 2), keepdims=True)
    return maps / jnp.where(size == 0, 1.0, size)
