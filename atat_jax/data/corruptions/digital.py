"""Digital processing: contrast, elastic deformation, pixels and JPEG."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import fft

from atat_jax.data.corruptions import geometry
from atat_jax.data.corruptions.geometry import at
from atat_jax.typing import Array

# Quantisation tables of the standard (ITU-T T.81, tables K.1 and K.2), and the
# matrices of JFIF from red, green and blue.
_LUMINANCE = np.array(
  """
  16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55
  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
  18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92
  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
  """.split(),
  np.float32,
).reshape(8, 8)
_CHROMINANCE = np.full((8, 8), 99, np.float32)
_CHROMINANCE[:4, :4] = [
  [17, 18, 24, 47],
  [18, 21, 26, 66],
  [24, 26, 56, 99],
  [47, 66, 99, 99],
]
_TO_YCC = np.array(
  [
    [0.299, 0.587, 0.114],
    [-0.168736, -0.331264, 0.5],
    [0.5, -0.418688, -0.081312],
  ],
  np.float32,
)
_FROM_YCC = np.linalg.inv(_TO_YCC.astype(np.float64)).astype(np.float32)
_DCT = fft.dct(np.eye(8), norm="ortho", axis=0).astype(np.float32)


def contrast(key: Array, image: Array, severity: Array) -> Array:
  """Moves each channel towards its mean, by CIFAR-10-C's factors."""
  del key
  mean = image.mean((0, 1))
  return mean + at(severity, (0.75, 0.5, 0.4, 0.3, 0.15)) * (image - mean)


def elastic_transform(key: Array, image: Array, severity: Array) -> Array:
  """Reads the image at places moved by a random affine map and a smooth field.

  The field has a root mean square that is the severity's; CIFAR-10-C smooths
  less from severity to severity.
  """
  unit = geometry.unit(image)
  smoothness = 2 * unit
  height, width, _ = image.shape
  bending, moving = jax.random.split(key)
  field = jax.random.uniform(bending, (height, width, 2), minval=-1, maxval=1)
  field = geometry.smoothed(field, jnp.float32(smoothness), smoothness)
  field /= jnp.maximum(jnp.sqrt((field**2).mean()), 1e-6)
  field *= at(severity, (0.2, 0.35, 0.5, 0.65, 0.8)) * unit
  affine = jax.random.uniform(moving, (2, 3), minval=-1, maxval=1)
  affine *= at(severity, (0.02, 0.03, 0.04, 0.05, 0.06))
  rows, columns = geometry.places(image)
  down, right = rows - (height - 1) / 2, columns - (width - 1) / 2
  shift = affine[:, 2] * min(height, width) / 2
  return geometry.sampled(
    image,
    rows
    + affine[0, 0] * down
    + affine[0, 1] * right
    + shift[0]
    + field[..., 0],
    columns
    + affine[1, 0] * down
    + affine[1, 1] * right
    + shift[1]
    + field[..., 1],
  )


def pixelate(key: Array, image: Array, severity: Array) -> Array:
  """Shows each pixel as the mean of the cell that its centre is in.

  Cells are up to 2.25 pixels wide (CIFAR-10-C's: 1.5), and in images of more than
  32 pixels by the root of the side wider, between what it and ImageNet-C do.
  """
  del key
  root = max(1.0, math.sqrt(geometry.unit(image)))
  width = root * at(severity, (1.15, 1.33, 1.5, 1.75, 2.25))
  rows, columns = (_cells(length, width) for length in image.shape[:2])
  return geometry.along_axes(image, rows, columns)


def _cells(length: int, width: Array) -> Array:
  """Returns, for each pixel, the share of every pixel in its cell, [n, n]."""
  pixel = jnp.arange(length)
  start = jnp.floor((pixel + 0.5) / width) * width
  end = jnp.minimum(start + width, length)
  overlap = jnp.minimum(end[:, None], pixel + 1) - jnp.maximum(
    start[:, None], pixel
  )
  overlap = jnp.maximum(overlap, 0.0)
  return overlap / overlap.sum(1, keepdims=True)


def jpeg_compression(key: Array, image: Array, severity: Array) -> Array:
  """Compresses as JPEG does, with CIFAR-10-C's qualities.

  Colours are subsampled 4:2:0; a channel that is no colour is compressed as a
  grey image.
  """
  del key
  quality = at(severity, (80, 65, 58, 50, 40))
  light, colour = (
    quantisation(table, quality) for table in (_LUMINANCE, _CHROMINANCE)
  )
  levels = jnp.round(image * 255)
  if image.shape[-1] < 3:
    return _planes(levels - 128, light) / 255 + 128 / 255
  ycc = jnp.round(
    jnp.einsum(
      "hwc,yc->hwy", levels[..., :3], _TO_YCC, precision=geometry.EXACT
    )
  )
  luma = _planes(ycc[..., :1] - 128, light) + 128
  chroma = _subsampled(ycc[..., 1:] + 128, colour) - 128
  made = jnp.einsum(
    "hwy,cy->hwc",
    jnp.concatenate([luma, chroma], -1),
    _FROM_YCC,
    precision=geometry.EXACT,
  )
  rest = _planes(levels[..., 3:] - 128, light) + 128
  return jnp.round(jnp.concatenate([made, rest], -1)) / 255


def quantisation(table: np.ndarray, quality: Array) -> Array:
  """Scales a quantisation table to a quality of 1 to 100, as libjpeg does.

  Args:
    table: [8, 8], for a quality of 50.
    quality: The quality.

  Returns:
    Integers as float32 [8, 8], 1 to 255.
  """
  percent = jnp.where(
    quality < 50, jnp.floor(5000 / quality), 200 - 2 * quality
  )
  return jnp.clip(jnp.floor((table * percent + 50) / 100), 1, 255)


def _planes(levels: Array, table: Array) -> Array:
  """Quantises the cosine transform of blocks of 8 x 8, channel by channel.

  Args:
    levels: Levels around 0, [H, W, C].
    table: Quantisation table [8, 8].

  Returns:
    [H, W, C], rounded to levels of -128 to 127.
  """
  height, width, channels = levels.shape
  wide = _filled(levels, 8)
  blocks = wide.reshape(wide.shape[0] // 8, 8, wide.shape[1] // 8, 8, channels)
  spectrum = jnp.einsum(
    "ui,aibjc,vj->abcuv", _DCT, blocks, _DCT, precision=geometry.EXACT
  )
  spectrum = jnp.round(spectrum / table) * table
  blocks = jnp.einsum(
    "ui,abcuv,vj->aibjc", _DCT, spectrum, _DCT, precision=geometry.EXACT
  )
  made = jnp.clip(jnp.round(blocks.reshape(wide.shape)), -128, 127)
  return made[:height, :width]


def _subsampled(levels: Array, table: Array) -> Array:
  """Compresses planes at half their resolution, and enlarges them again.

  Args:
    levels: Levels from 0 to 255, [H, W, C].
    table: Quantisation table [8, 8].

  Returns:
    [H, W, C].
  """
  height, width, channels = levels.shape
  wide = _filled(levels, 16)
  fours = wide.reshape(wide.shape[0] // 2, 2, wide.shape[1] // 2, 2, channels)
  # libjpeg rounds ties down and up in turn.
  bias = 1 + jnp.arange(fours.shape[2])[:, None] % 2
  half = jnp.floor((fours.sum((1, 3)) + bias) / 4)
  made = _planes(half - 128, table) + 128
  made = made[: -(-height // 2), : -(-width // 2)]
  twice = (2 * made.shape[0], 2 * made.shape[1], channels)
  made = jax.image.resize(made, twice, "linear", precision=geometry.EXACT)
  return made[:height, :width]


def _filled(levels: Array, multiple: int) -> Array:
  """Repeats the last row and column up to multiples of a number."""
  height, width, _ = levels.shape
  after = ((0, -height % multiple), (0, -width % multiple), (0, 0))
  return jnp.pad(levels, after, mode="edge")
