"""Is this robustness real? Rules on the rows of a results table.

Each rule says what it compared, whether it raised a flag, and what that means
in a sentence. Rows are those of `results.json`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

CONVERGED = 0.02
"""Largest fall in accuracy under more steps of an attack that has converged."""


def _accuracies(rows: Sequence[Row], batch_norm: str) -> dict[str, float]:
  return {
    row["attack"]: row["accuracy"]
    for row in rows
    if row["batch_norm"] == batch_norm
  }


def _pgd_by_steps(rows: Sequence[Row]) -> list[tuple[int, float]]:
  return sorted(
    (row["num_steps"], row["accuracy"])
    for row in rows
    if row["batch_norm"] == "running"
    and row["attack"] == f"pgd{row['num_steps']}"
  )


def _comparable(rows: Sequence[Row], model: str) -> list[Row]:
  """A model's rows on the most images, at the epsilon that comes first.

  A quick look at a few images, or another epsilon or seed, is no evidence for
  or against the others.
  """
  rows = [row for row in rows if row["model"] == model]
  most = max((row["num_examples"] for row in rows), default=0)
  rows = [row for row in rows if row["num_examples"] == most]
  keys = ("norm", "epsilon", "seed")
  attacked = [row for row in rows if row["attack"] != "nominal"]
  return [
    row
    for row in attacked
    if all(row.get(k) == attacked[0].get(k) for k in keys)
  ]


def _standard_error(rows: Sequence[Row]) -> float:
  # Of an accuracy near one half, the widest; two of them differ by sqrt(2).
  return (0.5 / min(row["num_examples"] for row in rows)) ** 0.5


def diagnose(rows: Sequence[Row], model: str) -> dict[str, dict[str, Any]]:
  """Applies the rules for which the rows have the numbers.

  Args:
    rows: Rows of `results.json`.
    model: Whose, e.g. "student".

  Returns:
    Rule name to {"rule", "value", "flag", "message"}.
  """
  rows = _comparable(rows, model)
  if not rows:
    return {}
  found: dict[str, dict[str, Any]] = {
    f"{row['attack']}_{name}": dict(check)
    for row in rows
    if row["batch_norm"] == "running"
    for name, check in row.get("diagnostics", {}).items()
  }
  running = _accuracies(rows, "running")
  batch = _accuracies(rows, "batch")
  noise = _standard_error(rows)

  shared = [a for a in running if a in batch]
  if shared:
    gaps = {attack: batch[attack] - running[attack] for attack in shared}
    attack = max(gaps, key=lambda name: gaps[name])
    gap = gaps[attack]
    found["batch_statistics"] = {
      "rule": "accuracy with batch statistics minus accuracy with running"
      f" statistics, largest over the attacks; flag above {noise:.3f}, one"
      " standard error of a difference",
      "value": gap,
      "flag": gap > noise,
      "message": (
        f"Evaluated with batch statistics, as the paper's released code does,"
        f" the {model} would score {abs(100 * gap):.1f} points"
        f" {'more' if gap > 0 else 'less'} under {attack}."
      ),
    }
  steps = _pgd_by_steps(rows)
  if steps and "fgsm" in running:
    most, accuracy = steps[-1]
    gap = accuracy - running["fgsm"]
    found["iterations_beat_one_step"] = {
      "rule": f"accuracy under PGD({most}) minus under FGSM; flag above"
      f" {noise:.3f}: a stronger attack that does less is a sign of masked"
      " gradients",
      "value": gap,
      "flag": gap > noise,
      "message": (
        f"PGD with {most} steps leaves {100 * accuracy:.1f} %, one step"
        f" {100 * running['fgsm']:.1f} %."
      ),
    }
  if len(steps) > 1:
    (few, before), (most, after) = steps[-2:]
    found["steps_converged"] = {
      "rule": f"accuracy under PGD({few}) minus under PGD({most}); flag above"
      " 0.02: the attack had not converged, more steps may lower it further",
      "value": before - after,
      "flag": before - after > CONVERGED,
      "message": (
        f"From {few} to {most} steps the accuracy falls by"
        f" {100 * (before - after):.1f} points."
      ),
    }
  if steps:
    most, accuracy = steps[-1]
    margin = running.get(f"pgd{most}-margin")
    if margin is not None:
      found["margin_loss"] = {
        "rule": f"accuracy under PGD({most}) with cross-entropy minus with the"
        " margin loss; flag above 0.02: cross-entropy alone overstates"
        " robustness",
        "value": accuracy - margin,
        "flag": accuracy - margin > 0.02,
        "message": (
          f"The margin loss leaves {100 * margin:.1f} %, cross-entropy"
          f" {100 * accuracy:.1f} %."
        ),
      }
  return found
