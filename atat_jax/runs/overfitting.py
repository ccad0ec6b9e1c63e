"""Catastrophic overfitting: a training that withstands single steps alone.

A network that is trained on attacks of one or a few steps can lose, within an
epoch, its accuracy under attacks of more steps, while that under a single step
rises (Wong et al., 2020, Section 5.4). Validations show it, as they measure both.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from atat_jax.runs import wording

SINGLE_STEP, ROBUST = "accuracy_fgsm", "accuracy_adversarial"
"""Accuracies of a validation, by name: under one step, and under its attack."""

ALARM = "alarm"
"""Name of the remark that a validation with a collapse has."""

_FALL = 0.2
"""Fall of the robust accuracy at which Wong et al.'s code stops a training."""
_LEAST_FALL = 0.1
"""Smallest fall that is more than chance on some hundred images."""


class _Measured(NamedTuple):
  """Accuracies of a validation."""

  step: int
  single_step: float
  robust: float


class Collapse(NamedTuple):
  """Validation that shows catastrophic overfitting.

  Attributes:
    step: Step of the validation.
    best: Step of the most robust validation before, whose checkpoint counts.
    robust: Accuracy under the validation attack, at that step and now.
    single_step: Accuracy under a single step, at that step and now.
  """

  step: int
  best: int
  robust: tuple[float, float]
  single_step: tuple[float, float]

  def describe(self) -> str:
    """Says in words what fell, what rose, and which checkpoint counts."""
    robust, single_step = (
      f"from {wording.percent(before)} to {wording.percent(after)}"
      for before, after in (self.robust, self.single_step)
    )
    return (
      "catastrophic overfitting: accuracy under the validation attack went"
      f" {robust} since step {self.best:,}, under a single step {single_step};"
      f" until a more robust one, the checkpoint of step {self.best:,} counts,"
      " and is kept"
    )


def find(lines: Iterable[Mapping[str, Any]]) -> list[Collapse]:
  """Finds the validations that show catastrophic overfitting.

  That is so where the robust accuracy is lower than the best before by 0.2, or
  by half of it if that is at least 0.1, while the accuracy under a single step
  is no lower than it was there. Other falls, after which both are lower, are
  those of a training that diverges or has a high learning rate.

  Args:
    lines: Lines "validation" of a `metrics.jsonl`, in order of step; those
      without both accuracies are passed over.

  Returns:
    One for each such validation, in order.
  """
  found: list[Collapse] = []
  best: _Measured | None = None
  for line in lines:
    point = _read(line)
    if point is None:
      continue
    if best is not None and _has_collapsed(best, point):
      found.append(
        Collapse(
          point.step,
          best.step,
          (best.robust, point.robust),
          (best.single_step, point.single_step),
        )
      )
    # The later of equals counts, as among checkpoints.
    if best is None or point.robust >= best.robust:
      best = point
  return found


def _has_collapsed(best: _Measured, point: _Measured) -> bool:
  fall = max(_LEAST_FALL, min(_FALL, best.robust / 2))
  lower = best.robust - point.robust >= fall - 1e-9
  return lower and point.single_step >= best.single_step


def _read(line: Mapping[str, Any]) -> _Measured | None:
  """Accuracies of a line, which may be anything; None without both."""
  found = []
  for name in (SINGLE_STEP, ROBUST):
    value = line.get(name)
    if type(value) not in (int, float) or not 0 <= value <= 1:  # type: ignore[operator]
      return None
    found.append(value)
  return _Measured(line["step"], *found)  # type: ignore[arg-type]
