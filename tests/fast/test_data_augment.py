import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quick import jit

from atat_jax.data import augment

pad_crop_flip = jit(augment.pad_crop_flip, static_argnames=("padding", "flip"))


def crop_flip_numpy(images, offsets, flips, padding):
  size = images.shape[1]
  out = []
  for image, (top, left), flip in zip(images, offsets, flips, strict=True):
    margin = (padding, padding)
    padded = np.pad(image, (margin, margin, (0, 0)))
    crop = padded[top : top + size, left : left + size]
    out.append(np.fliplr(crop) if flip else crop)
  return np.stack(out)


def random_batch(dtype, batch=25, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(1, 256, (batch, 12, 12, 3))
  return (images if dtype == np.uint8 else images / 255).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_flip_equals_numpy_at_every_offset(dtype):
  images = random_batch(dtype)
  offsets = np.stack(np.meshgrid(range(5), range(5)), -1).reshape(25, 2)
  flips = np.arange(25) % 2 == 1
  out = jit(augment.crop_flip, static_argnames="padding")(
    jnp.asarray(images),
    jnp.asarray(offsets, jnp.int32),
    jnp.asarray(flips),
    padding=2,
  )
  assert out.dtype == dtype
  np.testing.assert_array_equal(
    out, crop_flip_numpy(images, offsets, flips, padding=2)
  )


def recover(image, out, padding):
  """The offsets and flips that lead from image to out."""
  return {
    (top, left, flip)
    for top in range(2 * padding + 1)
    for left in range(2 * padding + 1)
    for flip in (False, True)
    if (
      crop_flip_numpy(image[None], [(top, left)], [flip], padding)[0] == out
    ).all()
  }


@pytest.mark.parametrize(
  ("padding", "flip"), [(2, True), (2, False), (0, True), (1, True)]
)
def test_random_draws_cover_exactly_what_is_allowed(padding, flip):
  images = random_batch(np.uint8, batch=1)
  count = 400  # 8 of each on average, with 50 outcomes
  out = pad_crop_flip(
    jax.random.key(1),
    jnp.asarray(np.repeat(images, count, axis=0)),
    padding=padding,
    flip=flip,
  )
  unique, times = np.unique(np.asarray(out), axis=0, return_counts=True)
  found = [recover(images[0], image, padding) for image in unique]
  assert all(len(draw) == 1 for draw in found)
  expected = (2 * padding + 1) ** 2 * (1 + flip)
  assert len(found) == expected
  # Uniform: no outcome is more than 5 standard deviations off its mean.
  mean = count / expected
  assert np.abs(times - mean).max() < 5 * np.sqrt(mean)


def test_images_are_drawn_independently():
  out = pad_crop_flip(
    jax.random.key(0), jnp.asarray(random_batch(np.uint8)), padding=2, flip=True
  )
  out = np.asarray(out)
  draws = {
    next(iter(recover(image, changed, 2)))
    for image, changed in zip(random_batch(np.uint8), out, strict=True)
  }
  assert len(draws) > 12


def test_same_key_same_images():
  images = jnp.asarray(random_batch(np.float32))
  a, b, c = (
    pad_crop_flip(jax.random.key(seed), images, padding=4, flip=True)
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(a, b)
  assert (np.asarray(a) != np.asarray(c)).any()


def test_without_crop_and_flip_images_are_returned_as_they_are():
  images = jnp.asarray(random_batch(np.uint8))
  key = jax.random.key(0)
  assert augment.pad_crop_flip(key, images, padding=0, flip=False) is images


def test_crops_are_not_taken_one_after_the_other():
  compiled = (
    jax.jit(augment.crop_flip, static_argnames="padding")
    .lower(
      jnp.zeros((128, 32, 32, 3), jnp.uint8),
      jnp.zeros((128, 2), jnp.int32),
      jnp.zeros(128, bool),
      padding=4,
    )
    .compile()
  )
  assert " while(" not in compiled.as_text()


def test_eight_devices_need_no_communication_and_agree_with_one(eight_devices):
  mesh = jax.sharding.Mesh(np.array(eight_devices), ("data",))
  batch = NamedSharding(mesh, PartitionSpec("data"))
  images = random_batch(np.uint8, batch=64)
  key = jax.random.key(0)

  def run(key, images):
    return augment.pad_crop_flip(key, images, padding=4, flip=True)

  sharded = jax.device_put(images, batch)
  step = jax.jit(run, out_shardings=batch).lower(key, sharded).compile()
  one = jax.jit(run)(key, jax.device_put(images, eight_devices[0]))
  np.testing.assert_array_equal(step(key, sharded), one)
  for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert word not in step.as_text()
