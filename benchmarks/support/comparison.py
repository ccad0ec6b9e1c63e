"""Results of two implementations of AutoAttack on one network, as tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atat_jax.runs import tables, wording

EVERYTHING = "everything"


@dataclasses.dataclass(frozen=True)
class Side:
  """Result of one implementation, and the time it took.

  Attributes:
    robust: bool [N]: examples classified correctly after every attack.
    adversarial: [N, H, W, C]: the image that fools the network, or the clean
      one where no attack found any.
    accuracy: Accuracy in [0, 1] after each attack, by name; first "clean".
    seconds: Seconds of each attack, by name.
    everything: Seconds of the whole call: checks, clean pass, attacks.
    cpu: Processor time of the whole call, summed over threads.
    compiling: Seconds of `everything` that XLA's compiler took.
    warnings: Warnings of the implementation's own checks.
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
    """Returns all but the images; `robust` as one digit per example."""
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

  @classmethod
  def from_json(cls, found: dict[str, Any]) -> "Side":
    """Reads the result of `as_json`; the images are empty."""
    return cls(
      robust=np.array([digit == "1" for digit in found["robust"]]),
      adversarial=np.zeros((0, 0, 0, 0), np.float32),
      accuracy=found["accuracy"],
      seconds=found["seconds"],
      everything=found["seconds_everything"],
      cpu=found["seconds_cpu"],
      compiling=found["seconds_compiling"],
      warnings=tuple(found["warnings"]),
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Results of both implementations on one network.

  Attributes:
    network: Name of the network.
    norm: Norm of the ball: "linf", "l2" or "l1".
    epsilon: Radius of the ball.
    ours: First run in the process, compilation included.
    reference: Run of the original package.
    warm: Second run of ours, with every program compiled; None: not made.
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
    """Indices of examples that are robust by ours alone."""
    return np.flatnonzero(self.ours.robust & ~self.reference.robust)

  @property
  def reference_only(self) -> np.ndarray:
    """Indices of examples that are robust by the reference alone."""
    return np.flatnonzero(self.reference.robust & ~self.ours.robust)

  @property
  def difference(self) -> float:
    """Robust accuracy, ours minus the reference's, in percentage points."""
    ours, reference = self.ours.robust, self.reference.robust
    return 100 * (int(ours.sum()) - int(reference.sum())) / len(ours)

  @property
  def parts(self) -> list[str]:
    """Attacks that either side has run, in order."""
    names = [*self.ours.seconds, *self.reference.seconds]
    return list(dict.fromkeys(names))

  def as_json(self) -> dict[str, Any]:
    """Returns plain values: everything that the tables show, and more."""
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

  @classmethod
  def from_json(cls, found: dict[str, Any]) -> "Comparison":
    """Reads the result of `as_json`, without images and details."""
    warm = found["ours_warm"]
    return cls(
      found["network"],
      found["norm"],
      found["epsilon"],
      ours=Side.from_json(found["ours"]),
      reference=Side.from_json(found["reference"]),
      warm=None if warm is None else Side.from_json(warm),
    )


def _ratio(reference: float | None, ours: float | None) -> float | None:
  return reference / ours if reference and ours else None


def speed_ratios(
  comparison: Comparison,
) -> dict[str, dict[str, float | None]]:
  """Computes the ratios of times, reference / ours.

  Args:
    comparison: Results of both sides.

  Returns:
    {attack or "everything": {"first": ..., "warm": ...}}, with and without our
    compilation; None where a side did not run the attack.
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


def _radius(found: Comparison) -> str:
  """Formats epsilon, levels of a pixel for linf."""
  if found.norm == "linf":
    return wording.pixels(found.epsilon)
  return f"{found.epsilon:.5g}"


def parity_table(comparisons: Sequence[Comparison]) -> str:
  """Tabulates robust accuracies and disagreements, a row per network.

  Args:
    comparisons: One or more comparisons.

  Returns:
    Markdown table.
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
        _radius(found),
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
  return tables.markdown([header, *rows])


def attack_table(comparisons: Sequence[Comparison]) -> str:
  """Tabulates robust accuracy after each attack, a row per attack.

  Args:
    comparisons: One or more comparisons.

  Returns:
    Markdown table; "-" where a side had no example left to attack.
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
  return tables.markdown([header, *rows])


def speed_table(comparisons: Sequence[Comparison]) -> str:
  """Tabulates seconds and their ratios, a row per attack.

  Args:
    comparisons: One or more comparisons.

  Returns:
    Markdown table; the last row of a network is the whole call.
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
  return tables.markdown([header, *rows])
