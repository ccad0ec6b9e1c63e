"""Sets up the process of a command: log, signals, cache, other processes."""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator

import jax
from absl import logging as absl_logging

from atat_jax import compilation
from atat_jax.errors import UserError
from atat_jax.training import interrupts


@contextlib.contextmanager
def plain_exits() -> Iterator[None]:
  """Ends the process with one line on bad input, with its status on a signal."""
  try:
    yield
  except UserError as error:
    sys.exit(f"error: {error}")
  except interrupts.Interrupted as error:
    sys.stderr.write(f"\n{error}\n")
    sys.exit(128 + error.signum)


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
  absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every save
  for number in interrupts.SIGNALS:
    signal.signal(number, interrupts.raise_interrupted)
  compilation.enable_persistent_cache()
  if distributed:
    jax.distributed.initialize()
