"""Accuracies on corrupted images as tables of a page."""

from collections.abc import Sequence
from typing import NamedTuple

from atat_jax.report.layout import Cell, Table
from atat_jax.runs import corrupted, tables, terminal


class Corruptions(NamedTuple):
  """Tables of one set of corrupted images.

  Attributes:
    summary: Means of every network and BatchNorm mode.
    trained: Corruption by severity, of the trained network.
    others: The same of the others.
  """

  summary: Table
  trained: Table
  others: list[Table]


def sections(
  rows: Sequence[tables.Row], found: Sequence[tables.Row]
) -> list[Corruptions]:
  """Arranges the accuracies on corrupted images.

  Args:
    rows: Rows of `results.json`.
    found: Its rows "corruptions".

  Returns:
    Tables for each set of corrupted images.
  """
  return [_section(grids) for grids in corrupted.grids(rows, found)]


def _section(grids: Sequence[corrupted.Grid]) -> Corruptions:
  trained = tables.trained([grid.protocol for grid in grids])
  first = next(
    (grid for grid in grids if grid.protocol["model"] == trained), grids[0]
  )
  return Corruptions(
    _summary(grids),
    _by_kind(first),
    [_by_kind(grid) for grid in grids if grid is not first],
  )


def _cells(name: str, values: Sequence[float | None]) -> list[Cell]:
  return [Cell(name), *(Cell(terminal.percent(value)) for value in values)]


def _summary(grids: Sequence[corrupted.Grid]) -> Table:
  notes = [
    f"{corrupted.images(grids[0])}.",
    f"mean: over {len(corrupted.KINDS)} corruptions and"
    f" {len(corrupted.SEVERITIES)} severities; 1 to 5: over the corruptions at"
    " this severity; clean: the same images without corruption.",
  ]
  if corrupted.is_unfinished(grids):
    notes.append("–: the evaluation is not finished, or left clean images out.")
  return Table(
    heading="Accuracy on corrupted images",
    kind="",
    head=["accuracy (%)", *corrupted.HEAD],
    rows=[_cells(grid.name, corrupted.summary(grid)) for grid in grids],
    notes=notes,
  )


def _by_kind(grid: corrupted.Grid) -> Table:
  return Table(
    heading=f"{grid.name}: by corruption and severity",
    kind=grid.protocol["batch_norm"],
    head=["corruption", "mean", *map(str, corrupted.SEVERITIES)],
    rows=[
      _cells(
        kind.replace("_", " "),
        [
          grid.mean(kind),
          *(
            grid.accuracies.get((kind, severity))
            for severity in corrupted.SEVERITIES
          ),
        ],
      )
      for kind in grid.kinds
    ],
    notes=[],
  )
