"""Products of two values that depend on the image, and choices by a third.

Planes around a product are McCormick's (1976, Computability of Global Solutions
to Factorable Nonconvex Programs), as auto_LiRPA takes them: below it
y_l x + x_l y - x_l y_l, above it y_u x + x_l y - x_l y_u. The other one on each
side is as near to the product in the middle.
"""

from typing import Any

import jax.numpy as jnp

from atat_jax.bounds.nodes import OWN, UNIT, Enclosure, Interval, Node
from atat_jax.typing import Array


def node(one: int, other: int, shape: tuple[int, ...]) -> Node:
  """Makes the node of a product.

  Args:
    one: Number of a factor's node.
    other: Number of the other's.
    shape: Shape of both.

  Returns:
    The node.
  """

  def interval(x: Interval, y: Interval) -> Interval:
    corners = jnp.stack(
      [a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)]
    )
    return Interval(corners.min(0), corners.max(0))

  def lines(x: Interval, y: Interval) -> Enclosure:
    below = y.lower, x.lower
    above = y.upper, x.lower
    error = (UNIT + 4 * OWN) * x.largest * y.largest
    return Enclosure(
      lambda v, w: below[0] * v + below[1] * w,
      lambda v, w: above[0] * v + above[1] * w,
      -below[0] * below[1],
      -above[0] * above[1],
      error,
      error,
    )

  return Node((one, other), shape, interval, lines)


def choice(
  parents: tuple[int, int, int], shape: tuple[int, ...], point: Any
) -> Node:
  """Makes the node of a choice between two values.

  Args:
    parents: Numbers of the nodes of what decides, of the value where that is
      below a point, and of the value where it is above.
    shape: Shape of all.
    point: The point, at which either value may be taken.

  Returns:
    The node.
  """

  def interval(which: Interval, below: Interval, above: Interval) -> Interval:
    first, second = which.upper < point, which.lower > point
    lower = jnp.minimum(below.lower, above.lower)
    upper = jnp.maximum(below.upper, above.upper)
    return Interval(
      jnp.where(first, below.lower, jnp.where(second, above.lower, lower)),
      jnp.where(first, below.upper, jnp.where(second, above.upper, upper)),
    )

  def lines(which: Interval, below: Interval, above: Interval) -> Enclosure:
    first, second = which.upper < point, which.lower > point
    found = interval(which, below, above)

    def chosen(_: Array, x: Array, y: Array) -> Array:
      return first * x + second * y

    lower, upper = (jnp.where(first | second, 0.0, level) for level in found)
    error = OWN * found.largest
    return Enclosure(chosen, chosen, lower, upper, error)

  return Node(parents, shape, interval, lines)
