"""Balls: projections, random starts and steepest directions, by norm.

Each function works on [B, H, W, C] and per example. Adding a norm is one entry
in `NORMS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax.attacks.simplex import project_l1
from atat_jax.typing import Array, Scalar


class Norm(NamedTuple):
  """What an attack needs to know of a norm."""

  project: Callable[[Array, Array, Scalar], Array]
  """(perturbation, images, epsilon) to the nearest perturbation in the ball."""
  start: Callable[[Array, Array, Scalar], Array]
  """(key, images, epsilon) to a perturbation uniform in the ball."""
  direction: Callable[[Array], Array]
  """Gradient to the unit step that increases the loss most."""


def length(norm: str, x: Array) -> Array:
  """[B, ...] to [B]."""
  # Over one long axis: on CPU a fifth of what several short ones take.
  x = x.reshape(x.shape[0], -1)
  if norm == "linf":
    return jnp.abs(x).max(-1)
  if norm == "l2":
    return jnp.sqrt(jnp.square(x).sum(-1))
  return jnp.abs(x).sum(-1)


def l2_length(x: Array) -> Array:
  """[B, H, W, C] to [B, 1, 1, 1]."""
  return length("l2", x).reshape(-1, 1, 1, 1)


def l1_length(x: Array) -> Array:
  """[B, H, W, C] to [B, 1, 1, 1]."""
  return length("l1", x).reshape(-1, 1, 1, 1)


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
  return epsilon * radius * direction / l2_length(direction)


def _l1_start(key: Array, images: Array, epsilon: Scalar) -> Array:
  direction_key, radius_key = jax.random.split(key)
  direction = jax.random.laplace(direction_key, images.shape, images.dtype)
  shape = (images.shape[0], 1, 1, 1)
  radius = jax.random.uniform(radius_key, shape, images.dtype)
  radius = radius ** (1.0 / images[0].size)
  return epsilon * radius * direction / l1_length(direction)


def kth_smallest(x: Array, k: Array) -> Array:
  """The k-th smallest of each row of x >= 0, k counted from 0, without sorting.

  Floats that are not negative are ordered as their bits are, so the bits of the
  answer are found from the highest down. On CPU a sort takes several times as
  long.

  Args:
    x: [B, D], not negative.
    k: int32 [B] in [0, D).

  Returns:
    [B].
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
    gradient: [B, H, W, C].
    kept: int32 [B]: how many entries of each example, at least 1.

  Returns:
    [B, H, W, C].
  """
  absolute = jnp.abs(gradient)
  rank = jnp.clip(gradient[0].size - kept, 0, gradient[0].size - 1)
  threshold = kth_smallest(absolute.reshape(len(gradient), -1), rank)
  sign = jnp.sign(gradient) * (absolute >= threshold.reshape(-1, 1, 1, 1))
  return sign / (l1_length(sign) + 1e-10)


def _slide(gradient: Array) -> Array:
  # SLIDE (Tramer and Boneh, 2019): the largest hundredth of the pixels.
  kept = max(1, gradient[0].size // 100)
  return sparse_sign(gradient, jnp.full(gradient.shape[0], kept))


NORMS: dict[str, Norm] = {
  "linf": Norm(
    project=lambda delta, images, epsilon: jnp.clip(delta, -epsilon, epsilon),
    start=_linf_start,
    direction=jnp.sign,
  ),
  "l2": Norm(
    # epsilon first: no division where the perturbation is zero.
    project=lambda delta, images, epsilon: (
      delta * (epsilon / jnp.maximum(l2_length(delta), epsilon))
    ),
    start=_l2_start,
    direction=lambda g: g / jnp.maximum(l2_length(g), 1e-12),
  ),
  "l1": Norm(project=project_l1, start=_l1_start, direction=_slide),
}


def project(
  norm: Norm, images_adv: Array, images: Array, epsilon: Scalar
) -> Array:
  """Into the epsilon-ball around `images` and into [0, 1].

  Clipping to the box comes last: it moves towards the clean image, so it never
  leaves the ball.

  Args:
    norm: The ball's norm.
    images_adv: [B, H, W, C].
    images: Centres, in [0, 1].
    epsilon: Radius.

  Returns:
    [B, H, W, C].
  """
  delta = norm.project(images_adv - images, images, epsilon)
  return jnp.clip(images + delta, 0.0, 1.0)
