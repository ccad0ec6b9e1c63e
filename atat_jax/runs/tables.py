"""Rows of `results.json` arranged by attack, and tables in Markdown."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from atat_jax.runs import roles, wording

Row = dict[str, Any]

# Running statistics first: only they make a fixed classifier.
BATCH_NORMS = ("running", "batch")

BATCH_NORM_NAMES = {
  "running": "running statistics",
  "batch": "batch statistics",
}

BATCH_WARNING = (
  "paper's released protocol, no fixed classifier, its attack can fail"
)

OWN_BATCHES = "those of the batch that each attack made"
"""Batches of a worst case: each attack judges an image among other ones."""

REFILLED_BATCHES = "filled up with images that are still robust"
"""Batches of AutoAttack, which earlier versions ran with batch statistics."""

BATCH_NORM_HEADINGS = {
  "running": "Running statistics: one fixed classifier",
  "batch": f"Batch statistics: {BATCH_WARNING}",
}

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
  "worst_of",
)
"""Fields on which the rows of a column agree; a worst case has `members`, too."""

NOMINAL = "nominal"
"""Attack of a row of clean images: none."""

WORST_CASE = "worst_case"
"""Attack of a row that `worst_case.complete` derives from others."""

WORST_CASE_MEANING = (
  "Worst case: share of the images that are correct under every attack of its"
  " list, derived from the results of these."
)

_MEMBER_FIELDS = ("step_size", "num_steps", "num_restarts", "loss", "seed")

SHOWN = ("dataset", "split", "step_size", "num_steps", "num_restarts", "loss")
"""Fields that a row must have, besides those that all have, to be on a page."""

# Columns of the paper's Tables 1 and 2.
_PAPER_ORDER = ("nominal", "fgsm", "ifgsm20", "pgd7", "pgd10", "pgd20")

_IMAGES = ("dataset", "split", "num_examples")
_BALL = ("norm", "epsilon")
_LENGTHS = ("epsilon", "step_size")  # in units of the pixels


@dataclasses.dataclass(frozen=True)
class Column:
  """Results of one attack with one protocol.

  Attributes:
    label: Name of the attack, with the fields that tell it from its namesakes.
    protocol: First of the rows, for the fields that all of them share.
    rows: {(model, batch_norm): row}; the last one where a pair occurs twice.
  """

  label: str
  protocol: Row
  rows: dict[tuple[str, str], Row]

  @property
  def nominal(self) -> bool:
    """True if the images are clean."""
    return self.protocol["attack"] == NOMINAL

  @property
  def derived(self) -> bool:
    """True if it is the worst case over other columns, and not measured."""
    return is_derived(self.protocol)

  @property
  def title(self) -> str:
    """Its label in a picture, which has no room for its protocol."""
    return f"{self.label}, derived" if self.derived else self.label

  def accuracy(self, model: str, batch_norm: str) -> float | None:
    """Returns an accuracy in [0, 1]; None if it was not measured."""
    row = self.rows.get((model, batch_norm))
    return None if row is None else row["accuracy"]


def is_derived(row: Row) -> bool:
  """Whether a row is a worst case over other rows, and not measured."""
  return row.get("worst_of") is not None


def identity(
  row: Row, fields: tuple[str, ...] = COLUMN_FIELDS
) -> tuple[Any, ...]:
  """Returns the protocol of a row; rows that agree on it share a column.

  A worst case is that of its attacks with all their numbers: the same names
  may stand for others.

  Args:
    row: Row of `results.json` or of a comparison.
    fields: Fields of the protocol.
  """
  members = json.dumps(row.get("members"), sort_keys=True)
  return (*(row.get(field) for field in fields), members)


def members(rows: Sequence[Row]) -> list[Row]:
  """Lists the attacks of a worst case, each with all its numbers.

  Args:
    rows: Rows of the attacks, and of clean images, which have no numbers.

  Returns:
    Each once, in an order that is not that of the rows.
  """
  fields = (*_MEMBER_FIELDS, "options")
  found = {}
  for row in rows:
    numbers = {f: row[f] for f in fields if row.get(f) is not None}
    member = {"attack": row["attack"]}
    if row["attack"] != NOMINAL:
      member |= numbers
    found[json.dumps(member, sort_keys=True)] = member
  return [
    member
    for _, member in sorted(
      found.items(), key=lambda item: (_place(item[1]["attack"]), item[0])
    )
  ]


def attack_members(row: Row) -> list[Row]:
  """Lists the attacks of a row that is a worst case, without clean images."""
  found = row.get("members") or []
  return [member for member in found if member["attack"] != NOMINAL]


def member_names(
  members: Sequence[Row], among: Sequence[Row] | None = None
) -> list[str]:
  """Names the attacks of a worst case, with what tells them from namesakes.

  Args:
    members: Attacks, as `members` lists them.
    among: All attacks that must be told apart; None: `members`.
  """
  every = list(members if among is None else among)
  return [_label(member, every, _MEMBER_FIELDS) for member in members]


def columns(
  rows: list[Row], fields: tuple[str, ...] = COLUMN_FIELDS
) -> list[Column]:
  """Groups rows of `results.json` by attack and protocol.

  Args:
    rows: Rows of `results.json`.
    fields: Fields on which the rows of a column agree.

  Returns:
    Columns in order of appearance.
  """
  groups: dict[tuple[Any, ...], list[Row]] = {}
  for row in rows:
    groups.setdefault(identity(row, fields), []).append(row)
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
  """Sorts columns: the paper's, others, AutoAttack, then worst cases."""
  return sorted(
    found,
    key=lambda column: (column.derived, _place(column.protocol["attack"])),
  )


def _place(attack: str) -> int:
  """Returns an attack's place: the paper's in its order, others, AutoAttack.

  The variants of an attack, as "pgd20-margin", are beside it.
  """
  name = re.split("[-:]", attack)[0]
  if name in _PAPER_ORDER:
    return _PAPER_ORDER.index(name)
  return len(_PAPER_ORDER) + name.startswith("autoattack")


NONFINITE = ("nonfinite", "nonfinite_points", "nonfinite_gradients")
"""Fields of a row that count what was not finite; missing in old rows.

Images whose logits were not finite when they were scored; evaluations within
the attack whose logits or loss were not; those whose gradient was not.
"""


def nonfinite(row: Row) -> str:
  """Says what was not finite when a row was measured; "" if nothing was."""
  images, points, gradients = (row.get(field) or 0 for field in NONFINITE)
  parts = []
  if images:
    parts.append(
      f"{images:,} of {wording.plural(row['num_examples'], 'image')}"
      f" {'has' if images == 1 else 'have'} logits that are not finite"
    )
  if points:
    parts.append(
      f"{wording.plural(points, 'evaluation')} of the attack gave logits or a"
      " loss that are not finite"
    )
  if gradients:
    parts.append(
      f"{wording.plural(gradients, 'gradient')} of the attack had entries that"
      " are not finite"
    )
  return wording.listed(parts) if parts else ""


def trained(rows: list[Row]) -> str:
  """Returns the network that a run trained: the student, if there is one."""
  models = [model for model, _ in series(rows)]
  if roles.STUDENT in models or not models:
    return roles.STUDENT
  return models[0]


def series(rows: list[Row]) -> list[tuple[str, str]]:
  """Lists the (model, batch_norm) pairs of the rows in the order of a table."""
  models = dict.fromkeys([*roles.MODELS, *(row["model"] for row in rows)])
  present = {(row["model"], row["batch_norm"]) for row in rows}
  return [
    (model, batch_norm)
    for batch_norm in BATCH_NORMS
    for model in models
    if (model, batch_norm) in present
  ]


def markdown(lines: Sequence[Sequence[str]], align: str | None = None) -> str:
  """Lays out a Markdown table with columns of equal width.

  Args:
    lines: Head and rows, all of one length.
    align: "l" or "r" for each column. Default: left for columns with a cell
      that starts with a letter, right for columns of numbers.

  Returns:
    Table, without a line break at its end.
  """
  cells = [[escaped(cell) for cell in line] for line in lines]
  columns = list(zip(*cells, strict=True))
  if align is None:
    align = "".join(
      "l" if any(cell[:1].isalpha() for cell in column[1:]) else "r"
      for column in columns
    )
  widths = [max(map(len, column)) for column in columns]
  rule = [
    "-" * width if side == "l" else "-" * (width - 1) + ":"
    for width, side in zip(widths, align, strict=True)
  ]
  head, *rows = (
    [
      cell.ljust(width) if side == "l" else cell.rjust(width)
      for cell, width, side in zip(line, widths, align, strict=True)
    ]
    for line in cells
  )
  return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows])


# Letters that Markdown takes for marks. An underscore within a word is none.
_MARKS = re.compile(r"[\\`*<&|~$]|(?<=\])\(|(?<!\w)_|_(?!\w)")

# A span of code, in which nothing is a mark.
_CODE = re.compile(r"`[^`|]+`")


def escaped(text: str) -> str:
  """Returns text that Markdown, and a terminal, show as it is, on one line."""
  line = "".join(letter if letter.isprintable() else " " for letter in text)
  if _CODE.fullmatch(line):
    return line
  return _MARKS.sub(r"\\\g<0>", line)


def attack(column: Column) -> str:
  """Describes the attack of a column on one line of plain text."""
  first = column.protocol
  if column.nominal:
    return "clean images, no attack"
  if column.derived:
    ball = wording.attack(norm=first.get("norm"), epsilon=first.get("epsilon"))
    return (
      f"derived, image by image: correct under every one of"
      f" {first['worst_of']}; {ball}"
    )
  parts = [
    wording.attack(
      norm=first.get("norm"),
      epsilon=first.get("epsilon"),
      step_size=first.get("step_size"),
      num_steps=first.get("num_steps"),
      num_restarts=first.get("num_restarts"),
      loss=first.get("loss"),
      unit="query" if first["attack"].startswith("square") else "step",
      options=[
        (option, _text(value))
        for option, value in first.get("options", {}).items()
      ],
    ),
    *(
      f"{part['attack']} ({part['numbers']})"
      for part in _ensemble(column)
      if part["numbers"]
    ),
  ]
  return ", ".join(parts)


def _ensemble(column: Column) -> list[dict[str, Any]]:
  """Returns AutoAttack's attacks; rows of earlier versions lack the last ones.

  Those stopped where no robust image was left.
  """
  rows = (column.protocol, *column.rows.values())
  return max((row.get("attacks") or [] for row in rows), key=len)


def images(column: Column) -> str:
  """Describes the images and the seed of a column on one line of text."""
  first, rows = column.protocol, column.rows.values()
  counts = " / ".join(
    f"{count:,}" for count in dict.fromkeys(row["num_examples"] for row in rows)
  )
  attacks = [one for row in rows for one in attack_members(row) or [row]]
  seeds = " / ".join(dict.fromkeys(_text(one.get("seed")) for one in attacks))
  return f"{counts} {first['dataset']} {first['split']} images, seed {seeds}"


def protocol(column: Column) -> str:
  """Describes the whole protocol of a column on one line of plain text."""
  return (
    f"{attack(column)}; {images(column)}; BatchNorm: {_batch_norms(column)}"
  )


def batches(column: Column) -> str:
  """Says what the batches of batch statistics were, where it is not plain."""
  if column.derived:
    return f", {OWN_BATCHES}"
  if column.protocol["attack"].startswith("autoattack"):
    return f", {REFILLED_BATCHES}"
  return ""


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
    if batch_norm == "batch":
      name += batches(column)
    names.append(name)
  return " and ".join(names)


def _label(row: Row, firsts: list[Row], fields: tuple[str, ...]) -> str:
  """Returns the attack's name, with the fields that tell it from others.

  Those are the fields in which namesakes differ; and images and ball where they
  are not those of the attack on the most images, as such accuracies must not be
  compared.
  """
  namesakes = [other for other in firsts if other["attack"] == row["attack"]]
  attacked = [other for other in firsts if other["attack"] != "nominal"]
  usual = max(attacked or firsts, key=lambda one: one.get("num_examples") or 0)

  def is_told(field: str) -> bool:
    if _differ(field, namesakes):
      return True
    in_name = f":{field}=" in row["attack"]
    unusual = row.get(field) not in (None, usual.get(field))
    return field in (*_IMAGES, *_BALL) and unusual and not in_name

  marks = [
    f"{field}={_value(field, row.get(field))}"
    for field in fields
    if field != "worst_of" and is_told(field)
  ]
  if is_derived(row):
    marks += _members_marks(row, namesakes, fields)
  return f"{row['attack']} ({', '.join(marks)})" if marks else row["attack"]


def _members_marks(
  row: Row, namesakes: list[Row], fields: tuple[str, ...]
) -> list[str]:
  """Tells a worst case from those over other attacks on the same images.

  By the number of its attacks, and where that is not enough by those that it is
  over and the others are not, or the other way round.
  """
  own, count = row.get("members") or [], len(attack_members(row))
  rivals = [
    other
    for other in namesakes
    if (other.get("members") or []) != own
    and all(other.get(f) == row.get(f) for f in fields if f != "worst_of")
  ]
  if not rivals:
    return []
  marks = [wording.plural(count, "attack")]
  lists = [
    r.get("members") or [] for r in rivals if len(attack_members(r)) == count
  ]
  if not lists:
    return marks
  every = [*own, *(member for found in lists for member in found)]
  more = [one for one in own if any(one not in found for found in lists)]
  less = [one for one in every if one not in own]
  names = dict.fromkeys(member_names(more or less, every))
  return [*marks, f"{'with' if more else 'without'} {', '.join(names)}"]


def _differ(field: str, rows: list[Row]) -> bool:
  return len({row.get(field) for row in rows}) > 1


def _value(field: str, value: Any) -> str:
  return exact_pixels(value) if field in _LENGTHS else _text(value)


def exact_pixels(value: float | None) -> str:
  """Writes a distance, in more digits where the usual text hides them.

  Two radii that differ must not look the same: 0.0314 is not 8/255.
  """
  text = wording.pixels(value)
  if value is None:
    return text
  above, _, below = text.partition("/")
  meaning = float(above) / float(below or 1)
  return text if math.isclose(meaning, value, rel_tol=1e-5) else f"{value:.6g}"


def _text(value: object) -> str:
  if value is None:
    return "none"
  return f"{value:.4g}" if isinstance(value, float) else str(value)
