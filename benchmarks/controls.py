"""Tables that compare a method with its controls, from a comparison of runs.

`benchmarks.methods` trains the methods and the named settings of ATAT with the
same seeds; here a setting is judged against the control that differs from it in
one thing, seed by seed. `benchmarks.reproduction` writes these tables into
docs/reproduction.md.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from atat_jax.report import layout, merge
from atat_jax.runs import tables

Row = dict[str, Any]


class Column(NamedTuple):
  """Column of accuracies.

  Attributes:
    head: Heading.
    attack: Name of the attack.
    batch_norm: BatchNorm mode.
  """

  head: str
  attack: str
  batch_norm: str


AUTOATTACK = "autoattack-fast"

HEADLINE = (
  Column("clean", "nominal", "running"),
  Column("PGD-20, batch statistics, as published", "pgd20", "batch"),
  Column("the same, statistics fixed", "pgd20:statistics=fixed", "batch"),
  Column("the same, margin loss", "pgd20-margin", "batch"),
  Column("PGD-20, running statistics", "pgd20", "running"),
  Column("PGD-20, margin, running", "pgd20-margin", "running"),
  Column("worst case, running", tables.WORST_CASE, "running"),
  Column("AutoAttack fast, running", AUTOATTACK, "running"),
)
HEADLINE_ROWS = {
  "standard": "standard",
  "at": "adversarial training (AT)",
  "trades": "TRADES",
  "atat_mixture_fresh": "mixture (0, 0), fresh",
  "atat_mixture": "mixture (0, 0), from the teacher",
  "atat_attention": "attention only (1, 0)",
  "atat_pairing": "pairing only (0, 1)",
  "atat": "ATAT (1, 1)",
  "atat_released": "released, logits (CIFAR-10)",
  "atat_released_maps": "released, maps (CIFAR-100)",
}
"""Label of a comparison to its row; in brackets (lambda1, lambda2)."""

ABLATION = (
  Column("PGD-20", "pgd20", "running"),
  Column("PGD-20, margin", "pgd20-margin", "running"),
  Column("worst case", tables.WORST_CASE, "running"),
  Column("AutoAttack fast", AUTOATTACK, "running"),
)
_WEIGHTS = {
  "atat_mixture": "(0, 0)",
  "atat_attention": "(1, 0)",
  "atat_pairing": "(0, 1)",
  "atat": "(1, 1)",
  "atat_weak_pairing": "(1, 0.1)",
}
ABLATION_ROWS = {
  "at": ("AT, fresh", "at"),
  "at_from_teacher": ("AT, from the teacher", "at"),
  **{
    name: (f"{weights}, from the teacher", "atat_mixture")
    for name, weights in _WEIGHTS.items()
  },
  "atat_l2": ("(1, 1) with l2 maps, from the teacher", "atat_mixture"),
  **{
    f"{name}_fresh": (f"{weights}, fresh", "atat_mixture_fresh")
    for name, weights in _WEIGHTS.items()
  },
}
"""Label to its row and to the label of its control."""

BATCH = tuple(
  Column(f"{name}, {head}", attack, mode)
  for name, short in (("FGSM", "fgsm"), ("PGD-20", "pgd20"))
  for head, attack, mode in (
    ("running", short, "running"),
    ("batch, as published", short, "batch"),
    ("batch, statistics fixed", f"{short}:statistics=fixed", "batch"),
    ("batch, margin", f"{short}-margin", "batch"),
  )
)


def find(found: dict[str, Any], dataset: str, label: str, of: Column) -> Row:
  """Finds the row of a method and a column; empty where there is none."""
  for row in found["rows"]:
    own = row["dataset"], row["model"], row["attack"], row["batch_norm"]
    if own == (dataset, label, of.attack, of.batch_norm):
      return row
  return {}


def mean(values: Sequence[float]) -> str:
  """Writes the mean of shares in percent, with its standard error."""
  text = f"{100 * statistics.mean(values):.1f}"
  if len(values) > 1:
    error = statistics.stdev(values) / math.sqrt(len(values))
    text += f" ± {100 * error:.1f}"
  return text


def _percent(row: Row) -> str:
  return layout.percent(row.get("accuracy"), row.get("standard_error"))


def _labels(found: dict[str, Any], wanted: Iterable[str]) -> list[str]:
  present = {row["model"] for row in found["rows"]}
  return [label for label in wanted if label in present]


def _measured(
  found: dict[str, Any],
  dataset: str,
  labels: Sequence[str],
  columns: Sequence[Column],
) -> list[Column]:
  """Selects the columns that any method has a number in."""
  return [
    column
    for column in columns
    if any(find(found, dataset, label, column) for label in labels)
  ]


def accuracies(
  found: dict[str, Any], rows: dict[str, str], columns: Sequence[Column]
) -> str:
  """Writes a table of accuracies for each data set.

  Args:
    found: Content of a `comparison.json`.
    rows: Label to the name of its row; those without results are left out.
    columns: Columns; those without results are left out.

  Returns:
    Markdown.
  """
  parts = []
  for dataset in layout.datasets(found):
    labels = _labels(found, rows)
    shown = _measured(found, dataset, labels, columns)
    lines = [["accuracy (%)", *(column.head for column in shown), "seeds"]]
    for label in labels:
      cells = [find(found, dataset, label, column) for column in shown]
      seeds = max((row.get("num_runs", 0) for row in cells), default=0)
      lines.append([rows[label], *map(_percent, cells), str(seeds)])
    parts.append(_table(f"{dataset}, {_epsilon(found, dataset)}", lines))
  return "\n\n".join(parts)


def ablation(found: dict[str, Any]) -> str:
  """Writes accuracies, and their paired differences from the control."""
  parts = []
  for dataset in layout.datasets(found):
    labels = _labels(found, ABLATION_ROWS)
    columns = _measured(found, dataset, labels, ABLATION)
    head = ["training", *(column.head for column in columns)]
    head += [f"{column.head}, minus control" for column in columns]
    lines = [[*head, "seeds"]]
    for label in labels:
      name, control = ABLATION_ROWS[label]
      own = [find(found, dataset, label, column) for column in columns]
      base = [find(found, dataset, control, column) for column in columns]
      gaps = [
        merge.paired_difference(row, other) if row and other else None
        for row, other in zip(own, base, strict=True)
      ]
      compared = [
        layout.points(gap) if gap and label != control else "–" for gap in gaps
      ]
      seeds = max((row.get("num_runs", 0) for row in own), default=0)
      lines.append([name, *map(_percent, own), *compared, str(seeds)])
    if len(lines) > 1:
      parts.append(_table(f"{dataset}, {_epsilon(found, dataset)}", lines))
  return "\n\n".join(parts)


def _epsilon(found: dict[str, Any], dataset: str) -> str:
  """Norm and radius of the attacks on a data set."""
  balls = {
    f"{row['norm']}, epsilon {tables.exact_pixels(row['epsilon'])}"
    for row in found["rows"]
    if row["dataset"] == dataset and row["norm"]
  }
  return " and ".join(sorted(balls))


def _table(heading: str, lines: list[list[str]]) -> str:
  align = "l" + "r" * (len(lines[0]) - 1)
  return f"{heading}:\n\n{tables.markdown(lines, align)}"


def headline(found: dict[str, Any]) -> str:
  """Writes the table of the methods under both BatchNorm modes."""
  return accuracies(found, HEADLINE_ROWS, HEADLINE)


def batch_statistics(found: dict[str, Any]) -> str:
  """Writes accuracies of one batch-mode classifier under three attacks."""
  labels = dict.fromkeys(row["model"] for row in found["rows"])
  return accuracies(found, {label: label for label in labels}, BATCH)
