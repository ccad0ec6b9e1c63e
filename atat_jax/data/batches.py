"""Examples of each batch: pure functions, no iterator, no state.

A resumed run needs the step and nothing else, and every process can compute
the whole batch and take its part.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from atat_jax import checks, sharding
from atat_jax.data import base
from atat_jax.errors import UserError
from atat_jax.typing import PyTree


# Training asks for the same epoch many times; a few more are kept for callers
# that look across its end.
@functools.lru_cache(maxsize=4)
def _epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  order = base.permutation(num_examples, (seed, epoch)).astype(np.int32)
  order.setflags(write=False)  # shared by all callers
  return order


def _check_sizes(num_examples: int, batch_size: int) -> None:
  checks.count("num_examples", num_examples)
  checks.count("batch_size", batch_size)


def train_indices(
  seed: int, step: int, *, num_examples: int, batch_size: int
) -> np.ndarray:
  """Returns the examples of one training step.

  An epoch is a permutation of all examples, drawn anew from `(seed, epoch)`;
  examples that do not fill a batch at its end are left out of that epoch.

  Args:
    seed: Seed of the run, 0 to 2**64 - 1.
    step: Number of the step, from 0, not reset between epochs.
    num_examples: Size of the training split.
    batch_size: Global batch size, B.

  Returns:
    int32 `[B]`, read-only, without repetition.

  Raises:
    UserError: A negative seed or step, or `batch_size` not in
      `1 .. num_examples`.
  """
  _check_sizes(num_examples, batch_size)
  if batch_size > num_examples:
    raise UserError(
      f"batch_size: {batch_size}; allowed: at most {num_examples}, the size of"
      " the training split"
    )
  checks.integer("seed", seed, 0, 2**64 - 1)
  checks.integer("step", step)
  epoch, batch = divmod(step, num_examples // batch_size)
  order = _epoch_permutation(seed, epoch, num_examples)
  return order[batch * batch_size : (batch + 1) * batch_size]


def eval_batches(
  num_examples: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns batches that show every example exactly once under the mask.

  The last batch is filled up from the first examples again, so that statistics
  over a batch remain those of real images.

  Args:
    num_examples: Size of the split, N.
    batch_size: Batch size, B; may exceed N.

  Returns:
    Indices int32 `[ceil(N / B), B]`, and the mask, bool of the same shape:
    False where an example only fills the batch.

  Raises:
    UserError: A size is below 1.
  """
  _check_sizes(num_examples, batch_size)
  num_batches = -(-num_examples // batch_size)
  position = np.arange(num_batches * batch_size).reshape(num_batches, -1)
  return (position % num_examples).astype(np.int32), position < num_examples


_listeners: list[Callable[[int, int], object]] = []


@contextlib.contextmanager
def watch(listener: Callable[[int, int], object]) -> Iterator[None]:
  """Has somebody told of every batch that `map_batches` is done with.

  Args:
    listener: Function of the number of examples done, and of all of them; work
      that is no walk through batches calls `tell`.
  """
  _listeners.append(listener)
  try:
    yield
  finally:
    _listeners.remove(listener)


def tell(done: int, count: int) -> None:
  """Tells whoever watches that a part of some work is done.

  Args:
    done: Number of examples done.
    count: Number of all of them; with these, a pass over them ends.
  """
  for listener in _listeners:
    listener(done, count)


def map_batches(
  function: Callable[..., PyTree],
  *arrays: np.ndarray,
  batch_size: int,
  mesh: Mesh,
  axis: int = 0,
) -> PyTree:
  """Applies a function batch by batch and joins its results on the host.

  The last batch is filled up with the first examples again, and their results
  are dropped.

  Args:
    function: Function of the number of the batch and of the batches on the
      devices, to a pytree of arrays that have the batch along `axis`.
    *arrays: Host arrays [N, ...], all of one length.
    batch_size: Number of examples at a time, B; may exceed N.
    mesh: Devices over which each batch is split.
    axis: Axis of the examples in the results.

  Returns:
    The pytree, its leaves numpy arrays with N along `axis`.

  Raises:
    UserError: A size is below 1.
  """
  count = len(arrays[0])
  indices, _ = eval_batches(count, batch_size)
  results = []
  for number, rows in enumerate(indices):
    batch = [sharding.put_batch(mesh, array[rows]) for array in arrays]
    results.append(sharding.to_host(mesh, function(number, *batch)))
    tell(min((number + 1) * batch_size, count), count)
  return jax.tree.map(
    lambda *parts: np.concatenate(parts, axis).take(range(count), axis),
    *results,
  )
