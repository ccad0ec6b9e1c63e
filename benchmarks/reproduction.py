"""Writes the measured parts of docs/reproduction.md from a comparison.

  python benchmarks/reproduction.py runs/methods/comparison.json

copies the comparison to docs/results/methods.json, replaces what stands on the
page between the markers `<!-- generated: NAME -->` and `<!-- end -->`, and draws
the figures into docs/figures. Without an argument the copy is read again. All
else on the page is written by hand. What was not measured is said to be so.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.figures import comparison as pictures
from atat_jax.report import layout
from atat_jax.runs import files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
RESULTS = ROOT / "docs" / "results" / "methods.json"
FIGURES = ROOT / "docs" / "figures"
COSTS = "costs.json"
ATTACK = "pgd20"  # the paper's headline

_NOT_MEASURED = "Not measured yet."


def generate(page: str, results: pathlib.Path) -> str:
  """The page with its measured parts as the results have them.

  Args:
    page: Markdown with markers.
    results: A `comparison.json`; it need not exist. Nor need `costs.json`
      beside it, which `benchmarks/costs.py` writes.

  Returns:
    The new text.

  Raises:
    UserError: A marker with an unknown name, results that cannot be read.
  """
  from benchmarks import setting

  found = pictures.read(results) if results.exists() else None
  costs = files.read_json(results.with_name(COSTS))

  def part(name: str) -> str:
    measured = costs if name == "costs" else found
    text = None if measured is None else PARTS[name](measured)
    return text or _NOT_MEASURED

  return setting.fill(page, PARTS, part)


def _accuracies(found: dict[str, Any]) -> str:
  parts = []
  for dataset in layout.datasets(found):
    for shown in layout.tables(found):
      if shown.heading.startswith(f"{dataset}."):
        notes = "\n".join(f"- {note}" for note in shown.notes)
        parts += [f"{shown.heading}", layout.table_as_markdown(shown), notes]
    parts.append(f"![Accuracy by method](figures/methods_{dataset}.png)")
  if found["missing"]:
    parts.append("\n".join(f"- {text}" for text in found["missing"]))
  return "\n\n".join(parts)


def _batch_statistics(found: dict[str, Any]) -> str:
  parts = []
  for dataset in layout.datasets(found):
    lines = [
      [
        "method",
        f"{ATTACK}, running (%)",
        f"{ATTACK}, batch (%)",
        "difference (points)",
        "runs",
      ]
    ]
    fixed = _rows(found, dataset, "running")
    for label, row in _rows(found, dataset, "batch").items():
      if label not in fixed or "difference" not in row:
        continue
      lines.append(
        [
          label,
          _percent(fixed[label]),
          _percent(row),
          layout.points(row["difference"]),
          str(row["difference"]["num_runs"]),
        ]
      )
    if len(lines) > 1:
      shown = layout.Table(
        heading=dataset,
        kind="",
        head=lines[0],
        rows=[[layout.Cell(text) for text in line] for line in lines[1:]],
        notes=[],
      )
      parts += [
        f"{dataset}:",
        layout.table_as_markdown(shown),
        "![What batch statistics change]"
        f"(figures/batch_statistics_{dataset}.png)",
      ]
  return "\n\n".join(parts)


def _rows(
  found: dict[str, Any], dataset: str, batch_norm: str
) -> dict[str, dict[str, Any]]:
  """Method to its row of the headline attack."""
  rows = {}
  for column in layout.columns(found, dataset, batch_norm):
    if column.protocol["attack"] == ATTACK:
      # The first column of that name only: protocols are not mixed.
      for label, _ in column.rows:
        rows.setdefault(label, column.rows[label, batch_norm])
      break
  return rows


def _percent(row: dict[str, Any]) -> str:
  return layout.percent(row["accuracy"], row["standard_error"])


def _costs(found: dict[str, Any]) -> str:
  from benchmarks import costs as step_costs

  return (
    f"Batches of {found['batch_size']} images; commit `{found['commit']}`,"
    f" {found['date']}, devices: {', '.join(found['devices'])}.\n\n"
    + step_costs.as_markdown(found["rows"])
  )


def _training(found: dict[str, Any]) -> str:
  shown = layout.training(found)
  if shown is None:
    return ""
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
  "accuracies": _accuracies,
  "batch_statistics": _batch_statistics,
  "costs": _costs,
  "training": _training,
  "provenance": _provenance,
}
"""Name of a part to what writes it."""


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the page and its figures."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("comparison", nargs="?", type=pathlib.Path)
  args = flags.parse_args(argv)
  if args.comparison is not None:
    pictures.read(args.comparison)  # refuses what is none
    files.write_bytes(RESULTS, args.comparison.read_bytes())
  text = generate(PAGE.read_text(encoding="utf-8"), RESULTS)
  files.write_bytes(PAGE, text.encode())
  sys.stdout.write(f"page: {PAGE}\n")
  if RESULTS.exists():
    drawn = pictures.draw_batch_statistics(RESULTS, ATTACK, FIGURES)
    for path in [*pictures.draw(RESULTS, FIGURES), *drawn]:
      sys.stdout.write(f"figure: {path}\n")


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))  # for the other scripts
  try:
    main()
  except UserError as error:
    sys.exit(f"error: {error}")
