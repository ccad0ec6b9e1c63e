"""Flags, cores, provenance and result files, the same for all benchmarks."""

import argparse
import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.runs import files, provenance
from benchmarks.support import timing

Row = dict[str, Any]

ROOT = pathlib.Path(__file__).resolve().parents[2]
PUBLISHED = (ROOT / "benchmarks" / "results", ROOT / "docs" / "results")
"""Folders of committed results: only a committed tree may write into them."""

COMPILATION = "/jax/core/compile/backend_compile_duration"
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "torch")


def say(line: str) -> None:
  """Prints a line with the time of day and flushes it."""
  print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def number(text: str) -> float:
  """Parses a positive number, also a fraction such as "8/255"."""
  top, _, bottom = text.partition("/")
  try:
    value = float(top) / float(bottom or 1)
  except (ValueError, ZeroDivisionError) as error:
    raise argparse.ArgumentTypeError(
      f"{text!r}; allowed: a number such as 0.5 or 8/255"
    ) from error
  if not 0 < value < float("inf"):
    raise argparse.ArgumentTypeError(f"{text!r}; allowed: > 0")
  return value


def whole(text: str) -> int:
  """Parses a whole number > 0."""
  if not text.isdigit() or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number > 0")
  return int(text)


def parser(description: str | None) -> argparse.ArgumentParser:
  """Makes a parser that prints the description as it is written."""
  return argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def measurement_parser(description: str | None) -> argparse.ArgumentParser:
  """Makes a parser with the flags of every measurement."""
  made = parser(description)
  made.add_argument(
    "--threads", type=whole, help="CPU cores to use; default: all allowed"
  )
  made.add_argument(
    "--out", type=pathlib.Path, help="JSON file for the results"
  )
  return made


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
  """Ends the process with one line where the user made a mistake."""
  try:
    yield
  except UserError as error:
    sys.exit(f"error: {error}")


def is_committed(commit: str | None) -> bool:
  """Whether a recorded commit names exactly the code that ran."""
  return commit not in (None, "", "unknown") and not commit.endswith("-dirty")


def check_out(out: pathlib.Path | None) -> None:
  """Checks that results may be written there.

  Published results come from committed code only. Elsewhere uncommitted changes
  are allowed, with a warning.

  Args:
    out: File to be written; None: none.

  Raises:
    UserError: A published folder, and changes that are not committed.
  """
  commit = provenance.commit()
  if out is None or is_committed(commit):
    return
  resolved = out.resolve()
  if any(resolved.is_relative_to(folder) for folder in PUBLISHED):
    raise UserError(
      f"out: {out}, commit {commit or 'unknown'}; allowed: a committed tree"
      " for published results, or another folder"
    )
  say(
    f"WARNING: commit {commit or 'unknown'}: these results cannot be published"
  )


def restrict_cores(threads: int | None) -> list[int]:
  """Restricts the process to some of its cores, before JAX and PyTorch start.

  XLA's thread pool on CPU has one thread a core that the process may use, so
  that the restriction holds for both.

  Args:
    threads: Number of cores; None: all that are allowed.

  Returns:
    Numbers of the cores.

  Raises:
    UserError: More cores than are allowed, or not on Linux.
  """
  if not hasattr(os, "sched_setaffinity"):
    if threads is not None:
      raise UserError(f"threads: {threads}; allowed: on Linux only")
    return list(range(os.cpu_count() or 1))
  allowed = sorted(os.sched_getaffinity(0))
  threads = len(allowed) if threads is None else threads
  if threads > len(allowed):
    raise UserError(f"threads: {threads}; allowed: up to {len(allowed)}")
  os.sched_setaffinity(0, allowed[:threads])
  return allowed[:threads]


def start(threads: int | None, *, cache: bool, torch: bool = True) -> list[int]:
  """Prepares the process; to be called before JAX and PyTorch do any work.

  Args:
    threads: Number of CPU cores; None: all that are allowed.
    cache: Whether JAX's compilation cache on disk stays on.
    torch: Whether PyTorch takes part.

  Returns:
    Numbers of the cores.

  Raises:
    UserError: Too many threads, or a device that one side does not have.
  """
  cores = restrict_cores(threads)
  # JAX and PyTorch have to share the memory of a GPU.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  import jax

  if not cache:
    jax.config.update("jax_enable_compilation_cache", False)
  if torch:
    import torch as peer

    peer.set_num_threads(len(cores))
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
      raise UserError(f"backend: {backend}; allowed beside PyTorch: cpu, gpu")
    if backend == "gpu" and not peer.cuda.is_available():
      raise UserError(
        "backend: JAX has a GPU and PyTorch has not; set JAX_PLATFORMS=cpu or"
        " install PyTorch with CUDA"
      )
  load = os.getloadavg()[0]
  if load > len(cores) / 4:
    say(
      f"WARNING: the machine is busy (load {load:.1f}): the times will be"
      " unreliable, most of all with several PyTorch threads"
    )
  return cores


def describe(cores: Sequence[int]) -> dict[str, Any]:
  """Describes how results are made, and the machine that times depend on.

  Args:
    cores: Numbers of the CPU cores in use.

  Returns:
    Entries of `provenance.record`, and "machine"; plain values.
  """
  import jax

  info = pathlib.Path("/proc/cpuinfo")
  text = info.read_text(encoding="utf-8") if info.is_file() else ""
  cpu = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
  torch = sys.modules.get("torch")
  return provenance.record(
    [device.device_kind for device in jax.devices()],
    command=shlex.join(["python", *map(_relative, sys.orig_argv[1:])]),
    machine={
      "cpu": cpu[1] if cpu else platform.processor(),
      "cores": os.cpu_count(),
      "cores_used": list(cores),
      "torch_threads": torch.get_num_threads() if torch else None,
      "backend": jax.default_backend(),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
      "python": platform.python_version(),
      **{name: _version(name) for name in _LIBRARIES},
    },
  )


def _relative(argument: str) -> str:
  """Shortens an absolute path, which is the machine's own."""
  flag, equals, value = argument.partition("=")
  path = value if equals else flag
  if path.startswith("/"):
    path = os.path.relpath(path)
  return f"{flag}={path}" if equals else path


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def run(
  args: argparse.Namespace,
  rows: Iterable[Row] | Callable[[Sequence[str]], Iterable[Row]],
  table: Callable[[Sequence[Row]], str],
  *,
  torch: bool = False,
  line: Callable[[Row], str] = timing.line,
  names: Sequence[str] = (),
) -> None:
  """Makes measurements; prints and writes each one as soon as it is there.

  Args:
    args: Flags of `measurement_parser`.
    rows: Measurements, made lazily: nothing runs before the cores are set. With
      `names`, a function from those that are not there yet to measurements.
    table: Function from all measurements to a Markdown table.
    torch: Whether PyTorch takes part.
    line: Function from one measurement to a line.
    names: Names of all measurements, where a call that was stopped is continued
      by the same command; the file lists what is missing.
  """
  with plain_errors():
    check_out(args.out)
    about = describe(start(args.threads, cache=False, torch=torch))
    found = earlier(args.out, about) if names else []
    for row in rows(_missing(names, found)) if callable(rows) else rows:
      found.append(row)
      say(line(row))
      if args.out is not None:
        write(args.out, about, found, _missing(names, found))
    print(f"\n{table(found)}")
    if args.out is not None:
      print(f"\nresults: {args.out}")


def earlier(out: pathlib.Path | None, about: Mapping[str, Any]) -> list[Row]:
  """Reads what a call of the same command has measured before it was stopped.

  Args:
    out: Result file, or None.
    about: Result of `describe`.

  Returns:
    Its measurements; none where command, commit, versions or machine differ, or
    code is not committed.
  """
  content = files.read_json(out) if out is not None else None
  if content is None or not is_committed(about["commit"]):
    return []

  def identity(told: Mapping[str, Any]) -> list[Any]:
    place = {
      **told["machine"],
      "cores_used": len(told["machine"]["cores_used"]),
    }
    return [told["command"], told["commit"], told["versions"], place]

  try:
    same = identity(content) == identity(about)
    rows: list[Row] = content["rows"] if same else []
  except (LookupError, TypeError):
    return []
  if rows:
    say(f"{len(rows)} measurements are in {out} already")
  return rows


def _missing(names: Sequence[str], found: Sequence[Row]) -> list[str]:
  there = {row["name"] for row in found}
  return [name for name in names if name not in there]


def write(
  path: pathlib.Path,
  about: dict[str, Any],
  rows: Sequence[Row],
  missing: Sequence[str] = (),
) -> None:
  """Writes results, and beside them the ratios that `compare.py` reads.

  Args:
    path: The JSON file.
    about: Result of `describe`.
    rows: Measurements, each with a "name" and, where a peer ran, a "ratio":
      peer / ours.
    missing: Names of measurements that are still to be made.
  """
  ratios = {row["name"]: row["ratio"] for row in rows if row.get("ratio")}
  content = {**about, "ratios": ratios, "rows": list(rows)}
  files.write_json(
    path, content | ({"missing": list(missing)} if missing else {})
  )
