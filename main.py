"""Trains, evaluates and explains a robust image classifier.

  python main.py --config=configs/digits.py --workdir=runs/digits

Flags only; the work is in `atat_jax/pipeline.py`.
"""

from atat_jax.process import commands

if __name__ == "__main__":
  commands.begin("stopped; the same command goes on from here")

import sys
import traceback
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from atat_jax import pipeline, runtime
from atat_jax.errors import UserError
from atat_jax.runs import locations

# Orbax writes checkpoints to no other store.
STORES = ("gs",)

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Configuration, e.g. configs/cifar10.py:atat.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory for everything that the run writes."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "run",
  pipeline.MODES,
  "Part of the work to do; run: everything that is not done yet.",
)
_STEP = flags.DEFINE_integer(
  "step", None, "Step of the training that --mode=replay makes again, from 1."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the other processes of a pod, cluster or job."
)
_DETERMINISTIC = flags.DEFINE_bool(
  "deterministic", False, "Make the numbers of a GPU repeat; slower."
)


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; ends with one line where they are wrong."""
  try:
    rest = flags.FLAGS(list(argv))
    if len(rest) > 1:
      raise flags.Error(f"unknown argument {rest[1]!r}; flags begin with --")
    for flag in (_CONFIG, _WORKDIR):
      if flag.value is None:
        raise flags.Error(f"--{flag.name} is missing")
    locations.find("--workdir", str(_WORKDIR.value), STORES)
    _CONFIG.value.items()  # a file that could not be read fails only here
    return rest
  except UserError as error:
    sys.exit(f"error: {error}")
  except (flags.Error, OSError) as error:
    lines = [line for line in str(error).splitlines() if line.strip()]
    sys.exit(f"error: {lines[-1].strip()}")
  except Exception as error:
    sys.exit(f"error: --config {_reason(error)}")


def _reason(error: Exception) -> str:
  """Puts an error in reading the configuration on one line."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  inner = error.args[0] if error.args else ""
  text = inner.args[0] if isinstance(inner, Exception) else inner
  text = " ".join(str(text).split())
  if isinstance(error, AttributeError | KeyError):
    # Those that Python raises itself know the name that is missing.
    named = getattr(error, "name", None) is not None
    if "ml_collections" in place.filename and not named:
      return f"has no field {text}"
  where = f"{place.filename}, line {place.lineno}"
  if isinstance(error, SyntaxError):
    where = f"{error.filename}, line {error.lineno}"
  return f"cannot be read: {type(error).__name__}: {text} ({where})"


def main(argv: Sequence[str]) -> None:
  """Sets the runtime up and runs the mode."""
  del argv
  workdir = locations.find("--workdir", str(_WORKDIR.value), STORES)
  kept = (
    f"what {workdir} holds is kept, and the same command goes on from there"
  )
  with runtime.plain_exits(workdir, kept):
    runtime.set_up(
      distributed=_DISTRIBUTED.value, deterministic=_DETERMINISTIC.value
    )
    pipeline.run(_MODE.value, _CONFIG.value, workdir, step=_STEP.value)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
