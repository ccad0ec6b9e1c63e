"""Metrics as sums and counts, so that means are exact whatever the batches."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.typing import Array

Sums = dict[str, Array]
"""Name to float32 [2]: the sum over examples and their number."""


def _named(name: str, value: Any) -> Mapping[str, Any]:
  checks.instance(name, value, Mapping, "arrays by name")
  checks.names(name, value.keys(), empty=True)
  found: Mapping[str, Any] = value
  return found


def _check_sums(name: str, sums: Any) -> None:
  for key, value in _named(name, sums).items():
    shape = checks.array(value, f"{name}[{key!r}]").shape
    if shape != (2,):
      raise UserError(
        f"{name}[{key!r}]: shape {shape}; allowed: [2], a sum and a count"
      )


def zeros(names: tuple[str, ...]) -> Sums:
  """Returns empty sums.

  Raises:
    UserError: Not a sequence of names.
  """
  names = checks.names("names", names, empty=True)
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

  Raises:
    UserError: Values or a mask of another shape or dtype.
  """
  sums = {}
  for name, value in _named("values", values).items():
    value = checks.array(value, f"values[{name!r}]")
    if value.ndim != 1:
      raise UserError(f"values[{name!r}]: shape {value.shape}; allowed: [B]")
    if mask is not None:
      mask = checks.mask(mask, value.shape[0])
    weight = jnp.ones(value.shape) if mask is None else mask.astype(jnp.float32)
    # Not a product, which would let a masked NaN through.
    value = jnp.where(weight > 0, value.astype(jnp.float32), 0.0)
    sums[name] = jnp.stack([value.sum(), weight.sum()])
  return sums


def merge(a: Sums, b: Sums) -> Sums:
  """Adds two sums of the same names.

  Raises:
    UserError: Something else than sums, or of other names.
  """
  _check_sums("a", a)
  _check_sums("b", b)
  if set(a) != set(b):
    raise UserError(
      f"b: {', '.join(b) or 'none'}; allowed: the names of a,"
      f" {', '.join(a) or 'none'}"
    )
  return {name: a[name] + b[name] for name in a}


def compute(sums: Sums) -> dict[str, float]:
  """Computes the means on the host; NaN for a count of zero.

  Raises:
    UserError: Something else than sums.
  """
  _check_sums("sums", sums)
  means = {}
  for name, value in sums.items():
    total, count = np.asarray(value, np.float64)
    means[name] = float(total / count) if count else float("nan")
  return means
