"""Batches of a stage as functions of the step: indices and extra images."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from atat_jax import sharding
from atat_jax.data import Extra, Split, batches
from atat_jax.data.streamed import TrainingBatches

# Seeds of stages are below 2**32, so that no stage has this stream.
_EXTRA_STREAM = 1 << 32


class BatchDraws:
  """Draws the batches of a stage; the same step always has the same batch.

  With extra images a batch has fewer images of the training split, which then
  takes more steps to be gone through; an epoch remains as many steps as
  without.

  Args:
    seed: Seed of the stage.
    num_examples: Number of training images.
    batch_size: Number of images in a batch, extra images included.
    num_extra: Number of extra images in a batch.
    extra: Extra images, or None.
    mesh: The devices.
    streamed: Batches that are read from the disk; None: the training split is
      on the device. Their images are drawn as extra ones, and there are no
      others.
  """

  def __init__(
    self,
    seed: int,
    *,
    num_examples: int,
    batch_size: int,
    num_extra: int,
    extra: Extra | None,
    mesh: Mesh,
    streamed: TrainingBatches | None = None,
  ):
    self._streamed = streamed
    self._seed, self._extra, self._mesh = seed, extra, mesh
    self._num_examples, self._num_extra = num_examples, num_extra
    self._batch_size = batch_size

  def _indices(self, number: int) -> np.ndarray:
    return batches.train_indices(
      self._seed,
      number,
      num_examples=self._num_examples,
      batch_size=self._batch_size - self._num_extra,
    )

  def _rows(self, number: int, extra: Extra) -> np.ndarray:
    """Extra images of a batch by number; they have epochs of their own."""
    return batches.train_indices(
      self._seed + _EXTRA_STREAM,
      number,
      num_examples=len(extra),
      batch_size=self._num_extra,
    )

  def _images(self, number: int) -> Split | None:
    """Extra images of a batch, or all that are streamed."""
    if self._streamed is not None:
      return self._streamed.batch(number)
    if self._extra is None:
      return None
    return self._extra.take(self._rows(number, self._extra))

  def describe(self, number: int) -> dict[str, list[int]]:
    """Describes a batch as JSON: its examples by number.

    Args:
      number: Number of the batch, from 0.

    Returns:
      "indices" in the training split, and "extra" among the extra images where
      there are any.
    """
    found = {"indices": self._indices(number).tolist()}
    if self._extra is not None:
      found["extra"] = self._rows(number, self._extra).tolist()
    return found

  def _put(
    self,
    draw: Callable[[int], Any],
    numbers: Sequence[int],
    size: int,
    put: Callable[..., Any] = sharding.put_batch,
  ) -> Any:
    """Puts what each batch draws on the devices: [B, ...], or [size, B, ...]."""
    found = [draw(number) for number in numbers]
    if size == 1:
      axis, (rows,) = 0, found
    else:  # the last batch fills the rest, which no step reads
      found += found[-1:] * (size - len(found))
      axis, rows = 1, jax.tree.map(lambda *arrays: np.stack(arrays), *found)
    return jax.tree.map(functools.partial(put, self._mesh, axis=axis), rows)

  def indices(self, numbers: Sequence[int], size: int = 1) -> jax.Array:
    """Indices into the training split.

    Args:
      numbers: Numbers of the batches, from 0; at most `size`.
      size: Number of batches in the array.

    Returns:
      int32 [M] on the devices, or [size, M] where size > 1.
    """
    return self._put(self._indices, numbers, size)

  def images(self, numbers: Sequence[int], size: int = 1) -> Split | None:
    """Extra images.

    Args:
      numbers: Numbers of the batches, from 0; at most `size`.
      size: Number of batches in the arrays.

    Returns:
      Images uint8 [E, H, W, C] and labels [E] on the devices, with an axis
      [size, ...] in front where size > 1; None without extra images.
    """
    return self._put(self._images, numbers, size, self._put_images)

  def follow(self, numbers: Sequence[int], size: int = 1) -> Split | None:
    """Extra or streamed images; those of the next batches are read ahead.

    Args:
      numbers: Numbers of the batches, from 0, one after the other; best those
        after the numbers of the last call. At most `size`.
      size: Number of batches in the arrays.

    Returns:
      The result of `images`.
    """
    draw = self._images if self._streamed is None else self._streamed.follow
    return self._put(draw, numbers, size, self._put_images)

  def close(self) -> None:
    """Ends threads and processes that read ahead."""
    if self._streamed is not None:
      self._streamed.close()

  @property
  def _put_images(self) -> Callable[..., Any]:
    """Function that puts images on the devices; streamed ones are in parts."""
    if self._streamed is None:
      return sharding.put_batch
    return functools.partial(_put_rows, self._batch_size)


def _put_rows(
  batch_size: int, mesh: Mesh, array: np.ndarray, *, axis: int
) -> jax.Array:
  return sharding.put_rows(mesh, array, batch_size, axis=axis)
