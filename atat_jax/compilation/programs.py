"""Programs as data: what distinguishes them, and their arrays as arguments.

A traced program (a jaxpr) refers to the arrays that its function has captured,
on its own level or inside the programs that it calls. `Reading` collects them
and describes all else; `Skeleton` is compiled with arguments in their place.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from atat_jax.errors import UserError
from atat_jax.typing import Array

_REMEDY = (
  "pass the weights as arguments: jax.tree_util.Partial(function, weights) with"
  " function(weights, images), or models.classifier(model, variables)"
)


def aval(value: Any) -> jax.ShapeDtypeStruct:
  """Returns an array's shape and type."""
  return _shape(jax.typeof(value))


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def signature(value: Any) -> Hashable:
  """Returns shape and type as something to compare."""
  return value.shape, value.dtype, getattr(value, "weak_type", False)


def has_open_rules(program: Any) -> bool:
  """Whether a derivative that its author wrote uses values of the trace.

  JAX runs such rules later than the function. When a trace has ended, those
  that close over its intermediate values fail, so that the function must be
  called in the trace that differentiates it.

  Args:
    program: Traced program.
  """
  return any(
    _is_rule(eqn, name) and _holds_tracer(value, set())
    for eqn in program.eqns
    for name, value in eqn.params.items()
  )


def _holds_tracer(value: Any, seen: set[int]) -> bool:
  """Whether a function closes over a traced value, itself or through others."""
  if isinstance(value, jax.core.Tracer):
    return True
  if id(value) in seen:
    return False
  seen.add(id(value))
  return any(_holds_tracer(part, seen) for part in _parts(value))


def _parts(value: Any) -> list[Any]:
  """The values that a function closes over or a wrapper of JAX holds."""
  if isinstance(value, types.FunctionType):
    return [*(value.__closure__ or ()), *(value.__defaults__ or ())]
  if isinstance(value, functools.partial):
    return [value.func, *value.args, *value.keywords.values()]
  if isinstance(value, tuple | list):
    return list(value)
  if isinstance(value, types.CellType):
    with contextlib.suppress(ValueError):  # a name that has no value yet
      return [value.cell_contents]
  if type(value).__module__.partition(".")[0] != "jax":
    return []
  return [getattr(value, name) for name in _WRAPPED if hasattr(value, name)]


class Reading:
  """Reads a program: its constants, and what else distinguishes it.

  Attributes:
    arrays: Constants in the order in which they are met, each once.
  """

  def __init__(self) -> None:
    self.arrays: list[Any] = []
    self._places: dict[int, int] = {}

  def place(self, value: Any) -> int:
    """Returns the number of a constant."""
    if id(value) not in self._places:
      self._places[id(value)] = len(self.arrays)
      self.arrays.append(value)
    return self._places[id(value)]

  def _constant(self, value: Any) -> Hashable:
    aval = jax.typeof(value)
    if _is_hoisted(value):
      return "array", self.place(value), signature(aval)
    return signature(aval), np.asarray(value).tobytes()

  def closed(self, closed: Any) -> Hashable:
    """Returns a program's structure, without the names of its variables."""
    return self._jaxpr(closed.jaxpr, tuple(map(self._constant, closed.consts)))

  def _jaxpr(self, jaxpr: Any, constants: Hashable) -> Hashable:
    numbers: dict[Any, int] = {}

    def bind(variables: Sequence[Any]) -> Hashable:
      for variable in variables:
        numbers[variable] = len(numbers)
      return tuple(variable.aval for variable in variables)

    def atoms(values: Sequence[Any]) -> Hashable:
      return tuple(
        self._constant(v.val) if isinstance(v, core.Literal) else numbers[v]
        for v in values
      )

    given = bind(jaxpr.constvars), bind(jaxpr.invars)
    equations = []
    for eqn in jaxpr.eqns:
      inputs = atoms(eqn.invars)
      equations.append(
        (eqn.primitive, inputs, self._params(eqn), bind(eqn.outvars))
      )
    return constants, given, tuple(equations), atoms(jaxpr.outvars)

  def _params(self, eqn: Any) -> Hashable:
    return tuple(
      (name, self._param(value))
      for name, value in sorted(eqn.params.items())
      if not _is_rule(eqn, name)
    )

  def _param(self, value: Any) -> Hashable:
    if isinstance(value, core.ClosedJaxpr):
      return self.closed(value)
    if isinstance(value, core.Jaxpr):
      return self._jaxpr(value, ())
    if isinstance(value, tuple | list):
      return type(value).__name__, tuple(map(self._param, value))
    if isinstance(value, dict):
      return tuple((str(k), self._param(v)) for k, v in value.items())
    if isinstance(value, np.ndarray | np.generic):
      return value.shape, value.dtype, value.tobytes()
    if isinstance(value, float | complex):
      return type(value), repr(value)
    try:
      hash(value)
    except TypeError:
      return _Identity(value)
    return type(value), value


class _Identity:
  """A value that equals only itself; kept, so that its place stays its own."""

  def __init__(self, value: Any):
    self._value = value

  def __hash__(self) -> int:
    return id(self._value)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Identity) and self._value is other._value


# Rules of differentiation, which a program that has been differentiated does
# not need any more. They are Python functions and may capture arrays.
_WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_REMATERIALIZED = ("checkpoint", "remat2")  # names of one primitive
_CALLS = (
  *_WITH_RULES,
  *_REMATERIALIZED,
  "jit",
  "pjit",
  "closed_call",
  "core_call",
)
_INNER = ("call_jaxpr", "jaxpr", "fun_jaxpr")

# Attributes of JAX's wrappers under which the functions are that they wrap.
_WRAPPED = ("f", "f_transformed", "transforms", "fun", "jvp", "fwd", "bwd")


def _is_rule(eqn: Any, name: str) -> bool:
  return eqn.primitive.name in _WITH_RULES and name not in _INNER


def called(eqn: Any) -> Any | None:
  """Returns the program that an equation runs on its operands; None: none.

  Args:
    eqn: Equation of a traced program.
  """
  if eqn.primitive.name not in _CALLS:
    return None
  return next(eqn.params[key] for key in _INNER if key in eqn.params)


def walk(
  jaxpr: Any,
  consts: Sequence[Any],
  args: Sequence[Any],
  equation: Callable[[Any, list[Any]], Sequence[Any]],
  constant: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
  """Goes through a program, one equation after the other.

  Args:
    jaxpr: The program.
    consts: Values of its constants.
    args: Values of its arguments.
    equation: Function of an equation and the values that go in; returns those
      that come out.
    constant: Function of a constant that stands in an equation; returns its
      value.

  Returns:
    The values of the program's results.
  """
  values: dict[Any, Any] = {}

  def read(v: Any) -> Any:
    return constant(v.val) if isinstance(v, core.Literal) else values[v]

  values.update(zip(jaxpr.constvars, consts, strict=True))
  values.update(zip(jaxpr.invars, args, strict=True))
  for eqn in jaxpr.eqns:
    out = equation(eqn, list(map(read, eqn.invars)))
    values.update(zip(eqn.outvars, out, strict=True))
  return list(map(read, jaxpr.outvars))


def _is_hoisted(value: Any) -> bool:
  """Whether a constant becomes an argument.

  JAX wraps captured numpy arrays; scalars that it wraps are Python's numbers.
  """
  return isinstance(value, jax.Array) or np.ndim(value) > 0


def _inner(eqn: Any) -> list[Any]:
  """The programs among an equation's parameters."""
  leaves = jax.tree.leaves(
    list(eqn.params.values()),
    is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
  )
  return [x for x in leaves if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]


def _is_clean(eqn: Any) -> bool:
  """Whether an equation holds neither arrays nor rules."""
  if eqn.primitive.name in _WITH_RULES:
    return False
  if any(
    isinstance(v, core.Literal) and _is_hoisted(v.val) for v in eqn.invars
  ):
    return False
  for inner in _inner(eqn):
    if isinstance(inner, core.ClosedJaxpr):
      if any(map(_is_hoisted, inner.consts)):
        return False
      inner = inner.jaxpr
    if not all(map(_is_clean, inner.eqns)):
      return False
  return True


class _Substitution:
  """Evaluates a program with arguments in place of its constants."""

  def __init__(self, reading: Reading, arrays: Sequence[Array]):
    self._reading, self._arrays = reading, arrays

  def _constant(self, value: Any) -> Any:
    if not _is_hoisted(value):
      return value
    return self._arrays[self._reading.place(value)]

  def closed(self, closed: Any, *args: Any) -> list[Any]:
    """Evaluates a closed program."""
    if isinstance(closed, core.Jaxpr):  # that of checkpoint
      return self._jaxpr(closed, (), args)
    consts = list(map(self._constant, closed.consts))
    return self._jaxpr(closed.jaxpr, consts, args)

  def _jaxpr(
    self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]
  ) -> list[Any]:
    return walk(jaxpr, consts, args, self._equation, self._constant)

  def _equation(self, eqn: Any, args: list[Any]) -> Sequence[Any]:
    if _is_clean(eqn):
      with eqn.ctx.manager:
        out = eqn.primitive.bind(
          *args, **eqn.primitive.get_bind_params(eqn.params)
        )
      return out if eqn.primitive.multiple_results else [out]
    name, params = eqn.primitive.name, eqn.params
    inner = called(eqn)
    if inner is not None:
      return self.closed(inner, *args)
    if name == "scan":
      return self._scan(params, args)
    if name == "while":
      return self._while(params, args)
    if name == "cond":
      index, *operands = args
      branches = [
        functools.partial(self.closed, branch) for branch in params["branches"]
      ]
      return lax.switch(index, branches, *operands)
    raise UserError(
      f"classifier: captures arrays inside {name}, where they cannot be"
      f" followed; allowed: to {_REMEDY}"
    )

  def _scan(self, params: dict[str, Any], args: list[Any]) -> list[Any]:
    first = params["num_consts"]
    last = first + params["num_carry"]
    consts, carry, xs = args[:first], args[first:last], args[last:]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
      out = self.closed(params["jaxpr"], *consts, *carry, *x)
      return out[: last - first], out[last - first :]

    carry, ys = lax.scan(
      body,
      carry,
      xs,
      length=params["length"],
      reverse=params["reverse"],
      unroll=params["unroll"],
    )
    return [*carry, *ys]

  def _while(self, params: dict[str, Any], args: list[Any]) -> list[Any]:
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    before, during, carry = args[:first], args[first:last], args[last:]
    return lax.while_loop(
      lambda carry: self.closed(params["cond_jaxpr"], *before, *carry)[0],
      lambda carry: self.closed(params["body_jaxpr"], *during, *carry),
      carry,
    )


class Skeleton:
  """A program without arrays; equal to those that compute the same.

  Args:
    key: The differences from other programs, hashable.
    closed: Traced program.
    reading: Reading of it.
    donated: Number of leading arguments whose memory may be reused.
    options: Compiler options.
  """

  def __init__(
    self,
    key: Hashable,
    closed: Any,
    reading: Reading,
    donated: int,
    options: dict[str, Any],
  ):
    self._key, self._hash = key, hash(key)
    self._source: Any = closed, reading
    self._donated, self._options = donated, options

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Skeleton) and self._key == other._key

  def build(self) -> Callable[..., list[Any]]:
    """Compiles the program and lets go of the arrays of its source."""
    closed, reading = self._source
    self._source = None

    def evaluate(arrays: list[Array], flat: list[Array]) -> list[Any]:
      return _Substitution(reading, arrays).closed(closed, *flat)

    flat = [_shape(v.aval) for v in closed.jaxpr.invars]
    arrays = [_shape(jax.typeof(array)) for array in reading.arrays]
    clean = jax.make_jaxpr(evaluate)(arrays, flat)
    function = core.jaxpr_as_fun(clean)

    def program(arrays: Any, donated: Any, kept: Any) -> list[Any]:
      return function(*arrays, *donated, *kept)

    return jax.jit(
      program, donate_argnums=1, compiler_options=self._options or None
    )


@functools.lru_cache(maxsize=256)
def compiled(program: Skeleton) -> Callable[..., list[Any]]:
  """Returns the function (arrays, donated, kept) of a program.

  The programs used last are kept; JAX has no bound on those of a jit.
  """
  return program.build()
