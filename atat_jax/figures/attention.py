"""Attention maps of teacher and student, on clean and attacked images."""

import pathlib

import numpy as np
from matplotlib import axes, cm, figure, patches

from atat_jax.figures import files, style

# Test images a file: so few that the labels stay legible on a telephone.
_IMAGES_PER_FIGURE = 3
_COLOR_MAP = "viridis"  # perceptually ordered
_OVERLAY = 0.5  # opacity of the map; the image shows through

_VIEW_NAMES = {"clean": "clean", "adversarial": "attacked"}


def draw(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws the maps, a column for each test image.

  From top to bottom: the image, then for teacher and student the map on the
  clean and on the attacked image, over the image in grey. Every map is scaled
  to its own maximum: it shows where a network looks, not how strongly.

  Args:
    workdir: reads `attention.npz`.

  Returns:
    Paths of `figures/attention_{1,2,...}.png`, three test images each.
  """
  data = files.read_attention(workdir)
  if data is None:
    return []
  starts = range(0, len(data.images), _IMAGES_PER_FIGURE)
  return [
    _draw_some(
      data,
      range(start, min(start + _IMAGES_PER_FIGURE, len(data.images))),
      workdir / "figures" / f"attention_{number}.png",
    )
    for number, start in enumerate(starts, start=1)
  ]


def _draw_some(
  data: files.Attention, indices: range, path: pathlib.Path
) -> pathlib.Path:
  num_rows = 1 + len(data.views)
  with style.context():
    fig = style.new_figure(4.8, 0.5 + 1.62 * num_rows, pad=0.03)
    # As many columns on the last figure as on the others, so that all pictures
    # have one size.
    grid = fig.subplots(num_rows, _IMAGES_PER_FIGURE, squeeze=False)
    for ax in grid.flat:
      ax.set_axis_off()
    for column, index in enumerate(indices):
      _image(grid[0, column], data, index)
      for row, view in enumerate(data.views.values(), start=1):
        _map(grid[row, column], data, view, index)
    names = ["test image"] + [
      f"{model}, {_VIEW_NAMES[kind]}" for model, kind in data.views
    ]
    for ax, name in zip(grid[:, 0], names, strict=True):
      ax.text(
        -0.06,
        0.5,
        name,
        rotation="vertical",
        ha="right",
        va="center",
        fontsize=9,
        transform=ax.transAxes,
      )
    _scale(fig, grid)
    return style.save(fig, path)


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
  bar.ax.set_xticklabels(["no attention", "the map's maximum"], fontsize=8)
  bar.ax.tick_params(length=0)
  bar.outline.set_visible(False)


def _image(ax: axes.Axes, data: files.Attention, index: int) -> None:
  image = data.images[index]
  if image.shape[-1] == 1:
    ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
  else:
    ax.imshow(np.clip(image, 0, 1))
  _title(ax, data.class_names[data.labels[index]], style.BLACK)


def _map(
  ax: axes.Axes, data: files.Attention, view: files.AttentionMaps, index: int
) -> None:
  image = view.images[index]
  height, width = image.shape[:2]
  extent = (-0.5, width - 0.5, height - 0.5, -0.5)
  # In grey, so that every colour in the picture belongs to the map; and never
  # black, on which the map's colours would look unlike those on white.
  grey = image.mean(axis=-1)
  low, high = grey.min(), grey.max()
  ax.imshow(grey, cmap="gray", vmin=low - 0.5 * (high - low), vmax=high)
  peak = view.maps[index].max()
  ax.imshow(
    view.maps[index],
    cmap=_COLOR_MAP,
    vmin=0,
    vmax=peak if peak > 0 else 1,  # a map of zeros is dark all over
    alpha=_OVERLAY,
    extent=extent,
    interpolation="bilinear",
  )
  prediction = view.predictions[index]
  name = data.class_names[prediction]
  percent = f"({100 * view.probabilities[index]:.0f}%)"
  if prediction == data.labels[index]:
    _title(ax, f"✓ {name} {percent}", style.BLUE)
    return
  _title(ax, f"✗ {name} {percent}", style.VERMILION, "bold")
  # A frame as well: the sign alone is small.
  ax.add_patch(
    patches.Rectangle(
      (-0.5, -0.5),
      width,
      height,
      fill=False,
      edgecolor=style.VERMILION,
      linewidth=2.5,
      linestyle=(0, (3, 1.5)),
      clip_on=False,
    )
  )


def _title(
  ax: axes.Axes, text: str, color: str, weight: str = "normal"
) -> None:
  # Long names ("aquarium fish") in smaller type, or neighbours would touch.
  size = 9 * min(1, 18 / len(text))
  text = text.replace("_", " ")
  ax.set_title(text, fontsize=size, pad=3, color=color, fontweight=weight)
