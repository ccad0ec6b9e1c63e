"""Reader of photographs for ImageNet networks."""

import pathlib

import numpy as np

from atat_jax import checks
from atat_jax.errors import UserError


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
    UserError: Not an image, or a crop larger than the image.
  """
  from PIL import Image, ImageOps

  checks.positive("resize", resize, integer=True)
  checks.positive("crop", crop, integer=True)
  if crop > resize:
    raise UserError(f"crop: {crop}; allowed: at most resize, {resize}")
  try:
    with Image.open(path) as file:
      image = ImageOps.exif_transpose(file).convert("RGB")
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or 'not an image'}") from None
  shorter = min(image.size)
  width, height = (resize * side // shorter for side in image.size)
  image = image.resize((width, height), Image.Resampling.BILINEAR)
  left, top = round((width - crop) / 2), round((height - crop) / 2)
  image = image.crop((left, top, left + crop, top + crop))
  return np.asarray(image, np.float32) / 255
