"""The whole job of `main.py` in seconds: a tiny configuration, and its runs.

The configuration is `configs/digits.py` with less of everything. An epoch has
ten steps; there is a validation every five steps and a log line every four, so
that every checkpoint but the last lies inside a log interval.

Test modules import it for its functions and name it in `pytest_plugins` for its
fixtures. (pytest warns of modules that it loads second, unless they say
PYTEST_DONT_REWRITE.)
"""

import functools
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import pytest
import quick
from ml_collections import ConfigDict

from atat_jax import (
  compilation,
  evaluation,
  objectives,
  pipeline,
  plan,
  sharding,
  steps,
)
from atat_jax.data import batches
from atat_jax.evaluation import accuracies
from atat_jax.training import averaging, writer
from atat_jax.trial import rehearsal

ROOT = pathlib.Path(__file__).resolve().parents[2]

QUICK = {"XLA_FLAGS": quick.flags()}
"""Environment of a process whose programs compile quickly."""

STEPS_PER_EPOCH = 10
TEACHER_STEPS, STUDENT_STEPS = 10, 20
NUM_TEST, BATCH_SIZE, STATISTICS_SIZE = 70, 64, 40
ATTACKS = ("nominal", "fgsm", "pgd2")
MEASURED = {
  "running": ATTACKS,
  "batch": (
    "nominal",
    *("fgsm", "fgsm:statistics=fixed", "fgsm-margin"),
    *("pgd2", "pgd2:statistics=fixed", "pgd2-margin"),
  ),
}
"""BatchNorm mode to the attacks of its rows, in their order."""

_TRAINING = {
  "batch_size": 128,
  "log_every_steps": 4,
  "validate_every_epochs": 0.5,
  "term_gradients": False,  # a program more to compile
}
OVERRIDES = {
  "data.validation_size": 128,
  "model.width": 1,
  "objective.num_steps": 1,
  **{f"train.{key}": value for key, value in _TRAINING.items()},
  **{f"teacher.{key}": value for key, value in _TRAINING.items()},
  "train.num_epochs": 2,
  "teacher.num_epochs": 1,
  "evaluation.validation_attack": "pgd1",
  "evaluation.attacks": ",".join(ATTACKS),
  "evaluation.num_examples": NUM_TEST,
  "evaluation.batch_size": BATCH_SIZE,
  "evaluation.batch_statistics_size": STATISTICS_SIZE,
  "figures.analyses": "attention",
  "figures.attack": "pgd2",
  "figures.num_images": 2,
}


@functools.cache
def _configurations(name: str) -> types.ModuleType:
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
  module = importlib.util.module_from_spec(spec)
  found = list(sys.path)
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path[:] = found
  return module


def load_config(name: str, method: str | None = None) -> ConfigDict:
  """Loads `configs/<name>.py`, with its default method or another choice."""
  return _configurations(name).get_config(*([method] if method else []))


def config(method: str = "atat", **overrides: Any) -> ConfigDict:
  """Returns the tiny configuration; `train__num_epochs=3` sets that field."""
  made = load_config("digits", method)
  made.update_from_flattened_dict(_overrides(method))
  made.update_from_flattened_dict(
    {field.replace("__", "."): value for field, value in overrides.items()}
  )
  return made


def _overrides(method: str) -> dict[str, Any]:
  """Returns the overrides of the fields that a method has."""
  missing = {"num_steps"} - set(objectives.defaults(method))
  unknown = {f"objective.{field}" for field in missing}
  return {k: v for k, v in OVERRIDES.items() if k not in unknown}


def flags(
  workdir: pathlib.Path | str,
  *extra: str,
  method: str = "atat",
  mode: str | None = None,
) -> list[str]:
  """Returns the same as arguments of `main.py`; those in `extra` win."""
  return [
    f"--config=configs/digits.py:{method}",
    f"--workdir={workdir}",
    *([f"--mode={mode}"] if mode else []),
    *(f"--config.{k}={v}" for k, v in _overrides(method).items()),
    *extra,
  ]


@contextmanager
def devices(number: int) -> Iterator[None]:
  """Restricts the modes of `main.py` to the first devices."""
  make_mesh = sharding.make_mesh
  chosen = jax.devices()[:number]
  if len(chosen) < number:
    pytest.skip(f"needs {number} devices, has {len(chosen)}")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", lambda: make_mesh(chosen))
    yield


_made: dict[Any, Any] = {}
_rehearse = rehearsal.rehearse


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a maker of programs: the same arguments give the same program."""

  def make(*args: Any, **kwargs: Any) -> Any:
    key = (function, args, tuple(sorted(kwargs.items())))
    if key not in _made:
      _made[key] = function(*args, **kwargs)
    return _made[key]

  return make


_rehearsed: set[tuple[str, int]] = set()


def _rehearse_once(
  plan: Any, workdir: pathlib.Path, dataset: Any, mesh: Any
) -> None:
  """Rehearses a plan unless that has gone well before."""
  key = json.dumps(plan.record, sort_keys=True), mesh.size
  if key not in _rehearsed:
    _rehearse(plan, workdir, dataset, mesh)
    _rehearsed.add(key)


@contextmanager
def quick_programs() -> Iterator[None]:
  """Programs compile quickly, and runs of one plan share theirs.

  Compilation takes most of a tiny run's time, and a resumed run, which is a new
  process elsewhere, would trace and compile the same programs again.
  """
  options = compilation.compiler_options() | quick.OPTIONS
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compilation, "compiler_options", lambda **_: options)
    patch.setattr(rehearsal, "rehearse", _rehearse_once)
    for owner, name in (
      (plan.StagePlan, "make_optimizer"),
      (steps, "make_train_step"),
      (averaging, "make_statistics_pass"),
    ):
      if hasattr(owner, name):  # a test may have removed it
        patch.setattr(owner, name, _remembered(getattr(owner, name)))
    yield


def run(
  workdir: pathlib.Path,
  mode: str = "run",
  made: ConfigDict | None = None,
  *,
  num_devices: int = 1,
) -> None:
  """Runs a mode of `main.py` in this process, with `quick_programs`."""
  with devices(num_devices), quick_programs():
    pipeline.run(mode, made or config(), workdir)


@contextmanager
def signal_before(step: int, seed: int, signum: int = signal.SIGTERM):
  """Sends this process a signal when it fetches the batch of a step.

  Args:
    step: Step, counted from 1 as in checkpoints and log lines.
    seed: Seed of the stage; the student's is `config.seed`.
    signum: The signal.
  """
  train_indices = batches.train_indices

  def fetch(stage_seed: int, index: int, **sizes: int):
    if (stage_seed, index) == (seed, step - 1):
      os.kill(os.getpid(), signum)
    return train_indices(stage_seed, index, **sizes)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches, "train_indices", fetch)
    yield


@contextmanager
def instant_steps() -> Iterator[None]:
  """Replaces the train step by one that only counts; it compiles nothing."""

  def make_train_step(*_: Any, **__: Any) -> steps.TrainStep:
    def step_fn(state: Any, *_: Any) -> Any:
      sums = {name: value + 1 for name, value in state.sums.items()}
      return state.replace(step=state.step + 1, sums=sums)

    return step_fn

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(steps, "make_train_step", make_train_step)
    yield


def teacher_seed(made: ConfigDict) -> int:
  """Returns the seed of the teacher's stage."""
  return made.seed + 1_000_003


class Compilations(NamedTuple):
  """Numbers of programs that a run had compiled at several moments.

  Attributes:
    lines: (directory, split, step, number) at each line of the metrics.
    evaluations: (protocol, batch size, number before, number after) of each
      row of the results.
    programs: (name, shapes of the arguments) of each program.
  """

  lines: list[tuple[str, str, int, int]]
  evaluations: list[tuple[str, int, int, int]]
  programs: list[tuple[str, str]]


class FinishedRun(NamedTuple):
  """A run of the tiny configuration on one device, which no test may change.

  Attributes:
    workdir: Working directory of the run.
    compilations: Programs that it compiled.
  """

  workdir: pathlib.Path
  compilations: Compilations

  def copy(self, to: pathlib.Path) -> pathlib.Path:
    """Copies the working directory, for a test that changes it."""
    return pathlib.Path(shutil.copytree(self.workdir, to))

  @property
  def results(self) -> dict[str, Any]:
    """Content of `results.json`."""
    return json.loads((self.workdir / "results.json").read_text())


@contextmanager
def noted_programs(programs: list[tuple[str, str]]) -> Iterator[None]:
  """Collects the programs that jax compiles (or loads) as (name, shapes)."""

  class Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      found = re.match(r"Compiling jit\((.+?)\) with (.+)", record.getMessage())
      if found:
        programs.append((found[1], found[2]))

  handler, logger = Handler(), logging.getLogger("jax")
  logger.addHandler(handler)
  try:
    with jax.log_compiles():
      yield
  finally:
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def finished(
  tmp_path_factory: pytest.TempPathFactory, compilations: Callable[[], int]
) -> FinishedRun:
  """A finished run with teacher, student, evaluation, figures and report."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  counts = Compilations([], [], [])
  write, judge = writer.MetricsWriter.write, evaluation.judge

  def counted_write(self: Any, split: str, step: int, values: Any) -> None:
    directory = pathlib.Path(self._file.name).parent.name
    counts.lines.append((directory, split, step, compilations()))
    write(self, split, step, values)

  def counted_evaluation(*args: Any, **kwargs: Any) -> Any:
    before = compilations()
    value = judge(*args, **kwargs)
    name, size = kwargs["protocol"].name, kwargs["batch_size"]
    counts.evaluations.append((name, size, before, compilations()))
    return value

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(writer.MetricsWriter, "write", counted_write)
    # Training calls the one, evaluation the other.
    patch.setattr(evaluation, "judge", counted_evaluation)
    patch.setattr(accuracies, "judge", counted_evaluation)
    _made.clear()  # this run compiles all of its programs
    _rehearsed.clear()
    jax.clear_caches()
    with noted_programs(counts.programs):
      run(workdir)
  return FinishedRun(workdir, counts)


def snapshot(directory: pathlib.Path) -> dict[str, tuple[int, str]]:
  """Maps each path below a directory to (time of change, digest)."""
  return {
    str(path.relative_to(directory)): (
      path.stat().st_mtime_ns,
      hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
    )
    for path in sorted(directory.rglob("*"))
  }


def metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a `metrics.jsonl` without the speed, which is never the same."""
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  for line in lines:
    line.pop("images_per_second", None)
    line.pop("input_wait", None)
  return lines


class Outcome(NamedTuple):
  """Exit status and output of a process."""

  status: int
  stdout: str
  stderr: str


# Runs `python main.py` many times without importing everything again: JAX has
# not started a backend when the process forks. Says the number of each process,
# and its status when it has ended.
_SERVER = """
import json, os, runpy, sys, traceback
import jax, tensorboardX
from atat_jax import pipeline
sys.path.insert(0, os.getcwd())
for line in sys.stdin:
  arguments, out, err, cache, prelude = json.loads(line)
  child = os.fork()
  if child == 0:
    os.setpgid(0, 0)
    for path, stream in ((out, 1), (err, 2)):
      os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if cache:
      os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
      jax.config.update("jax_compilation_cache_dir", cache)
    sys.argv, status = ["main.py", *arguments], 0
    try:
      exec(prelude)
      runpy.run_path("main.py", run_name="__main__")
    except SystemExit as error:
      status = error.code
    except BaseException:
      traceback.print_exc()
      status = 1
    if isinstance(status, str):
      print(status, file=sys.stderr)
      status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # an orderly exit takes a second
  try:
    os.setpgid(child, child)  # whoever is first
  except OSError:
    pass
  print(child, flush=True)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
  """Runs `python main.py` in the repository, one process after the other.

  Attributes:
    pid: Number of the process, which leads a group of its own.
  """

  def __init__(self) -> None:
    self._server = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", _SERVER],
      cwd=ROOT,
      env={**os.environ, **QUICK},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      bufsize=0,  # so that `ready` sees all that there is
    )
    self._status: int | None = None
    self.pid = 0

  def start(
    self,
    arguments: Sequence[object],
    *,
    out: pathlib.Path,
    err: pathlib.Path,
    cache: pathlib.Path | None = None,
    prelude: str = "",
  ) -> None:
    """Starts one; the one before has ended.

    Args:
      arguments: Arguments of `main.py`.
      out: File to which the output is appended.
      err: The same for errors.
      cache: Folder of compiled programs; None: that of this process.
      prelude: Code that runs first.
    """
    made = list(map(str, arguments)), str(out), str(err), cache and str(cache)
    self._server.stdin.write(json.dumps([*made, prelude]).encode() + b"\n")
    self.pid = int(self._server.stdout.readline())
    self._status = None

  def wait(self, timeout: float | None = None) -> int:
    """Waits for the end and returns the exit status.

    Raises:
      subprocess.TimeoutExpired: It is still at work.
    """
    if self._status is None:
      stdout = self._server.stdout
      if not select.select([stdout], [], [], timeout)[0]:
        raise subprocess.TimeoutExpired("main.py", timeout)
      self._status = int(stdout.readline())
    return self._status

  def close(self) -> None:
    """Ends the server."""
    self._server.stdin.close()
    self._server.wait()
    self._server.stdout.close()


class CommandLine:
  """Runs `python main.py` to its end, one command after the other."""

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder = folder
    self._server = Server()

  def __call__(self, *arguments: object) -> Outcome:
    """Runs one command."""
    out, err = self._folder / "stdout", self._folder / "stderr"
    out.unlink(missing_ok=True)
    err.unlink(missing_ok=True)
    self._server.start(arguments, out=out, err=err)
    return Outcome(self._server.wait(), out.read_text(), err.read_text())

  def close(self) -> None:
    """Ends the server."""
    self._server.close()


@pytest.fixture(scope="session")
def command_line(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[CommandLine]:
  """Callable that runs `python main.py` with the arguments given."""
  made = CommandLine(tmp_path_factory.mktemp("output"))
  yield made
  made.close()
