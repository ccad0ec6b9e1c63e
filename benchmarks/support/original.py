"""The original AutoAttack package (fra31/auto-attack), run and timed.

Its own `run_standard_evaluation` runs once and unmodified; only the object to
which it reports the end of each attack is extended by a clock.
"""

import contextlib
import hashlib
import importlib
import io
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from atat_jax.errors import UserError
from benchmarks.support.comparison import Side

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}

_ADVICE = (
  "git clone https://github.com/fra31/auto-attack and name the clone with"
  " --reference=auto-attack, or pip install"
  " git+https://github.com/fra31/auto-attack"
)


def load(directory: str | None) -> ModuleType:
  """Imports the package.

  Args:
    directory: Folder that holds the folder `autoattack`; None: the installed
      package.

  Returns:
    The module that has the class `AutoAttack`.

  Raises:
    UserError: The package is missing, or too old to be timed.
  """
  if directory is not None:
    folder = pathlib.Path(directory).resolve()
    if not (folder / "autoattack" / "autoattack.py").is_file():
      raise UserError(
        f"reference: no package autoattack in {directory}; {_ADVICE}"
      )
    sys.path.insert(0, str(folder))
  try:
    module = importlib.import_module("autoattack.autoattack")
  except ModuleNotFoundError as error:
    if error.name not in ("autoattack", "autoattack.autoattack"):
      raise
    raise UserError(
      f"reference: the original AutoAttack is not installed; {_ADVICE}"
    ) from error
  if not hasattr(module, "EvaluationState"):
    raise UserError(
      f"reference: {module.__file__} is a version from before 2023, without"
      f" EvaluationState; {_ADVICE}"
    )
  return module


def digest(module: ModuleType) -> str:
  """Returns the SHA-256 of the package's source, which tells its version."""
  folder = pathlib.Path(str(module.__file__)).parent
  found = hashlib.sha256()
  for path in sorted(folder.glob("*.py")):
    found.update(path.name.encode() + b"\0" + path.read_bytes())
  return found.hexdigest()


def _set_steps(
  adversary: Any, num_steps: int | None, num_queries: int | None
) -> None:
  if num_steps is not None:
    for apgd in (adversary.apgd, adversary.apgd_targeted):
      apgd.n_iter = apgd.n_iter_orig = num_steps
      # The same formulas as in its constructor.
      apgd.n_iter_2 = max(int(0.22 * num_steps), 1)
      apgd.n_iter_min = max(int(0.06 * num_steps), 1)
      apgd.size_decr = max(int(0.03 * num_steps), 1)
    adversary.fab.n_iter = num_steps
  if num_queries is not None:
    adversary.square.n_queries = num_queries


class _Recorder:
  """Clock of an evaluation: accuracy and end of each of its attacks."""

  def __init__(self) -> None:
    self.accuracy: dict[str, float] = {}
    self._ends: list[tuple[str, float]] = []

  def record(self, name: str, flags: Any) -> None:
    """Notes that an attack has ended; `flags` bool [N] are the robust ones."""
    self.accuracy[name] = float(np.mean(flags.cpu().numpy()))  # waits for a GPU
    self._ends.append((name, time.perf_counter()))

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of each attack."""
    return {
      name: end - start
      for (_, start), (name, end) in itertools.pairwise(self._ends)
    }

  def state(self, base: type) -> type:
    """Returns the package's class of states, extended by this clock."""
    record = self.record

    class State(base):  # type: ignore[misc, valid-type]
      @property
      def clean_accuracy(self) -> float:
        return self._clean_accuracy

      @clean_accuracy.setter
      def clean_accuracy(self, accuracy: float) -> None:
        record("clean", self.robust_flags)
        self._clean_accuracy = accuracy

      def add_run_attack(self, attack: str) -> None:
        record(attack, self.robust_flags)
        super().add_run_attack(attack)

    return State


def make(
  module: ModuleType,
  network: Any,
  *,
  epsilon: float,
  norm: str,
  version: str,
  attacks: Sequence[str],
  seed: int,
  device: str,
  num_steps: int | None = None,
  num_queries: int | None = None,
) -> Any:
  """Makes the package's evaluation.

  Args:
    module: Result of `load`.
    network: PyTorch module from [B, C, H, W] to logits, on the device.
    epsilon: Radius of the ball.
    norm: Norm of the ball: "linf", "l2" or "l1".
    version: "standard" or "plus": sets the attacks' numbers of steps.
    attacks: Names of the attacks to run, in order.
    seed: Seed of every attack, as the package does it.
    device: "cpu" or "cuda".
    num_steps: Steps of APGD and FAB; None: the version's.
    num_queries: Queries of Square; None: the version's.

  Returns:
    The package's `AutoAttack` object.
  """
  with contextlib.redirect_stdout(io.StringIO()):
    adversary = module.AutoAttack(
      network,
      norm=NORMS[norm],
      eps=epsilon,
      seed=seed,
      verbose=False,
      version=version,
      device=device,
    )
  adversary.attacks_to_run = list(attacks)
  _set_steps(adversary, num_steps, num_queries)
  return adversary


def run(
  module: ModuleType,
  adversary: Any,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  batch_size: int,
  say: Callable[[str], None],
) -> Side:
  """Runs the package's evaluation.

  Args:
    module: Result of `load`.
    adversary: Result of `make`.
    images: float32 [N, H, W, C] in [0, 1].
    labels: Integers [N].
    batch_size: Images per batch.
    say: Function that is given each line of progress.

  Returns:
    Its result.
  """
  import torch

  warnings: list[str] = []

  def log(line: str) -> None:
    if line.startswith("Warning: "):
      line = line.removeprefix("Warning: ")
      if line in warnings:
        return
      warnings.append(line)
    say(line)

  # A verbose evaluation logs its progress and the warnings of its checks.
  adversary.verbose, adversary.logger.log = True, log
  x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  y = torch.from_numpy(labels.astype(np.int64))
  recorder = _Recorder()
  state = recorder.state(module.EvaluationState)
  with mock.patch.object(module, "EvaluationState", state):
    began, cpu = time.perf_counter(), time.process_time()
    adversarial, predicted = adversary.run_standard_evaluation(
      x, y, bs=batch_size, return_labels=True
    )
    everything = time.perf_counter() - began
    cpu = time.process_time() - cpu
  return Side(
    robust=(predicted == y).numpy(),
    adversarial=adversarial.numpy().transpose(0, 2, 3, 1),
    accuracy=recorder.accuracy,
    seconds=recorder.seconds(),
    everything=everything,
    cpu=cpu,
    warnings=tuple(warnings),
  )
