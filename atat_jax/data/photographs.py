"""Reader of photographs for ImageNet networks."""

import pathlib
from typing import IO, Any

import numpy as np

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.runs import locations
from atat_jax.untrusted import regular

# No format for which Pillow starts another program, as it does for PostScript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MOST_PIXELS = 178_956_970  # Pillow's own limit, 512 MiB of colours


def _decode(file: IO[bytes], resize: int) -> Any:
  """Decodes an image, upright and in colour; its size is checked before."""
  from PIL import Image, ImageOps

  with Image.open(file, formats=_FORMATS) as image:
    width, height = image.size
    scale = resize / min(width, height)
    pixels = width * height * max(1.0, scale) ** 2
    if pixels > _MOST_PIXELS:
      raise ValueError(
        f"{width} x {height}, with a shorter side of {resize} {pixels:.0f}"
        f" pixels; allowed: at most {_MOST_PIXELS}"
      )
    return ImageOps.exif_transpose(image).convert("RGB")


_LARGEST = 16_384
"""Longest shorter side in pixels; a longer one is a slip of the pen."""


def read_photograph(
  path: pathlib.Path | str, *, resize: int = 256, crop: int = 224
) -> np.ndarray:
  """Reads a photograph, resizes it and crops its centre, as torchvision does.

  The shorter side becomes `resize` pixels (bilinear, antialiased, rounded to
  8 bits), the longer one in proportion. A photograph is rotated upright if its
  EXIF data say how.

  Args:
    path: Image file that Pillow can read; grey ones get three equal channels.
    resize: Length of the shorter side in pixels.
    crop: Side of the square crop in pixels, at most `resize`.

  Returns:
    The image, float32 [crop, crop, 3] in [0, 1]; the networks normalise it.

  Raises:
    UserError: Not an image, one of too many pixels before or after it is
      resized, or a crop larger than the image.
  """
  from PIL import Image

  path = locations.expand("path", path)
  checks.count("resize", resize)
  checks.integer("resize", resize, 1, _LARGEST)
  checks.count("crop", crop)
  if crop > resize:
    raise UserError(f"crop: {crop}; allowed: at most resize, {resize}")
  try:
    with regular.open_regular(path) as file:
      image = _decode(file, resize)
  except UserError:
    raise
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or 'not an image'}") from None
  except Exception as error:  # a damaged file can raise anything in a decoder
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(f"{path}: not an image ({reason})") from None
  shorter = min(image.size)
  width, height = (resize * side // shorter for side in image.size)
  image = image.resize((width, height), Image.Resampling.BILINEAR)
  left, top = round((width - crop) / 2), round((height - crop) / 2)
  image = image.crop((left, top, left + crop, top + crop))
  return np.asarray(image, np.float32) / 255
