"""Parts of a row that is measured shard by shard, and how they are joined."""

import pathlib
from typing import Any

import jax
import numpy as np

from atat_jax.errors import DamagedFileError
from atat_jax.evaluation import accuracies
from atat_jax.runs import files, tables, worst_case

Row = dict[str, Any]

_FORMAT = 1


class Parts:
  """Shards of a row that are done, kept in a file after each of them.

  Args:
    path: The file; None: nothing is read or written.
    identity: Row without its result, as `measuring.identity` writes it.
    size: Number of images in a shard.

  Raises:
    DamagedFileError: The file is not what was written; it stays.
  """

  def __init__(self, path: pathlib.Path | None, identity: str, size: int):
    self._path = path
    self._head = {"format": _FORMAT, "row": identity, "shard_size": size}
    self._parts: list[Row] = []
    self._spent = 0.0
    found = files.read_json(path) if path else None
    # Shards of another size are measured again: they are other images.
    if found and all(found.get(k) == v for k, v in self._head.items()):
      self._parts = found["parts"]
      if not isinstance(self._parts, list):
        raise DamagedFileError(f"{path}: has no parts; move it away")

  @property
  def num_images(self) -> int:
    """Number of images that are done."""
    return sum(len(part["labels"]) for part in self._parts)

  def add(self, part: Row, labels: np.ndarray, seconds: float) -> None:
    """Adds the result of a shard and writes the file.

    Args:
      part: Fields of a row that are its result.
      labels: True classes of the shard, int32 [M].
      seconds: Time that it took.
    """
    self._parts.append(
      {**part, "labels": labels.tolist(), "seconds": round(seconds, 3)}
    )
    self._spent += seconds
    if self._path is not None and jax.process_index() == 0:
      files.write_json(
        self._path, {**self._head, "parts": self._parts}, sealed=True
      )

  def finish(self, num_classes: int) -> Row:
    """Joins the shards.

    Args:
      num_classes: Number of classes, K.

    Returns:
      The fields of a row that are its result; "seconds" are those of shards
      that were done before this object was made.
    """
    parts = self._parts
    labels = np.concatenate([part["labels"] for part in parts]).astype(np.int32)
    correct = np.concatenate(
      [
        worst_case.unpack({**part, "num_examples": len(part["labels"])})
        for part in parts
      ]
    )
    joined: Row = {
      "accuracy": float(correct.mean()),
      "class_accuracy": accuracies.by_class(correct, labels, num_classes),
      "correct": worst_case.pack(correct),
      **{name: sum(part[name] for part in parts) for name in tables.NONFINITE},
      "seconds": sum(part["seconds"] for part in parts) - self._spent,
    }
    if "attacks" in parts[0]:
      joined["attacks"] = _join_attacks(parts)
      joined["diagnostics"] = _join_diagnostics(parts)
    return joined


def _join_attacks(parts: list[Row]) -> list[Row]:
  """Accuracy after each attack of an ensemble, and its time, over all images."""
  weights = np.array([len(part["labels"]) for part in parts], float)
  found = []
  for row in zip(*(part["attacks"] for part in parts), strict=True):
    values = np.array([one["accuracy"] for one in row])
    found.append(
      {
        "attack": row[0]["attack"],
        "numbers": row[0]["numbers"],
        "accuracy": float(values @ weights / weights.sum()),
        "seconds": round(sum(one["seconds"] for one in row), 3),
      }
    )
  return found


def _join_diagnostics(parts: list[Row]) -> Row:
  """Each check of the first shard in which it raised its flag, or the first."""
  found: Row = {}
  for part in parts:
    for name, check in part["diagnostics"].items():
      if name not in found or (check["flag"] and not found[name]["flag"]):
        found[name] = check
  return found
