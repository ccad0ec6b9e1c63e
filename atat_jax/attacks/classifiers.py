"""Classifiers as pytrees, so that jit takes their arrays as arguments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from atat_jax import checks, compilation
from atat_jax.compilation import captures
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Randomized:
  """Classifier that draws random numbers: `function(key, images)` to logits.

  A pure function cannot be random by itself; this type tells attacks to pass a
  new key at every evaluation. Called without a key it always draws the same.

  Attributes:
    function: A callable of a key and images, e.g. a `jax.tree_util.Partial`.
  """

  function: Any

  def __call__(self, images: Array, key: Array | None = None) -> Array:
    """Maps images [B, H, W, C] to logits [B, K]."""
    return self.function(jax.random.key(0) if key is None else key, images)


def as_pytree(classifier: Classifier) -> Classifier:
  """Turns a classifier into one that jit takes as an argument.

  Its arrays become arguments of the compiled program, wherever they are: leaves
  of a pytree, attributes of an object, captured by a function. They are read
  when this is called or shortly after, so that an attack sees the weights of
  its call; see `captures`.

  Args:
    classifier: Any callable from images to logits.

  Returns:
    A pytree callable, for one call of an attack or one evaluation.

  Raises:
    UserError: Not callable.
  """
  function = classifier
  if isinstance(classifier, Randomized):
    function = classifier.function
  checks.refuse_torch("classifier", function)
  if not callable(function) or isinstance(function, type):
    raise UserError(
      f"classifier: {checks.kind(function)}; allowed: a callable from images"
      " [B, H, W, C] to logits [B, K]"
    )
  if isinstance(function, nn.Module) and function.scope is None:
    raise UserError(
      f"classifier: a {type(function).__name__} without its variables;"
      " allowed: models.classifier(model, variables)"
    )
  if isinstance(function, nnx.Module):
    _check_mode(function)
  return captures.argument(classifier, _check_result)


def _check_mode(network: nnx.Module) -> None:
  """Refuses an nnx network that normalises by the batch or drops units."""
  for path, module in nnx.iter_modules(network):
    rates = (getattr(module, name, 0) for name in ("rate", "dropout_rate"))
    drops = any(isinstance(rate, float) and rate > 0 for rate in rates)
    if getattr(module, "use_running_average", None) is False or (
      drops and getattr(module, "deterministic", None) is False
    ):
      where = "/".join(map(str, path)) or "itself"
      raise UserError(
        f"classifier: a {type(network).__name__} in training mode, see its"
        f" {type(module).__name__} {where}; allowed: an nnx network in evaluation"
        " mode, network.eval()"
      )


def check_logits(logits: Any, num_images: int) -> None:
  """Checks by its shape that a result is an array of logits.

  Args:
    logits: Result of a classifier, or its shapes.
    num_images: Number of images that were classified.

  Raises:
    UserError: Anything but real floating-point numbers [B, K] with K > 1.
  """
  allowed = f"allowed: logits [{num_images}, K], floating point, K > 1"
  if not (hasattr(logits, "shape") and hasattr(logits, "dtype")):
    raise UserError(
      f"classifier: returns a {type(logits).__name__}; allowed: one array of"
      f" logits [{num_images}, K], taken out of what is returned beside it by a"
      " function, such as lambda images: network(images)[0]"
    )
  shape = tuple(logits.shape)
  if len(shape) != 2 or shape[0] != num_images or shape[1] < 2:
    raise UserError(
      f"classifier: returns shape {shape} for {num_images} images; {allowed}"
    )
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise UserError(f"classifier: returns {logits.dtype} numbers; {allowed}")


def _check_result(args: tuple[Any, ...], result: Any) -> None:
  check_logits(result, args[-1].shape[0])


def _apply(classifier: Classifier, images: Array) -> Array:
  return classifier(images)


# Only used for its shape; unlike eval_shape of a plain function, the traces of
# a jitted one are cached.
_jitted = compilation.jit(_apply)


def num_classes(classifier: Classifier, images: Array) -> int:
  """Returns the number of classes, K, of a classifier.

  Args:
    classifier: A callable made by `as_pytree`.
    images: Images [B, H, W, C]; used for their shape and dtype.

  Raises:
    UserError: The classifier cannot be traced by JAX, or its result is not an
      array of logits.
  """
  try:
    logits = _jitted.eval_shape(classifier, images)  # type: ignore[attr-defined]
  except UserError:
    raise
  except Exception as error:
    raise UserError(captures.reason(error)) from error
  check_logits(logits, images.shape[0])
  return int(logits.shape[1])
