"""Corruptions: their formulas, and what all fifteen have in common."""

import colorsys
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import fft, ndimage

from atat_jax.data import corruptions
from atat_jax.data.corruptions import blur, digital, geometry, noise, weather
from atat_jax.errors import UserError
from atat_jax.runs import corrupted

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)

# The others take a second each to compile.
QUICK = (
  "impulse_noise",
  "motion_blur",
  "fog",
  "brightness",
  "pixelate",
  "jpeg_compression",
)
DRAWN = {
  *("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur"),
  *("motion_blur", "snow", "frost", "fog", "elastic_transform"),
}


def pictures(height, width, channels, count=2):
  """Smooth shapes with detail, float32 [count, H, W, C] in [0, 1]."""
  generator = np.random.default_rng(0)
  unit = min(height, width) / 32
  noise_ = generator.random((count, height, width, channels))
  found = 0.45
  for sigma, weight in ((2 * unit, 0.15), (0.7 * unit, 0.12)):
    layer = ndimage.gaussian_filter(noise_, (0, sigma, sigma, 0))
    layer -= layer.mean((1, 2), keepdims=True)
    found = found + weight * layer / layer.std((1, 2), keepdims=True)
  return jnp.asarray(np.clip(found, 0, 1), jnp.float32)


def distance(made, images):
  return float(jnp.sqrt(((made - images) ** 2).mean()))


def corrupted_by(function, image, severity):
  """One image without the clipping of `corrupt`, as float64."""
  made = jax.jit(function)(KEY, jnp.asarray(image, jnp.float32), severity)
  return np.asarray(made, np.float64)


def check(kind, images):
  """What every corruption of these images must be; returns severity 3."""
  found = []
  for severity in corruptions.SEVERITIES:
    made = corruptions.corrupt(KEY, images, kind=kind, severity=severity)
    assert made.shape == images.shape and made.dtype == jnp.float32
    assert bool(jnp.isfinite(made).all())
    assert float(made.min()) >= 0 and float(made.max()) <= 1
    found.append(made)
  distances = [distance(made, images) for made in found]
  assert distances[0] > 0.005
  assert distances == sorted(set(distances)), "a severity does less than before"
  return found[2]


def test_the_kinds_of_the_tables_are_those_that_exist():
  assert tuple(corruptions.CORRUPTIONS) == corrupted.KINDS
  assert corruptions.SEVERITIES == corrupted.SEVERITIES


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
    for kind in corruptions.CORRUPTIONS
  ],
)
def test_a_corruption_grows_with_severity_and_repeats_itself(kind):
  images = pictures(10, 9, 3)
  made = check(kind, images)
  again = corruptions.corrupt(KEY, images, kind=kind, severity=jnp.int32(3))
  np.testing.assert_array_equal(again, made)
  # The number of an image decides, not its place or its batch.
  moved = corruptions.corrupt(
    KEY, images[jnp.array([1, 1])], kind=kind, severity=3, numbers=[1, 7]
  )
  np.testing.assert_allclose(moved[0], made[1], atol=1e-6)
  drawn = distance(moved[0], moved[1]) > 1e-3
  assert drawn == (kind in DRAWN)
  other = corruptions.corrupt(jax.random.key(1), images, kind=kind, severity=3)
  assert (distance(other, made) > 1e-3) == (kind in DRAWN)


@pytest.mark.slow
@pytest.mark.parametrize(
  "shape", [(8, 8, 1), (33, 20, 2), (32, 32, 4), (224, 224, 3)]
)
@pytest.mark.parametrize("kind", corruptions.CORRUPTIONS)
def test_images_of_any_size_and_number_of_channels(kind, shape):
  check(kind, pictures(*shape))


def test_black_and_white_images_stay_finite():
  ends = jnp.stack([jnp.zeros((10, 9, 3)), jnp.ones((10, 9, 3))])
  for kind in QUICK:
    made = corruptions.corrupt(KEY, ends, kind=kind, severity=5)
    assert bool(jnp.isfinite(made).all()), kind


# --- Noise -------------------------------------------------------------------


def test_gaussian_noise_has_the_deviation_of_its_severity():
  made = corrupted_by(noise.gaussian_noise, jnp.full((64, 64, 1), 0.5), 3) - 0.5
  assert abs(float(made.mean())) < 5 * 0.08 / 64
  assert float(made.std()) == pytest.approx(0.08, rel=0.06)


def test_shot_noise_has_the_mean_and_variance_of_photons():
  for value, severity, photons in ((0.5, 3, 100), (0.04, 5, 50)):
    made = corrupted_by(
      noise.shot_noise, jnp.full((64, 64, 1), value), severity
    )
    variance = value / photons
    assert abs(float(made.mean()) - value) < 5 * variance**0.5 / 64
    assert float(made.var()) == pytest.approx(variance, rel=0.15)
    counts = np.asarray(made) * photons
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3)


def test_impulse_noise_hits_its_share():
  made = np.asarray(
    corrupted_by(noise.impulse_noise, jnp.full((99, 99, 1), 0.5), 5)
  )
  error = 5 * (0.035 / 99**2) ** 0.5
  assert abs((made == 0).mean() - 0.035) < error
  assert abs((made == 1).mean() - 0.035) < error
  assert set(np.unique(made)) == {0, 0.5, 1}


# --- Blur --------------------------------------------------------------------


def test_smoothing_is_scipys():
  image = np.asarray(pictures(9, 7, 2)[0], np.float64)
  smoothed = jax.jit(geometry.smoothed, static_argnums=2)
  for sigma in (0.4, 1.3):
    expected = ndimage.gaussian_filter(
      image, (sigma, sigma, 0), mode="reflect", radius=(8, 8, 0)
    )
    made = smoothed(jnp.asarray(image, jnp.float32), sigma, 2.0)
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_a_streak_along_an_axis_is_a_gaussian_of_one_axis():
  image = pictures(20, 18, 1)[0]
  streaked = jax.jit(geometry.streaked, static_argnums=3)
  for angle, axis in ((0.0, 1), (jnp.pi / 2, 0)):
    made = streaked(image, 1.5, angle, 2.0)
    expected = ndimage.gaussian_filter1d(
      np.asarray(image, np.float64), 1.5, axis, mode="reflect", radius=6
    )
    np.testing.assert_allclose(made, expected, atol=2e-3)


def test_defocus_is_the_convolution_with_its_disk():
  image = np.asarray(pictures(32, 34, 1)[0], np.float64)
  steps = np.arange(-8, 9)
  radius = np.hypot(steps[:, None], steps)
  disk = 1 / (1 + np.exp(4 * (radius - 1.6)))
  expected = ndimage.convolve(image[..., 0], disk / disk.sum(), mode="reflect")
  made = corrupted_by(blur.defocus_blur, jnp.asarray(image, jnp.float32), 5)
  np.testing.assert_allclose(made[..., 0], expected, atol=2e-4)


def test_zooming_leaves_the_centre_and_spreads_the_border():
  ramp = jnp.broadcast_to(jnp.arange(32.0)[:, None, None], (32, 32, 1)) / 31
  made = corrupted_by(blur.zoom_blur, ramp, 5)[:, 16, 0]
  factors = 1 / (1 + 0.25 * np.arange(6) / 5)
  expected = 0.5 + (np.asarray(ramp[:, 16, 0]) - 0.5) * factors.mean()
  np.testing.assert_allclose(made, expected, atol=1e-5)


def test_reading_between_pixels_is_linear():
  image = pictures(6, 5, 2)[0]
  rows, columns = geometry.places(image)
  made = jax.jit(geometry.sampled)(image, rows + 0.25, columns)
  below = np.concatenate([image[1:], image[-1:]])
  np.testing.assert_allclose(made, 0.75 * image + 0.25 * below, atol=1e-6)


# --- Weather -----------------------------------------------------------------


def test_brightness_is_colorsys_value():
  image = np.random.default_rng(0).random((4, 5, 3)).astype(np.float32)
  image[0, 0] = 0
  made = np.clip(corrupted_by(weather.brightness, jnp.asarray(image), 4), 0, 1)
  for place in np.ndindex(4, 5):
    hue, saturation, value = colorsys.rgb_to_hsv(*map(float, image[place]))
    expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
    np.testing.assert_allclose(made[place], expected, atol=1e-6)


def plasma(height, width, decay):
  drawn = jax.jit(weather.plasma, static_argnums=(1, 2))
  return np.asarray(drawn(KEY, height, width, decay))


def test_fog_is_its_formula_of_a_fractal():
  image = pictures(12, 9, 3)[0]
  mist = plasma(12, 9, 2.5)[..., None]
  assert mist.min() == 0 and mist.max() == pytest.approx(1)
  top = float(image.max())
  expected = (np.asarray(image) + 0.75 * mist) * top / (top + 0.75)
  np.testing.assert_allclose(
    corrupted_by(weather.fog, image, 3), expected, atol=1e-5
  )


def test_a_fractal_of_larger_decay_is_smoother():
  def roughness(decay):
    found = plasma(40, 40, decay)
    return np.abs(np.diff(found, axis=0)).mean()

  assert roughness(3.0) < 0.7 * roughness(1.5)


# --- Digital -----------------------------------------------------------------


def test_contrast_moves_towards_the_mean_of_a_channel():
  image = np.asarray(pictures(7, 6, 3)[0])
  mean = image.mean((0, 1))
  expected = mean + 0.15 * (image - mean)
  made = corrupted_by(digital.contrast, jnp.asarray(image), 5)
  np.testing.assert_allclose(made, expected, atol=1e-6)


def test_pixels_are_means_of_their_cells():
  image = np.asarray(pictures(6, 9, 1)[0])
  made = corrupted_by(
    digital.pixelate, jnp.asarray(image), 3
  )  # 1.5 pixels a cell
  rows = np.array([[2, 1, 0], [1, 2, 0], [0, 1, 2]]) / 3
  rows[1] = rows[2]  # the centre of the second pixel is where a cell begins
  weights = [np.kron(np.eye(n), rows) for n in (2, 3)]
  expected = weights[0] @ image[..., 0] @ weights[1].T
  np.testing.assert_allclose(made[..., 0], expected, atol=1e-6)


def test_blocks_are_quantised_in_the_cosine_transform():
  levels = np.random.default_rng(0).uniform(-128, 127, (16, 8, 1))
  table = np.arange(1, 65).reshape(8, 8)
  expected = np.empty((16, 8))
  for start in (0, 8):
    block = slice(start, start + 8)
    spectrum = fft.dctn(levels[block, :, 0], norm="ortho")
    spectrum = np.round(spectrum / table) * table
    expected[block] = fft.idctn(spectrum, norm="ortho")
  made = jax.jit(digital._planes)(jnp.asarray(levels, jnp.float32), table)[
    ..., 0
  ]
  difference = np.abs(made - np.clip(expected.round(), -128, 127))
  assert (difference > 0.5).mean() < 0.02 and difference.max() <= 1


def encoded(image, quality):
  file = io.BytesIO()
  Image.fromarray(image).save(file, "jpeg", quality=quality)
  return Image.open(file)


def test_jpeg_is_that_of_libjpeg():
  quality, severity = 40, 5
  image = np.asarray(pictures(33, 30, 3)[0] * 255).round().astype(np.uint8)
  tables = encoded(image, quality).quantization
  for number, table in enumerate((digital._LUMINANCE, digital._CHROMINANCE)):
    made = digital.quantisation(table, jnp.float32(quality))
    assert np.asarray(made).ravel().tolist() == list(tables[number])
  for pixels in (image, image[..., :1]):
    expected = np.asarray(encoded(pixels.squeeze(), quality), np.float64)
    made = corrupted_by(digital.jpeg_compression, pixels / 255, severity)
    difference = 255 * made.clip(0, 1) - expected.reshape(made.shape)
    assert np.abs(difference).mean() < 1
    assert np.abs(expected.reshape(made.shape) - pixels).mean() > 8


@pytest.mark.parametrize("numbers", [[-1, 0], [0, 2**40]])
def test_numbers_that_would_be_those_of_other_images_are_refused(numbers):
  with pytest.raises(UserError, match=r"numbers: .*; allowed: 0 to 2147483647"):
    corruptions.corrupt(
      KEY, pictures(4, 4, 3)[:2], kind="fog", severity=1, numbers=numbers
    )
