"""Metrics as sums and counts, so that means are exact whatever the batches."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from atat_jax.typing import Array

Sums = dict[str, Array]
"""Name to float32 [2]: the sum over examples and their number."""


def zeros(names: tuple[str, ...]) -> Sums:
  """Returns empty sums."""
  return {name: jnp.zeros(2, jnp.float32) for name in names}


def from_examples(
  values: Mapping[str, Array], mask: Array | None = None
) -> Sums:
  """Sums values over a batch.

  Args:
    values: Name to per-example values [B], bool or float.
    mask: bool [B], examples to count; None: all.

  Returns:
    Sums and counts.
  """
  sums = {}
  for name, value in values.items():
    weight = jnp.ones(value.shape) if mask is None else mask.astype(jnp.float32)
    # Not a product, which would let a masked NaN through.
    value = jnp.where(weight > 0, value.astype(jnp.float32), 0.0)
    sums[name] = jnp.stack([value.sum(), weight.sum()])
  return sums


def merge(a: Sums, b: Sums) -> Sums:
  """Adds two sums of the same names."""
  return {name: a[name] + b[name] for name in a}


def compute(sums: Sums) -> dict[str, float]:
  """Computes the means on the host; NaN for a count of zero."""
  means = {}
  for name, value in sums.items():
    total, count = np.asarray(value, np.float64)
    means[name] = float(total / count) if count else float("nan")
  return means
