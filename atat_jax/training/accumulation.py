"""Gradient accumulation: a batch in parts, one after another, for memory.

A step remains a batch of B images and one update: schedules, logs and resuming
count the same steps. BatchNorm sees one part at a time, and each part moves the
running statistics.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from atat_jax.objectives import Batch, Outcome
from atat_jax.typing import Array, PyTree

Part = Callable[[PyTree, Array, Batch], tuple[PyTree, Outcome]]
"""(batch_stats, key, batch of b) to a gradient and an outcome."""


def split(x: Array, parts: int) -> Array:
  """[B, ...] to [parts, B / parts, ...]; part m has the rows m, m + parts, ...

  So every device keeps its share of every part, and extra images, which stand
  at the end of a batch, come into each.
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
  """The mean gradient of all parts.

  Args:
    function: What is computed for a part.
    batch_stats: Running statistics; each part goes on from the last one's.
    key: Of the attack; part m has the m-th key split from it.
    batch: B images, B a multiple of `parts`.
    parts: Their number; 1: `function` itself.
    params: What the gradient has the structure of.

  Returns:
    The gradient; the outcome in the order of the batch, with the statistics
    after the last part.
  """
  if parts == 1:
    return function(batch_stats, key, batch)

  def body(
    carry: tuple[PyTree, PyTree], part: tuple[Array, ...]
  ) -> tuple[tuple[PyTree, PyTree], Outcome]:
    stats, total = carry
    part_key, images, labels, targets = part
    gradient, outcome = function(
      stats, part_key, Batch(images, labels, targets, batch.epsilon_scale)
    )
    total = jax.tree.map(jnp.add, total, gradient)
    return (outcome.batch_stats, total), outcome._replace(batch_stats=None)

  each = (split(x, parts) for x in (batch.images, batch.labels, batch.targets))
  (stats, total), outcomes = jax.lax.scan(
    body,
    (batch_stats, jax.tree.map(jnp.zeros_like, params)),
    (jax.random.split(key, parts), *each),
  )
  outcome = jax.tree.map(join, outcomes)._replace(batch_stats=stats)
  return jax.tree.map(lambda x: x / parts, total), outcome
