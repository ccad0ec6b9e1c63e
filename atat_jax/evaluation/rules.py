"""Rules that judge from a results table whether robustness is real.

Each rule compares rows of `results.json` and returns a diagnostic, or None if
the rows that it needs are missing. Adding a rule is one function and one line
in `RULES`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from atat_jax import checks
from atat_jax.attacks.diagnostics import Diagnostic, diagnostic
from atat_jax.errors import UserError
from atat_jax.runs import (
  better_attacks,
  comparable,
  tables,
  wording,
  worst_case,
)

Row = Mapping[str, Any]

_NEEDED = ("model", "attack", "batch_norm", "num_examples", "accuracy")

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
    rows: The rows themselves.
  """

  model: str
  running: dict[str, float]
  batch: dict[str, float]
  pgd: list[tuple[int, float]]
  noise: float
  rows: Sequence[Row]


def _accuracies(rows: Sequence[Row], batch_norm: str) -> dict[str, float]:
  return {
    row["attack"]: row["accuracy"]
    for row in rows
    if row["batch_norm"] == batch_norm
  }


def _comparable(rows: Sequence[Row]) -> list[Row]:
  """Selects the attacks on the most images that answer one question.

  A quick test on a few images, or another epsilon or seed, is no evidence for
  or against the others.
  """
  groups = comparable.grouped(
    (row for row in rows if row["attack"] != "nominal"),
    lambda row: (comparable.question(row), row.get("seed")),
    lambda row: row["num_examples"],
  )
  return groups[0] if groups else []


def _evidence(rows: Sequence[Row], model: str) -> Evidence:
  return Evidence(
    model=model,
    running=_accuracies(rows, "running"),
    # Earlier versions ran AutoAttack in batches that it fills up.
    batch=_accuracies(
      [row for row in rows if not row["attack"].startswith("autoattack")],
      "batch",
    ),
    pgd=sorted(
      (row["num_steps"], row["accuracy"])
      for row in rows
      if row["batch_norm"] == "running"
      and row["attack"] == f"pgd{row['num_steps']}"
    ),
    # The standard error is largest for an accuracy of one half; that of a
    # difference is sqrt(2) times as large.
    noise=(0.5 / min(row["num_examples"] for row in rows)) ** 0.5,
    rows=rows,
  )


def _standard_error(one: Row, other: Row, noise: float) -> float:
  """Computes the standard error of a difference of two accuracies.

  McNemar's where it is known which images each leaves: only those on which the
  two differ are of weight.
  """
  if one.get("correct") is None or other.get("correct") is None:
    return noise
  differ = worst_case.unpack(one) != worst_case.unpack(other)
  return float(differ.sum()) ** 0.5 / len(differ)


def published_attack(evidence: Evidence) -> Diagnostic | None:
  """Compares published attacks on batch statistics with better ones."""
  found = []
  for row in evidence.rows:
    better = better_attacks.find(row, evidence.rows)
    if better:
      best = min(better, key=lambda one: one["accuracy"])
      gap = row["accuracy"] - best["accuracy"]
      error = _standard_error(row, best, evidence.noise)
      # One that is not a number is the worst.
      found.append(((math.isnan(gap), gap - error), gap, error, row, better))
  if not found:
    return None
  _, gap, error, row, better = max(found, key=lambda one: one[0])
  others = wording.listed(
    [
      f"{wording.percent(one['accuracy'])} under {one['attack']}"
      for one in better
    ]
  )
  message = (
    f"With batch statistics the {evidence.model} keeps"
    f" {wording.percent(row['accuracy'])} under {row['attack']} as published,"
    " whose cross-entropy gradients pass through the statistics; the same"
    f" classifier keeps {others}."
  )
  if len(better) == 1:
    fixed = better[0]["loss"] == "cross_entropy"
    missing = "the margin loss" if fixed else "the statistics held fixed"
    message += f" The same with {missing} was not run."
  running = evidence.running.get(row["attack"])
  if running is not None:
    message += (
      f" With running statistics, another classifier, {row['attack']} leaves"
      f" {wording.percent(running)}."
    )
  return diagnostic(
    not gap <= error + 1e-9,  # one image against one is a tie
    flagged=("The published attack overstates robustness", message),
    passed=("The published attack holds up", message),
    rule="accuracy with batch statistics under an attack as published minus"
    " under the better of the same with the statistics held fixed and with the"
    f" margin loss; flag above {error:.3f}, one standard error of the"
    " difference; the attack of the largest excess is told",
    value=gap,
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
  # One that is not a number is the worst.
  attack = max(gaps, key=lambda name: (math.isnan(gaps[name]), gaps[name]))
  gap = gaps[attack]
  message = (
    f"Under {attack} the {evidence.model} classifies"
    f" {wording.percent(evidence.batch[attack])} correctly with batch"
    " statistics, as the paper's released code evaluates, and"
    f" {wording.percent(evidence.running[attack])} with running statistics. The"
    " two are not the same classifier."
  )
  if not any(better_attacks.find(row, evidence.rows) for row in evidence.rows):
    message += (
      " Attacks that hold the statistics fixed, or have the margin loss, were"
      " not compared on the first, which may be less robust than that."
    )
  return diagnostic(
    not gap <= evidence.noise,
    flagged=("Batch statistics give a higher accuracy", message),
    passed=("Batch statistics give no higher accuracy", message),
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
    not accuracy - fgsm <= evidence.noise,
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
    f"From {few} to {most} steps the accuracy falls by {100 * fall:.1f} points."
    if fall >= 0
    else f"From {few} to {most} steps the accuracy does not fall."
  )
  return diagnostic(
    not fall <= CONVERGED,
    flagged=(
      f"PGD had not converged after {wording.plural(few, 'step')}",
      change,
    ),
    passed=(
      f"PGD had converged after {wording.plural(few, 'step')}",
      change,
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
    f"PGD with {wording.plural(most, 'step')} leaves {wording.percent(margin)}"
    f" with the margin loss, {wording.percent(accuracy)} with cross-entropy."
  )
  return diagnostic(
    not accuracy - margin <= 0.02,
    flagged=("Cross-entropy overstates robustness", message),
    passed=("Cross-entropy does not overstate robustness", message),
    rule=f"accuracy under PGD({most}) with cross-entropy minus with the margin"
    " loss; flag above 0.02",
    value=accuracy - margin,
  )


RULES: dict[str, Callable[[Evidence], Diagnostic | None]] = {
  "published_attack": published_attack,
  "batch_statistics": batch_statistics,
  "iterations_beat_one_step": iterations_beat_one_step,
  "steps_converged": steps_converged,
  "margin_loss": margin_loss,
}


def storable(check: Diagnostic) -> Diagnostic:
  """Returns a diagnostic that JSON can hold; one without a number flags.

  Args:
    check: Diagnostic whose number may be NaN or infinite.

  Returns:
    The diagnostic itself, or one with None for its number, flagged.
  """
  if check["value"] is None or math.isfinite(check["value"]):
    return check
  message = f"{check['message']} The number that this judges is not finite."
  told = {**check, "value": None, "flag": True, "message": message}
  return cast(Diagnostic, told)


def nonfinite(rows: Sequence[Row]) -> Diagnostic | None:
  """Checks whether any number of a model's rows was not finite.

  Args:
    rows: All rows of a model; those of earlier versions have no counts.

  Returns:
    The diagnostic; None if no row has counts.
  """
  counted = [row for row in rows if "nonfinite" in row]
  if not counted:
    return None
  found = {
    f"{row['attack']} with {row['batch_norm']} statistics": text
    for row in counted
    if (text := tables.nonfinite(dict(row)))
  }
  parts = "; ".join(f"{name}: {text}" for name, text in found.items())
  return diagnostic(
    bool(found),
    flagged=(
      "Numbers were not finite",
      f"{parts}. Such an image counts as not classified correctly, and where"
      " gradients or losses are not finite an attack is blind: the numbers say"
      " little of robustness.",
    ),
    passed=(
      "All numbers were finite",
      "All logits and gradients of the evaluation were finite.",
    ),
    rule="flag if the logits of an image were not finite when it was scored, or"
    " logits, losses or gradients within an attack; value: the largest number of"
    " such images",
    value=max(row["nonfinite"] for row in counted),
  )


def diagnose(rows: Sequence[Row], model: str) -> dict[str, Diagnostic]:
  """Applies the rules for which the rows have the numbers.

  Args:
    rows: Rows of `results.json`.
    model: Name of the model to judge, e.g. "student".

  Returns:
    Name of the rule to its diagnostic; those that attacks made themselves come
    first, as `<attack>_<check>`. Of two attacks of one name a flag counts.

  Raises:
    UserError: Rows that lack what the rules compare.
  """
  checks.instance("model", model, str, "the name of a model")
  for row in checks.sequence("rows", rows, "rows", empty=True):
    checks.instance("rows", row, Mapping, "rows of results.json")
    if lacking := [field for field in _NEEDED if field not in row]:
      raise UserError(
        f"rows: one has no {', '.join(lacking)}; allowed: rows of results.json"
      )
  rows = [
    row
    for row in rows
    if row["model"] == model and not tables.is_derived(dict(row))
  ]
  found = _of_attacks(rows)
  alike = _comparable(rows)
  if alike:
    evidence = _evidence(alike, model)
    results = {name: rule(evidence) for name, rule in RULES.items()}
    found |= {name: one for name, one in results.items() if one is not None}
  bad = nonfinite(rows)
  if bad is not None:
    found["nonfinite"] = bad
  return {name: storable(check) for name, check in found.items()}


def _of_attacks(rows: Sequence[Row]) -> dict[str, Diagnostic]:
  """Returns the checks of the attacks themselves, running statistics only."""
  found: dict[str, Diagnostic] = {}
  for row in rows:
    if row["batch_norm"] != "running":
      continue
    for name, check in row.get("diagnostics", {}).items():
      # Many attacks share a loss: it is told once.
      shared = name == "blind_loss"
      key = f"{row['loss'] if shared else row['attack']}_{name}"
      if key not in found or check["flag"]:
        found[key] = cast(Diagnostic, dict(check))
  return found
