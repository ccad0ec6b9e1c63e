"""Mixup and CutMix on the device, inside the jitted step.

Each image is mixed with one partner, given by a random permutation of the
batch, in a ratio of its own. The targets hold both classes. An attack needs a
single class to move away from: the label becomes that of the larger part.
"""

import jax
import jax.numpy as jnp

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.typing import Array

MIXES = ("none", "mixup", "cutmix")


def check(name: str, alpha: float) -> None:
  """Checks the name of the mix, and that alpha is positive."""
  checks.choice("mix", name, MIXES)
  checks.positive("mix_alpha", alpha)


def boxes(
  share: Array, centers: Array, height: int, width: int
) -> tuple[Array, Array]:
  """Places CutMix's boxes of pixels from the partner (Yun et al., 2019).

  A box has sqrt(1 - share) of each side and is cut off at the borders.

  Args:
    share: Share of the image that is to remain, [B] in [0, 1].
    centers: Row and column of each centre, int32 [B, 2].
    height: Height of the images.
    width: Width of the images.

  Returns:
    Mask bool [B, H, W], True in the box, and the share that remains, [B].
  """
  side = jnp.sqrt(1 - share)

  def inside(size: int, center: Array) -> Array:
    half = jnp.floor(size * side).astype(jnp.int32) // 2
    position = jnp.arange(size)
    return (position >= (center - half)[:, None]) & (
      position < (center + half)[:, None]
    )

  rows = inside(height, centers[:, 0])
  columns = inside(width, centers[:, 1])
  box = rows[:, :, None] & columns[:, None, :]
  return box, 1 - box.mean((1, 2), dtype=share.dtype)


def mix(
  key: Array,
  images: Array,
  labels: Array,
  targets: Array,
  *,
  name: str,
  alpha: float,
) -> tuple[Array, Array, Array]:
  """Mixes each image of a batch with another one.

  Args:
    key: Random key.
    images: Images, floating point [B, H, W, C] in [0, 1].
    labels: Labels, int32 [B].
    targets: Target probabilities, [B, K].
    name: "mixup" (Zhang et al., 2018): a x + (1 - a) x'; "cutmix": x with a box
      of x' that has the share 1 - a of the pixels; "none": no change.
    alpha: Parameter of Beta(alpha, alpha), from which each image's a is drawn.

  Returns:
    Images, labels (of the larger part, the image's own where both are equal)
    and targets a t + (1 - a) t'.
  """
  check(name, alpha)
  checks.key(key)
  images = checks.batch(images, "images", ndim=4)
  labels = checks.classes(labels, images.shape[0])
  targets = checks.batch(targets, "targets", ndim=2)
  if targets.shape[0] != images.shape[0]:
    raise UserError(
      f"targets: {targets.shape[0]} rows; allowed: {images.shape[0]}, one for"
      " each image"
    )
  if name == "none":
    return images, labels, targets
  batch, height, width = images.shape[:3]
  share_key, order_key, center_key = jax.random.split(key, 3)
  share = jax.random.beta(share_key, alpha, alpha, (batch,), images.dtype)
  partner = jax.random.permutation(order_key, batch)
  if name == "mixup":
    a = share[:, None, None, None]
    # Rounding could leave [0, 1].
    mixed = jnp.clip(a * images + (1 - a) * images[partner], 0.0, 1.0)
  else:
    centers = jax.random.randint(
      center_key, (batch, 2), 0, jnp.array([height, width])
    )
    box, share = boxes(share, centers, height, width)
    mixed = jnp.where(box[..., None], images[partner], images)
  return (
    mixed,
    jnp.where(share >= 0.5, labels, labels[partner]),
    share[:, None] * targets + (1 - share[:, None]) * targets[partner],
  )
