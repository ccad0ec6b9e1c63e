"""Weather: snow, frost and fog, drawn from random numbers, and brightness.

Fog, as in CIFAR-10-C, and frost are plasma fractals: noise on finer and finer
grids. CIFAR-10-C lays photographs of frost over the images.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy import special

from atat_jax.data.corruptions import geometry
from atat_jax.data.corruptions.geometry import at
from atat_jax.typing import Array


def plasma(key: Array, height: int, width: int, decay: Array | float) -> Array:
  """Draws a plasma fractal.

  Args:
    key: Random key.
    height: Number of rows, H.
    width: Number of columns, W.
    decay: Factor by which the noise shrinks from one grid to the next, which is
      twice as fine; larger: smoother.

  Returns:
    float32 [H, W], from 0 to 1, both of which it takes.
  """
  side = max(height, width)
  levels = max(1, math.ceil(math.log2(side)))
  points = jnp.arange(2 ** (levels - 1) + 1)
  drawn = jax.random.normal(key, (levels, len(points), len(points)))
  pixels = (jnp.arange(side) + 0.5) / side

  def add(level: Array, total: Array) -> Array:
    # Level l has 2^l cells a side, so that the first of the points are enough.
    distance = jnp.abs(pixels[:, None] * 2.0**level - points)
    near = jnp.maximum(1 - distance, 0.0)
    weights = near**2 * (3 - 2 * near)
    layer = geometry.along_axes(drawn[level][..., None], weights, weights)
    return total + layer[..., 0] / decay**level

  total = jax.lax.fori_loop(0, levels, add, jnp.zeros((side, side)))
  total = total[:height, :width]
  low, high = total.min(), total.max()
  return (total - low) / jnp.maximum(high - low, 1e-6)


def fog(key: Array, image: Array, severity: Array) -> Array:
  """Adds a plasma fractal and compresses the range, by CIFAR-10-C's numbers."""
  amount = at(severity, (0.2, 0.5, 0.75, 1.0, 1.5))
  decay = at(severity, (3, 3, 2.5, 2, 1.75))
  height, width, _ = image.shape
  mist = plasma(key, height, width, decay)[..., None]
  top = image.max()
  return (image + amount * mist) * top / jnp.maximum(top + amount, 1e-6)


def frost(key: Array, image: Array, severity: Array) -> Array:
  """Lays crystals over a darkened image: ridges of one fractal, in patches."""
  light = at(severity, (1, 0.95, 0.9, 0.85, 0.8))
  amount = at(severity, (0.25, 0.35, 0.45, 0.5, 0.6))
  height, width, channels = image.shape
  first, second = jax.random.split(key)
  ridges = 1 - jnp.abs(2 * plasma(first, height, width, 1.5) - 1)
  crystals = ridges**2 * (0.4 + 0.6 * plasma(second, height, width, 2.5))
  tint = jnp.array((0.85, 0.93, 1.0, 1.0)) if channels > 2 else jnp.ones(4)
  return light * image + amount * crystals[..., None] * tint[:channels]


def snow(key: Array, image: Array, severity: Array) -> Array:
  """Whitens the image and adds streaks of falling flakes."""
  share = at(severity, (0.015, 0.025, 0.04, 0.06, 0.085))
  white = at(severity, (0.95, 0.92, 0.88, 0.84, 0.8))
  unit = geometry.unit(image)
  drawing, falling = jax.random.split(key)
  height, width, _ = image.shape
  drawn = jax.random.normal(drawing, (height, width, 1))
  drawn = geometry.smoothed(drawn, jnp.float32(0.5 * unit), 0.5 * unit)
  drawn = drawn / jnp.maximum(drawn.std(), 1e-6)
  # The flakes are the share of the noise above its quantile.
  flakes = jax.nn.sigmoid(8 * (drawn - special.ndtri(1 - share)))
  angle = jax.random.uniform(falling, minval=jnp.pi / 4, maxval=3 * jnp.pi / 4)
  flakes = geometry.streaked(flakes, jnp.float32(unit), angle, unit)
  grey = image.mean(-1, keepdims=True)
  pale = jnp.maximum(image, 0.5 + 0.5 * grey)
  return white * image + (1 - white) * pale + 1.2 * jnp.maximum(flakes, 0.0)


def brightness(key: Array, image: Array, severity: Array) -> Array:
  """Adds CIFAR-10-C's numbers to the value of hue, saturation and value.

  Channels that are no colours are themselves the value.
  """
  del key
  more = at(severity, (0.05, 0.1, 0.15, 0.2, 0.3))
  if image.shape[-1] < 3:
    return image + more
  colours, rest = image[..., :3], image[..., 3:]
  value = colours.max(-1, keepdims=True)
  brighter = jnp.minimum(value + more, 1.0)
  # Hue and saturation stay where the three grow by one factor.
  scaled = colours * (brighter / jnp.maximum(value, 1e-6))
  colours = jnp.where(value > 1e-6, scaled, brighter)
  return jnp.concatenate([colours, rest + more], -1)
