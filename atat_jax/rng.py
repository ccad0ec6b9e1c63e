"""Random streams: keys derived from one key by name and step, never stored.

A run is a pure function of (config, seed) however often it is restarted,
because the key of every draw depends only on the run's key, the name of the
stream and the step.
"""

import zlib

import jax

from atat_jax import checks
from atat_jax.typing import Array


def stream(key: Array, name: str, step: Array | int = 0) -> Array:
  """Returns the key of the stream `name` at `step`.

  Args:
    key: Key of the run, `jax.random.key(seed)`.
    name: Name of the stream, e.g. "attack" or "augmentation".
    step: Number of the step, an int32 scalar; may be traced.

  Returns:
    A key that is independent of those of other names and other steps.

  Raises:
    UserError: Not a key, a name or the number of a step.
  """
  checks.instance("name", name, str, "the name of a stream")
  checks.integer("step", step)
  named = jax.random.fold_in(checks.key(key), zlib.crc32(name.encode()))
  return jax.random.fold_in(named, step)
