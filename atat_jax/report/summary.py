"""Verdict on a run: its numbers in a few sentences."""

from typing import Any

from atat_jax.runs import intervals, roles, tables, wording


def attacked(columns: list[tables.Column], model: str) -> list[tables.Column]:
  """Returns the attacks on a model with running statistics."""
  return [
    column
    for column in columns
    if not column.nominal and (model, "running") in column.rows
  ]


def verdict(results: dict[str, Any]) -> str:
  """Says in plain words how robust a run's network is.

  The strongest attack is the one that, with running statistics, leaves the
  student the least accuracy (the teacher, if there is no student).

  Args:
    results: Content of `results.json`.

  Returns:
    One paragraph of plain text.
  """
  columns = tables.columns(results["rows"])
  model = tables.trained(results["rows"])
  attacks = attacked(columns, model)
  if not attacks:
    return (
      "No attack was evaluated with BatchNorm's running statistics, so these "
      "results do not say how robust the classifier is."
    )
  sentences = [
    _robust_accuracy(attacks, model),
    _clean_accuracy(columns, model),
    _batch_statistics(attacks, model),
    _flags(results.get("diagnostics", {})),
    "An attack only bounds robustness from above: a stronger one may fool the "
    "network on more images.",
  ]
  return " ".join(filter(None, sentences))


def _robust_accuracy(attacks: list[tables.Column], model: str) -> str:
  strongest = tables.strongest(attacks, model)
  row = strongest.rows[model, "running"]
  rank = (
    f"the strongest of the {len(attacks)} attacks run"
    if len(attacks) > 1
    else "the only attack run"
  )
  low, high = intervals.proportion(row["accuracy"], row["num_examples"])
  sentence = (
    f"Under {strongest.label}, {rank} ({row['norm']}, epsilon "
    f"{wording.pixels(row['epsilon'])}), the {model} classifies "
    f"{wording.percent(row['accuracy'])} of {row['num_examples']:,} "
    f"{row['dataset']} {row['split']} images correctly (95% confidence: "
    f"{wording.percent(low)} to {wording.percent(high)})"
  )
  teacher = strongest.accuracy(roles.TEACHER, "running")
  if model == roles.TEACHER or teacher is None:
    return f"{sentence}."
  return (
    f"{sentence}, {_compared(row['accuracy'], teacher)} the teacher "
    f"({wording.percent(teacher)})."
  )


def _clean_accuracy(columns: list[tables.Column], model: str) -> str:
  for column in columns:
    accuracy = column.accuracy(model, "running")
    if not column.nominal or accuracy is None:
      continue
    sentence = (
      f"The {model} classifies {wording.percent(accuracy)} of the clean images"
      " correctly"
    )
    teacher = column.accuracy(roles.TEACHER, "running")
    if model == roles.TEACHER or teacher is None:
      return f"{sentence}."
    return f"{sentence}, the teacher {wording.percent(teacher)}."
  return ""


def _batch_statistics(attacks: list[tables.Column], model: str) -> str:
  both = [column for column in attacks if (model, "batch") in column.rows]
  if not both:
    return ""
  strongest = tables.strongest(both, model)
  honest = strongest.rows[model, "running"]["accuracy"]
  claimed = strongest.rows[model, "batch"]["accuracy"]
  return (
    "With the statistics of the batch being evaluated, which is how the "
    f"paper's released code evaluates, the {model} would be credited with "
    f"{wording.percent(claimed)} under {strongest.label}, "
    f"{_compared(claimed, honest)} the {wording.percent(honest)} of the fixed "
    "classifier that one would deploy."
  )


def _flags(diagnostics: dict[str, Any]) -> str:
  flags = sum(bool(check["flag"]) for check in diagnostics.values())
  if not flags:
    return ""
  return (
    f"{flags} of the {len(diagnostics)} diagnostics below "
    f"{'raises' if flags == 1 else 'raise'} a flag: read them before trusting "
    "these numbers."
  )


def _compared(a: float, b: float) -> str:
  """Compares accuracy a with accuracy b; the name of b follows."""
  points = round(100 * (a - b), 1)
  if points == 0:
    return "as much as"
  return f"{abs(points):.1f} points {'more' if points > 0 else 'less'} than"
