"""`results.csv`: the rows of `results.json` for spreadsheets and pandas.

A line is a row, its protocol in the columns. Lists and bits of single images are
in `results.json` only.
"""

import csv
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from atat_jax.runs import files

NAME = "results.csv"

# Fields that are no single value.
LEFT_OUT = ("correct", "class_accuracy", "diagnostics", "attacks", "members")

# A text that begins so is run as a formula by spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
  """Lays out rows of `results.json` as comma-separated values.

  Args:
    rows: The rows, worst cases included.

  Returns:
    A line of names and a line a row, in the same order. A field that a row
    lacks, or that is None, is empty; `options` are JSON; numbers read back as
    they were. A quote stands before a text that a spreadsheet would run.
  """
  fields = dict.fromkeys(
    field for row in rows for field in row if field not in LEFT_OUT
  )
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(fields)
  for row in rows:
    writer.writerow([_cell(row.get(field)) for field in fields])
  return text.getvalue()


def _cell(value: Any) -> Any:
  if value is None:
    return ""
  if isinstance(value, dict | list):
    return json.dumps(value, sort_keys=True)
  if isinstance(value, str) and value.startswith(_FORMULA):
    return f"'{value}"
  return value


def write_results(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes `results.json`, and its rows as `results.csv` beside it.

  The table comes first: a kill between the two leaves a row too many there,
  which the next start measures again and writes again.

  Args:
    path: Path of `results.json`.
    content: Its content.

  Raises:
    UserError: The operating system refuses.
  """
  files.write_text(path.with_name(NAME), as_csv(content["rows"]))
  files.write_json(path, content, sealed=True)
