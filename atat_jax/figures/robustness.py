"""Accuracy under each attack, models side by side."""

import pathlib
from typing import Any

from matplotlib import axes, patches

from atat_jax.drawing import style
from atat_jax.drawing.text import broken, plain
from atat_jax.runs import comparable, files, tables

_MIXED = (
  "Not all attacks had the same images and ball: the names tell them. Only those"
  " of the same can be compared."
)
_LETTERS = 24  # in a line of a name beside the bars
_THICKNESS = {"running": 0.84, "batch": 0.5}  # height of a bar, in rows


def draw(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws one bar for each row of `results.json`.

  Numbers with running statistics are solid bars; those with the statistics of
  the batch being evaluated are thin, hatched and pale, so that no one takes
  them for the same kind of number.

  Args:
    workdir: Directory of a run; `results.json` is read.

  Returns:
    Path of `figures/robustness.png`; empty if there are no results.
  """
  results = files.read_results(workdir, tables.SHOWN)
  if results is None or not results["rows"]:
    return []
  columns = tables.in_paper_order(tables.columns(results["rows"]))
  series = tables.series(results["rows"])
  models = list(dict.fromkeys(model for model, _ in series))
  colors = style.model_colors(models)
  # By model, so that what batch statistics claim lies under the real number.
  series.sort(key=lambda pair: models.index(pair[0]))
  heights = [_height(column) + 1 for column in columns]
  with style.context():
    fig = style.new_figure(5.2, 1.4 + 0.2 * sum(heights))
    ax = fig.add_subplot()
    _draw_bars(ax, columns, series, colors)
    ax.set_xlim(0, 110)  # room for the number behind a bar of 100 %
    ax.set_xticks(range(0, 101, 20))
    ax.set_xlabel("accuracy (%)")
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    handles = [
      patches.Patch(
        label=f"{plain(model)}, {tables.BATCH_NORM_NAMES[batch_norm]}",
        **_bar(colors[model], batch_norm),
      )
      for model, batch_norm in series
    ]
    fig.legend(handles=handles, loc="outside upper left", ncols=2)
    notes = [_MIXED] if comparable.note(columns) else []
    if any(column.derived for column in columns):
      notes.append(tables.WORST_CASE_MEANING)
    if notes:
      style.caption(fig, " ".join(notes))
    return [style.save(fig, workdir / files.FIGURES / "robustness.png")]


def _name(column: tables.Column) -> str:
  return broken(plain(column.title), _LETTERS)


def _height(column: tables.Column) -> int:
  """Returns the rows that the bars of a column, or its name, take."""
  return max(len(column.rows), _name(column).count("\n") + 1)


def _draw_bars(
  ax: axes.Axes,
  columns: list[tables.Column],
  series: list[tuple[str, str]],
  colors: dict[str, str],
) -> None:
  top = 0
  centers = []
  for column in columns:
    center = top + (_height(column) - 1) / 2
    y = center - (len(column.rows) - 1) / 2
    for model, batch_norm in series:
      accuracy = column.accuracy(model, batch_norm)
      if accuracy is None:
        continue
      percent = 100 * accuracy
      thickness = _THICKNESS[batch_norm]
      ax.barh(y, percent, thickness, **_bar(colors[model], batch_norm))
      weight = "bold" if batch_norm == "running" else "normal"
      ax.text(
        percent + 1,
        y,
        f"{percent:.1f}",
        va="center",
        fontsize=8,
        fontweight=weight,
      )
      y += 1
    centers.append(center)
    top += _height(column) + 1  # an empty row between two attacks
  ax.set_yticks(centers, [_name(column) for column in columns])
  ax.set_ylim(top - 1, -1)  # the first attack on top


def _bar(color: str, batch_norm: str) -> dict[str, Any]:
  if batch_norm == "running":
    return {"facecolor": color, "edgecolor": color}
  return {"facecolor": "white", "edgecolor": color, "hatch": "/////"}
