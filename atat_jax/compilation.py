"""How functions are compiled: `jit` with what is fast on this backend.

XLA's CPU backend fuses convolutions and dots into library calls by default,
which makes the backward passes of narrow convolutions several times slower
than without. The option that turns this off is experimental, so it is probed
once and left out where the installed jaxlib does not know it. Other backends
get no options.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

_FAST = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
_ONCE = {"xla_backend_optimization_level": 0}


def _known(options: dict[str, Any]) -> bool:
  try:
    jax.jit(lambda x: x + 1, compiler_options=options).lower(0).compile()
  except jax.errors.JaxRuntimeError:  # "No such compile option"
    return False
  return True


@functools.cache
def compiler_options(*, once: bool = False) -> dict[str, Any]:
  """The compiler options for the default backend, {} where none apply.

  Args:
    once: For a program that runs once, which should compile fast rather than
      run fast.

  Returns:
    Options of `jax.jit`.
  """
  options = _ONCE if once else _FAST
  applies = jax.default_backend() == "cpu" and _known(options)
  return dict(options) if applies else {}


# What jax is doing right now: nothing, at import; tracing, inside jit, grad or
# vmap, even where only what a function closes over is traced.
_TOP_LEVEL = get_opaque_trace_state(convention="flax")


def jit(
  function: Callable[..., Any], *, once: bool = False, **kwargs: Any
) -> Callable[..., Any]:
  """`jax.jit` with `compiler_options()`, usable inside other transformations.

  jax accepts compiler options on the outermost jit only, so a call from inside
  another jit, vmap or grad goes through a plain jit; the enclosing function's
  options then hold for all of it.

  Args:
    function: A pure function.
    once: See `compiler_options`.
    **kwargs: Passed to `jax.jit`.

  Returns:
    The compiled function.
  """
  nested = jax.jit(function, **kwargs)

  @functools.cache
  def outermost() -> Callable[..., Any]:
    # Made at the first call: asking for the backend starts it.
    options = compiler_options(once=once)
    return jax.jit(function, compiler_options=options, **kwargs)

  @functools.wraps(function)
  def call(*args: Any, **kw: Any) -> Any:
    if get_opaque_trace_state(convention="flax") == _TOP_LEVEL:
      return outermost()(*args, **kw)
    return nested(*args, **kw)

  # As jax.jit's, for those who look at the program or time its compilation.
  call.lower = lambda *args, **kw: outermost().lower(*args, **kw)  # type: ignore[attr-defined]
  return call


@dataclasses.dataclass(frozen=True, eq=False)
class ByIdentity:
  """Makes an unhashable value a static argument: equal only to itself."""

  value: Any

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the value."""
    return self.value(*args, **kwargs)

  def __hash__(self) -> int:
    """Of the very object."""
    return id(self.value)

  def __eq__(self, other: object) -> bool:
    """Whether it is the very object."""
    return isinstance(other, ByIdentity) and self.value is other.value


def hashable(value: Any) -> Any:
  """The value itself if it can be hashed, else a `ByIdentity` of it."""
  try:
    hash(value)
  except TypeError:
    return ByIdentity(value)
  return value


def unwrap(value: Any) -> Any:
  """Undoes `hashable`."""
  return value.value if isinstance(value, ByIdentity) else value


def enable_persistent_cache() -> None:
  """Keeps compiled programs in the user's cache directory between runs.

  All of them, also those that take less than the second from which on JAX keeps
  them by default: the second start of a command compiles nothing.
  `JAX_COMPILATION_CACHE_DIR` is respected where it is set.
  """
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(root) / "atat_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(path))
