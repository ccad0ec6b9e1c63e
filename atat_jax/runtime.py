"""Sets up JAX in the process of a command: log, cache, other processes."""

import logging

import jax
from absl import logging as absl_logging

from atat_jax import compilation
from atat_jax.process import stops
from atat_jax.process.commands import plain_exits

__all__ = ["plain_exits", "set_up"]


def set_up(*, distributed: bool) -> None:
  """Sets up the process of a command.

  Args:
    distributed: Whether to join the other processes of a TPU pod, a SLURM or
      an Open MPI job, as `jax.distributed.initialize` finds them.
  """
  log = logging.getLogger("atat_jax")
  log.setLevel(logging.INFO)
  log.addHandler(logging.StreamHandler())
  log.propagate = False
  # Orbax logs every save, and the traceback of every error that it raises.
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  compilation.enable_persistent_cache()
  if distributed:
    jax.distributed.initialize()
  stops.started()
