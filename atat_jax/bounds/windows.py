"""Maxima over windows and axes: pooling, and the largest of a row."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from atat_jax.bounds.nodes import OWN, Enclosure, Interval, Node
from atat_jax.errors import UserError
from atat_jax.typing import Array


def entries(eqn: Any) -> np.ndarray:
  """Numbers the entries that each maximum is over.

  Args:
    eqn: Equation of the primitive reduce_window_max or reduce_max.

  Returns:
    int [*result, n]: places in the flat operand; -1 where there is none.

  Raises:
    UserError: A dilated operand.
  """
  shape, params = eqn.invars[0].aval.shape, eqn.params
  places = np.arange(math.prod(shape)).reshape(shape)
  if eqn.primitive.name == "reduce_max":
    kept = [a for a in range(len(shape)) if a not in params["axes"]]
    moved = places.transpose([*kept, *params["axes"]])
    return moved.reshape([*(shape[a] for a in kept), -1])
  if any(n != 1 for n in params["base_dilation"]):
    raise UserError(
      "classifier: reduce_window_max of a dilated operand; allowed: pooling"
    )
  padded = np.pad(places, params["padding"], constant_values=-1)
  sides = [
    (size - 1) * step + 1
    for size, step in zip(
      params["window_dimensions"], params["window_dilation"], strict=True
    )
  ]
  seen = np.lib.stride_tricks.sliding_window_view(padded, sides)
  starts = tuple(slice(None, None, n) for n in params["window_strides"])
  within = tuple(slice(None, None, n) for n in params["window_dilation"])
  found = seen[(*starts, *within)]
  return found.reshape([*found.shape[: len(shape)], -1])


def node(eqn: Any, parent: int) -> Node:
  """Makes the node of a maximum.

  With x_i in [l_i, u_i] and m the first i of the largest l_i,

    x_m <= max_i x_i <= x_m if l_m >= max_{i != m} u_i, else max_i u_i,

  as in auto_LiRPA's BoundMaxPool (Xu et al., 2020, arXiv:2002.12920). Padding is
  no entry.

  Args:
    eqn: Equation of the primitive reduce_window_max or reduce_max.
    parent: Number of its operand's node.

  Returns:
    The node.
  """
  places = entries(eqn)
  there = jnp.asarray(places >= 0)
  places = np.maximum(places, 0)
  shape = eqn.outvars[0].aval.shape

  def taken(x: Array) -> Array:
    return jnp.where(there, x.reshape(-1)[places], -jnp.inf)

  def interval(x: Interval) -> Interval:
    return Interval(taken(x.lower).max(-1), taken(x.upper).max(-1))

  def lines(x: Interval) -> Enclosure:
    lower, upper = taken(x.lower), taken(x.upper)
    best = lower.argmax(-1)[..., None]
    others = jnp.where(jnp.arange(places.shape[-1]) == best, -jnp.inf, upper)
    decided = lower.max(-1) >= others.max(-1)
    place = jnp.take_along_axis(jnp.asarray(places), best, -1)[..., 0]
    most = jnp.where(decided, 0.0, upper.max(-1))

    def below(v: Array) -> Array:
      return v.reshape(-1)[place]

    def above(v: Array) -> Array:
      return jnp.where(decided, v.reshape(-1)[place], 0.0)

    return Enclosure(below, above, None, most, OWN * jnp.abs(most))

  return Node((parent,), shape, interval, lines)
