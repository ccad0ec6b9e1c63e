"""Photographs against PyTorch's antialiased interpolation."""

import numpy as np
import pytest
from PIL import Image

from atat_jax.data import photographs
from atat_jax.errors import UserError


def _pixels(height, width):
  """Smooth colours with noise, uint8."""
  rows, columns = np.mgrid[:height, :width]
  generator = np.random.default_rng(0)
  image = np.stack(
    [rows / height, columns / width, (rows + columns) % 50 / 50], -1
  )
  noise = generator.uniform(-0.1, 0.1, image.shape)
  return np.uint8(255 * (image + noise).clip(0, 1))


def _interpolated(pixels, height, width):
  torch = pytest.importorskip("torch")
  x = torch.tensor(pixels).permute(2, 0, 1)[None].double() / 255
  x = torch.nn.functional.interpolate(
    x, (height, width), mode="bilinear", antialias=True
  )
  return x[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
  ("shape", "resized", "corner"),
  [
    # The longer side is rounded down: 256 * 451 / 300 = 384.85.
    ((300, 451), (256, 384), (16, 80)),
    ((640, 480), (341, 256), (58, 16)),  # 58.5 to the even number
    ((100, 130), (256, 332), (16, 54)),  # enlarged
  ],
)
def test_photographs_are_resized_and_cropped_as_by_pytorch(
  shape, resized, corner, tmp_path
):
  pixels = _pixels(*shape)
  path = tmp_path / "photo.png"
  Image.fromarray(pixels).save(path)
  ours = photographs.read_photograph(path)
  assert ours.shape == (224, 224, 3) and ours.dtype == np.float32
  assert 0 <= ours.min() and ours.max() <= 1
  top, left = corner
  expected = _interpolated(pixels, *resized)
  expected = expected[top : top + 224, left : left + 224]
  # Pillow rounds to 8 bits after each axis: at most one level and a bit.
  assert np.abs(ours - expected).max() < 1.2 / 255


def test_grey_rotated_and_small_photographs_are_read(tmp_path):
  pixels = _pixels(40, 60)
  grey = tmp_path / "grey.png"
  Image.fromarray(pixels[..., 0]).save(grey)
  image = photographs.read_photograph(grey, resize=20, crop=10)
  assert image.shape == (10, 10, 3)
  assert (image == image[..., :1]).all()

  plain, turned = tmp_path / "plain.png", tmp_path / "turned.png"
  Image.fromarray(pixels).save(plain)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be shown turned a quarter clockwise
  Image.fromarray(np.rot90(pixels)).save(turned, exif=exif)
  np.testing.assert_array_equal(
    photographs.read_photograph(turned, resize=20, crop=10),
    photographs.read_photograph(plain, resize=20, crop=10),
  )


def test_what_cannot_be_read_is_named(tmp_path):
  with pytest.raises(UserError, match=r"missing\.jpg: No such file"):
    photographs.read_photograph(tmp_path / "missing.jpg")
  text = tmp_path / "text.jpg"
  text.write_text("hello")
  with pytest.raises(UserError, match=r"text\.jpg: not an image"):
    photographs.read_photograph(text)
  with pytest.raises(UserError, match="crop: 300; allowed: at most resize"):
    photographs.read_photograph(text, crop=300)
  with pytest.raises(UserError, match="resize: 0"):
    photographs.read_photograph(text, resize=0)
