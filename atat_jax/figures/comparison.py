"""Several methods side by side: accuracy under every protocol."""

import math
import pathlib
from typing import Any

from matplotlib import axes, lines, ticker

from atat_jax.drawing import style
from atat_jax.errors import UserError
from atat_jax.runs import files, tables

_COLUMNS = 2  # panels beside each other, so that they are read on a telephone
# (colour, marker, fill, offset in rows): told apart without colour, too.
_LOOKS = {
  "running": (style.BLUE, "o", style.BLUE, -0.16),
  "batch": (style.VERMILION, "s", "white", 0.16),
}


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a `comparison.json`.

  Raises:
    UserError: It is not there, damaged, or of another format.
  """
  found = files.read_json(path)
  if found is None:
    raise UserError(f"{path} does not exist")
  if found.get("format") != 1 or "rows" not in found:
    raise UserError(f"{path} is not a comparison of format 1")
  return found


def draw(
  path: pathlib.Path, directory: pathlib.Path | None = None
) -> list[pathlib.Path]:
  """Draws a panel for each protocol, with a line for each method.

  Filled circles are running statistics, hollow squares batch statistics,
  crosses the paper's figures. A bar is a standard error to either side.

  Args:
    path: A `comparison.json`.
    directory: Where to; None: beside the file.

  Returns:
    Paths of `<stem of the file>_<data set>.png`.
  """
  directory = path.parent if directory is None else directory
  rows = read(path)["rows"]
  return [
    _draw(
      [row for row in rows if row["dataset"] == dataset],
      f"{dataset}: accuracy by method",
      directory / f"{path.stem}_{dataset}.png",
    )
    for dataset in dict.fromkeys(row["dataset"] for row in rows)
  ]


def draw_batch_statistics(
  path: pathlib.Path, attack: str, directory: pathlib.Path
) -> list[pathlib.Path]:
  """Draws what batch statistics change under one attack, as `draw` does.

  Args:
    path: A `comparison.json`.
    attack: Name of the attack.
    directory: Where to.

  Returns:
    Paths of `batch_statistics_<data set>.png`.
  """
  rows = [row for row in read(path)["rows"] if row["attack"] == attack]
  return [
    _draw(
      [row for row in rows if row["dataset"] == dataset],
      f"{dataset}: what batch statistics change",
      directory / f"batch_statistics_{dataset}.png",
    )
    for dataset in dict.fromkeys(row["dataset"] for row in rows)
  ]


def _draw(
  rows: list[tables.Row], title: str, path: pathlib.Path
) -> pathlib.Path:
  """One figure; batch statistics stand in the panel of their protocol."""
  methods = list(dict.fromkeys(row["model"] for row in rows))
  # By the fields that both modes share, so that they meet in one panel.
  panels = tables.in_paper_order(tables.columns(rows))
  across = min(_COLUMNS, len(panels))
  down = math.ceil(len(panels) / across)
  with style.context():
    fig = style.new_figure(
      max(5.2, 1.4 + 2.6 * across),
      0.9 + down * (0.75 + 0.27 * len(methods)),
      pad=0.06,
    )
    grid = fig.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[len(panels) :]:
      ax.set_axis_off()
    for ax, panel in zip(grid.flat, panels, strict=False):
      _panel(ax, panel, rows, methods)
    for place in range(across):
      bottom = grid.flat[max(range(place, len(panels), across))]
      bottom.set_xlabel("accuracy (%)")
      bottom.tick_params(axis="x", labelbottom=True)
    fig.suptitle(title)
    fig.legend(handles=_legend(rows), loc="outside lower center", ncols=3)
    return style.save(fig, path)


def _panel(
  ax: axes.Axes,
  panel: tables.Column,
  rows: list[tables.Row],
  methods: list[str],
) -> None:
  ax.set_title(panel.label)
  ax.set_xlim(-3, 103)
  ax.xaxis.set_major_locator(ticker.MultipleLocator(20))
  ax.set_yticks(range(len(methods)), methods)
  ax.set_ylim(len(methods) - 0.5, -0.5)  # the first method on top
  ax.tick_params(axis="y", length=0)
  ax.grid(visible=False, axis="y")
  for row in rows:
    if any(row[f] != panel.protocol[f] for f in tables.COLUMN_FIELDS):
      continue
    color, marker, fill, offset = _LOOKS[row["batch_norm"]]
    place = methods.index(row["model"])
    ax.errorbar(
      100 * row["accuracy"],
      place + offset,
      xerr=100 * (row["standard_error"] or 0),
      color=color,
      marker=marker,
      markerfacecolor=fill,
      markersize=5.5,
      elinewidth=1.4,
      capsize=2.5,
    )
    if row["published"] is not None:
      ax.plot(
        100 * row["published"], place, color=style.BLACK, marker="x", ms=6
      )
  for between in range(len(methods) - 1):
    ax.axhline(between + 0.5, color="#eeeeee", linewidth=0.8, zorder=0)


def _legend(rows: list[tables.Row]) -> list[lines.Line2D]:
  handles = []
  for mode, (color, marker, fill, _) in _LOOKS.items():
    if any(row["batch_norm"] == mode for row in rows):
      handles.append(
        lines.Line2D(
          [],
          [],
          color=color,
          marker=marker,
          markerfacecolor=fill,
          linestyle="",
          label=tables.BATCH_NORM_NAMES[mode],
        )
      )
  if any(row["published"] is not None for row in rows):
    handles.append(
      lines.Line2D(
        [], [], color=style.BLACK, marker="x", linestyle="", label="the paper's"
      )
    )
  return handles
