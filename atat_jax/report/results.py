"""Results of a run as tables: of the page, and by class."""

import math
from typing import Any, NamedTuple

from atat_jax.errors import UserError
from atat_jax.runs import comparable, intervals, tables, terminal, wording

_SHOWN_CLASSES = 20
_WORST_CLASSES = 10


class Accuracy(NamedTuple):
  """Accuracy of one model in a table.

  Attributes:
    percent: The accuracy in percent, or a dash.
    interval: Its 95 % interval, or "".
    change: Percentage points more than with running statistics, or "".
    nonfinite: Count of what was not finite, in words, or "".
  """

  percent: str
  interval: str = ""
  change: str = ""
  nonfinite: str = ""


class Line(NamedTuple):
  """Line of the table of results.

  Attributes:
    label: Name of the attack.
    protocol: Its numbers in words.
    accuracies: One for each model.
    seconds: Time of the evaluations together, or "".
    derived: True for a worst case over other lines.
  """

  label: str
  protocol: str
  accuracies: list[Accuracy]
  seconds: str
  derived: bool = False


class Block(NamedTuple):
  """Lines of the table of results with one BatchNorm mode.

  Attributes:
    kind: "running" or "batch".
    heading: The mode in words.
    lines: Lines of the block.
  """

  kind: str
  heading: str
  lines: list[Line]


class ByClass(NamedTuple):
  """Accuracies by class of one model.

  Attributes:
    sentence: Which model, which attack, which classes.
    attack: Label of the attack.
    lines: (class, clean accuracy, accuracy under attack); None: unknown.
  """

  sentence: str
  attack: str
  lines: list[tuple[str, float | None, float | None]]


def models(rows: list[tables.Row]) -> list[str]:
  """Returns the models of a run, in the order of the columns."""
  return list(dict.fromkeys(model for model, _ in tables.series(rows)))


def images(rows: list[tables.Row]) -> str:
  """Describes the images of all rows; "" if the rows have different ones."""
  found = {tables.images(column) for column in tables.columns(rows)}
  return found.pop() if len(found) == 1 else ""


def blocks(rows: list[tables.Row]) -> list[Block]:
  """Arranges rows of `results.json`: attacks down, models across."""
  columns = tables.in_paper_order(tables.columns(rows))
  modes = {batch_norm for _, batch_norm in tables.series(rows)}
  return [
    Block(
      kind=batch_norm,
      heading=tables.BATCH_NORM_HEADINGS[batch_norm],
      lines=[
        _line(column, rows, batch_norm)
        for column in columns
        if any(mode == batch_norm for _, mode in column.rows)
      ],
    )
    for batch_norm in tables.BATCH_NORMS
    if batch_norm in modes
  ]


def _line(
  column: tables.Column, rows: list[tables.Row], batch_norm: str
) -> Line:
  own = [row for (_, mode), row in column.rows.items() if mode == batch_norm]
  seconds = [row["seconds"] for row in own if row.get("seconds") is not None]
  protocol = tables.attack(column)
  if not images(rows):
    protocol += f"; {tables.images(column)}"
  sizes = {row["batch_size"] for row in own if row.get("batch_size")}
  if batch_norm == "batch" and sizes:
    batches = " / ".join(map(str, sorted(sizes)))
    protocol += f"; batches of {batches} images{tables.batches(column)}"
  return Line(
    label=column.label,
    protocol=protocol,
    accuracies=[_accuracy(column, model, batch_norm) for model in models(rows)],
    seconds=wording.duration(sum(seconds)) if seconds else "",
    derived=column.derived,
  )


def _accuracy(column: tables.Column, model: str, batch_norm: str) -> Accuracy:
  row = column.rows.get((model, batch_norm))
  if row is None:
    return Accuracy("–")
  low, high = intervals.proportion(row["accuracy"], row["num_examples"])
  running = column.accuracy(model, "running")
  change = ""
  if batch_norm == "batch" and running is not None:
    change = f"{100 * (row['accuracy'] - running):+.1f}".replace("-", "−")
  return Accuracy(
    percent=terminal.percent(row["accuracy"]),
    interval=f"{100 * low:.1f}–{100 * high:.1f}",
    change=change,
    nonfinite=tables.nonfinite(row),
  )


def by_class(
  rows: list[tables.Row], class_names: list[str] | None = None
) -> ByClass | None:
  """Arranges the accuracies by class, clean and under the strongest attack.

  Args:
    rows: Rows of `results.json`; "class_accuracy" is read where it is there.
    class_names: One name a class; None: numbers.

  Returns:
    Accuracies of the trained network with running statistics, of all classes or,
    where there are many, of the least robust ones; None if no attack's row has
    accuracies by class.

  Raises:
    UserError: Numbers of accuracies and of classes that differ.
  """
  model = tables.trained(rows)
  columns = [
    column
    for column in tables.columns(rows)
    if column.rows.get((model, "running"), {}).get("class_accuracy")
  ]
  attacks = comparable.attacks(columns, model)
  if not attacks:
    return None
  strongest = attacks[0].strongest
  robust = strongest.rows[model, "running"]["class_accuracy"]
  clean: list[float | None] = [None] * len(robust)
  unattacked = comparable.clean(columns, model, attacks[0].question)
  if unattacked is not None:
    clean = unattacked.rows[model, "running"]["class_accuracy"]
  names = class_names or [f"class {number}" for number in range(len(robust))]
  if not len(names) == len(clean) == len(robust):
    raise UserError(
      f"class_accuracy: {len(robust)} and {len(clean)} numbers for"
      f" {len(names)} classes; allowed: one for each class"
    )
  lines = list(zip(names, clean, robust, strict=True))
  sentence = (
    f"Accuracy of the {model} by class on clean images and under"
    f" {strongest.label}, the strongest attack with such numbers on"
    f" {attacks[0].question.describe()}; running statistics."
  )
  if len(lines) > _SHOWN_CLASSES:
    lines = sorted(
      lines, key=lambda line: math.inf if line[2] is None else line[2]
    )
    lines = lines[:_WORST_CLASSES]
    sentence += f" The {len(lines)} least robust of {len(robust)} classes."
  return ByClass(sentence, strongest.label, lines)


def titled(
  diagnostics: dict[str, dict[str, Any]], rows: list[tables.Row]
) -> list[tuple[str, dict[str, Any]]]:
  """Pairs each diagnostic with its title, which names the model.

  Args:
    diagnostics: "diagnostics" of `results.json`, by `<model>_<rule>`.
    rows: Rows of `results.json`.
  """
  found = []
  for name, check in diagnostics.items():
    model = next((m for m in models(rows) if name.startswith(f"{m}_")), "")
    rule = name.removeprefix(f"{model}_") if model else name
    title = check.get("title") or rule.replace("_", " ")
    found.append((f"{model}: {title}" if model else title, check))
  return found


def total_time(rows: list[tables.Row]) -> str:
  """Returns the time of all evaluations, "" if none was measured."""
  seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
  return wording.duration(sum(seconds)) if seconds else ""
