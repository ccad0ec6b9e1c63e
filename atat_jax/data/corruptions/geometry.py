"""Lengths, kernels and sampling that the corruptions share; one image each.

Borders are mirrored with the border's pixel repeated: d c b a | a b c d.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import ndimage

from atat_jax.typing import Array

EXACT = jax.lax.Precision.HIGHEST
"""Precision of products: an accelerator's default would show in the pixels."""


def at(severity: Array, values: Sequence[float]) -> Array:
  """Returns the value of a severity, 1 to 5; traced severities are welcome."""
  return jnp.asarray(values, jnp.float32)[severity - 1]


def unit(image: Array) -> float:
  """Returns the length in pixels that is one at 32 x 32.

  Args:
    image: [H, W, C].

  Returns:
    A thirty-second of the shorter side, and at least half a pixel.
  """
  return max(min(image.shape[:2]) / 32, 0.5)


def mirrored(length: int, reach: int) -> np.ndarray:
  """Returns the pixels that a window around each pixel shows.

  Args:
    length: Number of pixels, n.
    reach: Pixels on each side of the window, r; may exceed n.

  Returns:
    Integers [n, 2 r + 1], 0 to n - 1.
  """
  return _mirror(
    np.arange(length)[:, None] + np.arange(-reach, reach + 1), length
  )


def along_axes(image: Array, rows: Array, columns: Array) -> Array:
  """Multiplies an image by a matrix along each of its axes.

  Args:
    image: [H, W, C].
    rows: [h, H]: each new row as weights of the old ones.
    columns: [w, W].

  Returns:
    [h, w, C].
  """
  return jnp.einsum("yh,hwc,xw->yxc", rows, image, columns, precision=EXACT)


def _gaussian_matrix(length: int, sigma: Array, reach: int) -> Array:
  distance = jnp.arange(-reach, reach + 1)
  weights = jnp.exp(-0.5 * (distance / jnp.maximum(sigma, 1e-3)) ** 2)
  weights /= weights.sum()
  return (
    jnp.zeros((length, length))
    .at[jnp.arange(length)[:, None], mirrored(length, reach)]
    .add(weights)
  )


def smoothed(image: Array, sigma: Array, largest: float) -> Array:
  """Convolves an image with a Gaussian.

  Args:
    image: [H, W, C].
    sigma: Standard deviation in pixels.
    largest: Largest value that it can have; the kernel ends at 4 times that.

  Returns:
    [H, W, C].
  """
  reach = math.ceil(4 * largest)
  rows, columns = (
    _gaussian_matrix(length, sigma, reach) for length in image.shape[:2]
  )
  return along_axes(image, rows, columns)


def streaked(image: Array, sigma: Array, angle: Array, largest: float) -> Array:
  """Convolves an image with a Gaussian along a line.

  The transfer function of the line is applied to the spectrum of the mirrored
  image, so that any angle is exact.

  Args:
    image: [H, W, C].
    sigma: Standard deviation in pixels.
    angle: Direction in radians, from the right downwards.
    largest: Largest value that sigma can have.

  Returns:
    [H, W, C]; may leave the range of the image's pixels a little.
  """
  height, width, _ = image.shape
  reach = math.ceil(3 * largest)
  wide = padded(image, reach)
  spectrum = jnp.fft.rfft2(wide, axes=(0, 1))
  down = jnp.fft.fftfreq(wide.shape[0])[:, None]
  right = jnp.fft.rfftfreq(wide.shape[1])
  along = jnp.cos(angle) * right + jnp.sin(angle) * down
  transfer = jnp.exp(-2 * (jnp.pi * sigma * along) ** 2)
  made = jnp.fft.irfft2(
    spectrum * transfer[..., None], s=wide.shape[:2], axes=(0, 1)
  )
  return made[reach : reach + height, reach : reach + width]


def _mirror(places: np.ndarray, length: int) -> np.ndarray:
  """Returns the pixels, 0 to n - 1, that stand at places beyond the borders."""
  found = places % (2 * length)
  return np.minimum(found, 2 * length - 1 - found)


def padded(image: Array, reach: int) -> Array:
  """Mirrors an image [H, W, C] at its borders, `reach` pixels on each side."""
  rows, columns = (
    _mirror(np.arange(-reach, length + reach), length)
    for length in image.shape[:2]
  )
  return image[rows][:, columns]


def sampled(image: Array, rows: Array, columns: Array) -> Array:
  """Reads an image between its pixels, bilinearly.

  Args:
    image: [H, W, C].
    rows: Places [h, w] in pixels, 0 the centre of the first.
    columns: Places [h, w].

  Returns:
    [h, w, C].
  """

  def channel(plane: Array) -> Array:
    return ndimage.map_coordinates(plane, [rows, columns], 1, mode="reflect")

  return jax.vmap(channel, -1, -1)(image)


def places(image: Array) -> tuple[Array, Array]:
  """Returns row and column of each pixel of an image, float32 [H, W] each."""
  height, width, _ = image.shape
  rows, columns = jnp.meshgrid(
    jnp.arange(height, dtype=jnp.float32),
    jnp.arange(width, dtype=jnp.float32),
    indexing="ij",
  )
  return rows, columns
