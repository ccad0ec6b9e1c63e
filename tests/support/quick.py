"""Compilation for tests that run each program once or twice.

The options make programs compile three to four times as quickly and run slowly.
They change neither the operations nor their dtypes.
"""

import functools
import os

import jax

OPTIONS = {
  "xla_backend_optimization_level": 0,
  # Most of the time goes into the kernels that XLA fuses by this emitter.
  "xla_cpu_use_fusion_emitters": False,
}

jit = functools.partial(jax.jit, compiler_options=OPTIONS)


def flags() -> str:
  """The variable XLA_FLAGS of a process that compiles all programs so."""
  given = os.environ.get("XLA_FLAGS", "").split()
  own = [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()]
  return " ".join(dict.fromkeys([*given, *own]))
