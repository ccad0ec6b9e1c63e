"""Lines around functions of one number: pieces, convex, concave and S-shaped.

A convex function lies above its tangents and below its chord; a concave one is
its mirror image. Around an S-shaped one, between points on both sides of its
inflection, are two lines of the smaller slope at the ends (Singh et al., 2019,
An Abstract Domain for Certifying Neural Networks, section 4).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from atat_jax.bounds.nodes import Interval, Slopes, settled
from atat_jax.typing import Array

_NARROW = 1e-6  # relative width below which a chord has no reliable slope


class CurvedFunction(NamedTuple):
  """Function of one number.

  Attributes:
    value: The function.
    slope: Its derivative.
    shape: "convex", "concave", "s" (convex up to 0, concave from there on),
      "odd" (convex from 0 on, concave before) or "monotone".
    falls: Whether it falls with its argument.
    least: Argument at which it turns, None if it is monotone.
    above: Argument above which it is defined.
  """

  value: Callable[[Array], Array]
  slope: Callable[[Array], Array]
  shape: str
  falls: bool = False
  least: float | None = None
  above: float | None = None


def _power(exponent: int) -> CurvedFunction:
  """x ** exponent for an integer exponent."""
  even = exponent % 2 == 0
  shape = "convex" if even or exponent < 0 else "monotone"
  return CurvedFunction(
    lambda x: lax.integer_pow(x, exponent),
    lambda x: exponent * lax.integer_pow(x, exponent - 1),
    shape,
    falls=exponent < 0,
    least=0.0 if even and exponent > 0 else None,
    above=0.0 if exponent < 0 else None,
  )


CURVES: dict[str, Callable[[dict[str, Any]], CurvedFunction]] = {
  "exp": lambda _: CurvedFunction(jnp.exp, jnp.exp, "convex"),
  "exp2": lambda _: CurvedFunction(
    jnp.exp2, lambda x: jnp.log(2.0) * jnp.exp2(x), "convex"
  ),
  "expm1": lambda _: CurvedFunction(jnp.expm1, jnp.exp, "convex"),
  "log": lambda _: CurvedFunction(
    jnp.log, lambda x: 1 / x, "concave", above=0.0
  ),
  "log1p": lambda _: CurvedFunction(
    jnp.log1p, lambda x: 1 / (1 + x), "concave", above=-1.0
  ),
  "sqrt": lambda _: CurvedFunction(
    jnp.sqrt, lambda x: 0.5 / jnp.sqrt(x), "concave", above=0.0
  ),
  "rsqrt": lambda _: CurvedFunction(
    lax.rsqrt, lambda x: -0.5 * lax.rsqrt(x) / x, "convex", True, above=0.0
  ),
  "logistic": lambda _: CurvedFunction(
    lax.logistic, lambda x: lax.logistic(x) * lax.logistic(-x), "s"
  ),
  "tanh": lambda _: CurvedFunction(
    jnp.tanh, lambda x: 1 / jnp.cosh(x) ** 2, "s"
  ),
  "erf": lambda _: CurvedFunction(
    lax.erf, lambda x: 2 / jnp.sqrt(jnp.pi) * jnp.exp(-x * x), "s"
  ),
  "square": lambda _: _power(2),
  "integer_pow": lambda params: _power(params["y"]),
}
"""Primitive to its function, by the parameters of an equation."""

RECIPROCAL = _power(-1)


def interval(curve: CurvedFunction, x: Interval) -> Interval:
  """Computes the range of a function; NaN outside its domain.

  Args:
    curve: The function.
    x: Range of its argument.
  """
  ends = curve.value(x.lower), curve.value(x.upper)
  low, high = ends[::-1] if curve.falls else ends
  if curve.least is not None:
    inside = (x.lower <= curve.least) & (curve.least <= x.upper)
    turn = curve.value(jnp.full_like(x.lower, curve.least))
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    low = jnp.where(inside, turn, low)
  if curve.above is not None:
    outside = ~(x.lower > curve.above)
    low, high = (jnp.where(outside, jnp.nan, y) for y in (low, high))
  return Interval(low, high)


def slopes(curve: CurvedFunction, x: Interval) -> Slopes:
  """Computes the lines around a function.

  Args:
    curve: The function.
    x: Range of its argument.
  """
  found = interval(curve, x)
  flat = jnp.zeros_like(x.lower)
  constant = Slopes(flat, found.lower, flat, found.upper)
  if curve.shape == "monotone":
    return constant
  middle = (x.lower + x.upper) / 2
  tangent = curve.slope(middle)
  at_tangent = curve.value(middle) - tangent * middle
  chord, at_chord = _chord(curve.value(x.lower), curve.value(x.upper), x)
  convex = Slopes(tangent, at_tangent, chord, at_chord)
  concave = Slopes(chord, at_chord, tangent, at_tangent)
  if curve.shape == "convex":
    made = convex
  elif curve.shape == "concave":
    made = concave
  else:
    least = jnp.minimum(curve.slope(x.lower), curve.slope(x.upper))
    both = Slopes(
      least,
      curve.value(x.lower) - least * x.lower,
      least,
      curve.value(x.upper) - least * x.upper,
    )
    made = _where(x.upper <= 0, convex, _where(x.lower >= 0, concave, both))
  return _where(_is_narrow(x), constant, made)


def _is_narrow(x: Interval) -> Array:
  return x.upper - x.lower <= _NARROW * jnp.maximum(x.largest, _NARROW)


def _chord(low: Array, high: Array, x: Interval) -> tuple[Array, Array]:
  """Slope and value at 0 of the line through both ends."""
  width = jnp.where(_is_narrow(x), 1.0, x.upper - x.lower)
  slope = (high - low) / width
  return slope, low - slope * x.lower


def _where(condition: Array, one: Slopes, other: Slopes) -> Slopes:
  return Slopes(
    *(jnp.where(condition, a, b) for a, b in zip(one, other, strict=True))
  )


class Pieces(NamedTuple):
  """Function of one number that is a line on each side of a point.

  Attributes:
    point: Argument at which the lines meet, or the function jumps.
    left: Slope and value at 0 before it.
    right: The same after it.
  """

  point: Any
  left: tuple[Any, Any]
  right: tuple[Any, Any]


def _values(pieces: Pieces, x: Interval) -> tuple[Array, ...]:
  """Values of the left piece at both its ends, then of the right one."""
  (left, before), (right, after) = pieces.left, pieces.right
  low_end = jnp.minimum(x.upper, pieces.point)
  high_end = jnp.maximum(x.lower, pieces.point)
  return (
    left * x.lower + before,
    left * low_end + before,
    right * high_end + after,
    right * x.upper + after,
  )


def pieces_interval(pieces: Pieces, x: Interval) -> Interval:
  """Computes the range of a function of two pieces.

  Args:
    pieces: The function.
    x: Range of its argument.
  """
  first, second, third, fourth = _values(pieces, x)
  is_left, is_right = _sides(pieces, x)
  low = jnp.minimum(
    jnp.where(is_right, jnp.inf, jnp.minimum(first, second)),
    jnp.where(is_left, jnp.inf, jnp.minimum(third, fourth)),
  )
  high = jnp.maximum(
    jnp.where(is_right, -jnp.inf, jnp.maximum(first, second)),
    jnp.where(is_left, -jnp.inf, jnp.maximum(third, fourth)),
  )
  return Interval(low, high)


def _sides(pieces: Pieces, x: Interval) -> tuple[Array, Array]:
  """Whether one piece alone counts; at a jump the point belongs to both."""
  meets = _meets(pieces)
  is_left = jnp.where(meets, x.upper <= pieces.point, x.upper < pieces.point)
  is_right = jnp.where(meets, x.lower >= pieces.point, x.lower > pieces.point)
  return is_left & ~is_right, is_right


def _meets(pieces: Pieces) -> Array:
  (left, before), (right, after) = pieces.left, pieces.right
  # Finite points only: an infinite one (a clamp that is none) meets nothing.
  return settled(left * pieces.point + before == right * pieces.point + after)


def pieces_slopes(pieces: Pieces, x: Interval) -> Slopes:
  """Computes the lines around a function of two pieces.

  Through the point goes that one of the two pieces which encloses the smaller
  area, as in CROWN's adaptive bounds (Zhang et al., 2018, Efficient Neural
  Network Robustness Certification with General Activation Functions).

  Args:
    pieces: The function.
    x: Range of its argument.
  """
  (left, before), (right, after) = pieces.left, pieces.right
  found = pieces_interval(pieces, x)
  flat = jnp.zeros_like(x.lower)
  constant = Slopes(flat, found.lower, flat, found.upper)
  first, *_, last = _values(pieces, x)
  chord, at_chord = _chord(first, last, x)
  # Nearer to the chord; auto_LiRPA compares with half the larger slope.
  level = jnp.where(left > 0, right / 2, (left + right) / 2)
  level = jnp.where(
    right < left, jnp.where(right > 0, left / 2, (left + right) / 2), level
  )
  convex = right >= left
  takes_right = settled((chord > level) == convex)
  through = jnp.where(takes_right, right, left)
  at_through = jnp.where(takes_right, after, before)
  bent = Slopes(
    jnp.where(convex, through, chord),
    jnp.where(convex, at_through, at_chord),
    jnp.where(convex, chord, through),
    jnp.where(convex, at_chord, at_through),
  )
  made = _where(_meets(pieces) & ~_is_narrow(x), bent, constant)
  is_left, is_right = _sides(pieces, x)
  one = Slopes(*(jnp.broadcast_to(v, flat.shape) for v in (left, before) * 2))
  two = Slopes(*(jnp.broadcast_to(v, flat.shape) for v in (right, after) * 2))
  return _where(is_left, one, _where(is_right, two, made))
