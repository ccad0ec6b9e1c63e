"""What an objective is: the page where model, attack, attention and losses meet.

An objective is a frozen dataclass whose fields are the method's
hyperparameters. `prepare` does what is not differentiated (attack the student,
ask the teacher), `loss` what is.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax.typing import Array, PyTree, Scalar, Variables


class Batch(NamedTuple):
  """What an objective is given.

  `labels` say what class an image is of: attacks leave it, Grad-CAM explains
  it. `targets` are what cross-entropies aim at, and only they.

  Attributes:
    images: Float [B, H, W, C] in [0, 1].
    labels: int32 [B].
    targets: [B, K], rows that sum to 1: one-hot, smoothed or mixed labels.
    epsilon_scale: Factor on the attack's epsilon and step size, in (0, 1].
  """

  images: Array
  labels: Array
  targets: Array
  epsilon_scale: Scalar


def make_batch(images: Array, labels: Array, num_classes: int) -> Batch:
  """A batch with hard labels and an attack of full strength.

  Args:
    images: Float [B, H, W, C].
    labels: int32 [B].
    num_classes: K.

  Returns:
    The batch.
  """
  targets = jax.nn.one_hot(labels, num_classes, dtype=images.dtype)
  return Batch(images, labels, targets, jnp.ones((), images.dtype))


class Outcome(NamedTuple):
  """What `loss` returns.

  Attributes:
    total: [B], what is minimised, weights applied.
    terms: Name to [B]: each term before its weight.
    batch_stats: Running statistics after the pass.
    logits_clean: [B, K], or None where no clean image was seen.
    logits_adversarial: [B, K], or None where nothing was attacked.
  """

  total: Array
  terms: dict[str, Array]
  batch_stats: PyTree
  logits_clean: Array | None
  logits_adversarial: Array | None


class Objective(Protocol):
  """The contract of an entry of `OBJECTIVES`, a frozen dataclass.

  Every field has a default: the value that the method's authors use. Inherit
  from this class, or give all of its attributes.

  Attributes:
    cifar_training: Fields of `config.train` with which the authors train on
      CIFAR, where they differ from the default configuration.
    cifar_padding: Pixels of padding before the random crop on CIFAR, as the
      authors have it.
  """

  cifar_training: ClassVar[dict[str, Any]] = {}
  cifar_padding: ClassVar[int] = 2

  @property
  def needs_teacher(self) -> bool:
    """Whether `prepare` is given a teacher's variables."""

  @property
  def starts_from_teacher(self) -> bool:
    """Whether the student starts from the teacher's variables, if any."""

  @property
  def term_names(self) -> tuple[str, ...]:
    """The keys of `Outcome.terms`."""

  @property
  def sees_clean(self) -> bool:
    """Whether there are clean logits."""

  @property
  def attacks(self) -> bool:
    """Whether there are adversarial logits."""

  def prepare(
    self,
    key: Array,
    model: nn.Module,
    variables: Variables,
    teacher: Variables | None,
    batch: Batch,
  ) -> Any:
    """Constants of the loss: adversarial images, teacher maps. A pytree."""

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: Any,
    batch: Batch,
  ) -> Outcome:
    """The loss of each example; differentiated with respect to variables."""
