"""Writes the table of all methods from result files, whatever is there.

  python -m benchmarks.honest runs/at/comparison.json runs/atat/comparison.json
  python -m benchmarks.honest --publish runs/*/comparison.json
  python -m benchmarks.honest

A file is a `comparison.json` (`benchmarks.methods`, `python -m atat_jax.report`) or
a `results.json` of one run. The table has all methods of `OBJECTIVES` and, beside
those that start from the standard network, adversarial training that starts from
it too; what no file has is shown as not measured. Below it are the protocols, the
recipe, and whatever makes its rows unequal.

`--publish` copies the files to docs/results/table_<data set>/. Without files the
tables in README.md and docs/results.md are written again from these copies, or,
where there are none, from the files of `SOURCES`.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

if __name__ == "__main__" and not __package__:  # run as a script
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from atat_jax import objectives
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.figures import comparison as pictures
from atat_jax.report import layout, merge
from atat_jax.runs import files, tables, wording
from benchmarks import tables as pages
from benchmarks.support import machine
from benchmarks.support.machine import ROOT

Row = dict[str, Any]

RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", RESULTS.with_suffix(".md"))
SOURCES = {
  "cifar10": ("h200/cifar10_wrn16_4_*.json",),
  "digits": ("methods.json",),
}
"""Patterns of the published files of a data set, as long as it has no folder."""

CONTROL = "at_from_teacher"
NOT_MEASURED = "–"

_ATTACKS = (
  ("nominal", "running"),
  ("fgsm", "running"),
  ("pgd20", "running"),
  ("pgd20", "batch"),
)
_HEADS = {"nominal": "clean", "fgsm": "FGSM", "pgd20": "PGD-20"}
_STARTS = {"True": "standard network", "False": "fresh"}
_STARTS_FIELD = "objective.starts_from_teacher"
_RECIPE = (
  *(f"model.{name}" for name in ("name", "depth", "width", "normalization")),
  *(f"train.{name}" for name in ("num_epochs", "batch_size", "schedule")),
  *(f"train.{name}" for name in ("learning_rate", "weight_decay", "ema_decay")),
  "train.label_smoothing",
  *(f"objective.{name}" for name in ("attack_method", "num_steps")),
  *(f"objective.{name}" for name in ("step_size", "epsilon")),
)
"""Fields that describe the recipe below the table; the files have all."""


class Source(NamedTuple):
  """Comparison of runs, and the file that it was read from.

  Attributes:
    path: The file; for files of single runs the first of them.
    found: Content of a `comparison.json`.
  """

  path: pathlib.Path
  found: dict[str, Any]


# --- Reading -----------------------------------------------------------------


def read(paths: Sequence[pathlib.Path]) -> list[Source]:
  """Reads result files; those of single runs become one comparison.

  Raises:
    UserError: A file is missing, damaged, of another kind or named twice.
  """
  sources, runs = [], []
  for path in paths:
    if [other.resolve() for other in paths].count(path.resolve()) > 1:
      raise UserError(f"files: {path} twice; allowed: each file once")
    found = files.read_json(path)
    if found is None:
      raise UserError(f"files: {path}; allowed: files that exist")
    if isinstance(found.get("runs"), list):
      sources.append(Source(path, _checked(path)))
    elif isinstance(found.get("run"), dict):
      runs.append(path)
    else:
      raise UserError(
        f"files: {path}; allowed: comparison.json or results.json"
      )
  if runs:
    sources.append(Source(runs[0], _compared(runs)))
  return sources


_NEEDED = {
  "runs": ("label", "workdir", "network", "commit", "date", "devices"),
  "rows": ("model", "method", "batch_norm", "num_runs", "accuracies"),
  "costs": ("label", "seconds_per_step"),
  "shifts": ("label", "dataset", "mean", "standard_error", "num_examples"),
}
"""Fields that the table takes from each entry of a comparison."""


def _checked(path: pathlib.Path) -> dict[str, Any]:
  """Reads a comparison.

  Raises:
    UserError: An entry lacks a field.
  """
  found = pictures.read(path)
  for part, fields in _NEEDED.items():
    entries = found.setdefault(part, [])  # older files have no shifts
    if not isinstance(entries, list) or not all(
      isinstance(entry, dict) and entry.keys() >= {*fields} for entry in entries
    ):
      raise DamagedFileError(
        f"{path}: {part}; allowed: entries with {', '.join(fields)}"
      )
  return found


def _compared(paths: Sequence[pathlib.Path]) -> dict[str, Any]:
  """Compares runs of which there are only the results."""
  with tempfile.TemporaryDirectory() as folder:
    names = {}
    for number, path in enumerate(paths):
      workdir = pathlib.Path(folder, str(number))
      workdir.mkdir()
      shutil.copyfile(path, workdir / files.RESULTS)
      names[str(workdir)] = path.stem
    found = merge.compare(list(names))
    for run in found["runs"]:
      run["workdir"] = names[run["workdir"]]
    return found


# --- The table ---------------------------------------------------------------


def labels(sources: Sequence[Source], dataset: str) -> list[str]:
  """Lists the rows of the table.

  Every method, the control of those that start from the standard network, and a
  setting of a method where the method itself has not been measured.
  """
  measured = {
    (row["model"], row["method"])
    for source in sources
    for row in source.found["rows"]
    if row["dataset"] == dataset
  }
  found = []
  for method in objectives.OBJECTIVES:
    own = [label for label, of in measured if of == method]
    instead = [] if method in own else sorted(set(own) - {CONTROL})
    found += instead or [method]
    found += [CONTROL] if method == "at" else []
  return found


def columns(sources: Sequence[Source], dataset: str) -> list[tables.Column]:
  """Lists the columns of accuracies, one a protocol and BatchNorm mode."""
  kinds: dict[tuple[str, str], list[Row]] = {}
  for source in sources:
    for row in source.found["rows"]:
      kind = row["attack"], row["batch_norm"]
      is_autoattack = kind[0].split("-")[0].split(":")[0] == "autoattack"
      if row["dataset"] == dataset and (
        kind in _ATTACKS or (is_autoattack and kind[1] == "running")
      ):
        kinds.setdefault(kind, []).append(row)
  others = sorted(kind for kind in kinds if kind not in _ATTACKS)
  return [
    column
    for kind in (*_ATTACKS, *others)
    for column in tables.columns(kinds.get(kind, []), merge.FIELDS)
  ]


def heads(found: Sequence[tables.Column]) -> list[str]:
  """Names the columns, each with what tells it from the others."""
  counts = [column.protocol["num_examples"] for column in found]
  usual = max(counts, key=counts.count, default=0)
  names = []
  for column, count in zip(found, counts, strict=True):
    attack = column.protocol["attack"]
    name = _HEADS.get(attack) or attack.replace("autoattack", "AutoAttack", 1)
    name = name.replace("AutoAttack-", "AutoAttack ", 1)
    # Columns of one attack are told apart by the label's further fields.
    marks = column.label.removeprefix(attack).strip()
    name += f" {marks}" if marks and "num_examples" not in marks else ""
    if column.protocol["batch_norm"] == "batch":
      name += ", batch statistics"
    names.append(name if count == usual else f"{name}, {count:,} images")
  return names


def _cell(
  sources: Sequence[Source], column: tables.Column, label: str
) -> Row | None:
  """Finds the number of a method: the first file's that has it."""
  mode = column.protocol["batch_norm"]
  wanted = tables.identity(column.protocol, merge.FIELDS)
  for source in sources:
    for row in source.found["rows"]:
      if (row["model"], row["batch_norm"]) == (label, mode) and (
        tables.identity(row, merge.FIELDS) == wanted
      ):
        return row
  return None


def _field(sources: Sequence[Source], label: str, field: str) -> str | None:
  """Looks up a field of a method's training; None: not recorded."""
  for source in sources:
    values = source.found.get("training", {}).get(field, {})
    shared = source.found.get("recipe", {})
    if label in [run["label"] for run in source.found["runs"]]:
      value = values.get(label, shared.get(field))
      return None if value == "–" else value
  return None


def _start(sources: Sequence[Source], label: str) -> str:
  if not any(
    label in [run["label"] for run in source.found["runs"]]
    for source in sources
  ):
    return NOT_MEASURED
  value = _field(sources, label, _STARTS_FIELD)
  return _STARTS.get(str(value), "fresh")


def _shift(sources: Sequence[Source], dataset: str, label: str) -> Row | None:
  for source in sources:
    for shift in source.found.get("shifts", []):
      if (shift["label"], shift["dataset"]) == (label, dataset):
        return shift
  return None


def _seconds(sources: Sequence[Source], label: str) -> str:
  """Time of a training's steps, as far as it was recorded."""
  for source in sources:
    for cost in source.found["costs"]:
      if cost["label"] == label and cost.get("num_steps"):
        return f"{cost['num_steps'] * cost['seconds_per_step']:.0f}"
  return NOT_MEASURED


def _gap(sources: Sequence[Source], column: tables.Column, label: str) -> str:
  """Writes the difference from the control of the same standard networks."""
  if label == CONTROL or _start(sources, label) != _STARTS["True"]:
    return NOT_MEASURED
  for source in sources:
    own, control = (_cell([source], column, name) for name in (label, CONTROL))
    gap = merge.paired_difference(own, control) if own and control else None
    if gap:
      return layout.points(gap)
  return NOT_MEASURED


def _line(
  sources: Sequence[Source],
  dataset: str,
  found: Sequence[tables.Column],
  label: str,
) -> list[str]:
  """Writes the row of a method."""
  cells = [_cell(sources, column, label) for column in found]
  shift = _shift(sources, dataset, label)
  counts = sorted({cell["num_runs"] for cell in cells if cell})
  return [
    f"`{label}`",
    _start(sources, label),
    *(
      layout.percent(cell["accuracy"], cell["standard_error"])
      if cell
      else NOT_MEASURED
      for cell in cells
    ),
    *(_gap(sources, column, label) for column in _strongest(found)),
    layout.distance(shift["mean"], shift["standard_error"])
    if shift
    else NOT_MEASURED,
    _seconds(sources, label),
    " to ".join(map(str, dict.fromkeys([*counts[:1], *counts[-1:]])))
    or NOT_MEASURED,
  ]


def _strongest(found: Sequence[tables.Column]) -> list[tables.Column]:
  """Lists the columns of AutoAttack, which are compared with the control."""
  return [
    column
    for column in found
    if column.protocol["attack"].startswith("autoattack")
  ]


def table(
  sources: Sequence[Source], dataset: str, *, brief: bool = False
) -> str:
  """Writes the table of a data set, and below it the protocols.

  Args:
    sources: Result of `read`.
    dataset: Name of the data set.
    brief: Whether methods that have not been measured are only named, and
      columns without a number and the protocols left out.

  Returns:
    Markdown.
  """
  sources = [s for s in sources if dataset in layout.datasets(s.found)]
  found = columns(sources, dataset)
  names = dict(zip(map(id, found), heads(found), strict=True))
  head = ["method", "starts from", *names.values()]
  head += [f"{names[id(c)]}, minus {CONTROL}" for c in _strongest(found)]
  head += ["attention shift", "seconds", "seeds"]
  lines = [
    _line(sources, dataset, found, label) for label in labels(sources, dataset)
  ]
  missing = [line for line in lines if {*line[2:]} == {NOT_MEASURED}]
  if brief:
    lines = [line for line in lines if line not in missing]
    kept = [
      place
      for place in range(len(head))
      if any(line[place] != NOT_MEASURED for line in lines)
    ]
    head, *lines = ([line[i] for i in kept] for line in [head, *lines])
  parts = [tables.markdown([head, *lines], "ll" + "r" * (len(head) - 2))]
  if not brief:
    notes = _notes(sources, dataset, found)
    parts.append("\n".join(f"- {note}" for note in notes))
  elif missing:
    parts.append(
      f"Not measured: {wording.listed([line[0] for line in missing])}."
    )
  return "\n\n".join(parts)


# --- What stands below it ----------------------------------------------------


def _notes(
  sources: Sequence[Source], dataset: str, found: Sequence[tables.Column]
) -> list[str]:
  """Lists the sentences that a reader of the table needs."""
  shown = labels(sources, dataset)
  notes = [f"Accuracy in %. {NOT_MEASURED}: not measured."]
  cells = [_cell(sources, c, label) for c in found for label in shown]
  if any(cell and cell["standard_error"] is not None for cell in cells):
    notes.append("±: standard error of the mean over training seeds.")
  notes += [
    f"{name}: {tables.escaped(tables.protocol(column))}."
    for name, column in zip(heads(found), found, strict=True)
  ]
  shifts = [_shift(sources, dataset, label) for label in shown]
  notes += dict.fromkeys(
    "Attention shift: cosine distance of the true class's Grad-CAM maps of clean"
    f" and attacked images (0: nothing moves); {shift['protocol']};"
    f" {shift['num_examples']:,} images; layer {shift['layer']}."
    for shift in shifts
    if shift
  )
  if any(_seconds(sources, label) != NOT_MEASURED for label in shown):
    notes.append(
      "Seconds: the steps of the training alone, at the median speed of its log"
      " intervals; a method that starts from the standard network, or has it as"
      " its teacher, needs that network's too."
    )
  return [
    *notes,
    *_recipe(sources, shown),
    *_several(sources, found, shown),
    _provenance(sources, shown),
  ]


def _values(
  sources: Sequence[Source], shown: Sequence[str]
) -> dict[str, list[str]]:
  """Lists the values that the fields of the trainings have."""
  found: dict[str, dict[str, None]] = {}
  for source in sources:
    for field, value in source.found.get("recipe", {}).items():
      found.setdefault(field, {})[value] = None
    for field, values in source.found.get("training", {}).items():
      used = [values[label] for label in shown if label in values]
      own = [value for value in used if value != NOT_MEASURED]
      found.setdefault(field, {}).update(dict.fromkeys(own))
  return {field: list(values) for field, values in found.items()}


def _recipe(sources: Sequence[Source], shown: Sequence[str]) -> list[str]:
  """Describes the training that the rows share, and where they do not."""
  values = _values(sources, shown)
  shared = [
    f"{field} {values[field][0]}"
    for field in _RECIPE
    if len(values.get(field, ())) == 1
  ]
  notes = []
  if any(source.found.get("recipe") for source in sources):
    notes.append(f"Recipe: {', '.join(shared)}.")
  if not all(source.found.get("recipe") for source in sources):
    notes.append(
      "Not every file records the fields that its methods share, so that"
      " whether all files have one recipe is not known."
      if len(sources) > 1
      else "The file does not record the fields that its methods share."
    )
  for field, found in sorted(values.items()):
    section = field.split(".")[0]
    if len(found) > 1 and (
      section in ("train", "model", "data") or field in _RECIPE
    ):
      notes.append(f"**Not one recipe**: {field} is {wording.listed(found)}.")
  return notes


def _several(
  sources: Sequence[Source],
  found: Sequence[tables.Column],
  shown: Sequence[str],
) -> list[str]:
  """Says where files disagree on one number."""
  notes = []
  for name, column in zip(heads(found), found, strict=True):
    for label in shown:
      cells = [_cell([source], column, label) for source in sources]
      values = sorted({cell["accuracy"] for cell in cells if cell})
      if len(values) > 1:
        notes.append(
          f"{label}, {name}: several files have it, up to"
          f" {100 * (values[-1] - values[0]):.2f} points apart; the first is"
          " shown."
        )
  return notes


def _provenance(sources: Sequence[Source], shown: Sequence[str]) -> str:
  runs = [
    run
    for source in sources
    for run in source.found["runs"]
    if run["label"] in shown
  ]
  commits = sorted({f"`{run['commit'] or 'not recorded'}`" for run in runs})
  dates = sorted({str(run["date"])[:10] for run in runs if run["date"]})
  devices = sorted({device for run in runs for device in run["devices"]})
  networks = sorted({run["network"] for run in runs})
  return (
    f"Networks: {', '.join(networks)}. Commit {', '.join(commits)};"
    f" {' to '.join(dict.fromkeys([*dates[:1], *dates[-1:]])) or 'no date'};"
    f" devices: {', '.join(devices) or 'not recorded'}."
  )


# --- The pages ---------------------------------------------------------------


def published(dataset: str) -> list[pathlib.Path]:
  """Lists the published files of a data set."""
  folder = RESULTS / f"table_{dataset}"
  if folder.is_dir():
    return sorted(folder.glob("*.json"))
  return [
    path
    for pattern in SOURCES[dataset]
    for path in sorted(RESULTS.glob(pattern))
  ]


def generate(page: str) -> str:
  """Writes the tables of a page from the published files.

  Args:
    page: Markdown with the markers `table_<data set>` and `brief_<data set>`;
      others stay as they are.

  Raises:
    UserError: A file cannot be read.
  """

  def part(name: str) -> str:
    kind, _, dataset = name.partition("_")
    sources = read(published(dataset))
    return table(sources, dataset, brief=kind == "brief")

  names = [f"{kind}_{name}" for kind in ("table", "brief") for name in SOURCES]
  return pages.fill(page, names, part)


def publish(paths: Iterable[pathlib.Path], sources: Sequence[Source]) -> None:
  """Copies result files to the folder of their data set.

  Raises:
    UserError: Results of uncommitted code, or of more than one data set.
  """
  datasets = {row["dataset"] for s in sources for row in s.found["rows"]}
  if len(datasets) != 1 or not datasets <= SOURCES.keys():
    raise UserError(
      f"files: {', '.join(sorted(datasets))}; allowed: one of"
      f" {', '.join(SOURCES)}"
    )
  for source in sources:
    for run in source.found["runs"]:
      if not machine.is_committed(run["commit"]):
        raise UserError(
          f"files: {run['workdir']}, commit {run['commit']}; allowed: runs of"
          " committed code"
        )
  folder = RESULTS / f"table_{datasets.pop()}"
  for path in paths:
    name = path.parent.name if path.stem == "comparison" else path.stem
    files.write_bytes(folder / f"{name}.json", path.read_bytes())


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.parser(__doc__)
  made.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE")
  made.add_argument(
    "--publish", action="store_true", help="copy the files, write the pages"
  )
  made.add_argument(
    "--out", type=pathlib.Path, help="Markdown file for the tables of the files"
  )
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  if args.files:
    sources = read(args.files)
    names = dict.fromkeys(
      dataset for s in sources for dataset in layout.datasets(s.found)
    )
    text = "\n\n".join(f"## {name}\n\n{table(sources, name)}" for name in names)
    sys.stdout.write(f"{text}\n")
    if args.out is not None:
      files.write_text(args.out, f"{text}\n")
  if args.publish:
    publish(args.files, sources if args.files else [])
  if args.publish or not args.files:
    for page in PAGES:
      text = generate(page.read_text(encoding="utf-8"))
      files.write_text(page, text)
      sys.stdout.write(f"written: {page}\n")


if __name__ == "__main__":
  with machine.plain_errors():
    main()
