"""Bounds of a network's nodes: forwards by intervals, backwards by lines.

Backwards, a linear function of a node is replaced by one of its parents that is
nowhere above it, until it is one of the image (Zhang et al., 2018, CROWN,
arXiv:1811.00866; Xu et al., 2020, arXiv:2002.12920). A node that is not affine
needs intervals of its parents for that, first nodes first: each is the
intersection of the one found backwards and the one found forwards from those of
its own parents, neither of which is always the narrower.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from atat_jax.bounds.network import NodeList
from atat_jax.bounds.nodes import OWN, Enclosure, Interval, settled
from atat_jax.typing import Array

_ENTRIES = 2**22
"""Numbers that one step of the backward pass holds of a node."""


class Propagation:
  """Bounds of all nodes for one image.

  Args:
    network: The network.
    image: Range of each pixel, [1, H, W, C].
    backward: Whether nodes that are not affine are enclosed by lines; otherwise
      by their intervals.

  Attributes:
    intervals: Interval of each node.
  """

  def __init__(self, network: NodeList, image: Interval, *, backward: bool):
    self._nodes = network.nodes
    self.intervals = [settled(image)]
    self._lines = [Enclosure(_nothing, _nothing, None, None, None)]
    self._backward = backward
    self._tight = {0}  # nodes that have the best interval
    needed = {
      parent
      for node in self._nodes
      if not node.affine
      for parent in node.parents
    }
    for number in range(1, len(self._nodes)):
      node = self._nodes[number]
      parents = [self.intervals[parent] for parent in node.parents]
      self._lines.append(node.lines(*parents))
      self.intervals.append(self._forward(number))
      if backward and number in needed:
        self._tighten(number)

  def _forward(self, number: int) -> Interval:
    """Interval of a node by those of its parents."""
    node = self._nodes[number]
    found = node.interval(*(self.intervals[parent] for parent in node.parents))
    return settled(found.widened(self._lines[number].spread))

  def _tighten(self, number: int) -> None:
    """Intersects a node's interval with the one that is found backwards."""
    if number in self._tight:
      return
    self._tight.add(number)
    node = self._nodes[number]
    if node.moved or not node.affine:
      # Its entries are known as well as those of its parents.
      for parent in node.parents:
        self._tighten(parent)
      found = self._forward(number)
    else:
      found = self._rows(number)
    self.intervals[number] = settled(_meet(self.intervals[number], found))

  def _rows(self, number: int) -> Interval:
    """Interval of a node, each entry bounded backwards on both sides."""
    shape = self._nodes[number].shape
    size = math.prod(shape)

    def bound(row: Array) -> Array:
      place, sign = row % size, jnp.where(row < size, 1.0, -1.0)
      coefficients = jnp.zeros(size).at[place].set(sign).reshape(shape)
      return self._least(number, coefficients, by_lines=True)

    largest = max(math.prod(node.shape) for node in self._nodes)
    found = mapped(bound, jnp.arange(2 * size), _ENTRIES // largest)
    lower, upper = found[:size], -found[size:]
    return Interval(lower.reshape(shape), upper.reshape(shape))

  def least(self, number: int, coefficients: Array) -> Array:
    """Bounds a linear function of a node from below.

    Args:
      number: Number of the node.
      coefficients: Factor of each of its entries.

    Returns:
      The bound, a scalar; every rounding is taken off it. Backwards, it is the
      better of that by lines and that by intervals, neither of which always is.
    """
    found = self._least(number, coefficients, by_lines=False)
    if not self._backward:
      return found
    return jnp.maximum(found, self._least(number, coefficients, by_lines=True))

  def _least(
    self, number: int, coefficients: Array, *, by_lines: bool
  ) -> Array:
    waiting = {number: coefficients}
    total = jnp.zeros(())
    for current in range(number, -1, -1):
      a = waiting.pop(current, None)
      if a is None:
        continue
      node, lines = self._nodes[current], self._lines[current]
      if current == 0 or not (node.affine or by_lines):
        total += _ends(a, self.intervals[current])
        continue
      if lines.error is not None:
        total -= (jnp.abs(a) * lines.error).sum()
      parts = [(a, lines.lower, lines.lower_offset)]
      if not node.affine:
        parts = [
          (jnp.maximum(a, 0), lines.lower, lines.lower_offset),
          (jnp.minimum(a, 0), lines.upper, lines.upper_offset),
        ]
      zeros = [jnp.zeros(self._nodes[p].shape) for p in node.parents]
      for part, line, offset in parts:
        if offset is not None:
          total += (part * offset).sum()
        _, pull = jax.vjp(line, *zeros)
        for parent, gradient in zip(node.parents, pull(part), strict=True):
          before = waiting.get(parent)
          waiting[parent] = gradient if before is None else before + gradient
    return total

  def is_finite(self) -> Array:
    """Whether all intervals are, without which nothing is proved."""
    limit = jnp.finfo(jnp.float32).max
    return jnp.stack(
      [(one.largest < limit).all() for one in self.intervals]
    ).all()


def mapped(function: Callable[[Any], Any], xs: Any, at_once: int) -> Any:
  """Applies a function to each entry, some at once.

  `jax.lax.map` compiles the function twice where the number does not fit.

  Args:
    function: Function of one entry of `xs`.
    xs: Pytree of arrays [N, ...].
    at_once: Number of entries that may be computed at once.

  Returns:
    The results, [N, ...].
  """
  count = len(jax.tree.leaves(xs)[0])
  steps = -(-count // max(1, at_once))
  if steps == 1:
    return jax.vmap(function)(xs)
  size = -(-count // steps)
  places = jnp.minimum(jnp.arange(steps * size), count - 1).reshape(steps, size)
  found = jax.lax.map(
    lambda row: jax.vmap(function)(jax.tree.map(lambda x: x[row], xs)), places
  )
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def _nothing() -> Array:
  raise NotImplementedError("the image is a function of nothing")


def _ends(a: Array, x: Interval) -> Array:
  """Least value of a linear function on a box."""
  return _sum(jnp.maximum(a, 0) * x.lower) + _sum(jnp.minimum(a, 0) * x.upper)


def _meet(one: Interval, other: Interval) -> Interval:
  """Intersection; NaN stays."""
  return Interval(
    jnp.maximum(one.lower, other.lower), jnp.minimum(one.upper, other.upper)
  )


def _sum(x: Array) -> Array:
  """Sum, less the error that it may have."""
  return x.sum() - OWN * jnp.abs(x).sum()


def pixels(image: Array, epsilon: Any) -> Interval:
  """Computes the range of each pixel in a linf ball and in [0, 1].

  Args:
    image: Float64 [1, H, W, C].
    epsilon: Radius.

  Returns:
    The range, widened by what float32 rounds a perturbed pixel.
  """
  slack = epsilon + 2.0**-23
  return Interval(jnp.clip(image - slack, 0, 1), jnp.clip(image + slack, 0, 1))
