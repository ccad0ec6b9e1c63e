"""Tables of a comparison, and the verdict on it."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from atat_jax.report.merge import FIELDS
from atat_jax.runs import comparable, intervals, wording
from atat_jax.runs import tables as rows_lib


class Cell(NamedTuple):
  """Cell of a table.

  Attributes:
    text: Number or name.
    notes: Remarks on it, for small print.
    error: Its standard error, "± 0.50", or "".
  """

  text: str
  notes: tuple[str, ...] = ()
  error: str = ""

  @property
  def small_print(self) -> tuple[str, ...]:
    """Standard error and notes, for a page."""
    return (self.error, *self.notes) if self.error else self.notes


@dataclasses.dataclass(frozen=True)
class Table:
  """Table with a heading and notes.

  Attributes:
    heading: Heading of the table.
    kind: "running", "batch", or "" where neither applies.
    head: Names of the columns.
    rows: Rows of cells; the first cell of each names the row.
    notes: Sentences that a reader of the table needs.
  """

  heading: str
  kind: str
  head: list[str]
  rows: list[list[Cell]]
  notes: list[str]


def percent(mean: float | None, error: float | None = None) -> str:
  """Writes an accuracy in [0, 1] as percent, with its standard error."""
  if mean is None:
    return "–"
  return f"{100 * mean:.2f} {_plus_minus(error)}".rstrip()


def _plus_minus(error: float | None) -> str:
  return "" if error is None else f"± {100 * error:.2f}"


def points(difference: dict[str, Any]) -> str:
  """Writes a difference of accuracies in points, with its standard error."""
  # + 0.0 turns a negative zero into a positive one.
  text = f"{round(100 * difference['accuracy'], 1) + 0.0:+.1f}"
  error = difference["standard_error"]
  return text if error is None else f"{text} ± {100 * error:.1f}"


def datasets(comparison: dict[str, Any]) -> list[str]:
  """Lists the data sets in order of appearance."""
  return list(dict.fromkeys(row["dataset"] for row in comparison["rows"]))


def columns(
  comparison: dict[str, Any], dataset: str, batch_norm: str
) -> list[rows_lib.Column]:
  """Groups the rows of one data set and mode by attack, the paper's first."""
  rows = [
    row
    for row in comparison["rows"]
    if (row["dataset"], row["batch_norm"]) == (dataset, batch_norm)
  ]
  return rows_lib.in_paper_order(rows_lib.columns(rows, FIELDS))


def tables(comparison: dict[str, Any]) -> list[Table]:
  """Makes the tables of accuracies, one a data set and BatchNorm mode."""
  return [
    _accuracies(comparison, dataset, batch_norm)
    for dataset in datasets(comparison)
    for batch_norm in rows_lib.BATCH_NORMS
    if columns(comparison, dataset, batch_norm)
  ]


def _labels(comparison: dict[str, Any], dataset: str) -> dict[str, int]:
  """Returns the methods of a data set with their numbers of runs."""
  evaluated = {
    row["model"] for row in comparison["rows"] if row["dataset"] == dataset
  }
  labels = [run["label"] for run in comparison["runs"]]
  return {
    label: labels.count(label)
    for label in dict.fromkeys(labels)
    if label in evaluated
  }


def _accuracies(
  comparison: dict[str, Any], dataset: str, batch_norm: str
) -> Table:
  found = columns(comparison, dataset, batch_norm)
  rows = []
  for label, num_runs in _labels(comparison, dataset).items():
    cells = [Cell(label, (wording.plural(num_runs, "run"),))]
    cells += [
      _accuracy(column.rows.get((label, batch_norm)), num_runs)
      for column in found
    ]
    rows.append(cells)
  return Table(
    heading=f"{dataset}. {rows_lib.BATCH_NORM_HEADINGS[batch_norm]}",
    kind=batch_norm,
    head=["accuracy (%)", *(column.label for column in found)],
    rows=rows,
    notes=[
      *_legend(comparison, found),
      *(f"{c.label}: {rows_lib.protocol(c)}." for c in found),
    ],
  )


def _legend(
  comparison: dict[str, Any], found: list[rows_lib.Column]
) -> list[str]:
  """Explains the small print of a table of accuracies."""
  shown = [row for column in found for row in column.rows.values()]
  notes = []
  if any(row["standard_error"] is not None for row in shown):
    notes.append(
      "±: standard error of the mean over training seeds (sample standard"
      " deviation / √n). All seeds are scored on the same images, so it does not"
      " tell how well these stand for others."
    )
  if any(row["standard_error"] is None for row in shown):
    notes.append(
      "a–b: Wilson's 95% interval over the images, for a method with one run"
      " or with runs that all agree. It does not tell how much another training"
      " seed would change."
    )
  if any("difference" in row for row in shown):
    notes.append(
      "+/−: percentage points by which batch statistics differ from running"
      " statistics, mean and standard error of the differences of each seed."
    )
  if any(row["published"] is not None for row in shown):
    notes.append(f"paper: {comparison['source']}")
  return notes


def _accuracy(row: rows_lib.Row | None, num_runs: int) -> Cell:
  if row is None:
    return Cell("–")
  notes = []
  if row["num_runs"] < num_runs:
    notes.append(f"n = {row['num_runs']}")
  if row["standard_error"] is None:
    low, high = intervals.proportion(row["accuracy"], row["num_examples"])
    notes.append(f"{100 * low:.1f}–{100 * high:.1f}")
  if "difference" in row:
    notes.append(points(row["difference"]))
  if row["published"] is not None:
    notes.append(f"paper {percent(row['published'])}")
  if found := rows_lib.nonfinite(row):
    notes.append(found)
  return Cell(
    percent(row["accuracy"]), tuple(notes), _plus_minus(row["standard_error"])
  )


def costs(comparison: dict[str, Any]) -> Table | None:
  """Makes the table of step times; None if no run has measured them."""
  if not comparison["costs"]:
    return None
  rows = [
    [
      Cell(cost["label"]),
      Cell(str(cost["num_runs"])),
      Cell(_milliseconds(cost["seconds_per_step"], cost["standard_error"])),
      Cell(_ratio(cost["relative_to_at"])),
    ]
    for cost in comparison["costs"]
  ]
  return Table(
    heading="Time of a training step",
    kind="",
    head=["method", "runs", "ms a step", "relative to at"],
    rows=rows,
    notes=[
      "Median over the log intervals of a run, mean over runs; without"
      " compilation, validation and saving. Other work on the machine is in it."
      " Relative times are given on the same devices, network, data set and"
      " batch size only."
    ],
  )


def shifts(comparison: dict[str, Any]) -> Table | None:
  """Makes the table of attention shifts; None if none was measured."""
  found = comparison.get("shifts")
  if not found:
    return None
  rows = [
    [
      Cell(shift["label"], (wording.plural(shift["num_runs"], "run"),)),
      Cell(shift["dataset"]),
      Cell(distance(shift["mean"], shift["standard_error"])),
    ]
    for shift in found
  ]
  protocols = dict.fromkeys(
    f"{shift['protocol']}; {shift['num_examples']:,} images; layer"
    f" {shift['layer']}."
    for shift in found
  )
  return Table(
    heading="Attention shift",
    kind="",
    head=["method", "data", "1 - cosine"],
    rows=rows,
    notes=[
      "Cosine distance of the true class's Grad-CAM map of an attacked image from"
      " that of the clean one: mean over the images, then over runs. 0: the"
      " attention stays in place.",
      *protocols,
    ],
  )


def distance(mean: float, error: float | None) -> str:
  """Writes a distance of maps with its standard error."""
  return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _milliseconds(seconds: float, error: float | None) -> str:
  text = f"{1000 * seconds:.1f}"
  return text if error is None else f"{text} ± {1000 * error:.1f}"


def _ratio(value: float | None) -> str:
  return "–" if value is None else f"{value:.2f}"


def training(comparison: dict[str, Any]) -> Table | None:
  """Makes the table of fields that differ in training; None if none does."""
  fields = comparison["training"]
  if not fields:
    return None
  labels = list(dict.fromkeys(run["label"] for run in comparison["runs"]))
  return Table(
    heading="What differs in training",
    kind="",
    head=["field", *labels],
    rows=[
      [Cell(field), *(Cell(values[label]) for label in labels)]
      for field, values in fields.items()
    ],
    notes=[
      "All other fields of the configurations are the same, but for the seed and"
      " the teacher, which is that of the seed. –: the method has no such field."
    ],
  )


def _fact(field: str, value: object) -> str:
  if value is None:
    return "–"
  if field == "num_parameters":
    return f"{value:,}"
  return str(value)[:10] if field == "date" else str(value)


def runs(comparison: dict[str, Any]) -> Table:
  """Makes the table of runs, the source of every number."""
  fields = {
    "run": "workdir",
    "method": "label",
    "seed": "seed",
    "network": "network",
    "parameters": "num_parameters",
    "step": "checkpoint_step",
    "commit": "commit",
    "date": "date",
  }
  devices = dict.fromkeys(
    tuple(map(str, run["devices"])) for run in comparison["runs"]
  )
  return Table(
    heading="Runs",
    kind="",
    head=list(fields),
    rows=[
      [Cell(_fact(field, run.get(field))) for field in fields.values()]
      for run in comparison["runs"]
    ],
    notes=[
      "step: step of the checkpoint that was evaluated, chosen on validation"
      " images.",
      *(f"Devices: {', '.join(names)}." for names in devices if names),
    ],
  )


def verdict(comparison: dict[str, Any]) -> list[str]:
  """Says which method is the most robust, a sentence for each data set."""
  return [_ranking(comparison, dataset) for dataset in datasets(comparison)]


def _ranking(comparison: dict[str, Any], dataset: str) -> str:
  labels = _labels(comparison, dataset)
  complete = [
    column
    for column in columns(comparison, dataset, "running")
    if all((label, "running") in column.rows for label in labels)
  ]
  groups = comparable.attacks(complete, next(iter(labels), ""))
  if not groups:
    return (
      f"{dataset}: no attack was run on every method with BatchNorm's running"
      " statistics, so there is no ranking."
    )
  first, *others = [_weakest(group) for group in groups]
  asked, strongest, ranked = first
  where = " on these images in this ball" if others else ""
  left_out = comparable.left_out(
    [
      (asked, column.label, f"{wording.percent(rows[0]['accuracy'])} at most")
      for asked, column, rows in others
    ]
  )
  sentence = (
    f"{dataset}, running statistics, {strongest.label} (of the attacks run on"
    f" every method{where} the one that leaves least; {asked.norm}, epsilon"
    f" {rows_lib.exact_pixels(asked.epsilon)}, {asked.num_examples:,} images):"
    f" {_listed(ranked)}. {_worst_case(groups[0])}{left_out}"
  )
  return f"{sentence.rstrip()} An attack only bounds robustness from above."


def _weakest(
  found: comparable.Attacks,
) -> tuple[comparable.Question, rows_lib.Column, list[rows_lib.Row]]:
  """Returns the attack that leaves least of all methods, the best one first."""
  strongest = min(
    found.columns,
    key=lambda c: sum(row["accuracy"] for row in c.rows.values()),
  )
  return found.question, strongest, _best_first(strongest)


def _best_first(column: rows_lib.Column) -> list[rows_lib.Row]:
  return sorted(column.rows.values(), key=lambda row: -row["accuracy"])


def _listed(rows: Iterable[rows_lib.Row]) -> str:
  """Lists methods with their accuracies."""
  return ", ".join(
    f"{row['model']} {percent(row['accuracy'], row['standard_error'])} %"
    for row in rows
  )


def _worst_case(found: comparable.Attacks) -> str:
  """Says what withstands the attacks of a group, "" where it is not known."""
  if found.worst_case is None:
    return ""
  attacks = rows_lib.attack_members(found.worst_case.protocol)
  return (
    f"In the worst case over {len(attacks)} attacks, image by image:"
    f" {_listed(_best_first(found.worst_case))}. "
  )


def other_tables(comparison: dict[str, Any]) -> list[Table]:
  """Makes the tables beside the accuracies: training, costs, runs."""
  others = (
    training(comparison),
    costs(comparison),
    shifts(comparison),
    runs(comparison),
  )
  return [found for found in others if found]


def _plain(cell: Cell) -> str:
  notes = [f"[{note}]" for note in cell.notes]
  return " ".join(filter(None, [cell.text, cell.error, *notes]))


def table_as_markdown(found: Table) -> str:
  """Lays out a table as Markdown, without heading and notes."""
  lines = [found.head, *([_plain(cell) for cell in row] for row in found.rows)]
  return rows_lib.markdown(lines)
