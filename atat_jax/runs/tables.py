"""The rows of `results.json`, arranged: models down, attacks across."""

import dataclasses
from typing import Any

from atat_jax.runs import files

Row = dict[str, Any]

# Running statistics first: they make a fixed classifier, so theirs are the
# numbers that count.
BATCH_NORMS = ("running", "batch")

BATCH_NORM_NAMES = {
  "running": "running statistics",
  "batch": "batch statistics",
}

BATCH_WARNING = "paper's released protocol, can overstate robustness"

# Rows that agree on these stand in one column.
COLUMN_FIELDS = (
  "attack",
  "dataset",
  "split",
  "norm",
  "epsilon",
  "step_size",
  "num_steps",
  "num_restarts",
  "loss",
  "num_examples",
  "seed",
)

# The columns of the paper's Tables 1 and 2.
_PAPER_ORDER = ("nominal", "fgsm", "ifgsm20", "pgd7", "pgd10", "pgd20")

# How the numbers of a protocol are called, where an attack has them.
_NUMBERS = {
  "step_size": "step size",
  "num_steps": "steps",
  "num_restarts": "restarts",
  "loss": "loss",
}


@dataclasses.dataclass(frozen=True)
class Column:
  """One attack with one protocol.

  Attributes:
    label: name of the attack, and what tells it from its namesakes if any.
    protocol: the first of its rows; what the rows share is read off it.
    rows: {(model, batch_norm): row}; the last where a pair was written twice.
  """

  label: str
  protocol: Row
  rows: dict[tuple[str, str], Row]

  @property
  def nominal(self) -> bool:
    """Whether the images are clean."""
    return self.protocol["attack"] == "nominal"

  def accuracy(self, model: str, batch_norm: str) -> float | None:
    """Accuracy in [0, 1]; None if it was not measured."""
    row = self.rows.get((model, batch_norm))
    return None if row is None else row["accuracy"]


def columns(
  rows: list[Row], fields: tuple[str, ...] = COLUMN_FIELDS
) -> list[Column]:
  """Groups rows of `results.json` by attack and protocol, in their order.

  Args:
    rows: The rows.
    fields: What the rows of a column agree on.

  Returns:
    The columns.
  """
  groups: dict[tuple[Any, ...], list[Row]] = {}
  for row in rows:
    key = tuple(row.get(field) for field in fields)
    groups.setdefault(key, []).append(row)
  firsts = [group[0] for group in groups.values()]
  return [
    Column(
      label=_label(group[0], firsts, fields),
      protocol=group[0],
      rows={(row["model"], row["batch_norm"]): row for row in group},
    )
    for group in groups.values()
  ]


def in_paper_order(found: list[Column]) -> list[Column]:
  """The paper's columns first, as it has them; ensembles of attacks last."""

  def place(column: Column) -> int:
    attack = column.protocol["attack"]
    if attack in _PAPER_ORDER:
      return _PAPER_ORDER.index(attack)
    return len(_PAPER_ORDER) + attack.startswith("autoattack")

  return sorted(found, key=place)


def markdown(lines: list[list[str]]) -> str:
  """An aligned Markdown table: names to the left, numbers to the right.

  Args:
    lines: The head and the rows, all of one length.

  Returns:
    The table, without a line break at its end.
  """
  widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
  rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
  return "\n".join(
    "| "
    + " | ".join(
      [cells[0].ljust(widths[0])]
      + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
    )
    + " |"
    for cells in [lines[0], rule, *lines[1:]]
  )


def series(rows: list[Row]) -> list[tuple[str, str]]:
  """The (model, batch_norm) pairs of the rows, in the order of the table."""
  models = dict.fromkeys([*files.MODELS, *(row["model"] for row in rows)])
  present = {(row["model"], row["batch_norm"]) for row in rows}
  return [
    (model, batch_norm)
    for batch_norm in BATCH_NORMS
    for model in models
    if (model, batch_norm) in present
  ]


def size(value: float | None) -> str:
  """A perturbation size in [0, 1] as a decimal, and as k/255 if it is one."""
  if value is None:
    return "none"
  levels = 255 * value
  fraction = f" = {round(levels)}/255"
  is_multiple = round(levels) >= 1 and abs(levels - round(levels)) < 0.02
  return f"{value:.4g}" + (fraction if is_multiple else "")


def protocol(column: Column) -> str:
  """The protocol of a column in full, on one line of plain text."""
  first = column.protocol
  if column.nominal:
    parts = ["clean images, no attack"]
  else:
    parts = [
      f"norm {first.get('norm') or 'none'}",
      f"epsilon {size(first.get('epsilon'))}",
    ]
    parts += [
      f"{label} {_number(field, first[field])}"
      for field, label in _NUMBERS.items()
      if first.get(field) is not None
    ]
    parts += [
      f"{option} {_text(value)}"
      for option, value in first.get("options", {}).items()
    ]
    parts += [
      f"{attack['attack']} ({attack['numbers']})"
      for attack in first.get("attacks", [])
      if attack["numbers"]
    ]
  rows = column.rows.values()
  counts = " / ".join(
    f"{count:,}" for count in dict.fromkeys(row["num_examples"] for row in rows)
  )
  seeds = " / ".join(dict.fromkeys(_text(row.get("seed")) for row in rows))
  parts += [
    f"{counts} {first['dataset']} {first['split']} images",
    f"BatchNorm {_batch_norms(column)}",
    f"seed {seeds}",
  ]
  return ", ".join(parts)


def _batch_norms(column: Column) -> str:
  names = []
  for batch_norm in BATCH_NORMS:
    rows = [row for (_, mode), row in column.rows.items() if mode == batch_norm]
    if not rows:
      continue
    name = BATCH_NORM_NAMES[batch_norm]
    sizes = {row["batch_size"] for row in rows if row.get("batch_size")}
    if batch_norm == "batch" and sizes:
      name += f" of {' / '.join(map(str, sorted(sizes)))} images"
    names.append(name)
  return " and ".join(names)


def _label(row: Row, firsts: list[Row], fields: tuple[str, ...]) -> str:
  """The attack's name, with the fields that tell it from its namesakes."""
  namesakes = [other for other in firsts if other["attack"] == row["attack"]]
  differing = [
    field
    for field in fields
    if len({other.get(field) for other in namesakes}) > 1
  ]
  marks = [f"{field}={_text(row.get(field))}" for field in differing]
  return f"{row['attack']} ({', '.join(marks)})" if marks else row["attack"]


def _number(field: str, value: Any) -> str:
  return size(value) if field == "step_size" else _text(value)


def _text(value: object) -> str:
  if value is None:
    return "none"
  return f"{value:.4g}" if isinstance(value, float) else str(value)
