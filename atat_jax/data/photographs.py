"""Reader of photographs for ImageNet networks."""

import pathlib

import numpy as np

from atat_jax import checks
from atat_jax.data import pictures
from atat_jax.errors import UserError
from atat_jax.runs import locations
from atat_jax.untrusted import regular

_LARGEST = 16_384
"""Longest shorter side in pixels; a longer one is a slip of the pen."""


def read_photograph(
  path: pathlib.Path | str, *, resize: int = 256, crop: int = 224
) -> np.ndarray:
  """Reads a photograph, resizes it and crops its centre, as torchvision does.

  The shorter side becomes `resize` pixels (bilinear, antialiased, rounded to
  8 bits), the longer one in proportion. A photograph is rotated upright if its
  EXIF data say how. Grey values of 16 bits and floats in [0, 1] are scaled; the
  transparency of a picture is left out.

  Args:
    path: Image file that Pillow can read; grey ones get three equal channels.
    resize: Length of the shorter side in pixels.
    crop: Side of the square crop in pixels, at most `resize`.

  Returns:
    The image, float32 [crop, crop, 3] in [0, 1]; the networks normalise it.

  Raises:
    UserError: Not an image, one of too many pixels before or after it is
      resized, floats outside [0, 1], or a crop larger than the image.
  """
  path = locations.expand("path", path)
  checks.count("resize", resize)
  checks.integer("resize", resize, 1, _LARGEST)
  checks.count("crop", crop)
  if crop > resize:
    raise UserError(f"crop: {crop}; allowed: at most resize, {resize}")
  try:
    with regular.open_regular(path) as file:
      image = pictures.decode(file, shorter_side=resize)
  except UserError:
    raise
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or 'not an image'}") from None
  except Exception as error:  # a damaged file can raise anything in a decoder
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(f"{path}: not an image ({reason})") from None
  image = pictures.resize_and_crop(image.convert("RGB"), resize, crop)
  return np.asarray(image, np.float32) / 255
