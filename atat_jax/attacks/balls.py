"""Balls: projection, random start and direction of steepest ascent, by norm.

Every function takes [B, H, W, C] and treats each example on its own. Adding a
norm is one entry in `BALLS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax.attacks.simplex import project_l1
from atat_jax.typing import Array, Scalar

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
"""Norm to the one that says how much a step of length 1 can gain at most."""

_SMALLEST = 1e-12
"""Length below which an example is enlarged before it is scaled to length 1."""

_TINY = 1e-30
"""Divisor in the place of 0: an image of one pixel may draw a direction of 0."""


class Ball(NamedTuple):
  """Operations on the ball of a norm.

  Attributes:
    project: (perturbation, images, epsilon) to the nearest perturbation in the
      ball.
    start: (key, images, epsilon) to a perturbation uniform in the ball.
    direction: Gradient to the unit step that increases the loss most.
  """

  project: Callable[[Array, Array, Scalar], Array]
  start: Callable[[Array, Array, Scalar], Array]
  direction: Callable[[Array], Array]


def length(norm: str, x: Array) -> Array:
  """Norm of each example, [B, ...] to [B]."""
  # On CPU, reducing one long axis takes a fifth of the time of several short
  # ones.
  x = x.reshape(x.shape[0], -1)
  if norm == "linf":
    return jnp.abs(x).max(-1)
  if norm == "l2":
    return jnp.sqrt(jnp.square(x).sum(-1))
  return jnp.abs(x).sum(-1)


def l2_length(x: Array) -> Array:
  """Euclidean norm of each example, [B, H, W, C] to [B, 1, 1, 1]."""
  return length("l2", x).reshape(-1, 1, 1, 1)


def l1_length(x: Array) -> Array:
  """Sum of absolute values of each example, [B, H, W, C] to [B, 1, 1, 1]."""
  return length("l1", x).reshape(-1, 1, 1, 1)


def unit(norm: str, x: Array) -> Array:
  """Scales each example to length 1; 0 stays 0.

  In float32 the l2 length of numbers above 1e19 is infinite and that of numbers
  below 1e-19 is 0. Where a length is not usable, the example is divided by its
  largest entry first.

  Args:
    norm: "linf", "l2" or "l1".
    x: Finite, [B, H, W, C].

  Returns:
    [B, H, W, C].
  """

  def scaled(x: Array) -> tuple[Array, Array]:
    size = length(norm, x).reshape(-1, 1, 1, 1)
    return x / jnp.maximum(size, _SMALLEST), size

  result, size = scaled(x)
  largest = length("linf", x).reshape(-1, 1, 1, 1)
  inside, _ = scaled(x / jnp.where(largest > 0, largest, 1))
  return jnp.where((size >= _SMALLEST) & jnp.isfinite(size), result, inside)


def _project_l2(delta: Array, images: Array, epsilon: Scalar) -> Array:
  del images
  size = l2_length(delta)
  # The maximum avoids dividing by zero where the perturbation is zero.
  shorter = delta * (epsilon / jnp.maximum(size, epsilon))
  return jnp.where(jnp.isfinite(size), shorter, epsilon * unit("l2", delta))


def _linf_start(key: Array, images: Array, epsilon: Scalar) -> Array:
  return epsilon * jax.random.uniform(
    key, images.shape, images.dtype, minval=-1.0, maxval=1.0
  )


def _l2_start(key: Array, images: Array, epsilon: Scalar) -> Array:
  direction_key, radius_key = jax.random.split(key)
  direction = jax.random.normal(direction_key, images.shape, images.dtype)
  shape = (images.shape[0], 1, 1, 1)
  radius = jax.random.uniform(radius_key, shape, images.dtype)
  radius = radius ** (1.0 / images[0].size)
  return epsilon * radius * direction / jnp.maximum(l2_length(direction), _TINY)


def _l1_start(key: Array, images: Array, epsilon: Scalar) -> Array:
  direction_key, radius_key = jax.random.split(key)
  direction = jax.random.laplace(direction_key, images.shape, images.dtype)
  shape = (images.shape[0], 1, 1, 1)
  radius = jax.random.uniform(radius_key, shape, images.dtype)
  radius = radius ** (1.0 / images[0].size)
  return epsilon * radius * direction / jnp.maximum(l1_length(direction), _TINY)


def kth_smallest(x: Array, k: Array) -> Array:
  """Finds the k-th smallest entry of each row without sorting.

  Non-negative floats are ordered like their bit patterns, so the bits of the
  answer are found one by one, the highest first. On CPU a sort takes several
  times as long.

  Args:
    x: Non-negative floats [B, D].
    k: Ranks, int32 [B] in [0, D), counted from 0.

  Returns:
    Entries of these ranks, [B].
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  integer = jnp.int64 if wide.dtype == jnp.float64 else jnp.int32
  bits = lax.bitcast_convert_type(wide, integer)
  highest = jnp.iinfo(integer).bits - 2

  def body(j: Array, found: Array) -> Array:
    candidate = found | (jnp.ones((), integer) << (highest - j))
    below = (bits < candidate[:, None]).sum(-1)
    return jnp.where(below <= k, candidate, found)

  first = jnp.zeros(x.shape[0], integer)
  found = lax.fori_loop(0, highest + 1, body, first)
  return lax.bitcast_convert_type(found, wide.dtype).astype(x.dtype)


def sparse_sign(gradient: Array, kept: Array) -> Array:
  """Signs of the largest entries, scaled to an l1 norm of 1.

  Args:
    gradient: Gradients [B, H, W, C].
    kept: Number of entries to keep of each example, int32 [B], at least 1.

  Returns:
    Steps of l1 norm 1, [B, H, W, C].
  """
  absolute = jnp.abs(gradient)
  rank = jnp.clip(gradient[0].size - kept, 0, gradient[0].size - 1)
  threshold = kth_smallest(absolute.reshape(len(gradient), -1), rank)
  sign = jnp.sign(gradient) * (absolute >= threshold.reshape(-1, 1, 1, 1))
  return sign / (l1_length(sign) + 1e-10)


def _slide(gradient: Array) -> Array:
  # SLIDE (Tramer and Boneh, 2019) keeps the largest hundredth of the entries.
  kept = max(1, gradient[0].size // 100)
  return sparse_sign(gradient, jnp.full(gradient.shape[0], kept))


BALLS: dict[str, Ball] = {
  "linf": Ball(
    project=lambda delta, images, epsilon: jnp.clip(delta, -epsilon, epsilon),
    start=_linf_start,
    direction=jnp.sign,
  ),
  "l2": Ball(
    project=_project_l2, start=_l2_start, direction=lambda g: unit("l2", g)
  ),
  "l1": Ball(project=project_l1, start=_l1_start, direction=_slide),
}


def project(
  ball: Ball, images_adv: Array, images: Array, epsilon: Scalar
) -> Array:
  """Projects images into the epsilon-ball around `images` and into [0, 1].

  Clipping to the box comes last: it moves pixels towards the clean image, so it
  never leaves the ball.

  Args:
    ball: Ball of the norm.
    images_adv: Images to project, [B, H, W, C].
    images: Centres of the balls, in [0, 1].
    epsilon: Radius.

  Returns:
    Projected images, [B, H, W, C].
  """
  delta = ball.project(images_adv - images, images, epsilon)
  return jnp.clip(images + delta, 0.0, 1.0)
