"""Decoder of picture files, of any kind, to 8 bits a channel.

Files are not trusted: only formats for which Pillow starts no other program are
opened, and the number of pixels is checked before anything is unpacked.
"""

import io
import math
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from PIL import Image

# PostScript, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are decoded, as Pillow names them."""

MOST_PIXELS = 178_956_970
"""Largest number of pixels: Pillow's own limit, 512 MiB of colours."""

_PLAIN = {
  "1": "L",
  "L": "L",
  "LA": "LA",
  "La": "LA",
  "RGB": "RGB",
  "RGBA": "RGBA",
  "RGBa": "RGBA",
  "PA": "RGBA",
}


def _from_numbers(values: np.ndarray) -> np.ndarray:
  """Scales grey values of 16 bits, or floats, to 8 bits.

  Args:
    values: Numbers [H, W].

  Returns:
    uint8 [H, W].

  Raises:
    ValueError: Values outside 0 to 65535, or floats outside 0 to 1.
  """
  largest = 65_535 if values.dtype.kind in "iu" else 1.0
  low, high = values.min(), values.max()
  if not (math.isfinite(low) and math.isfinite(high)):
    raise ValueError("values that are not finite")
  if low < 0 or high > largest:
    raise ValueError(
      f"{values.dtype.name} values from {low:g} to {high:g}; allowed: 0 to"
      f" {largest:g}"
    )
  scaled = values.astype(np.float64) * (255 / largest)
  return np.rint(scaled).astype(np.uint8)


def decode(file: IO[bytes], *, shorter_side: int = 0) -> "Image.Image":
  """Decodes a picture, upright, as its EXIF data say, with 8 bits a channel.

  Grey values of 16 bits are scaled, as are floats in [0, 1]; a palette becomes
  colours, and so do CMYK, YCbCr and LAB.

  Args:
    file: The open file.
    shorter_side: Length of the shorter side in pixels to which the picture will
      be resized, which counts towards the limit; 0: it will not be.

  Returns:
    Picture in the mode "L", "LA", "RGB" or "RGBA".

  Raises:
    ValueError: Too many pixels, or values out of range.
    Exception: Not a picture, or a damaged one: anything, mostly `OSError`.
  """
  from PIL import Image, ImageOps

  with Image.open(file, formats=FORMATS) as image:
    width, height = image.size
    scale = max(1.0, shorter_side / min(width, height))
    pixels = width * height * scale**2
    if pixels > MOST_PIXELS:
      raise ValueError(
        f"{width} x {height}, with a shorter side of"
        f" {shorter_side or min(width, height)} {pixels:.0f} pixels; allowed: at"
        f" most {MOST_PIXELS}"
      )
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
      return Image.fromarray(_from_numbers(np.asarray(upright)))
    if upright.mode == "P":
      has_alpha = "transparency" in upright.info
      return upright.convert("RGBA" if has_alpha else "RGB")
    return upright.convert(_PLAIN.get(upright.mode, "RGB"))


def decode_bytes(content: bytes) -> "Image.Image":
  """Decodes the content of a picture file; see `decode`."""
  return decode(io.BytesIO(content))


def resize_and_crop(
  image: "Image.Image", shorter_side: int, crop: int
) -> "Image.Image":
  """Resizes the shorter side and crops the centre, as torchvision does.

  Args:
    image: The picture.
    shorter_side: New length of the shorter side in pixels; the longer one keeps
      the proportion, rounded down. Bilinear, antialiased, rounded to 8 bits.
    crop: Side of the square crop in pixels, at most `shorter_side`.
  """
  from PIL import Image

  shorter = min(image.size)
  width, height = (shorter_side * side // shorter for side in image.size)
  image = image.resize((width, height), Image.Resampling.BILINEAR)
  left, top = round((width - crop) / 2), round((height - crop) / 2)
  return image.crop((left, top, left + crop, top + crop))
