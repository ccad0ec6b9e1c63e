"""Results laid out for a terminal."""

from typing import Any

from atat_jax.runs import comparable, corrupted, results_format, tables


def results_table(results: dict[str, Any]) -> str:
  """Lays out the results for a terminal, as a valid Markdown table.

  Args:
    results: Content of `results.json`.

  Returns:
    Table with a line for each model and BatchNorm mode, a column for each
    attack, accuracies in percent; under it the protocol of each column, and a
    table of the means on corrupted images, where there are any.

  Raises:
    UserError: Something else than such content.
  """
  results_format.check(results)
  rows = results["rows"]
  columns = tables.in_paper_order(tables.columns(rows))
  lines = [["accuracy (%)", *(column.label for column in columns)]]
  for model, batch_norm in tables.series(rows):
    numbers = [
      percent(column.accuracy(model, batch_norm)) for column in columns
    ]
    lines.append([f"{model}, {tables.BATCH_NORM_NAMES[batch_norm]}", *numbers])
  text = [tables.markdown(lines, "l" + "r" * len(columns)), ""]
  notes = [f"{c.label}: {tables.protocol(c)}" for c in columns]
  notes += filter(None, [comparable.note(columns), _nonfinite(rows)])
  text += map(tables.escaped, notes)
  if any(batch_norm == "batch" for _, batch_norm in tables.series(rows)):
    text.append(f"batch statistics: {tables.BATCH_WARNING}")
  if results.get("corruptions"):
    text += ["", corrupted.markdown(rows, results["corruptions"])]
  return "\n".join(text)


def _nonfinite(rows: list[tables.Row]) -> str:
  """Says in which rows something was not finite; "" if in none."""
  parts = [
    f"{row['model']} ({row['batch_norm']}), {row['attack']}: {found}"
    for row in rows
    if (found := tables.nonfinite(row))
  ]
  if not parts:
    return ""
  return (
    f"not finite: {'; '.join(parts)}. Such an image counts as not classified"
    " correctly, and an attack is blind there."
  )


def percent(accuracy: float | None) -> str:
  """Writes an accuracy in percent; a dash for none.

  Args:
    accuracy: Share in [0, 1].
  """
  return "–" if accuracy is None else f"{100 * accuracy:.2f}"
