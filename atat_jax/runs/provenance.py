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

_PACKAGES = (
  "atat_jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
)

_CONSOLE = "atat-jax"  # the command that an installation has


def commit() -> str | None:
  """Returns the commit of this source tree, with "-dirty" if it was changed.

  Outside a git checkout it is the value of the environment variable
  `ATAT_JAX_COMMIT` (for a copy that was sent to another machine), else None.
  """
  here = pathlib.Path(__file__)
  try:
    # Installed into an environment inside another project's checkout, the
    # package is no part of that.
    _git("ls-files", "--error-unmatch", here.name)
    return _git("describe", "--always", "--dirty", "--abbrev=12")
  except (OSError, subprocess.SubprocessError):
    return os.environ.get("ATAT_JAX_COMMIT")


def _git(*arguments: str) -> str:
  """Returns what git prints about this source tree, which it leaves alone."""
  # Within a hook of git, variables point to the repository of the hook.
  kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
  # The arguments are those of `commit`; git is the user's own, wherever it is.
  return subprocess.run(  # noqa: S603
    ["git", *arguments],  # noqa: S607
    cwd=pathlib.Path(__file__).parent,
    env={**kept, "GIT_OPTIONAL_LOCKS": "0"},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    encoding="utf-8",
    errors="replace",
    check=True,
    timeout=30,
  ).stdout.strip()


def command() -> str:
  """Returns the command of this process, ready for a shell."""
  main = sys.modules.get("__main__")
  spec = getattr(main, "__spec__", None)
  if spec is None and os.path.basename(sys.argv[0]) == _CONSOLE:
    return join([_CONSOLE, *sys.argv[1:]])
  if spec is None or sys.argv[0] != getattr(main, "__file__", None):
    return join(["python", *sys.argv])
  module = spec.name.removesuffix(".__main__")
  return join(["python", "-m", module, *sys.argv[1:]])


def join(words: Sequence[str]) -> str:
  """Joins the words of a command on one line that is safe to paste.

  Args:
    words: The words; they may hold line breaks and bytes that are no text.

  Returns:
    The command, quoted for bash, zsh and POSIX shells of 2024.
  """
  return " ".join(map(_quote, words))


def _quote(word: str) -> str:
  if word.isprintable():
    return shlex.quote(word)
  # Bytes for whatever a terminal would act on, or not show.
  letters = (
    f"\\{letter}"
    if letter in "\\'"
    else letter
    if letter.isprintable()
    else "".join(
      f"\\{byte:03o}" for byte in letter.encode(errors="surrogateescape")
    )
    for letter in word
  )
  return f"$'{''.join(letters)}'"


def _version(name: str) -> str | None:
  """Returns the version of a package; None without its metadata."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def record(devices: Sequence[str], **more: Any) -> dict[str, Any]:
  """Describes how a result is made, for the file that holds it.

  Args:
    devices: Kind of each accelerator in use.
    **more: Further entries; one of the same name replaces the usual one.

  Returns:
    Plain values: "command", "commit" (None: unknown), "date" (UTC, ISO 8601),
    "devices", "cpus", "versions", "xla_flags" if there are any, and `more`.
  """
  return {
    "command": command(),
    "commit": commit(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "devices": list(devices),
    "cpus": os.cpu_count(),
    "versions": {
      name: version for name in _PACKAGES if (version := _version(name))
    },
    **({"xla_flags": flags} if (flags := os.environ.get("XLA_FLAGS")) else {}),
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
