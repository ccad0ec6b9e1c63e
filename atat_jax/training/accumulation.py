"""Gradient accumulation: a batch in parts, one after another, to save memory.

A step remains a batch of B images and one update: schedules, logs and resuming
count the same steps. BatchNorm sees one part at a time, and each part moves the
running statistics.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from atat_jax.objectives import Batch, Outcome
from atat_jax.typing import Array, PyTree, Scalar

Part = Callable[[PyTree, Array, Batch], tuple[PyTree, Outcome]]
"""(batch_stats, key, batch of b) to a gradient and an outcome."""


def split(x: Array, parts: int) -> Array:
  """Splits [B, ...] into [parts, B / parts, ...].

  Part m has the rows m, m + parts, ..., so that every device keeps its share of
  every part, and the extra images, which come last in a batch, are spread over
  all parts.
  """
  shape = (x.shape[0] // parts, parts, *x.shape[1:])
  return x.reshape(shape).swapaxes(0, 1)


def join(x: Array) -> Array:
  """Undoes `split`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def accumulate(
  function: Part,
  batch_stats: PyTree,
  key: Array,
  batch: Batch,
  *,
  parts: int,
  params: PyTree,
) -> tuple[PyTree, Outcome]:
  """Averages the gradient over the parts of a batch.

  Args:
    function: Gradient and outcome of a part.
    batch_stats: Running statistics before the first part; each part starts from
      those of the part before it.
    key: Key of the attack; part m has the m-th key split from it.
    batch: B images, B a multiple of `parts`.
    parts: Number of parts; 1: `function` of the whole batch.
    params: Tree with the structure of the gradient.

  Returns:
    The mean gradient; the outcome in the order of the batch, with the
    statistics after the last part.
  """
  if parts == 1:
    return function(batch_stats, key, batch)
  each = (split(x, parts) for x in (batch.images, batch.labels, batch.targets))
  (stats, total), outcomes = jax.lax.scan(
    functools.partial(_add_part, function, batch.epsilon_scale),
    (batch_stats, jax.tree.map(jnp.zeros_like, params)),
    (jax.random.split(key, parts), *each),
  )
  outcome = jax.tree.map(join, outcomes)._replace(batch_stats=stats)
  return jax.tree.map(lambda x: x / parts, total), outcome


def _add_part(
  function: Part,
  epsilon_scale: Scalar,
  carry: tuple[PyTree, PyTree],
  part: tuple[Array, ...],
) -> tuple[tuple[PyTree, PyTree], Outcome]:
  """Adds the gradient of one part; the carry is (statistics, sum)."""
  stats, total = carry
  key, images, labels, targets = part
  gradient, outcome = function(
    stats, key, Batch(images, labels, targets, epsilon_scale)
  )
  total = jax.tree.map(jnp.add, total, gradient)
  return (outcome.batch_stats, total), outcome._replace(batch_stats=None)
