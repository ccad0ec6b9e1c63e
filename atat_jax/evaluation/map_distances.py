"""Distances between two attention maps: four of them, all blind to scale.

All take maps [..., h, w] >= 0, clean and attacked, of shapes that broadcast, and
return float32 [...]. 0 is the same attention. A map says where a network looks
by its values' proportions or order, so multiplying one by a number changes
nothing. Maps of zeros (Eq. (3) leaves nothing where nothing speaks for the
class) and equal values are common; each function says how it counts them. From
a map that is not finite every distance is NaN.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from atat_jax.typing import Array

Distance = Callable[[Array, Array], Array]
"""(clean, attacked) to distance."""


def _known(distance: Distance) -> Distance:
  """Makes a distance NaN where one of the maps is not finite."""

  @functools.wraps(distance)
  def checked(clean: Array, attacked: Array) -> Array:
    finite = [jnp.isfinite(maps).all((-2, -1)) for maps in (clean, attacked)]
    found = distance(clean, attacked)
    return jnp.where(finite[0] & finite[1], found, jnp.nan)

  return checked


def _flat(clean: Array, attacked: Array) -> tuple[Array, Array]:
  """Returns both as float32 [..., h * w] of one shape, with largest value 1 or 0."""
  clean, attacked = jnp.broadcast_arrays(clean, attacked)
  return _scaled(clean), _scaled(attacked)


def _scaled(maps: Array) -> Array:
  # By the largest value first: squares of tiny values would be 0.
  flat = maps.reshape(*maps.shape[:-2], -1).astype(jnp.float32)
  peak = flat.max(-1, keepdims=True)
  return flat / jnp.where(peak > 0, peak, 1.0)


@_known
def cosine(clean: Array, attacked: Array) -> Array:
  """Returns 1 - a.b / (|a| |b|), in [0, 1].

  Two maps of zeros are at 0; a map of zeros is at 1 from any other.

  Args:
    clean: [..., h, w] >= 0.
    attacked: [..., h, w] >= 0.

  Returns:
    float32 [...].
  """
  a, b = _flat(clean, attacked)
  lengths = [jnp.sqrt(jnp.square(x).sum(-1)) for x in (a, b)]
  units = [
    x / jnp.where(length > 0, length, 1.0)[..., None]
    for x, length in zip((a, b), lengths, strict=True)
  ]
  # As half a square, for maps that nearly agree: 1 - a.b would cancel.
  half = 0.5 * jnp.square(units[0] - units[1]).sum(-1)
  zero_a, zero_b = (length == 0 for length in lengths)
  return jnp.where(zero_a == zero_b, half, 1.0)


def _ranks(values: Array) -> Array:
  """Returns ranks from 1 of [..., n]; equal values share their mean rank."""

  def one(x: Array) -> Array:
    ordered = jnp.sort(x)
    below = jnp.searchsorted(ordered, x, side="left")
    up_to = jnp.searchsorted(ordered, x, side="right")
    return 0.5 * (below + up_to + 1).astype(jnp.float32)

  flat = values.reshape(-1, values.shape[-1])
  return jax.vmap(one)(flat).reshape(values.shape)


@_known
def rank_correlation(clean: Array, attacked: Array) -> Array:
  """Returns 1 - Spearman's rank correlation, in [0, 2].

  Equal values share the mean of their ranks. A map whose values are all equal
  has no order: it is at 1 (no correlation) from any other, two such are at 0.

  Args:
    clean: [..., h, w] >= 0.
    attacked: [..., h, w] >= 0.

  Returns:
    float32 [...].
  """
  a, b = (_ranks(x) for x in _flat(clean, attacked))
  middle = 0.5 * (a.shape[-1] + 1)
  a, b = a - middle, b - middle
  squares = jnp.square(a).sum(-1) * jnp.square(b).sum(-1)
  flat_a, flat_b = ((x == 0).all(-1) for x in (a, b))
  correlation = (a * b).sum(-1) / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
  distance = 1.0 - jnp.clip(correlation, -1.0, 1.0)
  return jnp.where(flat_a & flat_b, 0.0, distance)


def _top(values: Array, count: int) -> Array:
  """Returns membership [..., n] in the `count` largest, summing to `count`.

  It is 1 above the value at the border and 0 below; values equal to it share
  the remaining places.
  """
  border = jnp.sort(values, -1)[..., -count, None]
  above, at = values > border, values == border
  left = count - above.sum(-1, keepdims=True)
  share = left / at.sum(-1, keepdims=True)
  return jnp.where(above, 1.0, jnp.where(at, share, 0.0))


@_known
def top_decile(clean: Array, attacked: Array) -> Array:
  """Returns 1 - the overlap of both maps' highest tenth of positions, in [0, 1].

  The tenth is k = ceil(h w / 10) positions, the overlap the shared share of
  them. Where values at its border are equal, they share the remaining places,
  each belonging to the tenth in part, and two maps share the smaller part. So a
  map of zeros, all of whose positions belong to it by k / (h w), is at 0 from
  another one, and at 1 - k / (h w), chance, from a map with a clear tenth.

  Args:
    clean: [..., h, w] >= 0.
    attacked: [..., h, w] >= 0.

  Returns:
    float32 [...].
  """
  a, b = _flat(clean, attacked)
  count = -(-a.shape[-1] // 10)
  shared = jnp.minimum(_top(a, count), _top(b, count)).sum(-1)
  return jnp.clip(1.0 - shared / count, 0.0, 1.0)


def _center(flat: Array, height: int, width: int) -> Array:
  """Returns row and column [..., 2] in cells; the middle for a map of zeros."""
  total = flat.sum(-1, keepdims=True)
  weights = jnp.where(total > 0, flat, 1.0)
  weights = weights / weights.sum(-1, keepdims=True)
  weights = weights.reshape(*flat.shape[:-1], height, width)
  rows = (weights.sum(-1) * jnp.arange(height)).sum(-1)
  columns = (weights.sum(-2) * jnp.arange(width)).sum(-1)
  return jnp.stack([rows, columns], -1)


@_known
def center_of_mass(clean: Array, attacked: Array) -> Array:
  """Returns how far the centre of mass moves, in diagonals of the map, in [0, 1).

  The distance between both centres over sqrt(h^2 + w^2), in cells. The centre
  of a map of zeros is the middle, as that of any even map.

  Args:
    clean: [..., h, w] >= 0.
    attacked: [..., h, w] >= 0.

  Returns:
    float32 [...].
  """
  height, width = clean.shape[-2:]
  a, b = (_center(x, height, width) for x in _flat(clean, attacked))
  way = jnp.sqrt(jnp.square(a - b).sum(-1))
  return way / (height**2 + width**2) ** 0.5


DISTANCES: dict[str, Distance] = {
  "cosine": cosine,
  "rank_correlation": rank_correlation,
  "top_decile": top_decile,
  "center_of_mass": center_of_mass,
}
"""Name to (clean, attacked) to distance."""
