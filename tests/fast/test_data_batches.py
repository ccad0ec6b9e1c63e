"""Examples of each batch, and the walk over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import sharding
from atat_jax.data import batches
from atat_jax.errors import UserError


def epoch_of(seed, epoch, num_examples=103, batch_size=10):
  per_epoch = num_examples // batch_size
  return np.concatenate(
    [
      batches.train_indices(
        seed, step, num_examples=num_examples, batch_size=batch_size
      )
      for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
    ]
  )


def test_an_epoch_shows_every_example_at_most_once_and_drops_the_tail():
  indices = epoch_of(seed=3, epoch=2)
  assert indices.dtype == np.int32
  assert len(indices) == len(set(indices.tolist())) == 100
  assert indices.min() >= 0
  assert indices.max() < 103


def test_an_epoch_shows_all_examples_when_the_batch_size_divides():
  indices = epoch_of(seed=3, epoch=5, num_examples=60, batch_size=12)
  assert sorted(indices.tolist()) == list(range(60))


def test_dropped_examples_change_between_epochs():
  seen = set(epoch_of(0, 0).tolist()) | set(epoch_of(0, 1).tolist())
  assert len(seen) > 100


def test_epochs_and_seeds_differ():
  orders = [epoch_of(*key).tolist() for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
  assert len({tuple(order) for order in orders}) == 4


def test_a_batch_does_not_depend_on_earlier_calls():
  sizes = dict(num_examples=1000, batch_size=32)
  steps = [5, 200, 31, 30, 5, 4000, 200]
  first = [batches.train_indices(9, step, **sizes).tolist() for step in steps]
  batches._epoch_permutation.cache_clear()
  again = [
    batches.train_indices(9, step, **sizes).tolist() for step in steps[::-1]
  ]
  assert first == again[::-1]


def test_first_positions_are_uniform():
  # 2,000 epochs of 8 examples: each is first 250 times, standard deviation 15.
  first = [
    batches.train_indices(seed, 0, num_examples=8, batch_size=1)[0]
    for seed in range(2000)
  ]
  assert np.abs(np.bincount(first, minlength=8) - 250).max() < 75


def test_a_batch_cannot_be_changed_in_the_cache():
  batch = batches.train_indices(0, 0, num_examples=8, batch_size=8)
  with pytest.raises(ValueError, match="read-only"):
    batch[0] = 0


@pytest.mark.parametrize(
  ("seed", "step", "num_examples", "batch_size", "message"),
  [
    (-1, 0, 10, 2, "seed: -1"),
    (2**64, 0, 10, 2, "seed: 18446744073709551616"),
    (0, -1, 10, 2, "step: -1"),
    (0, 0, 10, 11, "batch_size: 11; allowed: at most 10"),
    (0, 0, 10, 0, "batch_size: 0"),
    (0, 0, 0, 1, "num_examples: 0"),
  ],
)
def test_bad_arguments_of_train_indices_are_named(
  seed, step, num_examples, batch_size, message
):
  with pytest.raises(UserError, match=message):
    batches.train_indices(
      seed, step, num_examples=num_examples, batch_size=batch_size
    )


@pytest.mark.parametrize(
  ("num_examples", "batch_size"),
  [(10_000, 1024), (10, 5), (11, 5), (1, 1), (3, 8), (7, 1)],
)
def test_eval_shows_every_example_exactly_once(num_examples, batch_size):
  indices, mask = batches.eval_batches(num_examples, batch_size)
  assert indices.shape == mask.shape
  assert indices.shape == (np.ceil(num_examples / batch_size), batch_size)
  assert (indices.dtype, mask.dtype) == (np.int32, np.bool_)
  assert indices[mask].tolist() == list(range(num_examples))


def test_eval_fills_up_with_the_first_examples():
  indices, mask = batches.eval_batches(5, 3)
  assert indices.tolist() == [[0, 1, 2], [3, 4, 0]]
  assert mask.tolist() == [[True] * 3, [True, True, False]]
  indices, _ = batches.eval_batches(2, 5)
  assert indices.tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_bad_sizes_of_eval_batches_are_named(sizes):
  with pytest.raises(UserError, match=": 0; allowed: an integer > 0"):
    batches.eval_batches(*sizes)


def _numbered(count):
  """Images and labels that differ in every number."""
  images = np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)
  return images, np.arange(count, dtype=np.int32) + 1000


def _products(xp, images, labels, axis):
  """A pytree of arrays that have the examples along `axis`."""
  scaled = images * labels[:, None, None]
  return {
    "scaled": xp.moveaxis(scaled, 0, axis),
    "others": (xp.moveaxis(images[:, :1], 0, axis),),
  }


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
  ("count", "batch_size"), [(16, 8), (13, 8), (3, 8), (7, 3), (5, 1)]
)
def test_map_batches_equals_a_loop_over_examples(
  count, batch_size, axis, num_devices, eight_devices
):
  images, labels = _numbered(count)
  found = batches.map_batches(
    lambda _, *batch: _products(jnp, *batch, axis),
    images,
    labels,
    batch_size=batch_size,
    mesh=sharding.make_mesh(eight_devices[:num_devices]),
    axis=axis,
  )
  each = [
    _products(np, images[i : i + 1], labels[i : i + 1], axis)
    for i in range(count)
  ]
  for actual, parts in (
    (found["scaled"], [x["scaled"] for x in each]),
    (found["others"][0], [x["others"][0] for x in each]),
  ):
    assert isinstance(actual, np.ndarray)
    np.testing.assert_array_equal(actual, np.concatenate(parts, axis))


def test_map_batches_splits_full_batches_over_the_devices(eight_devices):
  """Every call has a whole batch, filled up with the first examples."""
  images, labels = _numbered(20)
  calls = []

  def function(number, images, labels):
    assert len(images.sharding.device_set) == 8
    assert images.sharding.shard_shape(images.shape) == (1, 2, 3)
    calls.append((number, np.asarray(labels).tolist()))
    return labels

  found = batches.map_batches(
    function,
    images,
    labels,
    batch_size=8,
    mesh=sharding.make_mesh(eight_devices),
  )
  assert found.tolist() == labels.tolist()
  order = [*labels.tolist(), *labels[:4].tolist()]
  assert calls == [(i, order[8 * i : 8 * i + 8]) for i in range(3)]


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (4, 0)])
def test_map_batches_refuses_empty_sizes(count, batch_size, eight_devices):
  with pytest.raises(UserError, match=": 0; allowed: an integer > 0"):
    batches.map_batches(
      lambda _, x: x,
      np.zeros((count, 2)),
      batch_size=batch_size,
      mesh=sharding.make_mesh(eight_devices[:1]),
    )


def test_who_watches_is_told_of_every_batch_until_the_end():
  mesh, told = sharding.make_mesh(jax.devices()[:1]), []

  def walk():
    return batches.map_batches(
      lambda number, x: x + number, np.arange(10.0), batch_size=4, mesh=mesh
    )

  alone = walk()
  with batches.watch(lambda *counts: told.append(counts)):
    watched = walk()
  walk()
  assert told == [(4, 10), (8, 10), (10, 10)]
  np.testing.assert_array_equal(alone, watched)
