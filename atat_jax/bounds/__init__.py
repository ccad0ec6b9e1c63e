"""Certified lower bounds on the margins of small networks.

`interval` pushes the range of each pixel through the network; `crown` encloses
every nonlinear part by two lines and follows linear functions backwards, which
is tighter and costs a pass for each hidden unit. Both hold for every image of
the linf ball inside [0, 1], so that no attack finds less; an attack is a bound
from the other side. Any classifier of one image at a time will do whose trace
consists of primitives that have bounds.

**Rounding.** Bounds are computed in float64, with their own error taken off,
and hold for the network in exact arithmetic as well as in IEEE float32: a sum
of n products widens its bounds by n units of rounding of the sum of their
magnitudes, which no order of summation exceeds, exp and the like by 32.
Arithmetic of fewer bits (TF32, bfloat16) is not covered. Where anything is NaN
or infinite, nothing is certified.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import checks, compilation
from atat_jax.attacks import base
from atat_jax.attacks.classifiers import Randomized
from atat_jax.bounds import network, propagation
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier

METHODS = ("interval", "crown")
"""Names of the methods, the coarser first."""

__all__ = ["METHODS", "Bounds", "crown", "interval"]

_ENTRIES = 2**22
_SAME = {"rtol": 1e-2, "atol": 1e-3}  # as backends round differently


class Bounds(NamedTuple):
  """Lower bounds of a few images.

  Attributes:
    lower: Bound on the logit of an image's class minus that of each class,
      float32 [B, K]; 0 for the class itself, minus infinity where there is
      none.
    certified: Whether all bounds of an image against other classes are above
      0, bool [B]: no image of the ball is classified otherwise.
  """

  lower: Array
  certified: Array


def interval(
  classifier: Classifier, images: Array, labels: Array, *, epsilon: float
) -> Bounds:
  """Bounds margins by interval arithmetic (Gowal et al., 2018, IBP).

  Args:
    classifier: Callable from images [B, H, W, C] to logits [B, K], each a
      function of its own image, in float32.
    images: Float [B, H, W, C] in [0, 1].
    labels: True classes, integers [B].
    epsilon: Radius of the linf ball, in the unit of the pixels.

  Returns:
    The bounds.

  Raises:
    UserError: A bad argument; a primitive that has no bounds, by name.
  """
  return _bound(classifier, images, labels, epsilon, "interval")


def crown(
  classifier: Classifier, images: Array, labels: Array, *, epsilon: float
) -> Bounds:
  """Bounds margins by linear functions, backwards (Zhang et al., 2018, CROWN).

  Args:
    classifier: Callable from images [B, H, W, C] to logits [B, K], each a
      function of its own image, in float32.
    images: Float [B, H, W, C] in [0, 1].
    labels: True classes, integers [B].
    epsilon: Radius of the linf ball, in the unit of the pixels.

  Returns:
    The bounds.

  Raises:
    UserError: A bad argument; a primitive that has no bounds, by name.
  """
  return _bound(classifier, images, labels, epsilon, "crown")


def _bound(
  classifier: Classifier, images: Any, labels: Any, epsilon: Any, method: str
) -> Bounds:
  checks.epsilon(epsilon, "linf")
  if isinstance(classifier, Randomized):
    raise UserError(
      "classifier: draws random numbers; allowed: a deterministic classifier"
    )
  classifier, images, labels, _ = base.check_arguments(
    classifier, images, labels
  )
  logits = np.asarray(_logits(classifier, images), np.float64)
  host = np.asarray(images), np.asarray(labels)
  with jax.enable_x64(True):
    lower, middle, ok = jax.tree.map(
      np.asarray,
      _propagated(classifier, *host, np.float64(epsilon), method=method),
    )
  _check_alone(logits, middle)
  ok = ok & np.isfinite(logits).all(-1)
  return _rounded(lower, ok, host[1])


def _rounded(lower: np.ndarray, ok: np.ndarray, labels: np.ndarray) -> Bounds:
  """Rounds the bounds to float32, downwards."""
  own = np.arange(lower.shape[1]) == labels[:, None]
  usable = ok[:, None] & np.isfinite(lower)
  low = np.nextafter(lower.astype(np.float32), np.float32(-np.inf))
  low = np.where(own, 0, np.where(usable, low, -np.inf)).astype(np.float32)
  certified = ok & (own | (low > 0)).all(-1)
  return Bounds(jnp.asarray(low), jnp.asarray(certified))


def _check_alone(logits: np.ndarray, alone: np.ndarray) -> None:
  """Refuses a classifier whose logits depend on the batch."""
  if not np.allclose(logits, alone, **_SAME, equal_nan=True):
    raise UserError(
      "classifier: the logits of an image depend on the others in its batch;"
      " allowed: a classifier of each image by itself, such as one with running"
      " statistics"
    )


def _score(classifier: Classifier, images: Array) -> Array:
  return classifier(images)


_logits = compilation.jit(_score)


def _propagate(
  classifier: Classifier,
  images: Array,
  labels: Array,
  epsilon: Array,
  *,
  method: str,
) -> tuple[Array, Array, Array]:
  """Bounds [B, K], logits [B, K] of the images themselves, and what is finite."""
  one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
  found = network.read(classifier, one)
  last = len(found.nodes) - 1
  num_classes = found.nodes[last].shape[-1]

  def bound(given: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    image, label = given
    image = image[None]
    ball = propagation.pixels(image.astype(jnp.float64), epsilon)
    made = propagation.Propagation(found, ball, backward=method == "crown")
    gaps = jax.nn.one_hot(label, num_classes) - jnp.eye(num_classes)
    low = jax.vmap(lambda row: made.least(last, row[None]))(gaps)
    return low, found.logits(image)[0], made.is_finite()

  largest = max(int(np.prod(node.shape)) for node in found.nodes)
  rows = 2 * largest if method == "crown" else 1
  at_once = _ENTRIES // (rows * largest)
  return propagation.mapped(bound, (images, labels), at_once)


_propagated = compilation.jit(
  _propagate, once=True, static_argnames=("method",)
)
