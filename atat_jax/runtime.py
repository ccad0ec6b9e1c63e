"""Sets up JAX in the process of a command: log, cache, other processes."""

import ctypes
import functools
import logging
import os
import signal
from collections.abc import Callable

import jax
from absl import logging as absl_logging

from atat_jax import compilation
from atat_jax.process import stops
from atat_jax.process.commands import plain_exits

__all__ = ["plain_exits", "set_up"]

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
"""Has XLA use no operation on a GPU that adds in an order of its own, and choose
kernels by rules, not by which was the fastest when it was timed."""

_log = logging.getLogger(__name__)


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


def set_up(*, distributed: bool, deterministic: bool = False) -> None:
  """Sets up the process of a command.

  Args:
    distributed: Whether to join the other processes of a TPU pod, a SLURM or
      an Open MPI job, as `jax.distributed.initialize` finds them.
    deterministic: Whether the numbers of a GPU repeat (`DETERMINISTIC`). Before
      JAX has been asked for a device.
  """
  log = logging.getLogger("atat_jax")
  log.setLevel(logging.INFO)
  log.addHandler(logging.StreamHandler())
  log.propagate = False
  # Orbax logs every save, and the traceback of every error that it raises.
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  compilation.enable_persistent_cache()
  if deterministic:
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} {DETERMINISTIC}".strip()
  if distributed:
    jax.distributed.initialize()
    stops.share_by(_preemption_notice())
  if deterministic and (backend := jax.default_backend()) != "gpu":
    _log.info("--deterministic: not needed on %s", backend.upper())
  stops.started()
