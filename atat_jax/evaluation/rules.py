"""Rules that judge from a results table whether robustness is real.

Each rule compares rows of `results.json` and returns a diagnostic, or None if
the rows that it needs are missing. Adding a rule is one function and one line
in `RULES`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from atat_jax.attacks.diagnostics import Diagnostic, diagnostic
from atat_jax.runs import wording

Row = Mapping[str, Any]

CONVERGED = 0.02
"""Largest fall in accuracy under more steps of an attack that has converged."""


class Evidence(NamedTuple):
  """Comparable rows of one model.

  Attributes:
    model: Name of the model.
    running: Attack to accuracy, with running statistics.
    batch: Attack to accuracy, with batch statistics.
    pgd: Plain PGD with running statistics, as (steps, accuracy), fewest first.
    noise: One standard error of a difference of two accuracies.
  """

  model: str
  running: dict[str, float]
  batch: dict[str, float]
  pgd: list[tuple[int, float]]
  noise: float


def _accuracies(rows: Sequence[Row], batch_norm: str) -> dict[str, float]:
  return {
    row["attack"]: row["accuracy"]
    for row in rows
    if row["batch_norm"] == batch_norm
  }


def _comparable(rows: Sequence[Row], model: str) -> list[Row]:
  """Selects a model's rows on the most images, at the first epsilon.

  A quick test on a few images, or another epsilon or seed, is no evidence for
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


def _evidence(rows: Sequence[Row], model: str) -> Evidence:
  return Evidence(
    model=model,
    running=_accuracies(rows, "running"),
    batch=_accuracies(rows, "batch"),
    pgd=sorted(
      (row["num_steps"], row["accuracy"])
      for row in rows
      if row["batch_norm"] == "running"
      and row["attack"] == f"pgd{row['num_steps']}"
    ),
    # The standard error is largest for an accuracy of one half; that of a
    # difference is sqrt(2) times as large.
    noise=(0.5 / min(row["num_examples"] for row in rows)) ** 0.5,
  )


def batch_statistics(evidence: Evidence) -> Diagnostic | None:
  """Compares accuracies with batch statistics and with running statistics."""
  gaps = {
    attack: evidence.batch[attack] - accuracy
    for attack, accuracy in evidence.running.items()
    if attack in evidence.batch
  }
  if not gaps:
    return None
  attack = max(gaps, key=lambda name: gaps[name])
  gap = gaps[attack]
  message = (
    "Evaluated with batch statistics, as the paper's released code does, the"
    f" {evidence.model} would score {abs(100 * gap):.1f} points"
    f" {'more' if gap > 0 else 'less'} under {attack}."
  )
  return diagnostic(
    gap > evidence.noise,
    flagged=("Batch statistics overstate robustness", message),
    passed=("Batch statistics do not overstate robustness", message),
    rule="accuracy with batch statistics minus accuracy with running"
    f" statistics, largest over the attacks; flag above {evidence.noise:.3f},"
    " one standard error of a difference",
    value=gap,
  )


def iterations_beat_one_step(evidence: Evidence) -> Diagnostic | None:
  """Compares PGD with its first step, FGSM."""
  if not evidence.pgd or "fgsm" not in evidence.running:
    return None
  most, accuracy = evidence.pgd[-1]
  fgsm = evidence.running["fgsm"]
  message = (
    f"PGD with {wording.plural(most, 'step')} leaves"
    f" {wording.percent(accuracy)}, FGSM with one step {wording.percent(fgsm)}."
  )
  return diagnostic(
    accuracy - fgsm > evidence.noise,
    flagged=("PGD was weaker than FGSM", message),
    passed=("PGD was no weaker than FGSM", message),
    rule=f"accuracy under PGD({most}) minus under FGSM; flag above"
    f" {evidence.noise:.3f}: a stronger attack that does less is a sign of"
    " masked gradients",
    value=accuracy - fgsm,
  )


def steps_converged(evidence: Evidence) -> Diagnostic | None:
  """Compares PGD with the most steps and with the next fewer."""
  if len(evidence.pgd) < 2:
    return None
  (few, before), (most, after) = evidence.pgd[-2:]
  fall = before - after
  change = (
    f"from {few} to {most} steps the accuracy falls by {100 * fall:.1f} points"
    if fall >= 0
    else f"from {few} to {most} steps the accuracy does not fall"
  )
  return diagnostic(
    fall > CONVERGED,
    flagged=(
      f"PGD had not converged after {wording.plural(few, 'step')}",
      f"PGD had not converged after {wording.plural(few, 'step')}: {change}.",
    ),
    passed=(
      f"PGD had converged after {wording.plural(few, 'step')}",
      f"PGD had converged after {wording.plural(few, 'step')}: {change}.",
    ),
    rule=f"accuracy under PGD({few}) minus under PGD({most}); flag above 0.02",
    value=fall,
  )


def margin_loss(evidence: Evidence) -> Diagnostic | None:
  """Compares PGD on the cross-entropy and on the margin loss."""
  if not evidence.pgd:
    return None
  most, accuracy = evidence.pgd[-1]
  margin = evidence.running.get(f"pgd{most}-margin")
  if margin is None:
    return None
  message = (
    f"PGD with the margin loss leaves {wording.percent(margin)}, with"
    f" cross-entropy {wording.percent(accuracy)}."
  )
  return diagnostic(
    accuracy - margin > 0.02,
    flagged=("Cross-entropy overstates robustness", message),
    passed=("Cross-entropy does not overstate robustness", message),
    rule=f"accuracy under PGD({most}) with cross-entropy minus with the margin"
    " loss; flag above 0.02",
    value=accuracy - margin,
  )


RULES: dict[str, Callable[[Evidence], Diagnostic | None]] = {
  "batch_statistics": batch_statistics,
  "iterations_beat_one_step": iterations_beat_one_step,
  "steps_converged": steps_converged,
  "margin_loss": margin_loss,
}


def diagnose(rows: Sequence[Row], model: str) -> dict[str, Diagnostic]:
  """Applies the rules for which the rows have the numbers.

  Args:
    rows: Rows of `results.json`.
    model: Name of the model to judge, e.g. "student".

  Returns:
    Name of the rule to its diagnostic; those of AutoAttack come first, as
    `<attack>_<check>`.
  """
  rows = _comparable(rows, model)
  if not rows:
    return {}
  found: dict[str, Diagnostic] = {
    f"{row['attack']}_{name}": cast(Diagnostic, dict(check))
    for row in rows
    if row["batch_norm"] == "running"
    for name, check in row.get("diagnostics", {}).items()
  }
  evidence = _evidence(rows, model)
  for name, rule in RULES.items():
    result = rule(evidence)
    if result is not None:
      found[name] = result
  return found
