"""What two implementations of AutoAttack found on one network, as tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

EVERYTHING = "everything"


@dataclasses.dataclass(frozen=True)
class Side:
  """What one implementation found, and how long it took.

  Attributes:
    robust: bool [N]: who is classified correctly after every attack.
    adversarial: [N, H, W, C]: where an example fell the image that fools the
      network, elsewhere the clean one.
    accuracy: "clean" and every attack run to the accuracy after it, in [0, 1].
    seconds: Attack to the time it took.
    everything: Seconds of the whole call: checks, clean pass, attacks.
    cpu: Processor time of that, all threads together.
    compiling: Of `everything`, seconds that XLA's compiler took.
    warnings: What its own checks said.
  """

  robust: np.ndarray
  adversarial: np.ndarray
  accuracy: dict[str, float]
  seconds: dict[str, float]
  everything: float
  cpu: float = 0.0
  compiling: float = 0.0
  warnings: tuple[str, ...] = ()

  def as_json(self) -> dict[str, Any]:
    """All but the images; `robust` as one digit an example."""
    return {
      "robust_accuracy": float(self.robust.mean()),
      "accuracy": self.accuracy,
      "seconds": self.seconds,
      "seconds_everything": self.everything,
      "seconds_cpu": self.cpu,
      "seconds_compiling": self.compiling,
      "warnings": list(self.warnings),
      "robust": "".join(str(int(flag)) for flag in self.robust),
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Both sides on one network.

  Attributes:
    network: Its name.
    norm: "linf", "l2" or "l1".
    epsilon: Radius.
    ours: The first run in the process, compilation included.
    reference: The original package's.
    warm: The same run again, with every program compiled; None: not made.
    details: Further facts about the run, plain values.
  """

  network: str
  norm: str
  epsilon: float
  ours: Side
  reference: Side
  warm: Side | None = None
  details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def ours_only(self) -> np.ndarray:
    """Examples that hold out against ours and not against the reference."""
    return np.flatnonzero(self.ours.robust & ~self.reference.robust)

  @property
  def reference_only(self) -> np.ndarray:
    """Examples that hold out against the reference and not against ours."""
    return np.flatnonzero(self.reference.robust & ~self.ours.robust)

  @property
  def difference(self) -> float:
    """Robust accuracy, ours minus the reference's, in points."""
    ours, reference = self.ours.robust, self.reference.robust
    return 100 * (int(ours.sum()) - int(reference.sum())) / len(ours)

  @property
  def parts(self) -> list[str]:
    """The attacks that either side has run, in their order."""
    names = [*self.ours.seconds, *self.reference.seconds]
    return list(dict.fromkeys(names))

  def as_json(self) -> dict[str, Any]:
    """Plain values, all that the tables show and more."""
    return {
      "network": self.network,
      "norm": self.norm,
      "epsilon": self.epsilon,
      "num_examples": len(self.ours.robust),
      "difference_points": round(self.difference, 6),
      "robust_by_ours_only": self.ours_only.tolist(),
      "robust_by_reference_only": self.reference_only.tolist(),
      "ours": self.ours.as_json(),
      "ours_warm": None if self.warm is None else self.warm.as_json(),
      "reference": self.reference.as_json(),
      "ratios": speed_ratios(self),
      **self.details,
    }


def _ratio(reference: float | None, ours: float | None) -> float | None:
  return reference / ours if reference and ours else None


def speed_ratios(
  comparison: Comparison,
) -> dict[str, dict[str, float | None]]:
  """How many times the reference's time is ours.

  Args:
    comparison: Both sides.

  Returns:
    Attack, and "everything", to {"first": ..., "warm": ...}: reference / ours
    with and without our compilation; None where one of them is missing.
  """
  found = {}
  for part in [*comparison.parts, EVERYTHING]:
    reference = _seconds(comparison.reference, part)
    found[part] = {
      "first": _ratio(reference, _seconds(comparison.ours, part)),
      "warm": _ratio(reference, _seconds(comparison.warm, part)),
    }
  return found


def _seconds(side: Side | None, part: str) -> float | None:
  if side is None:
    return None
  return side.everything if part == EVERYTHING else side.seconds.get(part)


def _number(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
  return _number(None if value is None else 100 * value, ".2f")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table; columns of equal width, those of numbers to the right."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  left = [
    any(cell[:1].isalpha() for cell in column)
    for column in zip(*rows, strict=True)
  ]

  def line(cells: Sequence[str]) -> str:
    padded = [
      cell.ljust(width) if to_left else cell.rjust(width)
      for cell, width, to_left in zip(cells, widths, left, strict=True)
    ]
    return f"| {' | '.join(padded)} |"

  rule = [
    "-" * width if to_left else "-" * (width - 1) + ":"
    for width, to_left in zip(widths, left, strict=True)
  ]
  return "\n".join([line(header), line(rule), *map(line, rows)])


def parity_table(comparisons: Sequence[Comparison]) -> str:
  """Who is robust, by both: a row a network.

  Args:
    comparisons: At least one.

  Returns:
    A Markdown table.
  """
  rows = []
  for found in comparisons:
    clean = [
      _percent(s.accuracy["clean"]) for s in (found.ours, found.reference)
    ]
    rows.append(
      [
        found.network,
        found.norm,
        f"{found.epsilon:.5g}",
        str(len(found.ours.robust)),
        " / ".join(dict.fromkeys(clean)),
        _percent(found.ours.robust.mean()),
        _percent(found.reference.robust.mean()),
        f"{found.difference:+.2f}",
        str(len(found.ours_only)),
        str(len(found.reference_only)),
      ]
    )
  header = [
    "network",
    "norm",
    "epsilon",
    "n",
    "clean (%)",
    "ours (%)",
    "reference (%)",
    "difference (points)",
    "robust by ours only",
    "by the reference only",
  ]
  return markdown(header, rows)


def attack_table(comparisons: Sequence[Comparison]) -> str:
  """Robust accuracy after each attack: a row an attack.

  Args:
    comparisons: At least one.

  Returns:
    A Markdown table; "-" where a side had nobody left to attack.
  """
  rows = []
  for found in comparisons:
    for part in ["clean", *found.parts]:
      ours = found.ours.accuracy.get(part)
      reference = found.reference.accuracy.get(part)
      both = ours is not None and reference is not None
      rows.append(
        [
          found.network,
          part,
          _percent(ours),
          _percent(reference),
          _number(100 * (ours - reference) if both else None, "+.2f"),
        ]
      )
  header = ["network", "after", "ours (%)", "reference (%)", "difference"]
  return markdown(header, rows)


def speed_table(comparisons: Sequence[Comparison]) -> str:
  """Seconds, and the reference's as a multiple of ours: a row an attack.

  Args:
    comparisons: At least one.

  Returns:
    A Markdown table; the last row of a network is the whole call.
  """
  rows = []
  for found in comparisons:
    for part, ratios in speed_ratios(found).items():
      rows.append(
        [
          found.network,
          part,
          _number(_seconds(found.ours, part), ".2f"),
          _number(_seconds(found.warm, part), ".2f"),
          _number(_seconds(found.reference, part), ".2f"),
          _number(ratios["first"], ".2f"),
          _number(ratios["warm"], ".2f"),
        ]
      )
  header = [
    "network",
    "seconds of",
    "ours, compiling",
    "ours, warm",
    "reference",
    "reference / ours, compiling",
    "reference / ours, warm",
  ]
  return markdown(header, rows)
