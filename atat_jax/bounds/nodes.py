"""Nodes of a network as the bounds see them: ranges, lines and rounding.

All arrays are float64. A node's value is a function of those of its parents;
its range, an interval for each entry, holds the exact value and the one that
IEEE float32 computes, in any order of summation.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from atat_jax.typing import Array

_T = TypeVar("_T")

UNIT = 2.0**-24
"""Largest relative error of one operation in float32."""

OWN = 1e-10
"""Relative error of these computations in float64, and more."""

_ULPS = 32  # relative error of exp, tanh and the like, in units of `UNIT`


class Interval(NamedTuple):
  """Least and largest value of each entry.

  Attributes:
    lower: Array of a node's shape.
    upper: The same.
  """

  lower: Array
  upper: Array

  @property
  def largest(self) -> Array:
    """Largest magnitude of each entry."""
    return jnp.maximum(jnp.abs(self.lower), jnp.abs(self.upper))

  def widened(self, error: Array | None) -> "Interval":
    """Returns the interval with a margin on both sides."""
    if error is None:
      return self
    return Interval(self.lower - error, self.upper + error)


def settled(decision: _T) -> _T:
  """Has XLA compute a decision once, for all that depends on it.

  It may compute a value again for each use, and round it otherwise: a line would
  get the slope of one choice and the constant of another.

  Args:
    decision: The choice, or the numbers that comparisons alone decide it by.
  """
  found: _T = jax.lax.optimization_barrier(decision)
  return found


Map = Callable[..., Array]
"""Function of the parents' values."""


class Enclosure(NamedTuple):
  """Affine functions of the parents that enclose a node's value.

  Attributes:
    lower: Function that is nowhere above the value, without its constant.
    upper: Function that is nowhere below it, without its constant.
    lower_offset: Constant of the lower one; None: 0.
    upper_offset: Constant of the upper one; None: 0.
    error: Bound on the rounding of both and on that of the value in float32;
      None: 0.
    spread: Bound on the rounding of the value's own interval and on that of the
      value in float32; None: 0.
  """

  lower: Map
  upper: Map
  lower_offset: Array | None
  upper_offset: Array | None
  error: Array | None
  spread: Array | None = None


@dataclasses.dataclass(frozen=True)
class Node:
  """Value that depends on the image.

  Attributes:
    parents: Numbers of the nodes that it is a function of.
    shape: Shape of the value, the axis of the one image included.
    interval: Parents' intervals to its own, rounding not included.
    lines: Parents' intervals to its lines.
    affine: Whether it is affine, so that both lines are the value.
    moved: Whether its entries are those of its parents, or constants.
  """

  parents: tuple[int, ...]
  shape: tuple[int, ...]
  interval: Callable[..., Interval]
  lines: Callable[..., Enclosure]
  affine: bool = False
  moved: bool = False


def affine(
  parents: tuple[int, ...],
  shape: tuple[int, ...],
  function: Map,
  magnitude: Map,
  terms: int,
  *,
  offset: Array | None = None,
) -> Node:
  """Makes an affine node.

  Args:
    parents: Numbers of its parents.
    shape: Its shape.
    function: Its value, without its constant.
    magnitude: The same, each coefficient its magnitude.
    terms: Number of products and sums that make an entry; 0: entries are moved.
    offset: Its constant; None: 0.

  Returns:
    The node. A sum of n products is off by n units of the sum of their
    magnitudes at most, in any order (Higham, Accuracy and Stability of
    Numerical Algorithms, 2002, section 3.1).
  """

  def value(*given: Array) -> Array:
    found = function(*given)
    return found if offset is None else found + offset

  def interval(*found: Interval) -> Interval:
    if not terms:
      lower, upper = ([x[side] for x in found] for side in (0, 1))
      return Interval(value(*lower), value(*upper))
    middle = value(*((x.lower + x.upper) / 2 for x in found))
    radius = magnitude(*((x.upper - x.lower) / 2 for x in found))
    return Interval(middle - radius, middle + radius)

  def lines(*found: Interval) -> Enclosure:
    error = None
    if terms:
      size = magnitude(*(x.largest for x in found))
      size = size if offset is None else size + jnp.abs(offset)
      error = (terms * UNIT / (1 - terms * UNIT) + OWN) * size
    elif offset is not None:
      error = OWN * jnp.abs(offset)
    return Enclosure(function, function, offset, offset, error, error)

  return Node(parents, shape, interval, lines, affine=True, moved=not terms)


def elementwise(
  parent: int,
  shape: tuple[int, ...],
  interval: Callable[[Interval], Interval],
  slopes: Callable[[Interval], "Slopes"],
  *,
  rounding: Callable[[Interval], Array | None] | None = None,
) -> Node:
  """Makes a node that is a function of each entry of one parent.

  Args:
    parent: Number of the parent.
    shape: Its shape.
    interval: Parent's interval to the node's.
    slopes: Parent's interval to the lines.
    rounding: Parent's interval to the error of the value, None: there is none;
      by default that of exp and the like.

  Returns:
    The node.
  """

  def lines(x: Interval) -> Enclosure:
    a, b, c, d = slopes(x)
    own = interval(x).largest
    size = jnp.maximum(jnp.abs(a), jnp.abs(c)) * x.largest + own
    size += jnp.maximum(jnp.abs(b), jnp.abs(d))
    spread = rounding(x) if rounding else (_ULPS * UNIT + OWN) * own
    error = OWN * size if spread is None else OWN * size + spread
    return Enclosure(lambda v: a * v, lambda v: c * v, b, d, error, spread)

  return Node((parent,), shape, interval, lines)


class Slopes(NamedTuple):
  """Lines of a function of each entry: below it and above it.

  Attributes:
    lower_slope: Slope of the lower one.
    lower_offset: Its value at 0.
    upper_slope: Slope of the upper one.
    upper_offset: Its value at 0.
  """

  lower_slope: Array
  lower_offset: Array
  upper_slope: Array
  upper_offset: Array
