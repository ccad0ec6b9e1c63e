"""Contract of a training objective.

An objective is a frozen dataclass whose fields are the method's
hyperparameters, and the one page where model, attack, attention and losses
meet. `prepare` computes the constants of the loss (adversarial images, the
teacher's maps), `loss` the part that is differentiated.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import checks
from atat_jax.typing import Array, PyTree, Scalar, Variables


class Batch(NamedTuple):
  """Training batch.

  Attacks lead away from `labels` and Grad-CAM explains them; cross-entropies,
  and only they, use `targets`.

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
  """Builds a batch with hard labels and an attack of full strength.

  Args:
    images: Float [B, H, W, C].
    labels: int32 [B].
    num_classes: K.

  Returns:
    The batch.

  Raises:
    UserError: An argument of a wrong shape or dtype.
  """
  images = checks.batch(images, "images", ndim=4)
  labels = checks.classes(labels, images.shape[0])
  checks.count("num_classes", num_classes)
  targets = jax.nn.one_hot(labels, num_classes, dtype=images.dtype)
  return Batch(images, labels, targets, jnp.ones((), images.dtype))


class Outcome(NamedTuple):
  """Loss of a batch, with its terms and logits.

  Attributes:
    total: [B], the loss of each example, weights applied.
    terms: Name to [B]: each term before its weight.
    batch_stats: Running statistics after the pass.
    logits_clean: [B, K]; None if the student sees no clean images.
    logits_adversarial: [B, K]; None if there is no attack.
    attack_finite: Whether the inner attack of each image was finite all along,
      bool [B], for the train step; None: there was none, or it is not known.
  """

  total: Array
  terms: dict[str, Array]
  batch_stats: PyTree
  logits_clean: Array | None
  logits_adversarial: Array | None
  attack_finite: Array | None = None


class Objective(Protocol):
  """Contract of an entry of `OBJECTIVES`, a frozen dataclass.

  Every field has a default: the value that the method's authors use. Inherit
  from this class, or define all of its attributes.

  Attributes:
    cifar_training: Fields of `config.train` with which the authors train on
      CIFAR, where they differ from the default configuration.
    cifar_padding: The authors' padding before the random crop on CIFAR, pixels.
  """

  cifar_training: ClassVar[dict[str, Any]] = {}
  cifar_padding: ClassVar[int] = 2

  @property
  def needs_teacher(self) -> bool:
    """Whether `prepare` needs a teacher's variables."""

  @property
  def starts_from_teacher(self) -> bool:
    """Whether the student starts from the teacher's variables, if any."""

  @property
  def term_names(self) -> tuple[str, ...]:
    """Keys of `Outcome.terms`."""

  @property
  def term_weights(self) -> dict[str, float]:
    """Each term's weight in the total, which is the sum of weight * term."""
    return dict.fromkeys(self.term_names, 1.0)

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
    """Computes the constants of the loss; nothing here is differentiated.

    Args:
      key: Key of this step's random draws.
      model: Network of the student and of the teacher.
      variables: The student's variables.
      teacher: The teacher's variables, or None.
      batch: Training batch.

    Returns:
      A pytree, the argument `prepared` of `loss`.
    """

  def loss(
    self,
    model: nn.Module,
    variables: Variables,
    prepared: Any,
    batch: Batch,
  ) -> Outcome:
    """Computes the loss of each example.

    Args:
      model: Network of the student.
      variables: The student's variables, which the loss is differentiated by.
      prepared: Result of `prepare`.
      batch: Training batch.

    Returns:
      The loss, its terms, logits and moved running statistics.
    """
