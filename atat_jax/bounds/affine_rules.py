"""Affine primitives: which operands may depend on the image, and what they do."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax.bounds import nodes
from atat_jax.errors import UserError
from atat_jax.typing import Array

_WIDE = (np.dtype(np.float32), np.dtype(np.float64))


class Rule(NamedTuple):
  """Affine primitive.

  Attributes:
    terms: Equation to the number of products and sums that make an entry.
    factors: Whether constant operands are factors, not summands.
    operands: Number of leading operands that may depend on the image; None:
      all.
    turns: Whether it turns the sign of its last operand.
  """

  terms: Callable[[Any], int]
  factors: bool = False
  operands: int | None = None
  turns: bool = False


def _none(eqn: Any) -> int:
  del eqn
  return 0


def _one(eqn: Any) -> int:
  del eqn
  return 1


def _of_dot(eqn: Any) -> int:
  (axes, _), _ = eqn.params["dimension_numbers"]
  return math.prod(eqn.invars[0].aval.shape[axis] for axis in axes) + 1


def _of_convolution(eqn: Any) -> int:
  kernel = eqn.invars[1].aval.shape
  features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  return math.prod(kernel) // features + 1


def _of_sum(eqn: Any) -> int:
  shape = eqn.invars[0].aval.shape
  return math.prod(shape[axis] for axis in eqn.params["axes"])


def _of_cumsum(eqn: Any) -> int:
  return int(eqn.invars[0].aval.shape[eqn.params["axis"]])


RULES = {
  **dict.fromkeys(("add", "add_any"), Rule(_one)),
  "sub": Rule(_one, turns=True),
  "neg": Rule(_one, turns=True),
  "mul": Rule(_one, factors=True),
  "div": Rule(_one, factors=True, operands=1),
  "dot_general": Rule(_of_dot, factors=True),
  "conv_general_dilated": Rule(_of_convolution, factors=True),
  "reduce_sum": Rule(_of_sum),
  "reduce_window_sum": Rule(
    lambda eqn: math.prod(eqn.params["window_dimensions"])
  ),
  "cumsum": Rule(_of_cumsum),
  **dict.fromkeys(
    (
      *("reshape", "transpose", "squeeze", "expand_dims", "rev", "slice"),
      *("broadcast_in_dim", "concatenate", "pad", "split", "copy", "copy_p"),
      *(
        "optimization_barrier",
        "stop_gradient",
        "name",
        "convert_element_type",
      ),
      "reduce_precision",
    ),
    Rule(_none),
  ),
  **dict.fromkeys(("gather", "dynamic_slice"), Rule(_none, operands=1)),
}
"""Primitive to its rule; several operands may depend on the image where they
are summands, one where constants are factors."""

_IDENTITIES = (
  *("copy", "copy_p", "optimization_barrier", "stop_gradient", "name"),
  *("convert_element_type", "reduce_precision"),
)


def node(
  eqn: Any, args: Sequence[Any], parents: dict[int, int], output: int = 0
) -> nodes.Node:
  """Makes the node of an affine equation.

  Args:
    eqn: The equation.
    args: Its operands, None where they depend on the image.
    parents: Position of each operand that does to the number of its node.
    output: Number of the result, where there are several.

  Returns:
    The node, in float64.

  Raises:
    UserError: It computes in less than float32.
  """
  rule = RULES[eqn.primitive.name]
  shape = eqn.outvars[output].aval.shape
  places = tuple(parents)
  numbers = tuple(parents[place] for place in places)
  _check_precision(eqn)
  if eqn.primitive.name in _IDENTITIES:
    return nodes.affine(numbers, shape, _same, _same, 0)
  constants = {
    place: _wide(arg) for place, arg in enumerate(args) if place not in parents
  }
  params = _wide_params(eqn)
  plain = _without_fill(params)
  bind = functools.partial(_bind, eqn, places, output, plain)
  zeros = {place: _empty(value) for place, value in constants.items()}
  if rule.factors:
    sizes = {place: _size(value) for place, value in constants.items()}
    linear, offset = constants, None
  else:
    sizes, linear, offset = zeros, zeros, None
    nothing = [jnp.zeros(eqn.invars[place].aval.shape) for place in places]
    summands = any(place not in parents for place in range(_summands(eqn)))
    filled = plain is not params
    if summands or filled:
      offset = _bind(eqn, places, output, params, nothing, constants)

  def function(*values: Array) -> Array:
    return bind(values, linear)

  def magnitude(*values: Array) -> Array:
    turned = len(args) - 1 if rule.turns else -1
    given = [
      -value if place == turned else value
      for place, value in zip(places, values, strict=True)
    ]
    return bind(given, sizes)

  terms = rule.terms(eqn)
  return nodes.affine(numbers, shape, function, magnitude, terms, offset=offset)


def _bind(
  eqn: Any,
  places: Sequence[int],
  output: int,
  params: dict[str, Any],
  values: Sequence[Array],
  given: dict[int, Any],
) -> Array:
  """Computes an equation: `values` at their places, `given` elsewhere."""
  operands = [
    values[places.index(place)] if place in places else given[place]
    for place in range(len(eqn.invars))
  ]
  out = eqn.primitive.bind(*operands, **params)
  return out[output] if eqn.primitive.multiple_results else out


def _summands(eqn: Any) -> int:
  """Number of leading operands that are values, not indices."""
  operands = RULES[eqn.primitive.name].operands
  return len(eqn.invars) if operands is None else operands


def _is_value(x: Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _empty(x: Array) -> Array:
  return jnp.zeros_like(x) if _is_value(x) else x


def _size(x: Array) -> Array:
  return jnp.abs(x) if _is_value(x) else x


def _same(value: Array) -> Array:
  return value


def _wide(value: Any) -> Array:
  value = jnp.asarray(value)
  floating = jnp.issubdtype(value.dtype, jnp.floating)
  return value.astype(jnp.float64) if floating else value


def _wide_params(eqn: Any) -> dict[str, Any]:
  """Parameters of an equation, the dtype of its result float64."""
  params = dict(eqn.params)
  if params.get("preferred_element_type") is not None:
    params["preferred_element_type"] = np.dtype(np.float64)
  return params


def _without_fill(params: dict[str, Any]) -> dict[str, Any]:
  """Parameters by which entries that are not there count as 0.

  A gather fills them with a constant, by default NaN, which is part of the
  offset.
  """
  if params.get("mode") is not jax.lax.GatherScatterMode.FILL_OR_DROP:
    return params
  return {**params, "fill_value": 0.0}


def _check_precision(eqn: Any) -> None:
  """Refuses what rounds to less than float32."""
  given = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
  wanted = eqn.params.get("preferred_element_type")
  given += [] if wanted is None else [np.dtype(wanted)]
  name = eqn.primitive.name
  narrow = [
    str(dtype)
    for dtype in given
    if jnp.issubdtype(dtype, jnp.floating) and dtype not in _WIDE
  ]
  result = eqn.outvars[0].aval.dtype
  if not jnp.issubdtype(result, jnp.floating):
    narrow.append(str(result))
  if name == "reduce_precision":
    narrow.append("fewer bits")
  if narrow:
    raise UserError(
      f"classifier: {name} in {narrow[0]}; allowed: float32 throughout, as"
      " bounds must cover every rounding"
    )
