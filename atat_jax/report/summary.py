"""Verdict on a run: its numbers in a few sentences."""

from typing import Any

from atat_jax.runs import (
  better_attacks,
  comparable,
  intervals,
  results_format,
  roles,
  tables,
  wording,
)


def verdict(results: dict[str, Any]) -> str:
  """Says in plain words how robust a run's network is.

  The strongest attack is the one that, with running statistics, leaves the
  student the least accuracy (the teacher, if there is no student), among those
  run on the same images in the same ball; the worst case is over all of these,
  image by image. What is not comparable is told apart.

  Args:
    results: Content of `results.json`.

  Returns:
    One paragraph of plain text.

  Raises:
    UserError: Something else than such content.
  """
  return " ".join(sentences(results))


def headline(results: dict[str, Any]) -> str:
  """Says the result in one sentence, with its protocol.

  Args:
    results: Content of `results.json`.

  Returns:
    The accuracy that is left of all attacks, or of the strongest where it is
    not known which images each fools; "" without attacks on a fixed classifier.

  Raises:
    UserError: Something else than such content.
  """
  results_format.check(results)
  columns = tables.columns(results["rows"])
  model = tables.trained(results["rows"])
  groups = comparable.attacks(columns, model)
  if not groups:
    return ""
  found = groups[0]
  column, attacks = found.strongest, found.strongest.label
  if found.worst_case is not None:
    column = found.worst_case
    count = len(tables.attack_members(column.rows[model, "running"]))
    attacks = f"each of {count} attacks"
  row = column.rows[model, "running"]
  text = (
    f"The {model} withstands {attacks} on {wording.percent(row['accuracy'])} of"
    f" {row['num_examples']:,} {row['dataset']} {row['split']} images"
    f" ({row['norm']}, epsilon {tables.exact_pixels(row['epsilon'])})"
  )
  clean = comparable.clean(columns, model, found.question)
  if clean is None:
    return f"{text}."
  accuracy = clean.rows[model, "running"]["accuracy"]
  return f"{text}; without attack it is right on {wording.percent(accuracy)}."


def sentences(results: dict[str, Any]) -> list[str]:
  """Says the parts of the verdict, each in one sentence or two.

  Args:
    results: Content of `results.json`.

  Returns:
    The parts in order.

  Raises:
    UserError: Something else than such content.
  """
  results_format.check(results)
  columns = tables.columns(results["rows"])
  model = tables.trained(results["rows"])
  groups = comparable.attacks(columns, model)
  if not groups:
    return [
      "No attack was evaluated with BatchNorm's running statistics, so these "
      "results do not say how robust the classifier is."
    ]
  parts = [
    _robust_accuracy(groups[0], model, alone=len(groups) == 1),
    _worst_case(groups[0], model),
    _clean_accuracy(columns, model, groups[0].question),
    _left_out(groups[1:], model),
    _batch_statistics(columns, model, groups[0].question),
    _nonfinite(results["rows"]),
    _flags(results.get("diagnostics", {})),
    _limit(groups[0]),
  ]
  return [part for part in parts if part]


def _limit(found: comparable.Attacks) -> str:
  """Says what no list of attacks shows, and whether AutoAttack is in this one."""
  text = (
    "An attack only bounds robustness from above: a stronger one may fool the"
    " network on more images."
  )
  if any(column.label.startswith("autoattack") for column in found.columns):
    return text
  return (
    f"{text} AutoAttack was not run on these images; it usually leaves less"
    " than PGD."
  )


def _robust_accuracy(
  found: comparable.Attacks, model: str, *, alone: bool
) -> str:
  row = found.strongest.rows[model, "running"]
  count = len(found.columns)
  where = "" if alone else " on these images in this ball"
  rank = (
    f"the strongest of the {count} attacks run{where}"
    if count > 1
    else f"the only attack run{where}"
  )
  sentence = (
    f"Under {found.strongest.label}, {rank} ({row['norm']}, epsilon "
    f"{tables.exact_pixels(row['epsilon'])}), the {model} classifies "
    f"{wording.percent(row['accuracy'])} of {row['num_examples']:,} "
    f"{row['dataset']} {row['split']} images correctly {_confidence(row)}"
  )
  teacher = found.strongest.accuracy(roles.TEACHER, "running")
  if model == roles.TEACHER or teacher is None:
    return f"{sentence}."
  return (
    f"{sentence}, {_compared(row['accuracy'], teacher)} the teacher "
    f"({wording.percent(teacher)})."
  )


def _confidence(row: tables.Row) -> str:
  low, high = intervals.proportion(row["accuracy"], row["num_examples"])
  return f"(95% confidence: {wording.percent(low)} to {wording.percent(high)})"


def _worst_case(found: comparable.Attacks, model: str) -> str:
  """Says what withstands all attacks, "" where that is not known."""
  if found.worst_case is None:
    return ""
  row = found.worst_case.rows[model, "running"]
  count, total = len(tables.attack_members(row)), len(found.columns)
  attacks = f"all {count} attacks"
  if count < total:
    attacks = (
      f"{count} of the {total} attacks (of the others it is not known which"
      " images they fool)"
    )
  single = found.strongest.rows[model, "running"]["accuracy"]
  sentence = (
    f"In the worst case over {attacks}, image by image, the {model} classifies"
    f" {wording.percent(row['accuracy'])} correctly {_confidence(row)},"
    f" {_compared(row['accuracy'], single)} under {found.strongest.label} alone"
  )
  teacher = found.worst_case.accuracy(roles.TEACHER, "running")
  if model == roles.TEACHER or teacher is None:
    return f"{sentence}."
  return f"{sentence}, the teacher {wording.percent(teacher)}."


def _clean_accuracy(
  columns: list[tables.Column], model: str, asked: comparable.Question
) -> str:
  """Says the clean accuracy of the same images; else of the most, and which."""
  column = comparable.clean(columns, model, asked)
  images = "the clean images"
  if column is None:
    column = comparable.clean(columns, model)
    if column is None:
      return ""
    count = column.rows[model, "running"]["num_examples"]
    images = f"{count:,} clean images, which are not the same,"
  accuracy = column.rows[model, "running"]["accuracy"]
  sentence = (
    f"The {model} classifies {wording.percent(accuracy)} of {images} correctly"
  )
  teacher = column.accuracy(roles.TEACHER, "running")
  if model == roles.TEACHER or teacher is None:
    return f"{sentence}."
  return f"{sentence}, the teacher {wording.percent(teacher)}."


def _left_out(groups: list[comparable.Attacks], model: str) -> str:
  found = []
  for group in groups:
    row, count = group.strongest.rows[model, "running"], len(group.columns)
    name = group.strongest.label
    if count > 1:
      name += f", the strongest of {count},"
    found.append((group.question, name, wording.percent(row["accuracy"])))
  return comparable.left_out(found, f" the {model}")


def _batch_statistics(
  columns: list[tables.Column], model: str, asked: comparable.Question
) -> str:
  """Says what the released protocol claims, and what is left of it."""
  both = [column for column in columns if (model, "batch") in column.rows]
  rows = [column.rows[model, "batch"] for column in both]
  # The claim is the published attack's, if possible one beside better ones.
  published = [
    column
    for column, row in zip(both, rows, strict=True)
    if better_attacks.is_published(row)
  ]
  judged = [
    column
    for column, row in zip(both, rows, strict=True)
    if better_attacks.find(row, rows)
  ]
  groups = comparable.attacks(judged or published or both, model)
  if not groups:
    return ""
  # The images of the verdict, if batch statistics were evaluated on them.
  found = next((g for g in groups if g.question == asked), groups[0])
  where = "" if found.question == asked else f" on {found.question.describe()}"
  attack = found.strongest.label
  row = found.strongest.rows[model, "batch"]
  honest = found.strongest.rows[model, "running"]["accuracy"]
  return (
    "With the statistics of the batch being evaluated, which is how the"
    f" paper's released code evaluates, the {model} would be credited with"
    f" {wording.percent(row['accuracy'])} under {attack}{where},"
    f" {_compared(row['accuracy'], honest)} the {wording.percent(honest)} of the"
    f" fixed classifier that one would deploy. {_better(row, rows)}"
  )


def _better(row: tables.Row, rows: list[tables.Row]) -> str:
  """Says what better attacks leave of a classifier with batch statistics."""
  better = better_attacks.find(row, rows)
  if not better:
    return (
      "Attacks that hold those statistics fixed, or have the margin loss, were"
      " not compared with it."
    )
  best = min(better, key=lambda one: one["accuracy"])
  return (
    f"{best['attack']} leaves the same classifier"
    f" {wording.percent(best['accuracy'])},"
    f" {_compared(best['accuracy'], row['accuracy'])} {row['attack']}."
  )


def _nonfinite(rows: list[tables.Row]) -> str:
  """Says how many rows met numbers that are not finite; "" if none did."""
  count = sum(bool(tables.nonfinite(row)) for row in rows)
  if not count:
    return ""
  return (
    f"{wording.plural(count, 'number')} of the table met logits or gradients"
    " that are not finite; such an image counts as not classified correctly,"
    " and an attack is blind there."
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
