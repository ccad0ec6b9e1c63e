"""Convolutions of any classifier, in the form that is fast inside attacks.

XLA's CPU backend runs the convolutions that autodiff makes on a slow path
inside loops, which is where attacks differentiate. The networks of this package
bring another form (`models.convolution`); the classifier of a user has plain
convolutions, whatever library wrote it. So a classifier is traced before it is
differentiated, and its convolutions are replaced on the way: those of two
dimensions, in any layout, with any strides. Grouped and dilated ones, those of
other dtypes than float32 and float64 and those with a very large kernel stay as
they are, as does what has a derivative of its own (`jax.custom_jvp`,
`jax.custom_vjp`), which is its author's. Logits and gradients are equal up to
rounding. Nothing is kept: the rewritten program is part of the attack's.

On other backends nothing is replaced.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from atat_jax.compilation import programs
from atat_jax.models import convolution
from atat_jax.typing import Array

_DTYPES = (np.float32, np.float64)
_CALLS = ("jit", "pjit", "closed_call", "core_call")
_REMATERIALIZED = ("checkpoint", "remat", "remat2")
_LOOPS = ("scan", "while", "cond")


def fast(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
  """Replaces the convolutions of a function that have a faster form.

  Args:
    function: Function of one array that JAX can trace.

  Returns:
    A function of the same array with the same result up to rounding. Where a
    convolution was replaced, it has no forward-mode derivative (`jax.jvp`).
  """
  if jax.default_backend() != "cpu":
    return function

  def call(x: Array) -> Any:
    # JAX caches traces by function, and this one is new in every call.
    def traced(x: Array) -> Any:
      return function(x)

    closed, shapes = jax.make_jaxpr(traced, return_shape=True)(x)
    return jax.tree.unflatten(
      jax.tree.structure(shapes), _evaluate(closed, [x])
    )

  return call


class _Orders(NamedTuple):
  """Axes of a convolution's arrays in the order that the fast form takes."""

  x: tuple[int, ...]
  kernel: tuple[int, ...]
  result: tuple[int, ...]


def _orders(numbers: Any) -> _Orders:
  def channels_last(axes: Sequence[int]) -> tuple[int, ...]:
    batch, channel, *places = axes
    return batch, *places, channel

  features, channels, *places = numbers.rhs_spec
  return _Orders(
    channels_last(numbers.lhs_spec),
    (*places, channels, features),
    channels_last(numbers.out_spec),
  )


def _is_replaced(eqn: Any) -> bool:
  """Whether an equation is a convolution that has a faster form."""
  if eqn.primitive.name != "conv_general_dilated":
    return False
  params = eqn.params
  x, kernel = (v.aval for v in eqn.invars)
  plain = (
    params["feature_group_count"],
    params["batch_group_count"],
    *params["lhs_dilation"],
    *params["rhs_dilation"],
  )
  if x.ndim != 4 or x.dtype not in _DTYPES or any(n != 1 for n in plain):
    return False
  if params["preferred_element_type"] not in (None, x.dtype):
    return False
  order = _orders(params["dimension_numbers"]).kernel
  sides = tuple(kernel.shape[axis] for axis in order[:2])
  return convolution.fits(sides, params["window_strides"], params["padding"])


def _convolve(eqn: Any, x: Array, kernel: Array) -> Array:
  orders = _orders(eqn.params["dimension_numbers"])
  result = convolution.canonical(
    x.transpose(orders.x),
    kernel.transpose(orders.kernel),
    tuple(eqn.params["window_strides"]),
    tuple(map(tuple, eqn.params["padding"])),
  )
  return result.transpose(np.argsort(orders.result))


def _programs(eqn: Any) -> list[Any]:
  """The programs that an equation runs, where they may be rewritten."""
  if eqn.primitive.name not in (*_CALLS, *_REMATERIALIZED, *_LOOPS):
    return []
  return list(core.jaxprs_in_params(eqn.params))


def _has_any(program: Any) -> bool:
  """Whether a program has a convolution to replace."""
  return any(
    _is_replaced(eqn) or any(map(_has_any, _programs(eqn)))
    for eqn in program.eqns
  )


def _rewritten(value: Any) -> Any:
  """A parameter of an equation, its programs rewritten."""
  if isinstance(value, core.ClosedJaxpr) and _has_any(value):
    avals = map(programs.shape, value.in_avals)
    return jax.make_jaxpr(lambda *args: _evaluate(value, args))(*avals)
  if type(value) is tuple:  # the branches of a cond
    return tuple(map(_rewritten, value))
  return value


def _evaluate(program: Any, args: Sequence[Any]) -> list[Any]:
  """Evaluates a program, its convolutions replaced."""
  jaxpr, consts = program, ()
  if isinstance(program, core.ClosedJaxpr):
    jaxpr, consts = program.jaxpr, program.consts
  values: dict[Any, Any] = {}

  def read(v: Any) -> Any:
    return v.val if isinstance(v, core.Literal) else values[v]

  values.update(zip(jaxpr.constvars, consts, strict=True))
  values.update(zip(jaxpr.invars, args, strict=True))
  for eqn in jaxpr.eqns:
    out = _equation(eqn, list(map(read, eqn.invars)))
    values.update(zip(eqn.outvars, out, strict=True))
  return list(map(read, jaxpr.outvars))


def _equation(eqn: Any, args: list[Any]) -> Sequence[Any]:
  if _is_replaced(eqn):
    return [_convolve(eqn, *args)]
  name, params = eqn.primitive.name, eqn.params
  if any(map(_has_any, _programs(eqn))):
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if name in _CALLS:
      return _evaluate(inner, args)
    if name in _REMATERIALIZED:
      return jax.checkpoint(
        lambda *args: _evaluate(inner, args),
        policy=params["policy"],
        prevent_cse=params["prevent_cse"],
      )(*args)
    params = {key: _rewritten(value) for key, value in params.items()}
  with eqn.ctx.manager:
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params))
  return out if eqn.primitive.multiple_results else [out]
