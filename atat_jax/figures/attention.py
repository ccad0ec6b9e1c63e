"""Attention maps over images: models side by side, or an attack as it goes on."""

import pathlib
import re
from typing import Any

import numpy as np
from matplotlib import axes, cm, figure, lines, patches

from atat_jax.drawing import style
from atat_jax.runs import files

_ROWS_PER_FIGURE = 6  # of maps
_COLOR_MAP = "viridis"  # perceptually ordered
_OVERLAY = 0.5  # opacity of the map; the image shows through
_CELL = 1.5  # inches


def draw(path: pathlib.Path, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws the maps of a few test images on each figure.

  On the left the image and its true class, beside it the maps, each over what
  the network saw, in grey. Several models stand side by side with their clean
  and attacked maps below each other (Fig. 2, 5 and 6 of the paper); of a single
  model, or where there are more rounds of an attack than models, the maps go
  from left to right (Fig. 1 and 3).

  A model's maps of one image share a scale, so that attention that is lost is
  seen as such. A cross marks a map's centre of mass, which shows a shift even in
  a pale map. Above a map stands what the model predicts and with which
  probability: with a dashed frame where that is wrong, with a full one where it
  is right and the first model is wrong ("corrected").

  Args:
    path: Of `attention.npz`, what `evaluation.attention_maps` or
      `evaluation.attention_rounds` returns; `class_names` [K] may be added.
    directory: Where to.

  Returns:
    Paths of `<name of the file>_{1,2,...}.png`; nothing if there is no file.

  Raises:
    UserError: The file cannot be read.
  """
  data = files.read_attention(path)
  if data is None:
    return []
  grid = _Grid(data)
  per_figure = max(1, _ROWS_PER_FIGURE // len(grid.rows))
  per_figure = min(per_figure, len(data.images))
  starts = range(0, len(data.images), per_figure)
  paths = []
  for number, start in enumerate(starts, start=1):
    with style.context():
      fig = grid.draw(start, per_figure)
      paths.append(style.save(fig, directory / f"{path.stem}_{number}.png"))
  return paths


def kind_name(kind: str) -> str:
  """A kind of input, in words."""
  match = re.fullmatch(r"round(\d+)", kind)
  if match is None:
    return {"adversarial": "attacked"}.get(kind, kind)
  number = int(match[1])
  if number == 0:
    return "attack's start"
  return f"{number} round" + ("s" if number > 1 else "")


class _Grid:
  """Where each map stands."""

  def __init__(self, data: files.Attention):
    self._data = data
    self._by_network = len(data.networks) >= max(2, len(data.kinds))
    networks, kinds = data.networks, [kind_name(kind) for kind in data.kinds]
    self.columns = networks if self._by_network else kinds
    self.rows = kinds if self._by_network else networks

  def _view(self, row: int, column: int) -> tuple[str, str]:
    if self._by_network:
      return self._data.networks[column], self._data.kinds[row]
    return self._data.networks[row], self._data.kinds[column]

  def draw(self, start: int, count: int) -> figure.Figure:
    """The figure of `count` images, fewer at the end of the data."""
    data, height = self._data, len(self.rows)
    num_columns = 1 + len(self.columns)
    fig = style.new_figure(
      0.3 + _CELL * num_columns, 1.3 + 1.1 * _CELL * height * count, pad=0.03
    )
    # As many rows on the last figure as on the others: one size for all.
    grid = fig.subplots(height * count, num_columns, squeeze=False)
    for ax in grid.flat:
      ax.set_axis_off()
    marks = set()
    for block, index in enumerate(
      range(start, min(start + count, len(data.images)))
    ):
      cells = grid[block * height : (block + 1) * height]
      _image(cells[0, 0], data, index)
      for row, name in enumerate(self.rows):
        if len(self.rows) > 1:
          _beside(cells[row, 1], name)
        self._attacked(cells[row, 0], row, index)
        for column in range(len(self.columns)):
          view = self._view(row, column)
          marks.add(_map(cells[row, column + 1], data, view, index))
    for ax, name in zip(grid[0, 1:], self.columns, strict=True):
      ax.annotate(
        name,
        (0.5, 1),
        (0, 18),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        fontsize=10 * min(1, 16 / len(name)),
        fontweight="bold",
      )
    _scale(fig, grid)
    _legend(fig, data.networks[0], marks)
    style.caption(
      fig, f"Grad-CAM of the true class at {data.layer}. {data.protocol}.", 7
    )
    return fig

  def _attacked(self, ax: axes.Axes, row: int, index: int) -> None:
    """The attacked image, where all models saw the same."""
    if not row or not self._by_network:
      return
    columns = range(len(self.columns))
    first, *others = (
      self._data.views[self._view(row, column)].images[index]
      for column in columns
    )
    if all(np.array_equal(first, other) for other in others):
      _show(ax, first)


def _beside(ax: axes.Axes, name: str) -> None:
  ax.text(
    -0.06,
    0.5,
    name,
    rotation="vertical",
    ha="right",
    va="center",
    fontsize=9 * min(1, 18 / len(name)),
    transform=ax.transAxes,
  )


def _scale(fig: figure.Figure, grid: np.ndarray) -> None:
  bar = fig.colorbar(
    cm.ScalarMappable(cmap=_COLOR_MAP),
    ax=grid,
    location="bottom",
    aspect=60,
    shrink=0.6,
    pad=0.01,
    ticks=[0, 1],
    alpha=0.8,
  )
  bar.ax.set_xticklabels(
    ["no attention", "the model's most for the image"], fontsize=8
  )
  bar.ax.tick_params(length=0)
  bar.outline.set_visible(False)


def _legend(fig: figure.Figure, first: str, marks: set[str]) -> None:
  handles: list[lines.Line2D | patches.Patch] = [
    lines.Line2D(
      [],
      [],
      linestyle="",
      marker="P",
      color="white",
      markeredgecolor="black",
      label="centre of mass",
    )
  ]
  for mark, label in (
    ("wrong", "wrong"),
    ("corrected", f"right where {first} is wrong"),
  ):
    if mark in marks:
      handles.append(patches.Patch(fill=False, label=label, **_FRAMES[mark]))
  fig.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)


def _show(ax: axes.Axes, image: np.ndarray) -> None:
  if image.shape[-1] == 1:
    ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
  else:
    ax.imshow(np.clip(image, 0, 1))


def _image(ax: axes.Axes, data: files.Attention, index: int) -> None:
  _show(ax, data.images[index])
  _title(ax, data.name(data.labels[index]), style.BLACK)


_FRAMES: dict[str, dict[str, Any]] = {
  "wrong": {
    "edgecolor": style.VERMILION,
    "linewidth": 2.5,
    "linestyle": (0, (3, 1.5)),
  },
  "corrected": {"edgecolor": style.GREEN, "linewidth": 2.5},
}


def _map(
  ax: axes.Axes, data: files.Attention, key: tuple[str, str], index: int
) -> str:
  """Draws a map; returns "right", "corrected" or "wrong"."""
  network, kind = key
  view = data.views[key]
  image = view.images[index]
  height, width = image.shape[:2]
  # In grey, so that every colour in the picture belongs to the map; and never
  # black, on which the map's colours would look unlike those on white.
  grey = image.mean(axis=-1)
  low, high = grey.min(), grey.max()
  ax.imshow(grey, cmap="gray", vmin=low - 0.5 * (high - low), vmax=high)
  peak = max(data.views[network, k].maps[index].max() for k in data.kinds)
  ax.imshow(
    view.maps[index],
    cmap=_COLOR_MAP,
    vmin=0,
    vmax=peak if peak > 0 else 1,  # a map of zeros is dark all over
    alpha=_OVERLAY,
    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    interpolation="bilinear",
  )
  _mark_center(ax, view.maps[index], height, width)
  label, prediction = data.labels[index], view.predictions[index]
  text = f"{data.name(prediction)} ({100 * view.probabilities[index]:.0f}%)"
  if prediction != label:
    _title(ax, f"✗ {text}", style.VERMILION, "bold")
    _frame(ax, "wrong", height, width)
    return "wrong"
  first = data.views[data.networks[0], kind].predictions[index]
  if first != label:
    _title(ax, f"✓ {text}", style.GREEN, "bold")
    _frame(ax, "corrected", height, width)
    return "corrected"
  _title(ax, f"✓ {text}", style.BLUE)
  return "right"


def _mark_center(
  ax: axes.Axes, map_: np.ndarray, height: int, width: int
) -> None:
  total = map_.sum(dtype=float)
  if not total > 0:
    return
  rows, columns = map_.shape
  row = (map_.sum(1) * (np.arange(rows) + 0.5)).sum() / total
  column = (map_.sum(0) * (np.arange(columns) + 0.5)).sum() / total
  ax.plot(
    column * width / columns - 0.5,
    row * height / rows - 0.5,
    marker="P",
    color="white",
    markeredgecolor="black",
    markeredgewidth=0.8,
    markersize=7,
  )


def _frame(ax: axes.Axes, mark: str, height: int, width: int) -> None:
  # As well as the sign, which alone is small.
  ax.add_patch(
    patches.Rectangle(
      (-0.5, -0.5), width, height, fill=False, clip_on=False, **_FRAMES[mark]
    )
  )


def _title(
  ax: axes.Axes, text: str, color: str, weight: str = "normal"
) -> None:
  # Long names ("aquarium fish") in smaller type, or neighbours would touch.
  size = 9 * min(1, 18 / len(text))
  text = text.replace("_", " ")
  ax.set_title(text, fontsize=size, pad=4, color=color, fontweight=weight)
