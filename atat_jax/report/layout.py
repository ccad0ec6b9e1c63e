"""A comparison as tables, and the tables as Markdown and as HTML."""

import dataclasses
from typing import Any, NamedTuple

from atat_jax.report import page
from atat_jax.report.merge import FIELDS
from atat_jax.runs import tables as rows_lib
from atat_jax.runs import wording

_HEADINGS = {
  "running": "Running statistics: one fixed classifier",
  "batch": f"Batch statistics: {rows_lib.BATCH_WARNING}",
}


class Cell(NamedTuple):
  """A number, and what is said of it in small print."""

  text: str
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells under a heading.

  Attributes:
    heading: Of the table.
    kind: "running", "batch", or "" where neither applies.
    head: Names of the columns.
    rows: The first cell of each names it.
    notes: What must be known to read it, a sentence or more each.
  """

  heading: str
  kind: str
  head: list[str]
  rows: list[list[Cell]]
  notes: list[str]


def percent(mean: float | None, error: float | None = None) -> str:
  """An accuracy in [0, 1] as percent, with its standard error if it has one."""
  if mean is None:
    return "–"
  text = f"{100 * mean:.2f}"
  return text if error is None else f"{text} ± {100 * error:.2f}"


def points(difference: dict[str, Any]) -> str:
  """A difference of accuracies in percentage points, with its error."""
  # + 0.0: no minus before a zero.
  text = f"{round(100 * difference['accuracy'], 1) + 0.0:+.1f}"
  error = difference["standard_error"]
  return text if error is None else f"{text} ± {100 * error:.1f}"


def datasets(comparison: dict[str, Any]) -> list[str]:
  """The data sets, in order of appearance."""
  return list(dict.fromkeys(row["dataset"] for row in comparison["rows"]))


def columns(
  comparison: dict[str, Any], dataset: str, batch_norm: str
) -> list[rows_lib.Column]:
  """The columns of one block, the paper's first."""
  rows = [
    row
    for row in comparison["rows"]
    if (row["dataset"], row["batch_norm"]) == (dataset, batch_norm)
  ]
  return rows_lib.in_paper_order(rows_lib.columns(rows, FIELDS))


def tables(comparison: dict[str, Any]) -> list[Table]:
  """The accuracies: for each data set a table for each BatchNorm mode."""
  return [
    _accuracies(comparison, dataset, batch_norm)
    for dataset in datasets(comparison)
    for batch_norm in rows_lib.BATCH_NORMS
    if columns(comparison, dataset, batch_norm)
  ]


def _labels(comparison: dict[str, Any], dataset: str) -> dict[str, int]:
  """The methods evaluated on a data set, and how many runs each has."""
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
    unit = "run" if num_runs == 1 else "runs"
    cells = [Cell(label, (f"{num_runs} {unit}",))]
    cells += [
      _accuracy(column.rows.get((label, batch_norm)), num_runs)
      for column in found
    ]
    rows.append(cells)
  shown = [row for column in found for row in column.rows.values()]
  notes = []
  if any(row["standard_error"] is not None for row in shown):
    notes.append(
      "±: standard error of the mean over training seeds (sample standard"
      " deviation / √n). All seeds are scored on the same images, so it does not"
      " tell how well these stand for others."
    )
  if any("difference" in row for row in shown):
    notes.append(
      "+/−: percentage points by which batch statistics differ from running"
      " statistics, mean and standard error of the differences of each seed."
    )
  if any(row["published"] is not None for row in shown):
    notes.append(f"paper: {comparison['source']}")
  notes += [f"{column.label}: {rows_lib.protocol(column)}." for column in found]
  return Table(
    heading=f"{dataset}. {_HEADINGS[batch_norm]}",
    kind=batch_norm,
    head=["accuracy (%)", *(column.label for column in found)],
    rows=rows,
    notes=notes,
  )


def _accuracy(row: rows_lib.Row | None, num_runs: int) -> Cell:
  if row is None:
    return Cell("–")
  notes = []
  if row["num_runs"] < num_runs:
    notes.append(f"n = {row['num_runs']}")
  if "difference" in row:
    notes.append(points(row["difference"]))
  if row["published"] is not None:
    notes.append(f"paper {percent(row['published'])}")
  return Cell(percent(row["accuracy"], row["standard_error"]), tuple(notes))


def costs(comparison: dict[str, Any]) -> Table | None:
  """Time of a training step; None where no run has measured it."""
  if not comparison["costs"]:
    return None
  rows = []
  for cost in comparison["costs"]:
    milliseconds = f"{1000 * cost['seconds_per_step']:.1f}"
    if cost["standard_error"] is not None:
      milliseconds += f" ± {1000 * cost['standard_error']:.1f}"
    relative = cost["relative_to_at"]
    rows.append(
      [
        Cell(cost["label"]),
        Cell(str(cost["num_runs"])),
        Cell(milliseconds),
        Cell("–" if relative is None else f"{relative:.2f}"),
      ]
    )
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


def training(comparison: dict[str, Any]) -> Table | None:
  """The fields in which the trainings differ; None where there are none."""
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


def runs(comparison: dict[str, Any]) -> Table:
  """Where every number comes from."""
  return Table(
    heading="Runs",
    kind="",
    head=["run", "method", "seed", "network", "step", "commit", "date"],
    rows=[
      [
        Cell("–" if run[field] is None else str(run[field]))
        for field in (
          "workdir",
          "label",
          "seed",
          "network",
          "checkpoint_step",
          "commit",
          "date",
        )
      ]
      for run in comparison["runs"]
    ],
    notes=[
      "step: of the checkpoint that was evaluated, chosen on validation images.",
      *(
        f"Devices: {', '.join(devices)}."
        for devices in dict.fromkeys(
          tuple(map(str, run["devices"])) for run in comparison["runs"]
        )
        if devices
      ),
    ],
  )


def verdict(comparison: dict[str, Any]) -> list[str]:
  """What the numbers say, a sentence for each data set."""
  sentences = []
  for dataset in datasets(comparison):
    attacked = [
      column
      for column in columns(comparison, dataset, "running")
      if not column.nominal
    ]
    labels = _labels(comparison, dataset)
    complete = [
      column
      for column in attacked
      if all((label, "running") in column.rows for label in labels)
    ]
    if not complete:
      sentences.append(
        f"{dataset}: no attack was run on every method with BatchNorm's running"
        " statistics, so there is no ranking."
      )
      continue

    def total(column: rows_lib.Column) -> float:
      return sum(row["accuracy"] for row in column.rows.values())

    strongest = min(complete, key=total)
    ranked = sorted(strongest.rows.values(), key=lambda row: -row["accuracy"])
    listed = ", ".join(
      f"{row['model']} {percent(row['accuracy'], row['standard_error'])} %"
      for row in ranked
    )
    first = strongest.protocol
    sentences.append(
      f"{dataset}, running statistics, {strongest.label} (of the attacks run on"
      f" every method the one that leaves least; {first['norm']}, epsilon"
      f" {wording.pixels(first['epsilon'])}, {first['num_examples']:,} images):"
      f" {listed}. An attack only bounds robustness from above."
    )
  return sentences


def _all_tables(comparison: dict[str, Any]) -> list[Table]:
  others = (training(comparison), costs(comparison), runs(comparison))
  return [*tables(comparison), *(found for found in others if found)]


def _plain(cell: Cell) -> str:
  return " ".join([cell.text, *(f"[{note}]" for note in cell.notes)])


def table_as_markdown(found: Table) -> str:
  """A table alone: neither heading nor notes."""
  lines = [found.head, *([_plain(cell) for cell in row] for row in found.rows)]
  return rows_lib.markdown(lines)


def as_markdown(comparison: dict[str, Any]) -> str:
  """The whole comparison as Markdown text."""
  parts = ["# Comparison", *verdict(comparison)]
  for found in _all_tables(comparison):
    parts += [
      f"## {found.heading}",
      table_as_markdown(found),
      "\n".join(f"- {note}" for note in found.notes),
    ]
  if comparison["missing"]:
    parts += [
      "## Missing",
      "\n".join(f"- {sentence}" for sentence in comparison["missing"]),
    ]
  return "\n\n".join(filter(None, parts)) + "\n"


def _html_cell(tag: str, cell: Cell) -> str:
  notes = "".join(
    f"<span class='delta'>{page.escape(note)}</span>" for note in cell.notes
  )
  return f"<{tag}>{page.escape(cell.text)}{notes}</{tag.split()[0]}>"


def _table_as_html(found: Table) -> str:
  head = "".join(
    f"<th scope='col'>{page.escape(name)}</th>" for name in found.head
  )
  rows = "\n".join(
    "<tr>"
    + _html_cell("th scope='row'", row[0])
    + "".join(_html_cell("td", cell) for cell in row[1:])
    + "</tr>"
    for row in found.rows
  )
  notes = "\n".join(f"<li>{page.escape(note)}</li>" for note in found.notes)
  return (
    f"<h2>{page.escape(found.heading)}</h2>\n<div class='scroll'>\n<table>\n"
    f"<thead><tr>{head}</tr></thead>\n<tbody class='{found.kind}'>\n{rows}\n"
    f"</tbody>\n</table>\n</div>\n<ul class='soft'>\n{notes}\n</ul>"
  )


def as_html(comparison: dict[str, Any], pictures: str = "") -> str:
  """The whole comparison as a page that needs nothing but itself.

  Args:
    comparison: What `compare` returns.
    pictures: A piece of HTML to stand below the accuracies.

  Returns:
    The text of the file.
  """
  accuracies = tables(comparison)
  body = ["<h1>Comparison</h1>"]
  body += [
    f"<p class='verdict'>{page.escape(text)}</p>"
    for text in verdict(comparison)
  ]
  body += [_table_as_html(found) for found in accuracies]
  body.append(pictures)
  if comparison["missing"]:
    items = "\n".join(
      f"<li>{page.escape(text)}</li>" for text in comparison["missing"]
    )
    body.append(f"<h2>Missing</h2>\n<ul>\n{items}\n</ul>")
  body += [
    _table_as_html(found)
    for found in _all_tables(comparison)[len(accuracies) :]
  ]
  return page.document("Comparison", body)
