"""Kills a run at random moments and compares it with an undisturbed one.

  python tests/reliability/kills.py --kills=50 --seed=0

Runs the tiny configuration once without interruption. Then chains of runs in
fresh working directories are killed with SIGKILL, each kill in a chosen phase
(while the process starts, compiles, takes a step, writes a checkpoint,
evaluates, attacks with AutoAttack, or draws) and at a random moment of it; the
same command then goes on, until the chain's kills are spent and it may finish.
Everything a chain leaves behind has to equal the undisturbed run bit by bit:
parameters, statistics, optimizer state, averages, metrics, results, arrays of
figures. Prints one line a kill and a table of phases.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
import tiny  # noqa: E402  found by the line above

# AutoAttack saves its state so often that a kill finds runs in flight.
_PRELUDE = """
from atat_jax import attacks
attacks.autoattack.__kwdefaults__["save_every_s"] = 0.3
"""

_FLAGS = (
  "--config.train.log_every_steps=1",
  "--config.train.ema_decay=0.9",
  "--config.evaluation.attacks=nominal,pgd2,autoattack-fast",
  "--config.evaluation.num_examples=24",
)

_TIME_LIMIT_S = 900.0


@dataclasses.dataclass(frozen=True)
class Phase:
  """Part of a run in which it is killed.

  Attributes:
    name: Name of the phase.
    begun: Function of the working directory: whether the phase has begun; it
      is asked again and again.
    seconds: Longest time from then on to the kill.
    compiles: Whether the run starts with an empty compilation cache.
  """

  name: str
  begun: Callable[[pathlib.Path], bool]
  seconds: float
  compiles: bool = False


def _any(pattern: str) -> Callable[[pathlib.Path], bool]:
  return lambda workdir: any(workdir.glob(pattern))


PHASES = (
  Phase("start", lambda _: True, 1.0),
  Phase("compilation", _any("config.json"), 6.0, compiles=True),
  Phase("step", _any("**/metrics.jsonl"), 2.0),
  Phase("checkpoint", _any("**/checkpoints/*tmp*"), 0.1),
  Phase("evaluation", _any("results.json"), 1.0),
  Phase("autoattack", _any("autoattack/*.npz"), 3.0),
  Phase("figures", _any("*.npz"), 2.0),
)
"""Phases in the order in which a run passes them."""


@dataclasses.dataclass
class Harness:
  """Starts runs of one command and kills them.

  Attributes:
    folder: Folder of all working directories, logs and caches.
    arguments: Arguments of `main.py`, without the working directory.
    rng: Source of every random choice.
    server: Process that starts the command.
    report: Function that prints a line.
  """

  folder: pathlib.Path
  arguments: Sequence[str]
  rng: random.Random
  server: tiny.Server
  report: Callable[[str], object] = print
  kills: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )

  def start(self, workdir: pathlib.Path, *, compiles: bool) -> None:
    """Starts the command."""
    cache = self.folder / "cache"
    if compiles:
      cache = pathlib.Path(tempfile.mkdtemp(dir=self.folder, prefix="cache-"))
    log = self._log(workdir)
    self.server.start(
      [f"--workdir={workdir}", *self.arguments],
      out=log,
      err=log,
      cache=cache,
      prelude=_PRELUDE,
    )

  def _log(self, workdir: pathlib.Path) -> pathlib.Path:
    return self.folder / f"{workdir.name}.log"

  def _failure(self, workdir: pathlib.Path, status: int) -> RuntimeError:
    words = self._log(workdir).read_text()[-3000:]
    return RuntimeError(f"{workdir.name} ended with {status}: {words}")

  def finish(self, workdir: pathlib.Path) -> None:
    """Runs the command to its end.

    Raises:
      RuntimeError: It failed; the message is the end of its output.
    """
    self.start(workdir, compiles=False)
    if status := self.server.wait(_TIME_LIMIT_S):
      raise self._failure(workdir, status)

  def kill(self, workdir: pathlib.Path, phase: Phase) -> bool:
    """Starts the command and kills it in a phase.

    Returns:
      Whether it was killed; False: it had finished before.
    """
    self.start(workdir, compiles=phase.compiles)
    began = time.monotonic()
    while not phase.begun(workdir):
      if self._has_ended(workdir, 0.002):
        return False
      if time.monotonic() - began > _TIME_LIMIT_S:
        raise RuntimeError(f"{workdir.name}: no {phase.name} in time")
    if self._has_ended(workdir, self.rng.uniform(0, phase.seconds)):
      return False
    os.killpg(self.server.pid, signal.SIGKILL)
    self.server.wait()
    self.kills[phase.name] += 1
    seconds = time.monotonic() - began
    self.report(f"{workdir.name}: killed in {phase.name} after {seconds:.2f} s")
    return True

  def _has_ended(self, workdir: pathlib.Path, seconds: float) -> bool:
    """Waits a while; whether the command has come to its end by itself."""
    try:
      status = self.server.wait(seconds)
    except subprocess.TimeoutExpired:
      return False
    if status:
      raise self._failure(workdir, status)
    return True

  def chain(
    self, number: int, phases: Sequence[Phase]
  ) -> tuple[pathlib.Path, int]:
    """Kills one run in several phases, then lets it finish.

    Returns:
      Its working directory, and the number of kills.
    """
    workdir = self.folder / f"chain{number:02d}"
    killed = sum(self.kill(workdir, phase) for phase in phases)
    self.finish(workdir)
    return workdir, killed


def _checkpoints(workdir: pathlib.Path) -> Iterator[tuple[str, Any]]:
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  for item in sorted(workdir.glob("**/checkpoints/*/*/_METADATA")):
    name = str(item.parent.relative_to(workdir))
    with warnings.catch_warnings(action="ignore"):  # "no sharding given"
      yield name, reader.restore(item.parent)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict):
    for key in sorted(tree):
      yield from _leaves(tree[key], f"{path}/{key}")
  elif isinstance(tree, list | tuple):
    for number, value in enumerate(tree):
      yield from _leaves(value, f"{path}/{number}")
  else:
    yield path, tree


def _numbers(leaf: Any) -> Any:
  is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )
  return jax.random.key_data(leaf) if is_key else leaf


_FREE = (
  "seconds",
  "images_per_second",
  "input_wait",
  "date",
  "command",
  "checksum",
)


def _plain(tree: Any) -> Any:
  """Leaves out times, the command with its path, and the checksum of both."""
  if isinstance(tree, dict):
    return {k: _plain(v) for k, v in tree.items() if k not in _FREE}
  return [_plain(v) for v in tree] if isinstance(tree, list) else tree


def contents(workdir: pathlib.Path) -> dict[str, Any]:
  """Collects everything of a finished run that a kill must not change.

  Args:
    workdir: Working directory of the run.

  Returns:
    Name to bytes, text or plain values.
  """
  found: dict[str, Any] = {
    "files": sorted(
      str(path.relative_to(workdir))
      for path in workdir.rglob("*")
      if path.is_file()
      and not {"tensorboard", "checkpoints", "autoattack"} & set(path.parts)
    )
  }
  for name, tree in _checkpoints(workdir):
    for path, leaf in _leaves(tree):
      array = np.asarray(_numbers(leaf))
      key = f"{name}{path} {array.dtype} {array.shape}"
      found[key] = array.tobytes()
  for path in sorted(workdir.glob("**/metrics.jsonl")):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    name = str(path.relative_to(workdir))
    for line in lines:
      key = f"{name} {line['split']} {line['step']}"
      if key in found:
        found[f"{key} again"] = _plain(line)
      found[key] = _plain(line)
  results = json.loads((workdir / "results.json").read_text())
  found["results"] = json.dumps(_plain(results), sort_keys=True).replace(
    str(workdir), ""
  )
  for path in sorted(workdir.glob("*.npz")):
    with np.load(path) as arrays:
      for name in arrays.files:
        found[f"{path.name} {name}"] = arrays[name].tobytes()
  return found


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
  """Names the entries in which two runs differ."""
  return sorted(
    name
    for name in wanted.keys() | found.keys()
    if name not in wanted or name not in found or wanted[name] != found[name]
  )


def run(
  folder: pathlib.Path,
  *,
  num_kills: int,
  seed: int,
  arguments: Sequence[str],
  phases: Sequence[Phase] = PHASES,
  report: Callable[[str], object] = print,
) -> list[str]:
  """Makes the undisturbed run and chains of kills, and compares them.

  Args:
    folder: Empty folder for all files.
    num_kills: Number of kills.
    seed: Seed of all random choices.
    arguments: Arguments of `main.py`, without the working directory.
    phases: Phases of a chain.
    report: Function that prints a line.

  Returns:
    Differences, one line each; empty if the kills changed nothing.
  """
  report(f"seed {seed}")
  found: list[str] = []
  number = 0
  with contextlib.closing(tiny.Server()) as server:
    harness = Harness(folder, arguments, random.Random(seed), server, report)
    harness.finish(folder / "whole")
    wanted = contents(folder / "whole")
    if len(wanted) < 50:
      raise RuntimeError(f"the undisturbed run left only {sorted(wanted)}")
    while (left := num_kills - harness.kills.total()) > 0:
      chosen = list(phases)
      if left < len(chosen):
        chosen = harness.rng.sample(chosen, left)
        chosen.sort(key=phases.index)
      workdir, killed = harness.chain(number, chosen)
      differ = differences(wanted, contents(workdir))
      report(f"{workdir.name}: {killed} kills, {len(differ)} differences")
      found += [f"{workdir.name}: {name}" for name in differ]
      number += 1
  report(f"compared {len(wanted)} entries of {number} chains")
  for phase in phases:
    report(f"{phase.name:<12} {harness.kills[phase.name]:>3} kills")
  return found


def arguments(method: str, *more: str) -> list[str]:
  """Returns the arguments of the tiny run that is killed.

  Args:
    method: Training method.
    *more: Further arguments, which win.

  Returns:
    Arguments of `main.py`, without the working directory.
  """
  flags = tiny.flags("", *_FLAGS, *more, method=method)
  return [flag for flag in flags if not flag.startswith("--workdir")]


def main() -> None:
  """Runs the harness; ends with status 1 if a kill changed anything."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--method", default="atat")
  parser.add_argument("--out", type=pathlib.Path, default=None)
  options = parser.parse_args()
  folder = options.out or pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
  folder.mkdir(parents=True, exist_ok=True)
  found = run(
    folder.resolve(),
    num_kills=options.kills,
    seed=options.seed,
    arguments=arguments(options.method),
  )
  sys.stdout.write("\n".join([*found, f"{len(found)} differences", ""]))
  sys.exit(1 if found else 0)


if __name__ == "__main__":
  main()
