"""Pictures of every kind of pixel against what their values mean."""

import io

import numpy as np
import pytest
from PIL import Image

from atat_jax.data import photographs, pictures
from atat_jax.errors import UserError

RAMP = np.linspace(0, 1, 48).reshape(6, 8)
"""Grey values of a picture."""


def decoded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, format=kind, **options)
  return np.asarray(pictures.decode_bytes(file.getvalue()))


@pytest.mark.parametrize(
  ("dtype", "largest", "kind"),
  [
    (np.uint16, 65_535, "PNG"),
    (np.uint16, 65_535, "TIFF"),
    (np.int32, 65_535, "TIFF"),
    (np.float32, 1.0, "TIFF"),
    (np.uint8, 255, "PNG"),
  ],
)
def test_grey_values_are_scaled_by_their_own_range(dtype, largest, kind):
  values = (RAMP * largest).astype(dtype)
  found = decoded(Image.fromarray(values), kind)
  assert found.dtype == np.uint8 and found.shape == RAMP.shape
  np.testing.assert_allclose(found / 255, values / largest, atol=0.5 / 255)


def test_a_grey_photograph_of_16_bits_is_not_white(tmp_path):
  path = tmp_path / "x.png"
  Image.fromarray(np.full((9, 9), 30_000, np.uint16)).save(path)
  image = photographs.read_photograph(path, resize=8, crop=8)
  np.testing.assert_allclose(image, 30_000 / 65_535, atol=0.5 / 255)


@pytest.mark.parametrize(
  "values",
  [
    np.full((4, 4), 1.5, np.float32),
    np.full((4, 4), -0.1, np.float32),
    np.full((4, 4), np.nan, np.float32),
    np.full((4, 4), 70_000, np.int32),
  ],
)
def test_numbers_without_a_known_range_are_refused(values, tmp_path):
  path = tmp_path / "x.tiff"
  Image.fromarray(values).save(path)
  with pytest.raises(UserError, match=r"x\.tiff: not an image \(ValueError"):
    photographs.read_photograph(path, resize=4, crop=4)


def test_palettes_cmyk_and_alpha_become_colours():
  colour = Image.fromarray(
    np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], "u1")
  )
  for kind, image in (
    ("PNG", colour.convert("P", palette=Image.Palette.ADAPTIVE)),
    ("TIFF", colour.convert("CMYK")),
  ):
    np.testing.assert_array_equal(decoded(image, kind), np.asarray(colour))
  alpha = colour.copy()
  alpha.putalpha(100)
  found = decoded(alpha, "PNG")
  np.testing.assert_array_equal(found[..., :3], np.asarray(colour))
  assert (found[..., 3] == 100).all()
  palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
  assert decoded(palette, "PNG", transparency=0).shape == (2, 2, 4)


def test_pictures_are_upright():
  pixels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
  for turned in (np.rot90(pixels), np.rot90(pixels.astype(np.uint16) * 257)):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    found = decoded(Image.fromarray(turned.copy()), "PNG", exif=exif)
    np.testing.assert_array_equal(found, pixels)


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch):
  monkeypatch.setattr(pictures, "MOST_PIXELS", 100)
  with pytest.raises(
    ValueError, match=r"11 x 10, .* 110 pixels; allowed: at mo"
  ):
    decoded(Image.fromarray(np.zeros((10, 11), np.uint8)), "PNG")
