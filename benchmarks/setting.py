"""What every benchmark needs: flags, cores, networks, and what was measured where."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from atat_jax.errors import UserError
from atat_jax.runs import provenance
from benchmarks import timing

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMPILATION = "/jax/core/compile/backend_compile_duration"
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "torch")


@dataclasses.dataclass(frozen=True)
class Network:
  """A flax network with images to attack.

  Attributes:
    name: For the tables.
    source: Where it comes from, for the JSON.
    model: The module.
    variables: Its parameters and running statistics.
    images: float32 [N, H, W, C] in [0, 1].
    labels: int32 [N].
  """

  name: str
  source: str
  model: Any
  variables: Any
  images: np.ndarray
  labels: np.ndarray


def say(line: str) -> None:
  """Prints a line with the time of day, at once."""
  print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def number(text: str) -> float:
  """A positive number, also as a fraction: "8/255"."""
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
  """A whole number > 0."""
  if not text.isdigit() or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number > 0")
  return int(text)


def restrict(threads: int | None) -> list[int]:
  """Leaves the process so many of its cores: before JAX and PyTorch start.

  XLA's pool on CPU has a thread for each core that the process may use, so this
  holds for both.

  Args:
    threads: How many; None: all.

  Returns:
    The cores.
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
  """Everything that has to come before JAX and PyTorch begin their work.

  Args:
    threads: Cores to use; None: all.
    cache: Whether JAX's cache on disk stays on.
    torch: Whether PyTorch takes part.

  Returns:
    The cores.

  Raises:
    UserError: Too many threads, or a device that one side has not.
  """
  cores = restrict(threads)
  # Both have to fit into the memory of a GPU.
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
      f"WARNING: the machine is busy (load {load:.1f}); the times will say"
      " little, above all those of several PyTorch threads"
    )
  return cores


def wide_resnet(name: str, **fields: Any) -> Any:
  """The network called "wrn-DEPTH-WIDTH", a flax module.

  Args:
    name: Such as "wrn-16-4".
    **fields: Other fields of the Wide ResNet.

  Returns:
    The module.

  Raises:
    UserError: Another name.
  """
  from atat_jax import models

  match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
  if match is None:
    raise UserError(f"model: {name!r}; allowed: wrn-DEPTH-WIDTH")
  depth, width = map(int, match.groups())
  return models.create("wide_resnet", depth=depth, width=width, **fields)


def network(name: str, **fields: Any) -> Any:
  """A network for 10 classes.

  Args:
    name: "wrn-DEPTH-WIDTH", or of `models.MODELS`.
    **fields: Of the network.

  Returns:
    The flax module.

  Raises:
    UserError: Another name, or a field that it has not.
  """
  from atat_jax import models

  if name.startswith("wrn-"):
    return wide_resnet(name, **fields)
  return models.create(name, num_classes=10, **fields)


def hyperparameters(method: str) -> dict[str, Any]:
  """A method's own, as `configs/default.py` has them.

  Raises:
    UserError: Unknown method.
  """
  from atat_jax import checks
  from benchmarks import methods

  known = methods.load(ROOT / "configs" / "default.py").METHODS
  checks.choice("method", method, known)
  return dict(known[method])


def random_network(name: str, num_examples: int, seed: int) -> Network:
  """A network that has learned nothing, on noise.

  The labels are its own predictions but for every eighth example.

  Args:
    name: Such as "wrn-10-2".
    num_examples: N.
    seed: Of weights and images.

  Returns:
    The network.
  """
  import jax

  model = wide_resnet(name)
  generator = np.random.default_rng(seed)
  images = generator.uniform(size=(num_examples, 32, 32, 3)).astype(np.float32)
  variables = jax.jit(model.init)(jax.random.key(seed), images[:1])
  logits = jax.jit(model.apply)(variables, images)
  labels = np.array(logits.argmax(-1), np.int32)
  labels[7::8] = (labels[7::8] + 1) % logits.shape[-1]
  return Network(name, "random weights", model, variables, images, labels)


def describe(cores: Sequence[int]) -> dict[str, Any]:
  """Command, commit, date, and the machine that the times depend on."""
  import jax

  info = pathlib.Path("/proc/cpuinfo")
  text = info.read_text(encoding="utf-8") if info.is_file() else ""
  cpu = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
  torch = sys.modules.get("torch")
  return {
    # Without the folders, which are the machine's own.
    "command": shlex.join(["python", *map(_relative, sys.orig_argv[1:])]),
    "commit": provenance.commit() or "unknown",
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "machine": {
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
  }


def _relative(argument: str) -> str:
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


def report(
  rows: Iterable[dict[str, Any]],
  table: Callable[[Sequence[dict[str, Any]]], str],
  *,
  cores: Sequence[int],
  out: pathlib.Path | None,
  line: Callable[[dict[str, Any]], str] = timing.line,
) -> None:
  """Tells and writes each measurement as it is made, and the table at the end.

  Args:
    rows: Makes the measurements one after the other.
    table: Of all of them.
    cores: That are used.
    out: JSON file; None: not written.
    line: Of one of them.
  """
  about = describe(cores)
  found: list[dict[str, Any]] = []
  for row in rows:
    found.append(row)
    say(line(row))
    if out is not None:
      write(out, about, found)
  print(f"\n{table(found)}")
  if out is not None:
    print(f"\nresults: {out}")


_PART = re.compile(
  r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL
)


def fill(
  page: str, names: Iterable[str], write_part: Callable[[str], str]
) -> str:
  """Replaces what stands on a page between its markers.

  Args:
    page: Markdown; `<!-- generated: NAME -->` and `<!-- end -->` are markers.
    names: Those that are known.
    write_part: Name to what is to stand there, without its last line break.

  Returns:
    The page.

  Raises:
    UserError: A marker with another name.
  """
  known = list(names)

  def part(match: re.Match[str]) -> str:
    if match["name"] not in known:
      raise UserError(
        f"generated: {match['name']!r}; allowed: {', '.join(known)}"
      )
    return f"{match[1]}{write_part(match['name'])}\n{match[3]}"

  return _PART.sub(part, page)


def write(
  path: pathlib.Path, about: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
  """Writes results, and beside them the ratios that `compare.py` looks at.

  Args:
    path: The JSON file.
    about: What `describe` returned.
    rows: Each with a "name" and, where a peer ran, a "ratio": peer / ours.
  """
  from atat_jax.runs import files

  ratios = {row["name"]: row["ratio"] for row in rows if row.get("ratio")}
  files.write_json(path, {**about, "ratios": ratios, "rows": list(rows)})
