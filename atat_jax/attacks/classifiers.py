"""Classifiers as pytrees, so that jit takes their arrays as arguments."""

import dataclasses
from typing import Any

import jax

from atat_jax import compilation
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Randomized:
  """Classifier that draws random numbers: `function(key, images)` to logits.

  A pure function cannot be random by itself; this type tells attacks to pass a
  new key at every evaluation. Called without a key it always draws the same.

  Attributes:
    function: A pytree callable, e.g. a `jax.tree_util.Partial`.
  """

  function: Any

  def __call__(self, images: Array, key: Array | None = None) -> Array:
    """Maps images [B, H, W, C] to logits [B, K]."""
    return self.function(jax.random.key(0) if key is None else key, images)


def as_pytree(classifier: Classifier) -> Classifier:
  """Turns a classifier into one that jit takes as an argument.

  A `jax.tree_util.Partial` or a registered pytree passes through; its arrays
  become arguments of the compiled program. A plain function becomes part of the
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
