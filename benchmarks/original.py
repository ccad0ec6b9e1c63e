"""The original AutoAttack package (fra31/auto-attack), run and timed.

Its own `run_standard_evaluation` runs, once and as it is: the recorder below
takes the place of the object to which it reports each attack's end.
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
from benchmarks.comparison import Side

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}

_ADVICE = (
  "git clone https://github.com/fra31/auto-attack and name the clone with"
  " --reference=auto-attack, or pip install"
  " git+https://github.com/fra31/auto-attack"
)


def load(directory: str | None) -> ModuleType:
  """Imports the package.

  Args:
    directory: The folder that holds the folder `autoattack`; None: as installed.

  Returns:
    Its module with the class `AutoAttack`.

  Raises:
    UserError: It is not there, or too old to be recorded.
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
  """SHA-256 over the package's source, to tell which version ran."""
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
      # As its constructor derives them.
      apgd.n_iter_2 = max(int(0.22 * num_steps), 1)
      apgd.n_iter_min = max(int(0.06 * num_steps), 1)
      apgd.size_decr = max(int(0.03 * num_steps), 1)
    adversary.fab.n_iter = num_steps
  if num_queries is not None:
    adversary.square.n_queries = num_queries


def _recorder(base: type, record: Callable[[str, Any], None]) -> type:
  """The package's state of an evaluation, which also tells what is done."""

  class Recorder(base):  # type: ignore[misc, valid-type]
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

  return Recorder


def run(
  module: ModuleType,
  network: Any,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  epsilon: float,
  norm: str,
  version: str,
  attacks: Sequence[str],
  batch_size: int,
  seed: int,
  device: str,
  num_steps: int | None = None,
  num_queries: int | None = None,
  say: Callable[[str], None],
) -> Side:
  """Runs the package's evaluation.

  Args:
    module: As `load` returns it.
    network: A PyTorch module from [B, C, H, W] to logits, on the device.
    images: float32 [N, H, W, C] in [0, 1].
    labels: Integers [N].
    epsilon: Radius.
    norm: "linf", "l2" or "l1".
    version: "standard" or "plus": whose numbers the attacks have.
    attacks: The attacks to run, in order.
    batch_size: Images at a time.
    seed: Of every attack, as the package does it.
    device: "cpu" or "cuda".
    num_steps: Of APGD and FAB; None: the version's.
    num_queries: Of Square; None: the version's.
    say: Gets a line for each thing that happens.

  Returns:
    What it found.
  """
  import torch

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

  # Verbose, its progress and the warnings of its checks go to its logger.
  adversary.verbose = True
  warnings: list[str] = []

  def log(line: str) -> None:
    if line.startswith("Warning: "):
      line = line.removeprefix("Warning: ")
      if line in warnings:
        return
      warnings.append(line)
    say(line)

  adversary.logger.log = log

  ends: list[tuple[str, float]] = []
  accuracy: dict[str, float] = {}

  def record(name: str, flags: torch.Tensor) -> None:
    accuracy[name] = float(np.mean(flags.cpu().numpy()))  # waits for a GPU
    ends.append((name, time.perf_counter()))

  x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  y = torch.from_numpy(labels.astype(np.int64))
  recorder = _recorder(module.EvaluationState, record)
  with mock.patch.object(module, "EvaluationState", recorder):
    began, cpu = time.perf_counter(), time.process_time()
    adversarial, predicted = adversary.run_standard_evaluation(
      x, y, bs=batch_size, return_labels=True
    )
    everything = time.perf_counter() - began
    cpu = time.process_time() - cpu
  return Side(
    robust=(predicted == y).numpy(),
    adversarial=adversarial.numpy().transpose(0, 2, 3, 1),
    accuracy=accuracy,
    seconds={
      name: end - start for (_, start), (name, end) in itertools.pairwise(ends)
    },
    everything=everything,
    cpu=cpu,
    warnings=tuple(warnings),
  )
