"""The nearest point of a hyperplane within [0, 1]^D, in linf, l2 and l1.

Nothing is sorted, as sorting is slow under XLA. A coordinate that moves goes
towards the hyperplane, at most to the face of the box. In linf and l2 it moves
by min(lambda u_i, room_i), with one lambda for the row and u_i = 1 or |w_i|.
The residual removed is a concave, piecewise linear function of lambda, so
Newton's steps from 0 never overshoot and end on the solution; each at least
halves the residual or the slope. In l1 the coordinates of the largest weights
go to their faces, as many as are needed; the last weight needed is found from
the bits of the numbers, the highest first.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from atat_jax.typing import Array

# More than are ever needed: after so many steps the product of residual and
# slope has fallen by a factor of 4^60.
_MAX_STEPS = 60


def _newton(
  weights: Array, units: Array, room: Array, residuals: Array
) -> Array:
  """Solves sum(weights * min(lambda * units, room)) = residuals for lambda.

  Args:
    weights: Absolute weights, [..., D] in [0, 1].
    units: Distance moved for lambda = 1, [..., D] in [0, 1], broadcast.
    room: Distance to the face of the box, [..., D] in [0, 1]; 0 where the
      weight is 0.
    residuals: Residuals, [..., 1], not negative.

  Returns:
    Lambda [..., 1]; the largest number where all the room does not suffice.
  """
  largest = jnp.finfo(room.dtype).max

  def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    step, length, _ = carry
    full = length * units >= room
    left = residuals - jnp.where(full, weights * room, 0).sum(-1, keepdims=True)
    slope = jnp.where(full, 0, weights * units).sum(-1, keepdims=True)
    longer = jnp.where(
      slope > 0, left / jnp.where(slope > 0, slope, 1), left * largest
    )
    new = jnp.clip(longer, length, largest)
    return step + 1, new, length

  def continues(carry: tuple[Array, Array, Array]) -> Array:
    step, new, old = carry
    return (step < _MAX_STEPS) & (new > old).any()

  start = jnp.zeros_like(residuals)
  first = body((jnp.int32(0), start, start))
  return lax.while_loop(continues, body, first)[1]


def _linf(weights: Array, room: Array, residuals: Array) -> Array:
  units = jnp.ones((), room.dtype)
  return jnp.minimum(_newton(weights, units, room, residuals), room)


def _l2(weights: Array, room: Array, residuals: Array) -> Array:
  length = _newton(weights, weights, room, residuals)
  return jnp.minimum(length * weights, room)


def _l1(weights: Array, room: Array, residuals: Array) -> Array:
  # Non-negative floats are ordered like their bit patterns.
  integer = jnp.int64 if weights.dtype == jnp.float64 else jnp.int32
  bits = lax.bitcast_convert_type(weights, integer)
  gains = weights * room

  def above(threshold: Array) -> Array:
    return jnp.where(bits > threshold, gains, 0).sum(-1, keepdims=True)

  def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = carry
    middle = low + (high - low) // 2
    enough = above(middle) >= residuals
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  def continues(carry: tuple[Array, Array]) -> Array:
    low, high = carry
    return (high - low > 1).any()

  one = lax.bitcast_convert_type(jnp.ones_like(residuals), integer)
  _, last = lax.while_loop(continues, body, (jnp.zeros_like(one), one))
  at_last = bits == last
  left = residuals - above(last)
  gain = jnp.where(at_last, gains, 0).sum(-1, keepdims=True)
  share = jnp.clip(left / jnp.where(gain > 0, gain, 1), 0, 1)
  return jnp.where(bits > last, room, jnp.where(at_last, share * room, 0))


_MOVES: dict[str, Callable[[Array, Array, Array], Array]] = {
  "linf": _linf,
  "l2": _l2,
  "l1": _l1,
}


def project(norm: str, points: Array, weights: Array, offsets: Array) -> Array:
  """Finds the smallest moves of points onto hyperplanes within [0, 1].

  Args:
    norm: Norm of the move to be minimised: "linf", "l2" or "l1".
    points: Points, [B, D] in [0, 1].
    weights: Normals [B, D] of the hyperplanes weights . x = offsets, of any
      length. Coordinates of weight 0 do not move.
    offsets: Offsets [B] of the hyperplanes.

  Returns:
    Moves [B, D], to be added to the points. If the hyperplane does not meet the
    box, the move goes as far towards it as the box allows; it is 0 if the
    hyperplane is not defined (weights all 0 or not finite).
  """
  dtype = jnp.promote_types(points.dtype, jnp.float32)
  t, w, b = (x.astype(dtype) for x in (points, weights, offsets))
  residuals = (b - (w * t).sum(-1))[..., None]
  # Dividing by the largest weight keeps squares and quotients in range.
  scale = jnp.abs(w).max(-1, keepdims=True)
  usable = (scale > 0) & jnp.isfinite(scale) & ~jnp.isnan(residuals)
  scale = jnp.where(usable, scale, 1)
  w = jnp.where(usable, w / scale, 0)
  residuals = jnp.where(usable, residuals / scale, 0)
  up = (w > 0) == (residuals > 0)
  room = jnp.where(w == 0, 0, jnp.maximum(jnp.where(up, 1 - t, t), 0))
  moved = _MOVES[norm](jnp.abs(w), room, jnp.abs(residuals))
  return jnp.where(up, moved, -moved).astype(points.dtype)
