"""The files of a working directory: reading them, writing atomically."""

import dataclasses
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from atat_jax.errors import UserError

# The order in which models are shown.
MODELS = ("teacher", "student")
KINDS = ("clean", "adversarial")


def write_atomically(path: pathlib.Path, content: bytes) -> pathlib.Path:
  """Writes a file so that a reader sees the old one or the new one, whole."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return path


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a JSON object; None if there is no such file.

  Raises:
    UserError: the file does not hold a JSON object.
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
    UserError: the file is damaged or of another format.
  """
  path = workdir / "results.json"
  results = read_json(path)
  if results is not None and results.get("format") != 1:
    raise UserError(
      f"{path}: format is {results.get('format')!r}, only 1 can be read"
    )
  return results


def read_metrics(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Reads a `metrics.jsonl`.

  Args:
    path: one JSON object a line, with "split" and "step".

  Returns:
    {split: its lines in order of step}; empty if there is no such file. Where
    a resumed run wrote a step again, the later line counts.
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
  """The arrays of a file by name; one that is not there is an error."""

  def __init__(self, path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    super().__init__(arrays)
    self._path = path

  def __missing__(self, name: str) -> np.ndarray:
    raise UserError(
      f"{self._path} cannot be read (it has no {name}): delete it and evaluate"
      " again"
    )


def read_arrays(path: pathlib.Path) -> Arrays | None:
  """Reads an `.npz` of `atat_jax.evaluation`; None if there is no such file.

  Raises:
    UserError: the file is damaged.
  """
  if not path.exists():
    return None
  try:
    with np.load(path, allow_pickle=False) as archive:
      return Arrays(path, dict(archive))
  except (
    AttributeError,  # a lone array, or an empty file's
    EOFError,
    OSError,
    ValueError,
    zipfile.BadZipFile,
  ) as error:
    raise UserError(
      f"{path} cannot be read ({error}): delete it and evaluate again"
    ) from error


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
  """Attention of one model on clean or attacked images.

  Attributes:
    images: float32 [N, H, W, C] in [0, 1], what the model saw.
    maps: float32 [N, h, w], at least 0.
    predictions: int32 [N].
    probabilities: float32 [N], of the predicted class.
  """

  images: np.ndarray
  maps: np.ndarray
  predictions: np.ndarray
  probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class Attention:
  """What `attention.npz` holds.

  Attributes:
    images: float32 [N, H, W, C] in [0, 1], clean test images.
    labels: int32 [N].
    class_names: one name a class.
    layer: the tensor whose attention is shown.
    protocol: attack and BatchNorm mode, in one line.
    views: {(model, kind): maps}, in the order of `MODELS` and `KINDS`.
  """

  images: np.ndarray
  labels: np.ndarray
  class_names: list[str]
  layer: str
  protocol: str
  views: dict[tuple[str, str], AttentionMaps]


def read_attention(workdir: pathlib.Path) -> Attention | None:
  """Reads `attention.npz`; None if there is no such file.

  Raises:
    UserError: the file is damaged or lacks an array.
  """
  path = workdir / "attention.npz"
  if not path.exists():
    return None
  try:
    with np.load(path, allow_pickle=False) as archive:
      arrays = dict(archive)
    images = arrays["images"]
    views = {}
    for model in MODELS:
      if f"{model}_clean_map" not in arrays:
        continue
      for kind in KINDS:
        views[model, kind] = AttentionMaps(
          images=images if kind == "clean" else arrays[f"{model}_{kind}"],
          maps=arrays[f"{model}_{kind}_map"],
          predictions=arrays[f"{model}_{kind}_prediction"],
          probabilities=arrays[f"{model}_{kind}_probability"],
        )
    return Attention(
      images=images,
      labels=arrays["labels"],
      class_names=[str(name) for name in arrays["class_names"]],
      layer=str(arrays["layer"]),
      protocol=str(arrays["protocol"]),
      views=views,
    )
  except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{path} cannot be read ({error}): delete it and evaluate again"
    ) from error
