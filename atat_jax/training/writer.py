"""Metrics of a training as JSON lines and on TensorBoard; process 0 writes."""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX

from atat_jax.runs import files


class MetricsWriter(contextlib.AbstractContextManager[Any]):
  """Writer of `metrics.jsonl` and `tensorboard/`, a context manager.

  Args:
    directory: Directory that holds both.
    step: Step that the training starts or resumes from; later lines, left by an
      interrupted run, are dropped, as they will be computed again.
  """

  def __init__(self, directory: pathlib.Path, step: int):
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    path = directory / "metrics.jsonl"
    kept = []
    if path.exists():
      for line in path.read_text(encoding="utf-8").splitlines():
        try:
          if json.loads(line)["step"] <= step:
            kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
          break  # a kill has cut this line off
    files.write_text(path, "".join(kept))
    self._file = path.open("a", encoding="utf-8")
    self._board = tensorboardX.SummaryWriter(
      str(directory / "tensorboard"), purge_step=step + 1
    )

  def write(
    self, split: str, step: int, values: Mapping[str, float | str]
  ) -> None:
    """Appends a line, and its numbers to TensorBoard.

    Args:
      split: "train" or "validation".
      step: Number of steps made.
      values: Metrics and remarks by name.
    """
    if not self._writes:
      return
    line = {"split": split, "step": step, **values}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in values.items():
      if isinstance(value, float):
        self._board.add_scalar(f"{split}/{name}", value, step)
    self._board.flush()

  def __exit__(self, *error: object) -> None:
    """Closes both files."""
    if self._writes:
      self._file.close()
      self._board.close()
