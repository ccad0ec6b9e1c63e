"""RandAugment against the definitions of its operations."""

import numpy as np
import pytest
from PIL import Image

from atat_jax.data import rand_augment

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)


def operate(name, level, sign=1, pixels=PIXELS):
  image = Image.fromarray(pixels)
  found = rand_augment.OPERATIONS[name](image, level, sign)
  return np.asarray(found).astype(int)


def grey(x):
  """Brightness as ITU-R 601-2 defines it."""
  return x @ np.array([0.299, 0.587, 0.114])


def stretched(x):
  low, high = x.min((0, 1)), x.max((0, 1))
  return (x - low) * 255 / (high - low)


# At level 0.9, which magnitude 9 has on average.
POINTWISE = {
  "invert": lambda x: 255 - x,
  "posterize": lambda x: x // 128 * 128,  # 4 - int(3.6) = 1 bit
  "solarize": lambda x: np.where(x < 256 - 230, x, 255 - x),
  "solarize_add": lambda x: np.where(x < 128, np.minimum(x + 99, 255), x),
  "brightness": lambda x: 1.81 * x,
  "contrast": lambda x: 1.81 * x - 0.81 * grey(x).mean().round(),
  "color": lambda x: 1.81 * x - 0.81 * grey(x).round()[..., None],
  "auto_contrast": stretched,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_an_operation_on_values_is_its_formula(name):
  pixels = PIXELS // 2 + 40 if name == "auto_contrast" else PIXELS
  wanted = POINTWISE[name](pixels.astype(float)).clip(0, 255)
  found = operate(name, 0.9, pixels=pixels)
  np.testing.assert_allclose(found, wanted, atol=1.01)


def test_strength_grows_with_the_level_and_goes_both_ways():
  for name in ("brightness", "contrast", "color", "sharpness"):
    changes = [
      np.abs(operate(name, level, sign) - PIXELS.astype(int)).mean()
      for sign in (1, -1)
      for level in (0.0, 0.3, 0.9)
    ]
    assert changes[0] == changes[3] == 0, name
    assert changes[1] < changes[2] and changes[4] < changes[5], name
  darker = operate("brightness", 1.0, -1)
  np.testing.assert_allclose(darker, 0.1 * PIXELS, atol=1.01)
  assert not operate("posterize", 1.0).any()
  assert np.array_equal(operate("solarize", 0.0), PIXELS)


def test_equalized_values_are_spread_evenly():
  values = np.arange(64, dtype=np.uint8).repeat(400).reshape(160, 160)
  found = operate("equalize", 0.9, pixels=np.stack([values] * 3, -1))
  places = np.unique(found)
  assert places[0] <= 4 and places[-1] == 255 and len(places) == 64
  assert set(np.diff(places)[:-1]) == {4, 5} or set(np.diff(places)) == {4}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_ramp_is_moved_as_its_coordinates(sign):
  """Interpolation of a linear function is exact, but at the border."""
  side = 40
  y, x = np.mgrid[:side, :side] + 0.5
  centre = side / 2

  def ramp(x, y):
    return 60 + 2 * x + 1.5 * y

  pixels = np.stack([np.round(ramp(x, y))] * 3, -1).astype(np.uint8)
  angle = np.deg2rad(27 * sign)
  cosine, sine = np.cos(angle), np.sin(angle)
  u, v = x - centre, y - centre
  sources = {
    "shear_x": (x + 0.27 * sign * y, y),
    "shear_y": (x, y + 0.27 * sign * x),
    "translate_x": (x + 0.405 * sign * side, y),
    "translate_y": (x, y + 0.405 * sign * side),
    # Counter-clockwise, as the picture is seen.
    "rotate": (centre + cosine * u - sine * v, centre + sine * u + cosine * v),
  }
  for name, (a, b) in sources.items():
    found = operate(name, 0.9, sign, pixels)[..., 0]
    inside = (a > 2) & (a < side - 2) & (b > 2) & (b < side - 2)
    outside = (a < -1) | (a > side + 1) | (b < -1) | (b > side + 1)
    assert inside.sum() > 300 and outside.sum() > 30, name
    np.testing.assert_allclose(
      found[inside], ramp(a, b)[inside], atol=1.6, err_msg=name
    )
    assert not found[outside].any(), name


def test_operations_and_magnitudes_have_the_published_frequencies(monkeypatch):
  calls = []
  monkeypatch.setattr(
    rand_augment,
    "OPERATIONS",
    {
      name: lambda image, *rest, name=name: calls.append((name, *rest)) or image
      for name in rand_augment.OPERATIONS
    },
  )
  total = 6000
  draws = np.random.default_rng(0).random((total, rand_augment.NUM_DRAWS))
  for row in draws.tolist():
    rand_augment.augment(None, row, 9.0)
  # Two layers, each with probability 1/2; five standard errors.
  assert abs(len(calls) / total - 1) < 5 * np.sqrt(0.5 / total)
  names = [name for name, _, _ in calls]
  counts = np.array([names.count(name) for name in rand_augment.OPERATIONS])
  assert len(counts) == 15
  assert np.abs(counts - len(calls) / 15).max() < 5 * np.sqrt(len(calls) / 15)
  levels = np.array([level for _, level, _ in calls])
  # Normal with deviation 0.05 around 0.9, cut off at 1: 2.3 % of it.
  assert abs(np.median(levels) - 0.9) < 0.005
  assert abs(np.quantile(levels, 0.16) - 0.85) < 0.005
  assert abs((levels == 1).mean() - 0.0228) < 0.01
  assert abs(np.mean([sign for _, _, sign in calls])) < 0.07
