"""Random streams: derived from one key by name and step, never carried along.

A run is a pure function of (config, seed) however often it is restarted,
because the key of every draw depends only on the run's key, the name of the
stream and the step.
"""

import zlib

import jax

from atat_jax.typing import Array


def stream(key: Array, name: str, step: Array | int = 0) -> Array:
  """The key of the stream `name` at `step`.

  Args:
    key: The run's key (`jax.random.key(seed)`).
    name: Name of the use, e.g. "attack" or "augmentation".
    step: int32 scalar; may be traced.

  Returns:
    A key that is independent of other names' and other steps' keys.
  """
  named = jax.random.fold_in(key, zlib.crc32(name.encode()))
  return jax.random.fold_in(named, step)
