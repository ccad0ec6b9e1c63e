"""Files of a working directory: their names, readers, the atomic writer."""

import contextlib
import json
import os
import pathlib
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from atat_jax.errors import UserError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
REPORT = "report.html"
EXPLANATION = "explain.html"
CHECKPOINTS = "checkpoints"
FIGURES = "figures"
TENSORBOARD = "tensorboard"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Replaces a file atomically: a reader sees the old or the new one, whole.

  Args:
    path: File to be written; its folder is made.

  Yields:
    Path of a temporary file beside it, with the same suffix. It takes the place
    of `path` when the block ends, and is removed when the block fails.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # A process id would not do: containers that share a disk share those, too.
  unique = uuid.uuid4().hex
  temporary = path.with_name(f".{path.stem}.{unique}.tmp{path.suffix}")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_bytes(path: pathlib.Path, content: bytes) -> pathlib.Path:
  """Writes a whole file or none; returns its path."""
  with replacing(path) as temporary:
    temporary.write_bytes(content)
  return path


def write_text(path: pathlib.Path, text: str) -> pathlib.Path:
  """Writes a whole UTF-8 file or none; returns its path."""
  return write_bytes(path, text.encode())


def write_json(path: pathlib.Path, value: Any) -> pathlib.Path:
  """Writes a whole JSON file or none; returns its path.

  Raises:
    ValueError: A number is not finite.
  """
  return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_arrays(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray]
) -> pathlib.Path:
  """Writes a whole `.npz` file or none; returns its path."""
  with replacing(path) as temporary, temporary.open("wb") as file:
    np.savez(file, **arrays)  # type: ignore[arg-type]
  return path


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a JSON object; None if there is no such file.

  Raises:
    UserError: The file does not hold a JSON object.
  """
  if not path.exists():
    return None
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object, not a {type(value)}")
  return value


def read_results(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Reads `results.json`; None if the run has not been evaluated.

  Raises:
    UserError: The file is damaged or of another format.
  """
  path = workdir / RESULTS
  results = read_json(path)
  if results is not None and results.get("format") != 1:
    raise UserError(
      f"{path}: format is {results.get('format')!r}, only 1 can be read"
    )
  return results


def read_autoattack(
  workdir: pathlib.Path, epsilon: float, norm: str
) -> dict[str, dict[str, Any]]:
  """Reads AutoAttack's rows of `results.json`, running statistics only.

  Args:
    workdir: Directory of the file.
    epsilon: Radius that the rows must have, pixels in [0, 1].
    norm: Norm that the rows must have.

  Returns:
    {model: row}. Of several rows of a model, the one with the most images; of
    those, the one with the lowest accuracy. Empty if there is no such file.

  Raises:
    UserError: The file is damaged or of another format.
  """
  results = read_results(workdir) or {"rows": []}
  found: dict[str, dict[str, Any]] = {}
  for row in results["rows"]:
    if (
      row["attack"].startswith("autoattack")
      and row["batch_norm"] == "running"
      and row["norm"] == norm
      and abs(row["epsilon"] - epsilon) < 1e-6
    ):
      best = found.setdefault(row["model"], row)
      found[row["model"]] = min(
        (best, row), key=lambda r: (-r["num_examples"], r["accuracy"])
      )
  return found


def read_metrics(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Reads a `metrics.jsonl`.

  Args:
    path: File with one JSON object a line, each with "split" and "step".

  Returns:
    {split: lines in order of step}; empty if there is no such file. Where a
    resumed run wrote a step again, the later line counts.
  """
  splits: dict[str, dict[int, dict[str, Any]]] = {}
  if not path.exists():
    return {}
  for text in path.read_text(encoding="utf-8").splitlines():
    try:
      line = json.loads(text)
      splits.setdefault(line["split"], {})[int(line["step"])] = line
    except (ValueError, KeyError, TypeError):
      continue  # a killed run may leave half a line behind
  return {
    split: [lines[step] for step in sorted(lines)]
    for split, lines in splits.items()
  }


class Arrays(dict[str, np.ndarray]):
  """Arrays of a file by name; a missing one raises a `UserError`.

  Attributes:
    path: Path of the file.
  """

  def __init__(self, path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    super().__init__(arrays)
    self.path = path

  def __missing__(self, name: str) -> np.ndarray:
    raise UserError(
      f"{self.path} cannot be read (it has no {name}): delete it and evaluate"
      " again"
    )


def read_arrays(path: pathlib.Path) -> Arrays | None:
  """Reads an `.npz` of arrays; None if there is no such file.

  Raises:
    UserError: The file is damaged.
  """
  if not path.exists():
    return None
  try:
    with np.load(path, allow_pickle=False) as archive:
      return Arrays(path, dict(archive))
  except (
    AttributeError,  # a single array, or an empty file
    EOFError,
    OSError,
    ValueError,
    zipfile.BadZipFile,
  ) as error:
    raise UserError(
      f"{path} cannot be read ({error}): delete it and evaluate again"
    ) from error
