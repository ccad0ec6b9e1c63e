"""Compilation: `jit` with the options that are fast on the backend at hand.

XLA's CPU backend fuses convolutions and dots into library calls by default,
which makes the backward passes of narrow convolutions several times slower. The
option that turns this off is experimental, so that it is probed once and left
out where the installed jaxlib does not know it. Other backends get no options.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from atat_jax.compilation import captures
from atat_jax.compilation.cache import (
  disable_persistent_cache,
  enable_by_default,
  enable_persistent_cache,
)
from atat_jax.compilation.captures import Opaque
from atat_jax.compilation.fingerprints import Keyed, keyed

__all__ = [
  "compiler_options",
  "disable_persistent_cache",
  "enable_persistent_cache",
  "hashable",
  "jit",
  "unwrap",
]

_FAST = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
_ONCE = {"xla_backend_optimization_level": 0}
_LIGHT = {**_FAST, "xla_backend_optimization_level": 1}
_ROUGH = {
  **_FAST,
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def _is_known(option: str, value: Any) -> bool:
  """Whether the installed jaxlib knows an option of the compiler."""

  def probe() -> None:
    pass

  try:
    jax.jit(probe, compiler_options={option: value}).lower().compile()
  except jax.errors.JaxRuntimeError:  # "No such compile option"
    return False
  return True


@functools.cache
def compiler_options(
  *, once: bool = False, light: bool = False, rough: bool = False
) -> dict[str, Any]:
  """Returns the compiler options for the default backend, {} if none apply.

  Args:
    once: Whether the program runs once, so that it should compile fast rather
      than run fast.
    light: Whether the program is a small part of the work, so that less time
      is spent on its optimisation.
    rough: Whether the program runs once on a whole network and its numbers are
      only looked at, so that they may be rounded otherwise; it compiles three
      times as fast and runs three times as long.

  Returns:
    Compiler options for `jax.jit`.
  """
  options = _ONCE if once else _LIGHT if light else _ROUGH if rough else _FAST
  if jax.default_backend() != "cpu":
    return {}
  return {name: x for name, x in options.items() if _is_known(name, x)}


def _names(given: Any, parameters: list[str]) -> set[str]:
  """Names of parameters from names or numbers, one or several."""
  if given is None:
    return set()
  several = (given,) if isinstance(given, int | str) else given
  return {parameters[x] if isinstance(x, int) else x for x in several}


class _Jitted:
  """Parameters of a function, by which `jit` can trace a call of it anew."""

  def __init__(
    self, function: Callable[..., Any], effort: dict[str, bool], kwargs: Any
  ):
    self._function, self._effort = function, effort
    self._signature = inspect.signature(function)
    parameters = list(self._signature.parameters)
    self._static = _names(kwargs.get("static_argnames"), parameters)
    self._static |= _names(kwargs.get("static_argnums"), parameters)
    self._donated = _names(kwargs.get("donate_argnames"), parameters)
    self._donated |= _names(kwargs.get("donate_argnums"), parameters)

  def prepare(
    self, args: tuple[Any, ...], kwargs: dict[str, Any]
  ) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Makes arguments of callables; says whether one must be traced anew."""
    if not any(map(callable, (*args, *kwargs.values()))):
      return args, kwargs, False
    bound = self._signature.bind(*args, **kwargs)
    opaque = False
    for name, value in bound.arguments.items():
      if not callable(value):
        continue
      if name in self._static:
        made = None if isinstance(value, Opaque) else keyed(value)
        opaque |= made is None
        value = value if made is None else made
      else:
        value = captures.argument(value)
        opaque |= bool(captures.find(value))
      bound.arguments[name] = value
    return bound.args, bound.kwargs, opaque

  def _split(
    self, args: tuple[Any, ...], kwargs: dict[str, Any]
  ) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    bound = self._signature.bind(*args, **kwargs)
    given = dict(bound.arguments)
    static = {name: given.pop(name) for name in self._static if name in given}

    def function(arguments: dict[str, Any]) -> Any:
      # In the order of the parameters, which a BoundArguments relies on.
      whole = {**bound.arguments, **arguments, **static}
      call = inspect.BoundArguments(self._signature, whole)
      return self._function(*call.args, **call.kwargs)

    if any(callable(v) and keyed(v) is None for v in static.values()):
      return function, given, None
    return function, given, (self, tuple(sorted(static.items())))

  def anew(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the function, traced anew."""
    enable_by_default()
    function, given, name = self._split(args, kwargs)
    options = compiler_options(**self._effort)
    return captures.call(
      function, given, self._donated, name=name, options=options
    )

  def ahead(
    self, outermost: Callable[[], Any], *args: Any, **kwargs: Any
  ) -> Callable[[], Any]:
    """Traces a call and lowers it; returns what compiles it."""
    args, kwargs, opaque = self.prepare(args, kwargs)
    if not opaque:
      return outermost().lower(*args, **kwargs).compile
    enable_by_default()
    function, given, name = self._split(args, kwargs)
    options = compiler_options(**self._effort)
    lowered = captures.lower(
      function, given, self._donated, name=name, options=options
    )
    return lowered.compile

  def shapes(
    self, nested: Callable[..., Any], *args: Any, **kwargs: Any
  ) -> Any:
    """Returns the shapes of a call's result."""
    args, kwargs, opaque = self.prepare(args, kwargs)
    if not opaque:
      return nested.eval_shape(*args, **kwargs)  # type: ignore[attr-defined]
    function, given, name = self._split(args, kwargs)
    return captures.shapes(function, given, name=name)


def jit(
  function: Callable[..., Any],
  *,
  once: bool = False,
  light: bool = False,
  rough: bool = False,
  **kwargs: Any,
) -> Callable[..., Any]:
  """Applies `jax.jit` with `compiler_options()`; nests in transformations.

  JAX accepts compiler options on the outermost jit only, so that a call from
  inside another jit, vmap or grad goes through a plain jit; the options of the
  enclosing function then hold for all of it.

  Arguments may be callables of any kind. What they capture becomes arguments of
  the compiled program, see `captures`; only that of `function` itself is part
  of it, as in `jax.jit`.

  Args:
    function: A pure function.
    once: Whether the program runs once, see `compiler_options`.
    light: Whether it is a small part of the work.
    rough: Whether its numbers are only looked at, once.
    **kwargs: Arguments of `jax.jit`.

  Returns:
    The compiled function; `.lower` and `.eval_shape` are those of `jax.jit`.
    `.ahead` takes the arguments of a call to come, or their shapes and
    shardings, traces it, and returns what compiles it; this may run in another
    thread, and the call then finds the program.
  """
  nested = jax.jit(function, **kwargs)
  flags = {"once": once, "light": light, "rough": rough}
  effort = {name: True for name, given in flags.items() if given}
  jitted = _Jitted(function, effort, kwargs)

  @functools.cache
  def outermost() -> Callable[..., Any]:
    # Asking for the backend starts it, so that this waits for the first call.
    options = compiler_options(**effort)
    enable_by_default()
    return jax.jit(function, compiler_options=options, **kwargs)

  @functools.wraps(function)
  def call(*args: Any, **kw: Any) -> Any:
    args, kw, opaque = jitted.prepare(args, kw)
    if opaque:
      return jitted.anew(args, kw)
    if captures.at_top_level():
      return outermost()(*args, **kw)
    return nested(*args, **kw)

  # Gives access to the program, and to its compilation time, as in jax.jit.
  call.lower = lambda *args, **kw: outermost().lower(*args, **kw)  # type: ignore[attr-defined]
  call.eval_shape = functools.partial(jitted.shapes, nested)  # type: ignore[attr-defined]
  call.ahead = functools.partial(jitted.ahead, outermost)  # type: ignore[attr-defined]
  return call


def hashable(value: Any) -> Any:
  """Returns the value itself if it can be hashed, else an `Opaque` of it."""
  try:
    hash(value)
  except TypeError:
    return Opaque(value)
  return value


def unwrap(value: Any) -> Any:
  """Undoes `hashable`, and what `jit` does to a static callable."""
  return value.value if isinstance(value, Opaque | Keyed) else value
