import numpy as np
import pytest

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


def test_all_examples_when_the_batch_size_divides():
  indices = epoch_of(seed=3, epoch=5, num_examples=60, batch_size=12)
  assert sorted(indices.tolist()) == list(range(60))


def test_dropped_examples_change_between_epochs():
  seen = set(epoch_of(0, 0).tolist()) | set(epoch_of(0, 1).tolist())
  assert len(seen) > 100


def test_epochs_and_seeds_differ():
  orders = [epoch_of(*key).tolist() for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
  assert len({tuple(order) for order in orders}) == 4


def test_pure_whatever_was_asked_before():
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
    (-1, 0, 10, 2, "seed=-1"),
    (2**64, 0, 10, 2, "seed=18446744073709551616"),
    (0, -1, 10, 2, "step=-1"),
    (0, 0, 10, 11, "batch_size=11: must be at most 10"),
    (0, 0, 10, 0, "batch_size=0"),
    (0, 0, 0, 1, "num_examples=0"),
  ],
)
def test_train_errors(seed, step, num_examples, batch_size, message):
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
def test_eval_errors(sizes):
  with pytest.raises(UserError, match="=0: must be at least 1"):
    batches.eval_batches(*sizes)
