"""Sets up JAX in the process of a command: log, cache, other processes."""

import atexit
import ctypes
import functools
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

import jax
from absl import logging as absl_logging

from atat_jax import compilation
from atat_jax.errors import UserError
from atat_jax.process import job, peers, stops
from atat_jax.process.commands import plain_exits

__all__ = ["plain_exits", "set_up"]

# All have come when JAX begins; it aborts the process where this is too short.
_INITIALIZATION_SECONDS = 120
# For a process that is alive and does nothing; the others are found sooner.
_HEARTBEAT_SECONDS = 55
# Process 0 draws figures, which the others wait for.
_SHUTDOWN_SECONDS = 24 * 3600

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


def _ask_cluster() -> job.Found:
  """Asks JAX for the place of this process in a cluster, if it knows any.

  The names are JAX's own and may go; then only flags and variables count.
  """
  try:
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, 30
    )
    return found[0], found[1], found[2]
  except (ImportError, AttributeError, TypeError) as error:
    _log.warning("clusters cannot be recognised (%s)", error)
    return None, None, None
  except Exception as error:  # whatever a cluster's own services raise
    raise UserError(
      f"distributed: the cluster does not say where this process is ({error});"
      f" allowed: with {', '.join(job.VARIABLES.values())}"
    ) from error


def join(
  place: job.Member, seconds: int, arguments: Sequence[str] = ()
) -> peers.Peers:
  """Joins the other processes of a job, before anything asks for a device.

  Args:
    place: Place of this process.
    seconds: Longest time to wait for the others.
    arguments: Arguments that all processes must have in common.

  Raises:
    UserError: A process has not come or does not fit; JAX has begun before.
  """
  others = peers.Peers(
    place,
    {
      "jax": jax.__version__,
      "atat_jax": metadata.version("atat_jax"),
      "arguments": list(arguments),
    },
    seconds=seconds,
    tell=_log.info,
  )
  try:
    jax.distributed.initialize(
      place.address,
      place.num_processes,
      place.process_id,
      initialization_timeout=_INITIALIZATION_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (RuntimeError, ValueError, TypeError) as error:
    raise UserError(f"distributed: {error}") from error
  notify = _preemption_notice()

  def forward(signum: int) -> None:
    notify()
    others.stop(signum)

  stops.share_by(forward)
  others.watch(
    on_stop=stops.request,
    on_gone=lambda line, leader: stops.lost(line, at_once=leader),
  )
  # Before JAX's own, which waits for the other processes.
  atexit.register(_leave, others)
  return others


def _leave(others: peers.Peers) -> None:
  """Tells the other processes that this one ends."""
  if signum := stops.requested():
    others.stop(signum)
  others.leave(failed=stops.ends_early())


def set_up(
  *,
  distributed: bool,
  deterministic: bool = False,
  place: Mapping[str, object] | None = None,
  wait_seconds: int = 50,
  arguments: Sequence[str] = (),
) -> None:
  """Sets up the process of a command.

  Args:
    distributed: Whether to join the other processes of a job.
    deterministic: Whether the numbers of a GPU repeat (`DETERMINISTIC`). Before
      JAX has been asked for a device.
    place: Flags that say where this process is (`process.job.find`); None: the
      environment or the cluster says it.
    wait_seconds: Longest time to wait for the other processes.
    arguments: Arguments that all processes must have in common.

  Raises:
    UserError: A place that is not allowed; a process that has not come or does
      not fit.
  """
  log = logging.getLogger("atat_jax")
  log.setLevel(logging.INFO)
  log.addHandler(logging.StreamHandler())
  log.propagate = False
  # Orbax logs every save, and the traceback of every error that it raises.
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  for name, value in (place or {}).items():
    if value is not None and not distributed:
      raise UserError(f"{name}: {value}; allowed: with --distributed only")
  compilation.enable_persistent_cache()
  if deterministic:
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} {DETERMINISTIC}".strip()
  if distributed:
    job.check_seconds(wait_seconds)
    found = job.find(place or {}, _ask_cluster)
    join(found, wait_seconds, arguments)
    if found.process_id:  # process 0 says it all
      log.setLevel(logging.ERROR)
  if deterministic and (backend := jax.default_backend()) != "gpu":
    _log.info("--deterministic: not needed on %s", backend.upper())
  # JAX ends all processes when process 0 goes, which is why that goes last.
  first = distributed and jax.process_count() > 1 and not jax.process_index()
  stops.started(1.0 if first else 0.0)
