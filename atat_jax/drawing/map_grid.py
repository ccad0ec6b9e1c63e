"""Attention maps over images: models side by side, or an attack as it goes on."""

import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from atat_jax.drawing import style
from atat_jax.drawing.style import Axes, Figure
from atat_jax.drawing.text import plain
from atat_jax.runs import attention_file

_ROWS_PER_FIGURE = 6  # rows of maps
_COLOR_MAP = "viridis"  # perceptually ordered
_OVERLAY = 0.5  # opacity of the map; the image shows through
_CELL = 1.5  # inches
_PAIR = 0.62  # height of the attacked image and its perturbation, in cells


def draw(
  data: attention_file.Attention, stem: str, directory: pathlib.Path
) -> list[pathlib.Path]:
  """Draws the maps of a few images on each figure.

  On the left the image and its true class, beside it the maps, each over what
  the network saw, in grey. Several models stand side by side with their clean
  and attacked maps below each other (Fig. 2, 5 and 6 of the paper); of a single
  model, or where there are more rounds of an attack than models, the maps go
  from left to right (Fig. 1 and 3). Below the maps of attacked images stand
  those images and the perturbations, magnified.

  A model's maps of one image share a scale, so that attention that is lost is
  seen as such. A cross marks a map's centre of mass, which shows a shift even in
  a pale map. The title of a map is the model's prediction with its probability;
  a dashed frame marks a wrong one, a full frame one that is right where the
  first model is wrong ("corrected").

  Args:
    data: Images, maps and predictions.
    stem: Beginning of the pictures' names.
    directory: Directory for the pictures.

  Returns:
    Paths of `<stem>_{1,2,...}.png`.
  """
  rows = _rows(data)
  num_maps = sum(not row.pair for row in rows)
  per_figure = max(1, _ROWS_PER_FIGURE // num_maps)
  per_figure = min(per_figure, len(data.images))
  paths: list[pathlib.Path] = []
  for start in range(0, len(data.images), per_figure):
    with style.context():
      fig = _figure(data, rows, start, per_figure)
      path = directory / f"{stem}_{len(paths) + 1}.png"
      paths.append(style.save(fig, path))
  return paths


def kind_name(kind: str) -> str:
  """Returns a kind of input in words: "attacked", "2 rounds"."""
  match = re.fullmatch(r"round(\d+)", kind)
  if match is None:
    return {"adversarial": "attacked"}.get(kind, kind)
  number = int(match[1])
  if number == 0:
    return "attack's start"
  return f"{number} round" + ("s" if number > 1 else "")


def magnification(data: attention_file.Attention) -> float:
  """Returns the factor that lets the largest perturbation fill half the range."""
  peak = max(
    float(abs(view.images - data.images).max()) for view in data.views.values()
  )
  return float(f"{0.5 / peak:.2g}") if peak > 0 else 1.0


class _Row(NamedTuple):
  """One row of an image's block: maps, or attacked images beside perturbations.

  Attributes:
    name: Name at its left.
    pair: Whether it has images and perturbations, not maps.
    views: (network, kind) of each column.
  """

  name: str
  pair: bool
  views: tuple[tuple[str, str], ...]


def _by_network(data: attention_file.Attention) -> bool:
  return len(data.networks) >= max(2, len(data.kinds))


def _columns(data: attention_file.Attention) -> list[str]:
  if _by_network(data):
    return data.networks
  return [kind_name(kind) for kind in data.kinds]


def _rows(data: attention_file.Attention) -> list[_Row]:
  rows = []
  if _by_network(data):
    for kind in data.kinds:
      views = tuple((network, kind) for network in data.networks)
      rows.append(_Row(kind_name(kind), False, views))
      if kind != "clean":
        rows.append(_Row("", True, views))
  else:
    for network in data.networks:
      views = tuple((network, kind) for kind in data.kinds)
      name = network if len(data.networks) > 1 else ""
      rows += [_Row(name, False, views), _Row("", True, views)]
  return rows


def _figure(
  data: attention_file.Attention, rows: list[_Row], start: int, count: int
) -> Figure:
  """Returns the figure of `count` images, fewer at the end of the data."""
  columns = _columns(data)
  heights = [_PAIR if row.pair else 1.1 for row in rows]
  fig = style.new_figure(
    0.3 + _CELL * (1 + len(columns)), 1.3 + _CELL * sum(heights) * count, 0.03
  )
  # As many rows on the last figure as on the others: one size for all.
  grid = fig.subplots(
    len(rows) * count,
    1 + len(columns),
    squeeze=False,
    gridspec_kw={"height_ratios": heights * count},
  )
  for ax in grid.flat:
    ax.set_axis_off()
  marks = set()
  blocks = grid.reshape(count, len(rows), -1)
  indices = range(start, min(start + count, len(data.images)))
  for block, index in zip(blocks, indices, strict=False):
    _show(block[0, 0], data.images[index])
    _title(block[0, 0], data.name(data.labels[index]), style.BLACK)
    for cells, row in zip(block, rows, strict=True):
      if row.name:
        _beside(cells[1], row.name)
      for ax, view in zip(cells[1:], row.views, strict=True):
        if row.pair:
          _pair(ax, data, view, index)
        else:
          marks.add(_map(ax, data, view, index))
  for ax, name in zip(grid[0, 1:], columns, strict=True):
    _heading(ax, name)
  _scale(fig, grid)
  _legend(fig, data.networks[0], marks)
  style.caption(
    fig,
    f"Grad-CAM of the true class at {data.layer}. {data.protocol}. Small: the"
    " attacked image and its perturbation, magnified"
    f" {magnification(data):g} times.",
    7,
  )
  return fig


def _pair(
  ax: Axes, data: attention_file.Attention, key: tuple[str, str], index: int
) -> None:
  """Draws the attacked image and, beside it, the magnified perturbation."""
  if key[1] == "clean":
    return
  attacked = data.views[key].images[index]
  moved = magnification(data) * (attacked - data.images[index])
  for left, image in ((0.0, attacked), (0.52, 0.5 + moved)):
    inset = ax.inset_axes((left, 0, 0.48, 1))
    inset.set_axis_off()
    _show(inset, image)


def _heading(ax: Axes, name: str) -> None:
  ax.annotate(
    plain(name),
    (0.5, 1),
    (0, 18),
    xycoords="axes fraction",
    textcoords="offset points",
    ha="center",
    fontsize=style.letters(10, name, 16),
    fontweight="bold",
  )


def _beside(ax: Axes, name: str) -> None:
  ax.text(
    -0.06,
    0.5,
    plain(name),
    rotation="vertical",
    ha="right",
    va="center",
    fontsize=style.letters(9, name, 18),
    transform=ax.transAxes,
  )


def _scale(fig: Figure, grid: np.ndarray) -> None:
  from matplotlib import cm

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
    ["no attention", "the model's highest for the image"], fontsize=8
  )
  bar.ax.tick_params(length=0)
  bar.outline.set_visible(False)


def _legend(fig: Figure, first: str, marks: set[str]) -> None:
  from matplotlib import lines, patches

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
    ("corrected", f"right where {plain(first)} is wrong"),
  ):
    if mark in marks:
      handles.append(patches.Patch(fill=False, label=label, **_FRAMES[mark]))
  names = [str(handle.get_label()) for handle in handles]
  columns = style.legend_columns(fig, names)
  fig.legend(
    handles=handles, loc="outside upper center", ncols=columns, fontsize=8
  )


def _show(ax: Axes, image: np.ndarray) -> None:
  if image.shape[-1] == 3:
    ax.imshow(np.clip(image, 0, 1))
  else:
    ax.imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=1)


_FRAMES: dict[str, dict[str, Any]] = {
  "wrong": {
    "edgecolor": style.VERMILION,
    "linewidth": 2.5,
    "linestyle": (0, (3, 1.5)),
  },
  "corrected": {"edgecolor": style.GREEN, "linewidth": 2.5},
}


def _map(
  ax: Axes, data: attention_file.Attention, key: tuple[str, str], index: int
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


def _mark_center(ax: Axes, map_: np.ndarray, height: int, width: int) -> None:
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


def _frame(ax: Axes, mark: str, height: int, width: int) -> None:
  from matplotlib import patches

  ax.add_patch(
    patches.Rectangle(
      (-0.5, -0.5), width, height, fill=False, clip_on=False, **_FRAMES[mark]
    )
  )


def _title(ax: Axes, text: str, color: str, weight: str = "normal") -> None:
  # Long names ("aquarium fish") in smaller type, or neighbours would touch.
  size = style.letters(9, text, 18)
  text = plain(text.replace("_", " "))
  ax.set_title(text, fontsize=size, pad=4, color=color, fontweight=weight)
