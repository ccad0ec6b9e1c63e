"""Provenance of a result: code, machine, command and time that made it."""

import datetime
import importlib.metadata
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def commit() -> str | None:
  """The commit of this source tree.

  Outside a git checkout what `ATAT_JAX_COMMIT` says (for a copy that was sent to
  another machine), else None.
  """
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=12"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return os.environ.get("ATAT_JAX_COMMIT")


def record(devices: Sequence[str], **more: Any) -> dict[str, Any]:
  """Records what made a result, as JSON.

  Args:
    devices: Kind of each device.
    **more: Further entries of the record.

  Returns:
    "command", "commit", "date", "devices", "cpus", "versions" of the packages
    that the numbers depend on, and `more`.
  """
  return {
    "command": " ".join(["python", *sys.argv]),
    "commit": commit(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "devices": list(devices),
    "cpus": os.cpu_count(),
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    **more,
  }
