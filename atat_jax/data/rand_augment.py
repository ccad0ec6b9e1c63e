"""RandAugment of pictures (Cubuk et al., 2020), in timm's increasing form.

Two operations of fifteen are drawn, each is done with probability 1/2, and its
magnitude is normal around the given one. This is timm's `rand-m9-mstd0.5-inc1`
for magnitude 9, with bicubic interpolation and black beyond the border, as
Singh et al. (2023) train with.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

NUM_LAYERS = 2
NUM_DRAWS = 5 * NUM_LAYERS
"""Uniform numbers that a picture needs."""
LARGEST = 10.0
DEVIATION = 0.5


def _affine(*matrix: float) -> Callable[[Any], Any]:
  """Makes the map that takes pixel (x, y) from (ax + by + c, dx + ey + f)."""
  from PIL import Image

  def moved(image: Any) -> Any:
    return image.transform(
      image.size,
      Image.Transform.AFFINE,
      matrix,
      resample=Image.Resampling.BICUBIC,
      fillcolor=(0, 0, 0),
    )

  return moved


def _enhanced(kind: str) -> Callable[[Any, float, int], Any]:
  """Makes more, or less, of what one of Pillow's enhancers changes."""

  def done(image: Any, level: float, sign: int) -> Any:
    from PIL import ImageEnhance

    factor = max(0.1, 1.0 + 0.9 * (sign * level))
    return getattr(ImageEnhance, kind)(image).enhance(factor)

  return done


def _rotated(image: Any, signed: float) -> Any:
  from PIL import Image

  return image.rotate(
    30 * signed, resample=Image.Resampling.BICUBIC, fillcolor=(0, 0, 0)
  )


def _pointwise(image: Any, function: Callable[[int], int]) -> Any:
  return image.point([function(value) for value in range(256)] * 3)


def _posterized(image: Any, level: float) -> Any:
  """Keeps the highest 4 to 0 bits."""
  mask = 0xFF & ~((1 << (4 + int(4 * level))) - 1)
  return _pointwise(image, lambda value: value & mask)


def _solarized(image: Any, level: float) -> Any:
  """Inverts what is bright."""
  threshold = 256 - int(256 * level)
  return _pointwise(
    image, lambda value: value if value < threshold else 255 - value
  )


def _brightened(image: Any, level: float) -> Any:
  """Adds to what is dark."""
  more = int(110 * level)
  return _pointwise(
    image, lambda value: min(255, value + more) if value < 128 else value
  )


def _plain(name: str) -> Callable[[Any, float, int], Any]:
  """An operation of Pillow's that has no magnitude."""

  def done(image: Any, level: float, sign: int) -> Any:
    from PIL import ImageOps

    del level, sign
    return getattr(ImageOps, name)(image)

  return done


OPERATIONS: dict[str, Callable[[Any, float, int], Any]] = {
  "auto_contrast": _plain("autocontrast"),
  "equalize": _plain("equalize"),
  "invert": _plain("invert"),
  "rotate": lambda image, level, sign: _rotated(image, sign * level),
  "posterize": lambda image, level, sign: _posterized(image, level),
  "solarize": lambda image, level, sign: _solarized(image, level),
  "solarize_add": lambda image, level, sign: _brightened(image, level),
  "color": _enhanced("Color"),
  "contrast": _enhanced("Contrast"),
  "brightness": _enhanced("Brightness"),
  "sharpness": _enhanced("Sharpness"),
  "shear_x": lambda image, level, sign: _affine(
    1, 0.3 * sign * level, 0, 0, 1, 0
  )(image),
  "shear_y": lambda image, level, sign: _affine(
    1, 0, 0, 0.3 * sign * level, 1, 0
  )(image),
  "translate_x": lambda image, level, sign: _affine(
    1, 0, 0.45 * sign * level * image.size[0], 0, 1, 0
  )(image),
  "translate_y": lambda image, level, sign: _affine(
    1, 0, 0, 0, 1, 0.45 * sign * level * image.size[1]
  )(image),
}
"""Name to a function of a picture, a level in [0, 1] and a sign, 1 or -1."""


def augment(image: Any, draws: Sequence[float], magnitude: float) -> Any:
  """Augments a picture.

  Args:
    image: RGB picture of Pillow.
    draws: `NUM_DRAWS` uniform numbers in [0, 1): operation, whether it is done,
      two for its magnitude, and its sign, of each layer.
    magnitude: Mean magnitude, above 0, at most `LARGEST`.

  Returns:
    A picture of the same size.
  """
  operations = [*OPERATIONS.values()]
  for first in range(0, NUM_DRAWS, 5):
    which, done, radius, angle, side = draws[first : first + 5]
    if done >= 0.5:
      continue
    normal = math.sqrt(-2 * math.log(1 - radius)) * math.cos(math.tau * angle)
    level = min(max(magnitude + DEVIATION * normal, 0.0), LARGEST) / LARGEST
    operation = operations[int(which * len(operations))]
    image = operation(image, level, 1 if side < 0.5 else -1)
  return image
