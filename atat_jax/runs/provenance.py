"""Provenance of a result: which code produced it."""

import os
import pathlib
import subprocess


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
