"""Convolutions of any classifier, in the form that is fast inside attacks.

XLA's CPU backend runs the convolutions that autodiff makes on a slow path
inside loops, which is where attacks differentiate. The networks of this package
bring another form (`models.convolution`); the classifier of a user has plain
convolutions, whatever library wrote it. So a classifier is traced before it is
differentiated, and its convolutions are replaced on the way: those of two
dimensions, in any layout, with any strides. Grouped and dilated ones, those of
other dtypes than float32 and float64 and those with a very large kernel stay as
they are, as does what has a derivative of its own (`jax.custom_jvp`,
`jax.custom_vjp`), which is its author's, and `convolution.as_written`. Logits
and gradients are equal up to rounding. Nothing is kept: the rewritten program
is part of the attack's.

On other backends nothing is replaced.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from atat_jax.compilation import programs
from atat_jax.models import convolution
from atat_jax.typing import Array

# Primitives whose programs are replaced in their parameters.
_HOLDERS = ("jit", "closed_call", "scan", "while", "cond")
_REMATERIALIZED = ("checkpoint", "remat2")  # names of one primitive

# Traced and differentiated once for convolutions of the same shapes.
_canonical = jax.jit(convolution.canonical, static_argnums=(2, 3))


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
    if programs.has_open_rules(closed):
      return function(x)
    return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(closed, x))

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
  result = eqn.outvars[0].aval
  plain = (
    params["feature_group_count"],
    params["batch_group_count"],
    *params["lhs_dilation"],
    *params["rhs_dilation"],
  )
  if x.ndim != 4 or any(n != 1 for n in plain) or not _is_ordinary(x, result):
    return False
  order = _orders(params["dimension_numbers"]).kernel
  sides = tuple(kernel.shape[axis] for axis in order[:2])
  return convolution.fits(sides, params["window_strides"], params["padding"])


def _is_ordinary(x: Any, result: Any) -> bool:
  """Whether the form's own operations keep the type of a convolution."""
  # Without jax_enable_x64 that of float64 is float32.
  dtypes = (np.float32, jax.dtypes.canonicalize_dtype(np.float64))
  return (
    x.dtype in dtypes
    and result.dtype == x.dtype
    and not result.weak_type
    and 0 not in (*x.shape, *result.shape)
    # Axes that are split over devices by their types cannot be reshaped.
    and all(axis is None for axis in (*x.sharding.spec, *result.sharding.spec))
  )


def _convolve(eqn: Any, x: Array, kernel: Array) -> Array:
  orders = _orders(eqn.params["dimension_numbers"])
  result = _canonical(
    x.transpose(orders.x),
    kernel.transpose(orders.kernel),
    tuple(eqn.params["window_strides"]),
    tuple(map(tuple, eqn.params["padding"])),
  )
  return result.transpose(np.argsort(orders.result))


def _has_any(program: Any) -> bool:
  """Whether a program has a convolution to replace."""
  return any(
    _is_replaced(eqn) or any(map(_has_any, _programs(eqn)))
    for eqn in program.eqns
  )


def _programs(eqn: Any) -> list[Any]:
  """The programs that an equation runs, where they may be rewritten."""
  name, params = eqn.primitive.name, eqn.params
  rewritten = name in _HOLDERS and not convolution.is_kept(params.get("name"))
  # One that is differentiated already keeps less when it is taken as it is.
  rewritten |= name in _REMATERIALIZED and not params["differentiated"]
  return list(core.jaxprs_in_params(params)) if rewritten else []


def _rewritten(value: Any) -> Any:
  """A parameter of an equation, its programs rewritten."""
  if isinstance(value, core.ClosedJaxpr) and _has_any(value):
    return jax.make_jaxpr(functools.partial(_evaluate, value))(*value.in_avals)
  if type(value) is tuple:  # the branches of a cond
    return tuple(map(_rewritten, value))
  return value


def _evaluate(program: Any, *args: Any) -> list[Any]:
  """Evaluates a program, its convolutions replaced."""
  jaxpr, consts = program, ()
  if isinstance(program, core.ClosedJaxpr):
    jaxpr, consts = program.jaxpr, program.consts
  return programs.walk(jaxpr, consts, args, _named_equation)


def _named_equation(eqn: Any, args: list[Any]) -> Sequence[Any]:
  # The names of modules, which profiles show.
  name = str(eqn.source_info.name_stack)
  with jax.named_scope(name) if name else contextlib.nullcontext():
    return _equation(eqn, args)


def _equation(eqn: Any, args: list[Any]) -> Sequence[Any]:
  if _is_replaced(eqn):
    return [_convolve(eqn, *args)]
  params = eqn.params
  if any(map(_has_any, _programs(eqn))):
    if eqn.primitive.name in _REMATERIALIZED:
      return jax.checkpoint(
        functools.partial(_evaluate, params["jaxpr"]),
        policy=params["policy"],
        prevent_cse=params["prevent_cse"],
      )(*args)
    params = {name: _rewritten(value) for name, value in params.items()}
  with eqn.ctx.manager:
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params))
  return out if eqn.primitive.multiple_results else [out]
