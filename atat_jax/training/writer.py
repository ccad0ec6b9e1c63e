"""Files that a run writes as it goes: metrics as JSON lines and TensorBoard.

Only process 0 writes. Files that are rewritten are replaced at once, so that a
kill leaves the old or the new one.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX


def replace_text(path: pathlib.Path, text: str) -> None:
  """Writes a whole file at once or not at all (process 0 only)."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON at once or not at all; NaN is refused."""
  replace_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


class MetricsWriter(contextlib.AbstractContextManager[Any]):
  """`metrics.jsonl` and `tensorboard/` of a training run, a context manager.

  Args:
    directory: The run's directory.
    step: The step that the run starts or resumes from: what an interrupted run
      wrote beyond it is dropped, for it will be computed again.
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
          break  # a line cut off by a kill, and nothing after it
    replace_text(path, "".join(kept))
    self._file = path.open("a", encoding="utf-8")
    self._board = tensorboardX.SummaryWriter(
      str(directory / "tensorboard"), purge_step=step + 1
    )

  def write(
    self, split: str, step: int, values: Mapping[str, float | str]
  ) -> None:
    """Appends a line and the scalars among `values`."""
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
