"""Provenance of a result: code, command, machine and time that produced it."""

import datetime
import importlib.metadata
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def commit() -> str | None:
  """Returns the commit of this source tree, with "-dirty" if it was changed.

  Outside a git checkout it is the value of the environment variable
  `ATAT_JAX_COMMIT` (for a copy that was sent to another machine), else None.
  """
  try:
    return subprocess.run(
      # The user's own git, wherever it is installed.
      ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return os.environ.get("ATAT_JAX_COMMIT")


def command() -> str:
  """Returns the command of this process, ready for a shell."""
  return shlex.join(["python", *sys.argv])


def record(devices: Sequence[str], **more: Any) -> dict[str, Any]:
  """Describes how a result is made, for the file that holds it.

  Args:
    devices: Kind of each accelerator in use.
    **more: Further entries; one of the same name replaces the usual one.

  Returns:
    Plain values: "command", "commit" (None: unknown), "date" (UTC, ISO 8601),
    "devices", "cpus", "versions", and `more`.
  """
  return {
    "command": command(),
    "commit": commit(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "devices": list(devices),
    "cpus": os.cpu_count(),
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    **more,
  }


def facts(found: Mapping[str, Any]) -> dict[str, str]:
  """Puts a record into words: devices, versions and commit.

  Args:
    found: Result of `record`; entries may be missing.

  Returns:
    Name of each fact to its text; "" for one that is not recorded, except the
    commit.
  """
  devices = found.get("devices", [])
  return {
    "Devices": ", ".join(
      f"{devices.count(device)} x {device}" for device in dict.fromkeys(devices)
    ),
    "Versions": ", ".join(
      f"{name} {version}" for name, version in found.get("versions", {}).items()
    ),
    "Commit": found.get("commit") or "not recorded",
  }
