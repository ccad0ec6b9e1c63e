"""A classifier as a list of nodes, read from its trace.

What does not depend on the image is computed as the network does, in its own
types. The rest becomes nodes: affine ones, functions of each entry, maxima,
products of two.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from atat_jax.bounds import affine_rules, curves, products, windows
from atat_jax.bounds.nodes import Interval, Node, affine, elementwise
from atat_jax.compilation import programs
from atat_jax.errors import UserError
from atat_jax.typing import Array

ALLOWED = (
  "dense layers and convolutions, sums, products with constants, reshaping,"
  " relu and its kin, max and average pooling, clamps, sigmoid, tanh, exp, log,"
  " square roots, BatchNorm with running statistics"
)

_ENTRYWISE = ("add", "sub", "neg", "mul", "div", "convert_element_type", "copy")
_OPPOSITE = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}


class _Ref(NamedTuple):
  """Value that depends on the image: the number of its node."""

  number: int


class _Comparison(NamedTuple):
  """Whether a node's entries are above a constant, or below it."""

  number: int
  point: Any
  above: bool


def _exactly(x: Interval) -> None:
  """The rounding of a maximum, a magnitude or a step: none."""
  del x


class NodeList:
  """Nodes of a classifier of one image, parents before children.

  Args:
    closed: Trace of the classifier for one image [1, H, W, C].

  Attributes:
    nodes: The nodes; the first is the image, the last the logits [1, K].

  Raises:
    UserError: A primitive that has no bounds.
  """

  def __init__(self, closed: Any):
    self._closed = closed
    (image,) = closed.jaxpr.invars
    self.nodes: list[Node] = [_input(image.aval.shape)]
    self._entrywise: set[int] = set()  # each entry a function of one
    (out,) = self._run(closed.jaxpr, closed.consts, [_Ref(0)])
    if not isinstance(out, _Ref):
      shape = closed.jaxpr.outvars[0].aval.shape
      out = self._add(_constant(shape, out))
    if out.number != len(self.nodes) - 1:
      shape = self.nodes[out.number].shape
      self._add(affine((out.number,), shape, _same, _same, 0))

  def logits(self, image: Array) -> Array:
    """Computes the logits [1, K] of an image, as the classifier does."""
    (found,) = core.jaxpr_as_fun(self._closed)(image)
    return found

  def _add(self, node: Node) -> _Ref:
    self.nodes.append(node)
    return _Ref(len(self.nodes) - 1)

  def _run(
    self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]
  ) -> list[Any]:
    return programs.walk(jaxpr, consts, args, self._equation)

  def _equation(self, eqn: Any, args: list[Any]) -> Sequence[Any]:
    depends = [isinstance(arg, _Ref | _Comparison) for arg in args]
    if not any(depends):
      out = eqn.primitive.bind(
        *args, **eqn.primitive.get_bind_params(eqn.params)
      )
      return out if eqn.primitive.multiple_results else [out]
    inner = programs.called(eqn)
    if inner is not None:
      if isinstance(inner, core.ClosedJaxpr):
        return self._run(inner.jaxpr, inner.consts, args)
      return self._run(inner, (), args)
    name = eqn.primitive.name
    special = getattr(self, f"_on_{name}", None)
    found = special(eqn, args) if special else None
    if found is None and not any(isinstance(x, _Comparison) for x in args):
      found = self._curve(eqn, args) or self._affine(eqn, args)
    if found is None:
      raise UserError(
        f"classifier: {name} of values that depend on the image has no bounds;"
        f" allowed: {ALLOWED}"
      )
    return found if isinstance(found, list) else [found]

  def _affine(self, eqn: Any, args: list[Any]) -> list[Any] | None:
    rule = affine_rules.RULES.get(eqn.primitive.name)
    if rule is None:
      return None
    parents = {i: x.number for i, x in enumerate(args) if isinstance(x, _Ref)}
    allowed = len(args) if rule.operands is None else rule.operands
    if max(parents) >= allowed or (rule.factors and len(parents) > 1):
      return None
    made = [
      self._add(affine_rules.node(eqn, args, parents, output))
      for output in range(len(eqn.outvars))
    ]
    if eqn.primitive.name in _ENTRYWISE:
      self._entrywise.update(ref.number for ref in made)
    return made

  def _curve(self, eqn: Any, args: list[Any]) -> _Ref | None:
    made = curves.CURVES.get(eqn.primitive.name)
    if made is None:
      return None
    return self._bend(args[0].number, made(eqn.params))

  def _bend(self, parent: int, curve: curves.CurvedFunction) -> _Ref:
    return self._add(
      elementwise(
        parent,
        self.nodes[parent].shape,
        lambda x: curves.interval(curve, x),
        lambda x: curves.slopes(curve, x),
      )
    )

  def _piecewise(
    self,
    parent: int,
    pieces: curves.Pieces,
    rounding: Callable[[Interval], Array | None] = _exactly,
  ) -> _Ref:
    pieces = jax.tree.map(_wide, pieces)
    parts = (self.nodes[parent].shape, *map(jnp.shape, jax.tree.leaves(pieces)))
    return self._add(
      elementwise(
        parent,
        np.broadcast_shapes(*parts),
        lambda x: curves.pieces_interval(pieces, x),
        lambda x: curves.pieces_slopes(pieces, x),
        rounding=rounding,
      )
    )

  def _difference(self, one: int, other: int) -> _Ref:
    return self._add(
      affine(
        (one, other),
        self._shape(one, other),
        lambda x, y: x - y,
        lambda x, y: x + y,
        1,
      )
    )

  def _sum(self, one: int, other: int) -> _Ref:
    shape = self._shape(one, other)
    return self._add(affine((one, other), shape, _plus, _plus, 1))

  def _shape(self, one: int, other: int) -> tuple[int, ...]:
    """Shape of two nodes together; an axis of one entry fits all."""
    return np.broadcast_shapes(self.nodes[one].shape, self.nodes[other].shape)

  # --- Primitives with rules of their own ------------------------------------

  def _on_max(self, eqn: Any, args: list[Any]) -> _Ref:
    return self._extreme(args, largest=True)

  def _on_min(self, eqn: Any, args: list[Any]) -> _Ref:
    return self._extreme(args, largest=False)

  def _extreme(self, args: Sequence[Any], *, largest: bool) -> _Ref:
    """The larger or smaller of two values."""
    one, other = args
    if isinstance(one, _Ref) and isinstance(other, _Ref):
      gap = self._difference(one.number, other.number)
      part = self._extreme([gap, jnp.zeros(())], largest=largest)
      return self._sum(part.number, other.number)
    ref, point = (one, other) if isinstance(one, _Ref) else (other, one)
    line, level = (1.0, 0.0), (0.0, point)
    pieces = (level, line) if largest else (line, level)
    return self._piecewise(ref.number, curves.Pieces(point, *pieces))

  def _on_clamp(self, eqn: Any, args: list[Any]) -> _Ref:
    low, ref, high = args
    return self._extreme(
      [self._extreme([low, ref], largest=True), high], largest=False
    )

  def _on_abs(self, eqn: Any, args: list[Any]) -> _Ref:
    pieces = curves.Pieces(0.0, (-1.0, 0.0), (1.0, 0.0))
    return self._piecewise(args[0].number, pieces)

  def _on_reduce_window_max(self, eqn: Any, args: list[Any]) -> _Ref:
    return self._add(windows.node(eqn, args[0].number))

  _on_reduce_max = _on_reduce_window_max

  def _on_mul(self, eqn: Any, args: list[Any]) -> _Ref | None:
    if not all(isinstance(arg, _Ref) for arg in args):
      return None
    one, other = args
    if one == other:
      return self._bend(one.number, curves.CURVES["square"]({}))
    shape = eqn.outvars[0].aval.shape
    return self._add(products.node(one.number, other.number, shape))

  def _on_div(self, eqn: Any, args: list[Any]) -> _Ref | None:
    one, other = args
    if not isinstance(other, _Ref):
      return None
    inverse = self._bend(other.number, curves.RECIPROCAL)
    shape = eqn.outvars[0].aval.shape
    if isinstance(one, _Ref):
      return self._add(products.node(one.number, inverse.number, shape))
    factor = _wide(one)
    return self._add(
      affine(
        (inverse.number,),
        shape,
        lambda x: factor * x,
        lambda x: jnp.abs(factor) * x,
        1,
      )
    )

  def _compare(self, eqn: Any, args: list[Any]) -> _Comparison:
    name, (one, other) = eqn.primitive.name, args
    if isinstance(one, _Ref) and isinstance(other, _Ref):
      one, other = self._difference(one.number, other.number), jnp.zeros(())
    elif not isinstance(one, _Ref):
      one, other, name = other, one, _OPPOSITE[name]
    return _Comparison(one.number, _wide(other), name in ("ge", "gt"))

  _on_ge = _on_gt = _on_le = _on_lt = _compare

  def _on_ne(self, eqn: Any, args: list[Any]) -> Array | None:
    """Whether a number is NaN: none is, as all intervals are finite."""
    if args[0] != args[1]:
      return None
    return jnp.zeros(eqn.outvars[0].aval.shape, bool)

  def _on_is_finite(self, eqn: Any, args: list[Any]) -> Array:
    return jnp.ones(eqn.outvars[0].aval.shape, bool)

  def _on_convert_element_type(self, eqn: Any, args: list[Any]) -> _Ref | None:
    (compared,) = args
    if not isinstance(compared, _Comparison):
      return None
    steps = (0.0, 0.0), (0.0, 1.0)
    pieces = steps if compared.above else steps[::-1]
    return self._piecewise(
      compared.number, curves.Pieces(compared.point, *pieces)
    )

  def _on_broadcast_in_dim(self, eqn: Any, args: list[Any]) -> Any:
    """A comparison that is given a shape which it has already."""
    shape = eqn.outvars[0].aval.shape
    if isinstance(args[0], _Comparison):
      return args[0] if eqn.invars[0].aval.shape == shape else None
    return None

  def _on_select_n(self, eqn: Any, args: list[Any]) -> _Ref | None:
    which, *cases = args
    shape = eqn.outvars[0].aval.shape
    if not isinstance(which, _Comparison):
      return self._chosen(which, cases, shape)
    if eqn.invars[0].aval.shape != shape or len(cases) != 2:
      return None
    if not which.above:
      cases = cases[::-1]
    one, other = (self._chain(case, which.number) for case in cases)
    if one is not None and other is not None:
      lines = (self._line(case, which.number) for case in cases)
      pieces = curves.Pieces(which.point, *lines)

      def rounding(x: Interval) -> Array:
        return jnp.maximum(_rounding(one, x), _rounding(other, x))

      return self._piecewise(which.number, pieces, rounding)
    below, above = (
      case if isinstance(case, _Ref) else self._add(_constant(shape, case))
      for case in cases
    )
    parents = which.number, below.number, above.number
    return self._add(products.choice(parents, shape, which.point))

  def _chosen(
    self, which: Any, cases: Sequence[Any], shape: tuple[int, ...]
  ) -> _Ref:
    """Entries of several values, by a choice that is constant."""
    refs = [case for case in cases if isinstance(case, _Ref)]

    def choose(given: Sequence[Array]) -> Array:
      values = iter(given)
      return jax.lax.select_n(
        jnp.asarray(which),
        *(
          next(values) if isinstance(case, _Ref) else jnp.zeros(shape)
          for case in cases
        ),
      )

    def linear(*values: Array) -> Array:
      return choose(values)

    fixed = jax.lax.select_n(
      jnp.asarray(which),
      *(
        jnp.zeros(shape)
        if isinstance(case, _Ref)
        else jnp.broadcast_to(_wide(case), shape)
        for case in cases
      ),
    )
    numbers = tuple(ref.number for ref in refs)
    return self._add(affine(numbers, shape, linear, linear, 0, offset=fixed))

  def _chain(self, case: Any, root: int) -> list[Node] | None:
    """Nodes by which a value is a line in a node; None if it is none."""
    if not isinstance(case, _Ref):
      return []
    chain, number = [], case.number
    while number != root:
      node = self.nodes[number]
      if number not in self._entrywise or len(node.parents) != 1:
        return None
      chain.append(node)
      (number,) = node.parents
    return chain[::-1]

  def _line(self, case: Any, root: int) -> tuple[Any, Any]:
    """Slope and offset of a value that is a line in a node."""
    if not isinstance(case, _Ref):
      return 0.0, case
    zeros = jnp.zeros(self.nodes[root].shape)
    slope, offset = zeros + 1, zeros
    for node in self._chain(case, root) or ():
      lines = node.lines(Interval(zeros, zeros))
      slope, offset = lines.lower(slope), lines.lower(offset)
      if lines.lower_offset is not None:
        offset += lines.lower_offset
    return slope, offset


def _rounding(chain: Sequence[Node], x: Interval) -> Array:
  """Error in float32 of a line that is computed in steps."""
  largest, error = x.largest, jnp.zeros_like(x.largest)
  for node in chain:
    lines = node.lines(Interval(-largest, largest))
    largest, error = jnp.abs(lines.lower(largest)), jnp.abs(lines.lower(error))
    if lines.lower_offset is not None:
      largest += jnp.abs(lines.lower_offset)
    if lines.error is not None:
      error += lines.error
  return error


def _input(shape: tuple[int, ...]) -> Node:
  def nothing(*found: Interval) -> Any:
    raise NotImplementedError("the image is a function of nothing")

  return Node((), shape, nothing, nothing)


def _constant(shape: tuple[int, ...], value: Any) -> Node:
  """A node that depends on nothing, for logits and cases that are constants."""
  fixed = jnp.broadcast_to(_wide(value), shape)

  def nothing() -> Array:
    return jnp.zeros(shape)

  return affine((), shape, nothing, nothing, 0, offset=fixed)


def _same(x: Array) -> Array:
  return x


def _plus(x: Array, y: Array) -> Array:
  return x + y


def _wide(value: Any) -> Array:
  return jnp.asarray(value, jnp.float64)


def read(classifier: Callable[[Array], Array], image: Any) -> NodeList:
  """Reads the network of a classifier.

  Args:
    classifier: Callable from images [B, H, W, C] to logits [B, K].
    image: Shape and dtype of one image, [1, H, W, C].

  Returns:
    The network.

  Raises:
    UserError: A primitive that has no bounds.
  """

  def logits(x: Array) -> Array:
    return classifier(x)

  with jax.enable_x64(False):  # as the network runs
    closed = jax.make_jaxpr(logits)(image)
  return NodeList(closed)
