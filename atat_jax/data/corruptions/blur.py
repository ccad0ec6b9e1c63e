"""Blur: out of focus, through frosted glass, while moving, while zooming."""

import math

import jax
import jax.numpy as jnp

from atat_jax.data.corruptions import geometry
from atat_jax.data.corruptions.geometry import at
from atat_jax.typing import Array


def defocus_blur(key: Array, image: Array, severity: Array) -> Array:
  """Convolves with a disk whose edge is soft: 1 / (1 + exp(4 (d - r))).

  CIFAR-10-C's disk is smoothed by a Gaussian in its place.
  """
  del key
  radii = (0.6, 0.8, 1.0, 1.25, 1.6)
  unit = geometry.unit(image)
  reach = math.ceil(radii[-1] * unit + 1.5)
  steps = jnp.arange(-reach, reach + 1)
  distance = jnp.hypot(steps[:, None], steps)
  disk = jax.nn.sigmoid(4 * (at(severity, radii) * unit - distance))
  made = jax.lax.conv_general_dilated(
    geometry.padded(image, reach).transpose(2, 0, 1)[:, None],
    (disk / disk.sum())[None, None],
    (1, 1),
    "VALID",
    precision=geometry.EXACT,
  )
  return made[:, 0].transpose(1, 2, 0)


def glass_blur(key: Array, image: Array, severity: Array) -> Array:
  """Smooths, moves each pixel at random, and smooths.

  CIFAR-10-C swaps neighbours one after another. Lengths grow with the root of
  the side, between what it and ImageNet-C do.
  """
  sigmas = (0.25, 0.3, 0.35, 0.4, 0.45)
  distances = (0.7, 0.95, 1.2, 1.5, 1.9)
  root = math.sqrt(geometry.unit(image))
  sigma, largest = at(severity, sigmas) * root, sigmas[-1] * root
  height, width, _ = image.shape
  moves = jax.random.uniform(key, (2, height, width), minval=-1, maxval=1)
  down, right = moves * at(severity, distances) * root
  rows, columns = geometry.places(image)
  made = geometry.smoothed(image, sigma, largest)
  made = geometry.sampled(made, rows + down, columns + right)
  return geometry.smoothed(made, sigma, largest)


def motion_blur(key: Array, image: Array, severity: Array) -> Array:
  """Convolves with a Gaussian along a line, at most 45 degrees from the level.

  CIFAR-10-C's line is one-sided, which also moves the image.
  """
  sigmas = (0.6, 0.9, 1.2, 1.5, 1.8)
  unit = geometry.unit(image)
  angle = jax.random.uniform(key, minval=-jnp.pi / 4, maxval=jnp.pi / 4)
  return geometry.streaked(
    image, at(severity, sigmas) * unit, angle, sigmas[-1] * unit
  )


def zoom_blur(key: Array, image: Array, severity: Array) -> Array:
  """Averages the image and zooms into it, up to CIFAR-10-C's."""
  del key
  most = (0.05, 0.10, 0.15, 0.20, 0.25)
  height, width, _ = image.shape
  # The border moves by at most a pixel from one copy to the next.
  count = max(6, math.ceil(most[-1] * max(height, width) / 2) + 1)
  centre = jnp.array([height / 2, width / 2])

  def zoomed(number: Array) -> Array:
    scale = 1 + at(severity, most) * number / (count - 1)
    return jax.image.scale_and_translate(
      image,
      image.shape,
      (0, 1),
      jnp.stack([scale, scale]),
      (1 - scale) * centre,
      method="linear",
      antialias=False,
    )

  def add(number: Array, total: Array) -> Array:
    return total + zoomed(number)

  return jax.lax.fori_loop(0, count, add, jnp.zeros_like(image)) / count
