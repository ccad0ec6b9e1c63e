"""Better attacks on batch statistics, beside those that papers publish.

With batch statistics the gradient of cross-entropy passes through the
statistics, in which it can lose its way. The same attack with the statistics
held fixed, and with the margin loss, are measured beside it: what they leave of
the same classifier is the number to believe.
"""

import json
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

PUBLISHED = ("fgsm", "ifgsm", "pgd")
"""Attacks that papers run with cross-entropy through batch statistics."""

# Fields, besides the attack's own options, that the rows have in common.
_SHARED = (
  "model",
  "dataset",
  "split",
  "num_examples",
  "norm",
  "epsilon",
  "step_size",
  "num_steps",
  "num_restarts",
  "batch_norm",
  "batch_size",
  "seed",
  "checkpoint_step",
)


def _kind(row: Row) -> tuple[str | None, str | None]:
  """Returns loss and statistics of a row with batch statistics."""
  options = row.get("options") or {}
  return row.get("loss"), options.get("statistics", "through")


def _key(row: Row) -> Hashable:
  options = dict(row.get("options") or {})
  options.pop("statistics", None)
  shared = [row.get(field) for field in _SHARED]
  return _attack(row), json.dumps([*shared, options], sort_keys=True)


def _attack(row: Row) -> str:
  """Returns the name of a row's attack, without its numbers."""
  return re.split(r"[^a-z]", row["attack"])[0]


def is_published(row: Row) -> bool:
  """Whether a row is that of a published attack on batch statistics."""
  return (
    row["batch_norm"] == "batch"
    and _attack(row) in PUBLISHED
    and _kind(row) == ("cross_entropy", "through")
  )


def find(row: Row, rows: Iterable[Row]) -> list[Row]:
  """Finds the better attacks beside a published one.

  Args:
    row: Row of `results.json`.
    rows: Rows among which to look.

  Returns:
    Rows of the same attack on the same classifier with the statistics held
    fixed, and with the margin loss; [] for a row that is not published.
  """
  if not is_published(row):
    return []
  kinds = (("cross_entropy", "fixed"), ("margin", "through"))
  return [
    other
    for other in rows
    if _kind(other) in kinds and _key(other) == _key(row)
  ]
