"""Checks of arguments: one clear error, before any compilation.

Values are checked where they are concrete; inside jit only shapes and dtypes
can be.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax.errors import UserError
from atat_jax.typing import Array


def _concrete(x: object) -> bool:
  return not isinstance(x, jax.core.Tracer)


@jax.jit
def _extremes(x: Array) -> Array:
  return jnp.stack([x.min(), x.max()])


def _range(x: Array | np.ndarray) -> tuple[float, float]:
  found = _extremes(x) if isinstance(x, jax.Array) else None
  if found is None or isinstance(found, jax.core.Tracer):
    host = np.asarray(x)  # a numpy array, or a constant inside jit
    return float(host.min()), float(host.max())
  low, high = np.asarray(found)  # one transfer
  return float(low), float(high)


def inspect_images(x: Array | np.ndarray, name: str = "images") -> None:
  """Checks [B, H, W, C] floating-point images in [0, 1] without moving them."""
  if x.ndim != 4 or 0 in x.shape:
    raise UserError(
      f"{name}: shape {x.shape}; allowed: [B, H, W, C], not empty"
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise UserError(
      f"{name}: dtype {x.dtype}; allowed: floating point in [0, 1]"
      " (uint8 pixels: divide by 255)"
    )
  if _concrete(x):
    low, high = _range(x)
    if not (low >= 0 and high <= 1):  # also refuses NaN
      raise UserError(f"{name}: values in [{low:g}, {high:g}]; allowed: [0, 1]")


def inspect_labels(
  x: Array | np.ndarray,
  batch_size: int,
  num_classes: int,
  name: str = "labels",
) -> None:
  """Checks integer labels [B] in [0, num_classes) without moving them."""
  if x.shape != (batch_size,):
    raise UserError(
      f"{name}: shape {x.shape}; allowed: [{batch_size}], one per image"
    )
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise UserError(f"{name}: dtype {x.dtype}; allowed: integers")
  if _concrete(x):
    low, high = _range(x)
    if low < 0 or high >= num_classes:
      raise UserError(
        f"{name}: values in [{low:.0f}, {high:.0f}]; allowed: 0 to {num_classes - 1}"
      )


def images(x: Array, name: str = "images") -> Array:
  """Checks [B, H, W, C] floating-point images in [0, 1] and returns them."""
  x = jnp.asarray(x)
  inspect_images(x, name)
  return x


def labels(
  x: Array, batch_size: int, num_classes: int, name: str = "labels"
) -> Array:
  """Checks integer labels [B] in [0, num_classes) and returns them as int32."""
  x = jnp.asarray(x)
  inspect_labels(x, batch_size, num_classes, name)
  return x.astype(jnp.int32)


def positive(name: str, value: object, *, integer: bool = False) -> None:
  """Checks that a value is a finite number > 0; traced values pass."""
  if not _concrete(value):
    return
  number = value
  if isinstance(value, jax.Array | np.ndarray | np.generic) and value.ndim == 0:
    number = value.item()
  ok = (
    isinstance(number, int if integer else int | float)
    and not isinstance(number, bool)
    and 0 < number < float("inf")
  )
  if not ok:
    kind = "an integer" if integer else "a number"
    raise UserError(f"{name}: {value!r}; allowed: {kind} > 0")


def not_negative(name: str, value: object) -> None:
  """Checks that a value is a finite number >= 0; traced values pass."""
  if not (isinstance(value, int | float) and value == 0):
    positive(name, value)


def epsilon(value: object, norm: str, name: str = "epsilon") -> None:
  """Checks that a radius is > 0 and, for linf, at most 1, a pixel's range."""
  positive(name, value)
  if norm == "linf" and _concrete(value) and float(value) > 1:  # type: ignore[arg-type]
    raise UserError(
      f"{name}: {value!r}; allowed: at most 1 for linf, as pixels are in"
      " [0, 1] (8/255 is 0.0314)"
    )


def choice(name: str, value: str, allowed: Iterable[str]) -> None:
  """Checks that a value is one of the allowed names."""
  allowed = sorted(allowed)
  if value not in allowed:
    raise UserError(f"{name}: {value!r}; allowed: {', '.join(allowed)}")
