"""Several methods side by side: accuracy under every protocol."""

import itertools
import math
import pathlib
import re
from typing import Any, NamedTuple

from matplotlib import axes, lines, ticker

from atat_jax.drawing import style
from atat_jax.drawing.text import broken, plain
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, results_format, tables

_ACROSS = 2  # panels beside each other; more would be too small on a telephone
_ROW = 0.3  # inches of height for each method
_LETTERS = 36  # in a line of a panel's name
_LEAST_SPAN = 4  # percentage points that an axis covers at least


class Mark(NamedTuple):
  """Marker of a BatchNorm mode, told apart without colour.

  Attributes:
    marker: Shape of the marker.
    filled: True if the marker is filled with the method's colour.
    offset: Distance from the middle of the method's row, in rows.
  """

  marker: str
  filled: bool
  offset: float


_MARKS = {"running": Mark("o", True, -0.17), "batch": Mark("s", False, 0.17)}


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a `comparison.json`.

  Raises:
    UserError: The file is missing, damaged, or of another format.
  """
  found = files.read_json(path)
  if found is None:
    raise UserError(f"{path} does not exist")
  if found.get("format") != 1 or not _are_rows(found.get("rows")):
    raise DamagedFileError(f"{path} is not a comparison of format 1")
  return found


def _are_rows(rows: Any) -> bool:
  """Whether rows have what the pictures show: each mean, error and figure."""
  if not isinstance(rows, list) or results_format.fault({"rows": rows}):
    return False
  return all(
    isinstance(row.get("dataset"), str)
    and all(
      name in row and (row[name] is None or type(row[name]) in (int, float))
      for name in ("standard_error", "published")
    )
    for row in rows
  )


def draw(
  path: pathlib.Path, directory: pathlib.Path | None = None
) -> list[pathlib.Path]:
  """Draws a panel for each protocol, with a row for each method.

  Filled circles are running statistics, hollow squares batch statistics,
  crosses the paper's figures. A bar is a standard error to either side. Each
  panel has an axis of its own, which spreads its points; an arrow at its left
  end is a point far below.

  Args:
    path: Path of a `comparison.json`.
    directory: Directory of the pictures; None: beside the file.

  Returns:
    Paths of `<stem of the file>_<data set>.png`.
  """
  directory = path.parent if directory is None else directory
  rows = read(path)["rows"]
  return [
    _draw(
      [row for row in rows if row["dataset"] == dataset],
      f"{dataset}: accuracy by method",
      directory / f"{path.stem}_{_file_name(dataset)}.png",
    )
    for dataset in dict.fromkeys(row["dataset"] for row in rows)
  ]


def draw_batch_statistics(
  path: pathlib.Path, attack: str, directory: pathlib.Path
) -> list[pathlib.Path]:
  """Draws the effect of batch statistics under one attack, as `draw` does.

  Beside the attack as published are its variants, which attack the same
  classifiers: with the statistics fixed, and with another loss. All panels
  share one axis.

  Args:
    path: Path of a `comparison.json`.
    attack: Name of the attack.
    directory: Directory of the pictures.

  Returns:
    Paths of `batch_statistics_<data set>.png`.
  """
  rows = [
    row
    for row in read(path)["rows"]
    if re.split("[-:]", row["attack"])[0] == attack
  ]
  return [
    _draw(
      [row for row in rows if row["dataset"] == dataset],
      f"{dataset}: what batch statistics change",
      directory / f"batch_statistics_{_file_name(dataset)}.png",
      one_axis=True,
    )
    for dataset in dict.fromkeys(row["dataset"] for row in rows)
  ]


def _file_name(dataset: str) -> str:
  """Returns a name as a part of a file's: a file may claim any."""
  return re.sub(r"[^\w=.-]", "_", dataset)[:100]


def _draw(
  rows: list[tables.Row],
  title: str,
  path: pathlib.Path,
  *,
  one_axis: bool = False,
) -> pathlib.Path:
  """Draws one figure; a panel shows both BatchNorm modes of its protocol."""
  methods = list(dict.fromkeys(row["model"] for row in rows))
  # Grouped by the fields that both modes share, so that they meet in one panel.
  panels = tables.in_paper_order(tables.columns(rows))
  across = min(_ACROSS, len(panels))
  down = math.ceil(len(panels) / across)
  with style.context():
    fig = style.new_figure(
      max(5.2, 1.6 + 3 * across),
      0.9 + down * (0.85 + _ROW * len(methods)),
      pad=0.06,
    )
    grid = fig.subplots(down, across, sharey=True, squeeze=False)
    for ax in grid.flat[len(panels) :]:
      ax.set_axis_off()
    for ax, panel in zip(grid.flat, panels, strict=False):
      shown = [
        row
        for row in rows
        if tables.identity(row) == tables.identity(panel.protocol)
      ]
      limits = _limits(rows if one_axis else shown)
      _panel(ax, panel.title, shown, methods, limits)
    fig.suptitle(plain(title))
    fig.legend(handles=_legend(rows), loc="outside lower center", ncols=3)
    return style.save(fig, path)


def _panel(
  ax: axes.Axes,
  title: str,
  rows: list[tables.Row],
  methods: list[str],
  limits: tuple[float, float],
) -> None:
  ax.set_title(broken(plain(title), _LETTERS))
  ax.set_xlabel("accuracy (%)")
  ax.set_yticks(range(len(methods)), [plain(m) for m in methods])
  ax.set_ylim(len(methods) - 0.5, -0.5)  # the first method on top
  ax.tick_params(axis="y", length=0)
  ax.grid(visible=False, axis="y")
  colors = style.model_colors(methods)
  low, high = limits
  ax.set_xlim(low, high)
  ticks = ticker.MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
  ax.set_xticks([t for t in ticks if low <= t <= high and 0 <= t <= 100])
  for row in rows:
    place = methods.index(row["model"])
    _point(ax, row, place, colors[row["model"]], low)
    if row["published"] is not None and 100 * row["published"] >= low:
      ax.plot(100 * row["published"], place, color=style.GREY, marker="x", ms=6)
  for between in range(len(methods) - 1):
    ax.axhline(between + 0.5, color="#eeeeee", linewidth=0.8, zorder=0)


def _point(
  ax: axes.Axes, row: tables.Row, place: int, color: str, low: float
) -> None:
  """Draws one accuracy with its number; left of the axis, an arrow."""
  mark = _MARKS[row["batch_norm"]]
  percent, error = 100 * row["accuracy"], 100 * (row["standard_error"] or 0)
  beyond = percent < low
  ax.errorbar(
    low if beyond else percent,
    place + mark.offset,
    xerr=0 if beyond else error,
    color=color,
    marker="<" if beyond else mark.marker,
    markerfacecolor=color if mark.filled else "white",
    markersize=5.5,
    elinewidth=1.4,
    capsize=2.5,
    clip_on=False,
  )
  ax.annotate(
    f"{percent:.1f}",
    (low if beyond else percent + error, place + mark.offset),
    (6, 0),
    textcoords="offset points",
    va="center",
    fontsize=7,
    color="#444444",
  )


def _limits(rows: list[tables.Row]) -> tuple[float, float]:
  """Returns the ends of an axis that spreads most methods, in percent.

  A few methods that are far below all others, such as one without a defence
  under attack, stay left of it.
  """
  spans = []
  for row in rows:
    error = row["standard_error"] or 0
    spans.append((row["accuracy"] - error, row["accuracy"] + error))
    if row["published"] is not None:
      spans.append((row["published"], row["published"]))
  spans.sort()
  gaps = [b[0] - a[1] for a, b in itertools.pairwise(spans)]
  if gaps and max(gaps) > 0.5 * (spans[-1][1] - spans[0][0]):
    below = gaps.index(max(gaps)) + 1
    if below <= len(spans) / 4:
      spans = spans[below:]
  low, high = 100 * spans[0][0], 100 * max(end for _, end in spans)
  missing = max(0.0, _LEAST_SPAN - (high - low))
  low, high = low - missing / 2, high + missing / 2
  span = high - low
  # The right margin has the numbers beside the points.
  return low - 0.08 * span, high + 0.22 * span


def _legend(rows: list[tables.Row]) -> list[lines.Line2D]:
  dark = "#444444"
  handles = [
    lines.Line2D(
      [],
      [],
      color=dark,
      marker=mark.marker,
      markerfacecolor=dark if mark.filled else "white",
      linestyle="",
      label=tables.BATCH_NORM_NAMES[mode],
    )
    for mode, mark in _MARKS.items()
    if any(row["batch_norm"] == mode for row in rows)
  ]
  if any(row["published"] is not None for row in rows):
    handles.append(
      lines.Line2D(
        [], [], color=style.GREY, marker="x", linestyle="", label="the paper's"
      )
    )
  return handles
