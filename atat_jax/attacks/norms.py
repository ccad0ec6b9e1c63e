"""Balls: projections, random starts and steepest directions, by norm.

Each function works on [B, H, W, C] and per example. Adding a norm is one entry
in `NORMS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atat_jax.typing import Array, Scalar


class Norm(NamedTuple):
  """What an attack needs to know of a norm."""

  project: Callable[[Array, Scalar], Array]
  """(perturbation, epsilon) to the nearest perturbation in the ball."""
  start: Callable[[Array, Array, Scalar], Array]
  """(key, images, epsilon) to a perturbation uniform in the ball."""
  direction: Callable[[Array], Array]
  """Gradient to the unit step that increases the loss most."""


def _l2(x: Array) -> Array:
  return jnp.sqrt(jnp.square(x).sum((1, 2, 3), keepdims=True))


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
  return epsilon * radius * direction / _l2(direction)


NORMS: dict[str, Norm] = {
  "linf": Norm(
    project=lambda delta, epsilon: jnp.clip(delta, -epsilon, epsilon),
    start=_linf_start,
    direction=jnp.sign,
  ),
  "l2": Norm(
    # epsilon first: no division where the perturbation is zero.
    project=lambda delta, epsilon: (
      delta * (epsilon / jnp.maximum(_l2(delta), epsilon))
    ),
    start=_l2_start,
    direction=lambda g: g / jnp.maximum(_l2(g), 1e-12),
  ),
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
  delta = norm.project(images_adv - images, epsilon)
  return jnp.clip(images + delta, 0.0, 1.0)
