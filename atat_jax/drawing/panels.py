"""Parts of figures: lines over a sweep, rows with intervals, tables of colours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atat_jax.drawing import style
from atat_jax.drawing.style import Axes, Figure
from atat_jax.drawing.text import plain
from atat_jax.runs import intervals


def accuracy_axes(num_models: int, chance: float) -> tuple[Figure, Axes]:
  """Returns a figure for accuracies in percent, with a line at chance.

  Args:
    num_models: Number of models in its legend, three of them in a row.
    chance: Accuracy of guessing, in [0, 1].
  """
  fig = style.new_figure(5.2, 4.1 + 0.2 * -(-num_models // 3))
  ax = fig.add_subplot()
  ax.set_ylabel("accuracy (%)")
  ax.set_ylim(-2, 102)
  ax.axhline(100 * chance, color=style.GREY, linewidth=1, zorder=1)
  ax.annotate(
    "chance",
    (1, 100 * chance),
    (-3, 2),
    xycoords=("axes fraction", "data"),
    textcoords="offset points",
    ha="right",
    fontsize=8,
    color=style.GREY,
  )
  return fig, ax


def lines(
  ax: Axes, x: np.ndarray, y: Mapping[str, np.ndarray], *, marked: bool = False
) -> None:
  """Draws one line a model, in its look."""
  for name, look in style.model_looks(y).items():
    ax.plot(
      x,
      y[name],
      label=plain(name),
      markersize=4.5,
      clip_on=False,
      **style.line(look, marked=marked),
    )


def ticks(
  ax: Axes, places: Iterable[float], text: Callable[[float], str]
) -> None:
  """Sets the ticks of the horizontal axis to some places, and no others."""
  from matplotlib import ticker

  places = list(places)
  ax.xaxis.set_major_locator(ticker.FixedLocator(places))
  ax.xaxis.set_major_formatter(
    ticker.FixedFormatter([text(place) for place in places])
  )
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.tick_params(axis="x", labelsize=9)


def integer_ticks(ax: Axes, count: int = 6) -> None:
  """Lets the horizontal axis have whole numbers at its ticks, at most `count`."""
  from matplotlib import ticker

  ax.xaxis.set_major_locator(ticker.MaxNLocator(count, integer=True))


def sample(count: int) -> str:
  """Returns how precise an accuracy over so many images is, in a sentence."""
  low, high = intervals.proportion(0.5, count)
  return (
    f"{count:,} images: a 95 % interval is ± {50 * (high - low):.1f} points at"
    " most."
  )


def four(
  titles: Mapping[str, str], width: float, height: float
) -> tuple[Figure, dict[str, Axes]]:
  """Returns a figure with two by two titled panels, by name."""
  fig = style.new_figure(width, height)
  grid = fig.subplots(2, 2, squeeze=False)
  panels = dict(zip(titles, grid.flat, strict=True))
  for name, ax in panels.items():
    ax.set_title(titles[name])
  return fig, panels


def rows(ax: Axes, names: Sequence[str], *, named: bool = True) -> None:
  """Gives each of some models a row, the first on top."""
  shown = [plain(name) if named else "" for name in names]
  ax.set_yticks(range(len(names)), shown)
  ax.set_ylim(len(names) - 0.4, -0.6)
  ax.tick_params(axis="y", length=0, labelsize=8)
  ax.grid(visible=False, axis="y")


def intervals_in_rows(
  ax: Axes,
  colors: Sequence[str],
  center: np.ndarray,
  low: np.ndarray,
  high: np.ndarray,
  *,
  shift: float = 0.0,
  **marker: Any,
) -> None:
  """Draws a mark with its interval in each row.

  Args:
    ax: Axes prepared by `rows`.
    colors: One colour a row.
    center: Places of the marks, [rows].
    low: Lower ends, [rows].
    high: Upper ends, [rows].
    shift: Offset from the middle of the row, in rows.
    **marker: `marker` and, for hollow ones, `markerfacecolor`.
  """
  for row, color in enumerate(colors):
    ax.errorbar(
      center[row],
      row + shift,
      xerr=[[center[row] - low[row]], [high[row] - center[row]]],
      linestyle="",
      markersize=5,
      color=color,
      **marker,
    )


def key_to_marks(fig: Figure, marks: Mapping[str, dict[str, Any]]) -> None:
  """Draws a legend of marks by their label, above the panels."""
  from matplotlib import lines as shapes

  handles = [
    shapes.Line2D([], [], linestyle="", label=label, **mark)
    for label, mark in marks.items()
  ]
  fig.legend(handles=handles, loc="outside upper center", ncols=len(marks))


def color_table(
  ax: Axes,
  values: np.ndarray,
  row_names: Sequence[str],
  column_names: Sequence[str],
) -> None:
  """Draws numbers in cells, coloured by their share of the column's largest.

  Args:
    ax: The axes.
    values: [rows, columns] >= 0; NaN leaves a cell blank.
    row_names: Names of the rows.
    column_names: Names of the columns.
  """
  peaks = np.nanmax(np.nan_to_num(values), axis=0)
  shares = np.ma.masked_invalid(values / np.where(peaks > 0, peaks, 1))
  ax.pcolormesh(
    shares, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5
  )
  for (row, column), value in np.ndenumerate(values):
    if np.isfinite(value):
      ax.text(
        column + 0.5,
        row + 0.5,
        f"{value:.2g}",
        ha="center",
        va="center",
        fontsize=7,
        color="black" if shares[row, column] > 0.6 else "white",
      )
  ax.invert_yaxis()
  ax.grid(visible=False)
  ax.tick_params(length=0, labelsize=8)
  ax.set_yticks(np.arange(len(row_names)) + 0.5, [plain(n) for n in row_names])
  ax.set_xticks(
    np.arange(len(column_names)) + 0.5,
    [plain(name) for name in column_names],
    rotation=30,
    ha="right",
    rotation_mode="anchor",
  )
