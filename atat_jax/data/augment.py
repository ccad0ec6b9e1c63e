"""Augmentation on the device, inside the jitted step.

Images are uint8 or float `[B, H, W, C]` and come back in the same dtype and
shape. Every operation acts on each image by itself: under a sharding of the
batch axis it needs no communication, and the result does not depend on the
number of devices.
"""

import jax
import jax.numpy as jnp

from atat_jax import checks
from atat_jax.errors import UserError


def _check_pixels(images: jax.Array) -> jax.Array:
  """Checks [B, H, W, C] of real numbers by shape and dtype alone."""
  found = checks.array(images, "images")
  if found.ndim != 4 or 0 in found.shape:
    raise UserError(
      f"images: shape {found.shape}; allowed: [B, H, W, C], not empty"
    )
  if not jnp.issubdtype(found.dtype, jnp.integer) and not jnp.issubdtype(
    found.dtype, jnp.floating
  ):
    raise UserError(
      f"images: dtype {found.dtype}; allowed: uint8, or floating point"
    )
  return found  # type: ignore[return-value]  # numpy's stay numpy's


def crop_flip(
  images: jax.Array, offsets: jax.Array, flips: jax.Array, *, padding: int
) -> jax.Array:
  """Pads with zeros, crops to the original size and mirrors left to right.

  Args:
    images: Images `[B, H, W, C]`.
    offsets: Top and left corner of the crop in the padded image, int32
      `[B, 2]`, 0 to `2 * padding`; `padding` leaves the image in its place.
    flips: Which crops are mirrored, bool `[B]`.
    padding: Pixels of zeros on every side.

  Returns:
    `[B, H, W, C]` in the dtype of `images`.
  """
  images = _check_pixels(images)
  batch = images.shape[0]
  checks.count("padding", padding, 0)
  flips = checks.mask(flips, batch, "flips")
  offsets = jnp.asarray(checks.array(offsets, "offsets"))
  if offsets.shape != (batch, 2) or not jnp.issubdtype(
    offsets.dtype, jnp.integer
  ):
    raise UserError(
      f"offsets: {offsets.dtype} of shape {offsets.shape}; allowed: integers"
      f" [{batch}, 2], one pair for each image"
    )
  shape = images.shape[1:]
  margin = (padding, padding)
  padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))

  def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), shape)

  cropped = jax.vmap(crop)(padded, offsets)
  return jnp.where(flips[:, None, None, None], cropped[:, :, ::-1], cropped)


def pad_crop_flip(
  key: jax.Array, images: jax.Array, *, padding: int, flip: bool
) -> jax.Array:
  """Crops the zero-padded images and mirrors them, at random per image.

  Args:
    key: Random key.
    images: Images `[B, H, W, C]`.
    padding: Pixels of zeros on every side (the paper's code: 2, usual: 4); 0
      leaves every image in its place.
    flip: Whether images are mirrored left to right, each with probability 1/2.

  Returns:
    `[B, H, W, C]` in the dtype of `images`; `images` itself where there is
    nothing to do.
  """
  checks.count("padding", padding, 0)
  checks.boolean("flip", flip)
  checks.key(key)
  images = _check_pixels(images)
  if not padding and not flip:
    return images
  batch = images.shape[0]
  crop_key, flip_key = jax.random.split(key)
  offsets = jax.random.randint(crop_key, (batch, 2), 0, 2 * padding + 1)
  flips = (
    jax.random.bernoulli(flip_key, shape=(batch,))
    if flip
    else jnp.zeros((batch,), bool)
  )
  return crop_flip(images, offsets, flips, padding=padding)


def to_float(images: jax.Array) -> jax.Array:
  """Converts uint8 pixels to float32 in [0, 1]."""
  images = _check_pixels(images)
  return images.astype(jnp.float32) / 255.0
