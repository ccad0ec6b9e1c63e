"""Sets up JAX in the process of a command: log, cache, other processes."""

import ctypes
import functools
import logging
import signal
from collections.abc import Callable

import jax
from absl import logging as absl_logging

from atat_jax import compilation
from atat_jax.process import stops
from atat_jax.process.commands import plain_exits

__all__ = ["plain_exits", "set_up"]


def _preemption_notice() -> Callable[[], object]:
  """Returns XLA's handler of SIGTERM, which `initialize` has installed.

  It tells the other processes, so that all stop after the same step. Python's
  handlers, which also know Ctrl-C, replace it and have to call it.
  """
  handle = ctypes.CDLL(None).signal
  handle.restype, handle.argtypes = ctypes.c_void_p, (ctypes.c_int,) * 2
  address = handle(signal.SIGTERM, 0)
  if not address or address == ctypes.c_void_p(-1).value:
    return lambda: None
  notify = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
  return functools.partial(notify, signal.SIGTERM)


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
    stops.share_by(_preemption_notice())
  stops.started()
