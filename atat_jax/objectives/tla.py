"""TLA: triplet loss adversarial training (Mao et al., 2019, Eq. 4 to 6).

  L = CE(f(x_adv), y)
      + lambda1 * sum_p [d(h(x_adv), h(p)) - d(h(x_adv), h(n)) + margin]_+
      + lambda2 * sum_p mean_j (h_j(x_adv)^2 + h_j(p)^2 + h_j(n)^2)

d(a, b) = 1 - |cos(a, b)|; h is the last convolutional tensor, pooled. The
anchor is the adversarial image. There are two triplets, one for each positive p:
the clean image, and another clean image of its class. Both have the same
negative n: in a dictionary of clean images of other classes, the one whose
embedding has the highest cosine to the anchor's.

The authors' code embeds 500 random clean images in evaluation mode for the
dictionary and draws the second positive from the whole data set. Here both come
from the batch, so that the step stays a function of its batch and embeds no
image twice: the dictionary has at most B - 1 images and batch statistics. An
image that is the only one of its class in the batch is its own second positive;
in a batch of one class there is no triplet. (With gradient accumulation, each
part is a batch in this sense.) The authors' code also adds uniform noise to the
first positive; here it is the clean image.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import attention, checks, losses
from atat_jax.objectives.adversarial import (
  InnerAttackResult,
  PairedPasses,
  check_weights,
)
from atat_jax.objectives.base import Batch, Outcome
from atat_jax.rng import stream
from atat_jax.typing import Array, BatchNormMode, PyTree, Variables


class PreparedTLA(NamedTuple):
  """Constants of the loss of TLA.

  Attributes:
    attack: Adversarial images, and the statistics after the attack.
    relatives: int32 [B]: index in the batch of another image of the class.
  """

  attack: InnerAttackResult
  relatives: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TLA(PairedPasses):
  """Triplet loss adversarial training.

  Attributes:
    lambda1: Weight of the two triplets.
    lambda2: Weight of the squared embeddings; in the authors' code 0.001 inside
      each triplet.
    margin: Margin of the triplets: distance by which the negative is to exceed
      the positive.
    layer: Name of the tensor that is pooled to the embedding; "": the last
      tensor [B, h, w, C].
  """

  lambda1: float = 2.0
  lambda2: float = 0.002
  margin: float = 0.03
  layer: str = ""
  attack_batch_norm: BatchNormMode = "running"
  attack_moves_statistics: bool = False
  student_batch_norm: str = "in_turn"

  term_names = ("cross_entropy", "triplet", "embedding_square")
  # At most 80,000 steps of 50 images. (The authors tune a network of AT; here
  # the student starts afresh, with the schedule of AT.)
  cifar_training: ClassVar[dict[str, Any]] = {
    "num_epochs": 82,
    "batch_size": 50,
  }

  def __post_init__(self) -> None:
    """Checks the hyperparameters."""
    super().__post_init__()
    check_weights(self, "lambda1", "lambda2")
    checks.not_negative("margin", self.margin)

  @property
  def term_weights(self) -> dict[str, float]:
    """Weights of Eq. (6)."""
    weights = {"triplet": self.lambda1, "embedding_square": self.lambda2}
    return super().term_weights | weights

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> PreparedTLA:
    """Attacks the student and draws the second positives."""
    labels = batch.labels
    scores = jax.random.uniform(
      stream(key, "relatives"), (len(labels), len(labels))
    )
    # The image itself has the lowest score of its class: the last resort.
    scores -= jnp.eye(len(labels))
    scores = jnp.where(labels == labels[:, None], scores, -jnp.inf)
    return PreparedTLA(
      self.attack(key, model, variables, batch), scores.argmax(-1)
    )

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: PreparedTLA,
    batch: Batch,
  ) -> Outcome:
    """Computes Eq. (6) of Mao et al."""
    forward = functools.partial(self._forward, model, variables["params"])
    (clean, embedded), (adversarial, anchor), stats = self.forward_pair(
      forward, prepared.attack, batch
    )
    hardest, exists = hardest_negatives(anchor, embedded, batch.labels)
    negative = embedded[hardest]
    triplet = embedding_square = jnp.zeros_like(adversarial[:, 0])
    for positive in (embedded, embedded[prepared.relatives]):
      gap = _distance(anchor, positive) - _distance(anchor, negative)
      triplet += jnp.where(exists, jax.nn.relu(gap + self.margin), 0.0)
      squares = jnp.square(anchor) + jnp.square(positive) + jnp.square(negative)
      embedding_square += squares.mean(-1)
    cross_entropy = losses.soft_cross_entropy(adversarial, batch.targets)
    return Outcome(
      total=cross_entropy
      + self.lambda1 * triplet
      + self.lambda2 * embedding_square,
      terms={
        "cross_entropy": cross_entropy,
        "triplet": triplet,
        "embedding_square": embedding_square,
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
    _: Array,
  ) -> tuple[tuple[Array, Array], PyTree]:
    """Makes the student's pass for logits and embeddings [B, D], a `Forward`."""
    logits, activations, stats = attention.activations(
      model,
      {"params": params, "batch_stats": stats},
      images,
      layers=(self.layer,) if self.layer else None,
      batch_norm="batch",
    )
    (tensor,) = activations.values()
    wide = jnp.promote_types(tensor.dtype, jnp.float32)
    return (logits, tensor.astype(wide).mean((1, 2))), stats


def hardest_negatives(
  anchor: Array, embedded: Array, labels: Array
) -> tuple[Array, Array]:
  """Finds the clean image of another class with the highest cosine to an anchor.

  Args:
    anchor: Embeddings of the adversarial images, [B, D].
    embedded: Embeddings of the clean images, [B, D].
    labels: Labels of both, int32 [B].

  Returns:
    Indices in the batch, int32 [B], and bool [B]: whether there is another
    class.
  """
  cosines = _directions(anchor) @ _directions(embedded).T
  other = labels != labels[:, None]
  return jnp.where(other, cosines, -jnp.inf).argmax(-1), other.any(-1)


def _directions(x: Array) -> Array:
  return x / jnp.maximum(losses.norm(x), 1e-12)[:, None]


def _distance(a: Array, b: Array) -> Array:
  return 1.0 - jnp.abs((_directions(a) * _directions(b)).sum(-1))
