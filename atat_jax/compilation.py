"""Compilation: `jit` with the options that are fast on the backend at hand.

XLA's CPU backend fuses convolutions and dots into library calls by default,
which makes the backward passes of narrow convolutions several times slower. The
option that turns this off is experimental, so that it is probed once and left
out where the installed jaxlib does not know it. Other backends get no options.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

from atat_jax.runs import locations

_FAST = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
_ONCE = {"xla_backend_optimization_level": 0}


def _known(options: dict[str, Any]) -> bool:
  def probe(x: jax.Array) -> jax.Array:
    return x + 1

  try:
    jax.jit(probe, compiler_options=options).lower(0).compile()
  except jax.errors.JaxRuntimeError:  # "No such compile option"
    return False
  return True


@functools.cache
def compiler_options(*, once: bool = False) -> dict[str, Any]:
  """Returns the compiler options for the default backend, {} if none apply.

  Args:
    once: Whether the program runs once, so that it should compile fast rather
      than run fast.

  Returns:
    Compiler options for `jax.jit`.
  """
  options = _ONCE if once else _FAST
  applies = jax.default_backend() == "cpu" and _known(options)
  return dict(options) if applies else {}


# JAX's trace state outside any transformation. It differs inside jit, grad and
# vmap, even where only values that a function closes over are traced.
_TOP_LEVEL = get_opaque_trace_state(convention="flax")


def jit(
  function: Callable[..., Any], *, once: bool = False, **kwargs: Any
) -> Callable[..., Any]:
  """Applies `jax.jit` with `compiler_options()`; nests in transformations.

  JAX accepts compiler options on the outermost jit only, so that a call from
  inside another jit, vmap or grad goes through a plain jit; the options of the
  enclosing function then hold for all of it.

  Args:
    function: A pure function.
    once: Whether the program runs once, see `compiler_options`.
    **kwargs: Arguments of `jax.jit`.

  Returns:
    The compiled function.
  """
  nested = jax.jit(function, **kwargs)

  @functools.cache
  def outermost() -> Callable[..., Any]:
    # Asking for the backend starts it, so that this waits for the first call.
    options = compiler_options(once=once)
    return jax.jit(function, compiler_options=options, **kwargs)

  @functools.wraps(function)
  def call(*args: Any, **kw: Any) -> Any:
    if get_opaque_trace_state(convention="flax") == _TOP_LEVEL:
      return outermost()(*args, **kw)
    return nested(*args, **kw)

  # Gives access to the program, and to its compilation time, as in jax.jit.
  call.lower = lambda *args, **kw: outermost().lower(*args, **kw)  # type: ignore[attr-defined]
  return call


@dataclasses.dataclass(frozen=True, eq=False)
class ByIdentity:
  """Wrapper that makes an unhashable value hashable: equal only to itself."""

  value: Any

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the wrapped value."""
    return self.value(*args, **kwargs)

  def __hash__(self) -> int:
    """Returns the identity of the wrapped value."""
    return id(self.value)

  def __eq__(self, other: object) -> bool:
    """Returns whether both wrap the same object."""
    return isinstance(other, ByIdentity) and self.value is other.value


def hashable(value: Any) -> Any:
  """Returns the value itself if it can be hashed, else a `ByIdentity` of it."""
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

  JAX by default keeps only programs that take over a second to compile; here
  all are kept, so that the second start of a command compiles nothing.
  `JAX_COMPILATION_CACHE_DIR` is respected where it is set. Without a folder that
  can be written nothing is kept, which is told.
  """
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    path = locations.cache("compiled")
    jax.config.update("jax_compilation_cache_dir", path and str(path))
