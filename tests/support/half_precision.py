"""Finds what a program computes in 16 bits, in its jaxpr.

Only the layers of the network may: convolutions, activations, sums and pooling
of tensors between them. Outside of the network nothing may have an operand or a
result of 16 bits (but see `_hands_over`), and no loop may carry one. Within, the
operations that need more are missing from `LAYERS`: sums over an axis
(statistics, pooling before the head), products of matrices (the head),
differences (the normalisation of images), exponentials, roots.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

LAYERS = {
  "add",
  "add_any",
  "broadcast_in_dim",
  "concatenate",
  "conv_general_dilated",
  "convert_element_type",
  "copy",
  "div",
  "ge",
  "mul",
  "pad",
  "reshape",
  "rev",
  "select_n",
  "slice",
  "squeeze",
  "transpose",
}
"""Operations on tensors of 16 bits that the layers of a network are made of."""


def _is_half(variable: Any) -> bool:
  dtype = getattr(variable.aval, "dtype", None)
  return dtype in (jnp.bfloat16, jnp.float16)


def _inner(equation: Any) -> Iterator[Any]:
  """Jaxprs that an operation runs."""
  for value in equation.params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      one = getattr(one, "jaxpr", one)
      if hasattr(one, "eqns"):
        yield one


def _hands_over(equation: Any) -> bool:
  """Whether a tensor of the network is read in float32, by attention.

  That is the cast of the tensor, the cast back in its derivative, and the zeros
  that are added to it where the derivative is taken.
  """
  source, name = equation.invars[0], equation.primitive.name
  if name == "broadcast_in_dim":
    return not source.aval.shape
  back = "transpose" in str(equation.source_info.name_stack)
  return name == "convert_element_type" and (_is_half(source) or back)


def _complaints(jaxpr: Any, network: str, inside: bool) -> Iterator[str]:
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    # flax names the operations of a module, and derivatives keep the name.
    within = inside or network in str(equation.source_info.name_stack)
    inner = list(_inner(equation))
    for one in inner:
      yield from _complaints(one, network, within)
    if not any(map(_is_half, (*equation.invars, *equation.outvars))):
      continue
    if name in ("while", "scan"):
      yield f"{name}: carries 16 bits"
    elif not within and not _hands_over(equation):
      yield f"{name}: outside of the network"
    elif within and not inner and name not in LAYERS:
      yield f"{name}: in the network"


def convolutions(function: Callable[..., Any], *args: Any) -> list[Any]:
  """Lists the dtypes of all convolutions' operands in a function's jaxpr."""

  def found(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
      if equation.primitive.name == "conv_general_dilated":
        yield equation.invars[0].aval.dtype
      for one in _inner(equation):
        yield from found(one)

  return list(found(jax.make_jaxpr(function)(*args).jaxpr))


def complaints(
  network: type, function: Callable[..., Any], *args: Any
) -> list[str]:
  """Names what a function computes in 16 bits and must not.

  Args:
    network: Class of the network.
    function: A function that JAX can trace.
    *args: Its arguments, or their shapes.

  Returns:
    One line an operation; each line once.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  edges = (*jaxpr.invars, *jaxpr.outvars)
  found = [*_complaints(jaxpr, network.__name__, False)]
  if any(map(_is_half, edges)):
    found.append("arguments, results: 16 bits")
  return sorted(set(found))
