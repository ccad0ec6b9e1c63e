"""What all attacks share: classifiers as pytrees, checks of their arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import checks, compilation, losses
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Randomized:
  """A classifier that draws random numbers: `function(key, images)` to logits.

  A pure function cannot be random by itself; this tells attacks to give it a
  new key at every look. Called without a key it draws the same every time.

  Attributes:
    function: A pytree callable, e.g. a `jax.tree_util.Partial`.
  """

  function: Any

  def __call__(self, images: Array, key: Array | None = None) -> Array:
    """Images [B, H, W, C] to logits [B, K]."""
    return self.function(jax.random.key(0) if key is None else key, images)


def apply(classifier: Classifier, key: Array, images: Array) -> Array:
  """Logits [B, K], with fresh random numbers where the classifier draws any."""
  if isinstance(classifier, Randomized):
    return classifier(images, key)
  return classifier(images)


def evaluate(
  classifier: Classifier,
  key: Array,
  images: Array,
  loss_fn: Callable[[Array], Array],
  *,
  eot_samples: int = 1,
) -> tuple[Array, Array, Array]:
  """One look at the classifier: logits, loss and its gradient.

  Args:
    classifier: Callable from images to logits.
    key: For a `Randomized` classifier.
    images: [B, H, W, C].
    loss_fn: Logits [B, K] to losses [B].
    eot_samples: Gradients to average (expectation over transformation; Athalye
      et al., 2018). Logits and losses are those of the last one.

  Returns:
    Logits [B, K], losses [B], gradient of their sum [B, H, W, C].
  """

  def objective(x: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
    logits = apply(classifier, key, x)
    loss = loss_fn(logits)
    return loss.sum(), (logits, loss)

  gradient_fn = jax.grad(objective, has_aux=True)
  gradient, (logits, loss) = gradient_fn(images, key)
  if eot_samples > 1:

    def body(sample: Array, carry: Any) -> Any:
      total, _ = carry
      gradient, aux = gradient_fn(images, jax.random.fold_in(key, sample))
      return total + gradient, aux

    gradient, (logits, loss) = jax.lax.fori_loop(
      1, eot_samples, body, (gradient, (logits, loss))
    )
    gradient = gradient / eot_samples
  return logits, loss, gradient


def as_pytree(classifier: Classifier) -> Classifier:
  """A classifier that jit takes as an argument.

  A `jax.tree_util.Partial` or a registered pytree passes through, its arrays
  being arguments of the compiled program. A plain function becomes part of the
  program: the same function object is compiled once.

  Args:
    classifier: Any callable from images to logits.

  Returns:
    A pytree callable.

  Raises:
    UserError: Not callable.
  """
  if not callable(classifier):
    raise UserError(
      f"classifier: {type(classifier).__name__}; allowed: a callable from"
      " images [B, H, W, C] to logits [B, K]"
    )
  if not jax.tree_util.all_leaves([classifier]):
    return classifier
  return jax.tree_util.Partial(compilation.hashable(classifier))


# Only ever asked for shapes; as a jitted function its traces are cached.
_logits = jax.jit(lambda classifier, images: classifier(images))


def check_arguments(
  classifier: Classifier, images: Array, labels: Array, **positive: Any
) -> tuple[Classifier, Array, Array, int]:
  """Checks what every attack is given.

  Args:
    classifier: Callable from images to logits.
    images: Float [B, H, W, C] in [0, 1].
    labels: Integers [B] in [0, K).
    **positive: Arguments that must be > 0; those named `num_...` must be integers.

  Returns:
    The classifier as a pytree, images, int32 labels, and K.

  Raises:
    UserError: Naming the argument, its value and what is allowed.
  """
  for name, value in positive.items():
    checks.positive(name, value, integer=name.startswith("num_"))
  classifier = as_pytree(classifier)
  images = checks.images(images)
  logits = _logits.eval_shape(classifier, images)
  shape = getattr(logits, "shape", None)
  if shape is None:
    raise UserError(
      f"classifier: returns a {type(logits).__name__}; allowed: one array of"
      f" logits [{images.shape[0]}, K]"
    )
  if len(shape) != 2 or shape[0] != images.shape[0]:
    raise UserError(
      f"classifier: returns shape {shape} for {images.shape[0]} images;"
      f" allowed: logits [{images.shape[0]}, K]"
    )
  labels = checks.labels(labels, images.shape[0], shape[1])
  return classifier, images, labels, shape[1]


def on_host(
  classifier: Classifier, images: Any, labels: Any
) -> tuple[Classifier, np.ndarray, np.ndarray, int]:
  """Checks any number of images where they are: none visits the devices.

  Args:
    classifier: Callable from images to logits.
    images: Float [N, H, W, C] in [0, 1].
    labels: Integers [N] in [0, K).

  Returns:
    The classifier as a pytree, float32 images, int32 labels, and K.

  Raises:
    UserError: Naming the argument, its value and what is allowed.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  checks.inspect_images(images)
  classifier, *_, num_classes = check_arguments(
    classifier, jnp.asarray(images[:1]), jnp.zeros(1, jnp.int32)
  )
  checks.inspect_labels(labels, len(images), num_classes)
  images, labels = images.astype(np.float32), labels.astype(np.int32)
  return classifier, images, labels, num_classes


def check_loss(loss: str, num_classes: int) -> bool:
  """Checks the name of a loss and that there are enough classes for it.

  Args:
    loss: Of `losses.ATTACK_LOSSES` or `losses.TARGETED_LOSSES`.
    num_classes: K.

  Returns:
    Whether it aims at one class after the other.

  Raises:
    UserError: Unknown, or too few classes.
  """
  allowed = {**losses.ATTACK_LOSSES, **losses.TARGETED_LOSSES}
  checks.choice("loss", loss, allowed)
  needed = losses.MIN_CLASSES.get(loss, 2)
  if num_classes < needed:
    raise UserError(
      f"loss: {loss!r} with {num_classes} classes; allowed: at least {needed}"
      " classes, or another loss"
    )
  return loss in losses.TARGETED_LOSSES
