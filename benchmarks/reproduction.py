"""Writes the measured parts of docs/reproduction.md from a comparison.

  python benchmarks/reproduction.py runs/methods/comparison.json

copies the comparison to docs/results/methods.json, replaces the text between the
page's markers `<!-- generated: NAME -->` and `<!-- end -->`, and draws the
figures into docs/figures. Without an argument it reads that copy again. A part
without results says "Not measured yet."
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__" and not __package__:  # run as a script
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from atat_jax.errors import UserError
from atat_jax.figures import comparison as pictures
from atat_jax.objectives import OBJECTIVES
from atat_jax.report import layout
from atat_jax.runs import files
from atat_jax.runs import tables as rows
from benchmarks import controls, costs, mechanism, normalization, tables
from benchmarks.support import machine
from benchmarks.support.machine import ROOT

PAGE = ROOT / "docs" / "reproduction.md"
RESULTS = ROOT / "docs" / "results" / "methods.json"
FIGURES = ROOT / "docs" / "figures"
OTHERS = {
  "headline": "controls",
  "ablation": "controls",
  "costs": "costs",
  "mechanism": "mechanism",
  "mechanism_own": "mechanism_own",
  "normalization": "normalization",
  "normalization_seeds": "normalization_seeds",
}
"""Parts with a result file of their own beside the comparison, and its name.

`controls.json` is a comparison of the runs with the epochs of `configs/digits.py`.
"""
ATTACK = "pgd20"  # the paper's headline

_NOT_MEASURED = "Not measured yet."


def generate(page: str, results: pathlib.Path) -> str:
  """Writes the page's measured parts.

  Args:
    page: Markdown with markers.
    results: A `comparison.json`, which may be missing, like the files beside it
      that `benchmarks/costs.py`, `mechanism.py` and `normalization.py` write.

  Returns:
    The new text of the page.

  Raises:
    UserError: A marker with an unknown name, or results that cannot be read.
  """
  found = pictures.read(results) if results.exists() else None

  def part(name: str) -> str:
    measured = found
    if name in OTHERS:
      measured = files.read_json(results.with_name(f"{OTHERS[name]}.json"))
    text = None if measured is None else PARTS[name](measured)
    return text or _NOT_MEASURED

  return tables.fill(page, PARTS, part)


def _accuracies(found: dict[str, Any]) -> str:
  parts = []
  for dataset in layout.datasets(found):
    for shown in layout.tables(found):
      # Batch statistics have a part of their own.
      if shown.kind == "running" and shown.heading.startswith(f"{dataset}."):
        notes = "\n".join(f"- {note}" for note in shown.notes)
        parts += [f"{shown.heading}", layout.table_as_markdown(shown), notes]
    parts.append(f"![Accuracy by method](figures/methods_{dataset}.png)")
  if found["missing"]:
    parts.append("\n".join(f"- {text}" for text in found["missing"]))
  return "\n\n".join(parts)


def _batch_statistics(found: dict[str, Any]) -> str:
  parts = [controls.batch_statistics(found)]
  for dataset in layout.datasets(found):
    columns = layout.columns(found, dataset, "batch")
    shown = {column.attack for column in controls.BATCH}
    parts.append(
      "\n".join(
        f"- {column.label}: {rows.protocol(column)}."
        for column in columns
        if column.protocol["attack"] in shown
      )
    )
    parts.append(
      f"![What batch statistics change](figures/batch_statistics_{dataset}.png)"
    )
  return "\n\n".join(filter(None, parts))


def _costs(found: dict[str, Any]) -> str:
  return (
    f"Batches of {found['batch_size']} images; commit `{found['commit']}`,"
    f" {found['date'][:10]}, devices: {', '.join(found['devices'])}.\n\n"
    + costs.as_markdown(found["rows"])
  )


def _experiment(
  table: Callable[[Sequence[dict[str, Any]]], str],
) -> Callable[[dict[str, Any]], str]:
  return lambda found: (
    f"{table(found['rows'])}\n\n`{found['command']}`; commit"
    f" `{found['commit']}`, {found['date'][:10]}, devices:"
    f" {', '.join(found['devices'])}."
  )


def _training(found: dict[str, Any]) -> str:
  shown = layout.training(found)
  if shown is None:
    return ""
  # Settings of a method differ from it in the fields that name them.
  kept = [0, *(i for i, head in enumerate(shown.head) if head in OBJECTIVES)]
  lines = [[row[i] for i in kept] for row in shown.rows]
  shown = dataclasses.replace(
    shown,
    head=[shown.head[i] for i in kept],
    rows=[line for line in lines if len({c.text for c in line[1:]}) > 1],
  )
  return "\n\n".join([layout.table_as_markdown(shown), *shown.notes])


def _provenance(found: dict[str, Any]) -> str:
  runs = found["runs"]
  dates = sorted(run["date"][:10] for run in runs if run["date"])
  commits = sorted({run["commit"] or "not recorded" for run in runs})
  devices = sorted({device for run in runs for device in run["devices"]})
  return (
    f"{len(runs)} runs; commit {', '.join(f'`{c}`' for c in commits)};"
    f" {' to '.join(dict.fromkeys([*dates[:1], *dates[-1:]])) or 'no date'};"
    f" devices: {', '.join(devices) or 'not recorded'}."
  )


PARTS = {
  "headline": controls.headline,
  "ablation": lambda found: (
    f"{controls.ablation(found)}\n\n{_provenance(found)}"
  ),
  "shorter": lambda found: "\n\n".join(
    [controls.headline(found), controls.ablation(found)]
  ),
  "accuracies": _accuracies,
  "batch_statistics": _batch_statistics,
  "costs": _costs,
  "mechanism": _experiment(mechanism.table),
  "mechanism_own": _experiment(mechanism.attack_table),
  "normalization": _experiment(normalization.table),
  "normalization_seeds": _experiment(normalization.table),
  "training": _training,
  "provenance": _provenance,
}
"""Function that writes each part."""


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the page and its figures."""
  flags = machine.parser(__doc__)
  flags.add_argument("comparison", nargs="?", type=pathlib.Path)
  args = flags.parse_args(argv)
  if args.comparison is not None:
    found = pictures.read(args.comparison)  # refuses another kind of file
    for run in found["runs"]:
      if not machine.is_committed(run["commit"]):
        raise UserError(
          f"comparison: {run['workdir']}, commit {run['commit']}; allowed: runs"
          " of committed code"
        )
    files.write_bytes(RESULTS, args.comparison.read_bytes())
  text = generate(PAGE.read_text(encoding="utf-8"), RESULTS)
  files.write_bytes(PAGE, text.encode())
  sys.stdout.write(f"page: {PAGE}\n")
  if RESULTS.exists():
    drawn = pictures.draw_batch_statistics(RESULTS, ATTACK, FIGURES)
    for path in [*pictures.draw(RESULTS, FIGURES), *drawn]:
      sys.stdout.write(f"figure: {path}\n")


if __name__ == "__main__":
  with machine.plain_errors():
    main()
