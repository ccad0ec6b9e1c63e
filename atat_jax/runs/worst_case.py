"""Pointwise worst case: images that stay correct under every attack of a list.

It is computed from what is stored for each attack, which images it has left
correct, and never measured: a row of it is made again whenever rows are read or
added.
"""

import base64
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from atat_jax.runs import comparable, tables

# Fields that all rows of a worst case share.
_SHARED = (
  "model",
  "dataset",
  "split",
  "num_examples",
  "norm",
  "batch_norm",
  "checkpoint_step",
)


def pack(correct: np.ndarray) -> str:
  """Writes which images are correct as text, eight images a byte, in base64.

  Args:
    correct: bool [N].
  """
  return base64.b64encode(np.packbits(correct).tobytes()).decode("ascii")


def unpack(row: Mapping[str, Any]) -> np.ndarray:
  """Reads which images are correct.

  Args:
    row: Row of `results.json` with the field `correct`.

  Returns:
    bool [`num_examples`].
  """
  packed = np.frombuffer(base64.b64decode(row["correct"]), np.uint8)
  return np.unpackbits(packed, count=row["num_examples"]).astype(bool)


def measured(rows: Iterable[tables.Row]) -> list[tables.Row]:
  """Selects the rows that are measurements."""
  return [row for row in rows if not tables.is_derived(row)]


def complete(rows: Iterable[tables.Row]) -> list[tables.Row]:
  """Returns the rows that are measurements, then their worst cases.

  A worst case is over all attacks on the same images of the same classifier in
  the same ball: model, BatchNorm mode (with the size of the batch, where that
  is part of the classifier), data, checkpoint, norm and epsilon. The same
  attack with another seed is another attack. Clean images are in the ball, so
  that their row counts, too. There is none of fewer than two attacks; rows
  without `correct`, which earlier versions have written, are left out.

  Args:
    rows: Rows of `results.json`; worst cases among them are dropped.
  """
  found = measured(rows)
  known = [row for row in found if row.get("correct") is not None]
  clean: dict[Hashable, list[tables.Row]] = {}
  groups: dict[Hashable, list[tables.Row]] = {}
  for row in known:
    is_clean = row["attack"] == tables.NOMINAL
    place = clean if is_clean else groups
    place.setdefault(_key(row, ball=not is_clean), []).append(row)
  return found + [
    _combine(group, clean.get(_key(group[0], ball=False), []))
    for group in groups.values()
    if len(group) > 1
  ]


def _key(row: tables.Row, *, ball: bool) -> Hashable:
  """Returns a key that the rows of one worst case share."""
  asked = comparable.question(row)
  if not ball:
    asked = asked._replace(norm=None, epsilon=None)
  mode = row["batch_norm"]
  size = row.get("batch_size") if mode == "batch" else None
  return row["model"], mode, size, asked


def _combine(attacks: list[tables.Row], clean: list[tables.Row]) -> tables.Row:
  """Makes the row of a worst case."""
  first = attacks[0]
  correct = np.logical_and.reduce([unpack(row) for row in attacks + clean])
  members = tables.members(attacks + clean)
  return {
    **{field: first[field] for field in _SHARED if field in first},
    "attack": tables.WORST_CASE,
    # Equal to six digits; all attacks are in the largest ball.
    "epsilon": max(row["epsilon"] or 0.0 for row in attacks),
    **dict.fromkeys(("step_size", "num_steps", "num_restarts", "loss")),
    "batch_size": _common(row.get("batch_size") for row in attacks),
    "seed": _common(row.get("seed") for row in attacks),
    "accuracy": float(correct.mean()),
    "worst_of": ", ".join(tables.member_names(members)),
    "members": members,
  }


def _common(values: Iterable[Any]) -> Any:
  """Returns the value that all share; None if they do not."""
  found = set(values)
  return found.pop() if len(found) == 1 else None
