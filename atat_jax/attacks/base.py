"""What all attacks share: classifiers as pytrees, checks of their arguments."""

from typing import Any

import jax

from atat_jax import checks, compilation
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier


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
