"""The loss around an image, a surface for each model (Fig. 7)."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import axes, cm, colors, figure, ticker

from atat_jax.drawing import style
from atat_jax.runs import files

_COLUMNS = 3  # models beside each other
_COLOR_MAP = "viridis"  # perceptually ordered
_LEVELS = 6  # lines of a contour


def draw(path: pathlib.Path, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws a surface and, below it, its contour for each network.

  All of one image's panels share one scale of the loss. A thick line in a
  contour is where the prediction turns from right to wrong. Titles use
  `indices` [n] and `class_names` [K], where the file has them.

  Args:
    path: Of `loss_landscape.npz`, what `evaluation.loss_landscape` returns.
    directory: Where to.

  Returns:
    Paths of `loss_landscape_{1,2,...}.png`, one for each image; nothing if
    there is no file.

  Raises:
    UserError: The file cannot be read.
  """
  data = files.read_arrays(path)
  if data is None:
    return []
  return [
    _draw_image(data, image, directory / f"loss_landscape_{image + 1}.png")
    for image in range(len(data["labels"]))
  ]


def _draw_image(
  data: files.Arrays, image: int, path: pathlib.Path
) -> pathlib.Path:
  names = [str(name) for name in data["networks"]]
  across = min(_COLUMNS, len(names))
  down = -(-len(names) // across)
  highest = max(float(data[f"{name}_loss"][image].max()) for name in names)
  norm = colors.Normalize(0.0, highest if highest > 0 else 1.0)
  with style.context():
    fig = style.new_figure(max(5.2, 2.6 * across), 1.3 + 4.6 * down, pad=0.06)
    grid = fig.add_gridspec(2 * down, across, height_ratios=[1.2, 1] * down)
    panels = []
    for number, name in enumerate(names):
      row, column = divmod(number, across)
      surface = data[f"{name}_loss"][image]
      upper = fig.add_subplot(grid[2 * row, column], projection="3d")
      _surface(upper, data["coefficients"], surface, norm)
      upper.set_title(f"{name}\n{_range(surface)}", fontsize=10, pad=0)
      lower = fig.add_subplot(grid[2 * row + 1, column])
      margin = data[f"{name}_margin"][image]
      _contour(lower, data["coefficients"], surface, margin, norm)
      panels += [upper, lower]
    fig.suptitle(_title(data, image), fontsize=11)
    _explain(fig, panels, data, norm)
    return style.save(fig, path)


def _surface(
  ax: Any, coefficients: np.ndarray, surface: np.ndarray, norm: Any
) -> None:
  a, b = np.meshgrid(coefficients, coefficients, indexing="ij")
  ax.plot_surface(
    a,
    b,
    surface,
    cmap=_COLOR_MAP,
    norm=norm,
    rcount=len(a),
    ccount=len(a),
    linewidth=0,
    antialiased=False,
    rasterized=True,  # thousands of faces: a PDF of them is slow to show
  )
  ax.set_zlim(norm.vmin, norm.vmax)
  ax.view_init(elev=22, azim=-120)
  ax.set_box_aspect((1, 1, 0.85), zoom=0.95)
  _ends(ax, coefficients)
  ax.zaxis.set_major_locator(ticker.MaxNLocator(4))
  ax.tick_params(labelsize=7, pad=-3)
  ax.set_xlabel("a", fontsize=9, labelpad=-9)
  ax.set_ylabel("b", fontsize=9, labelpad=-9)
  ax.set_zlabel("loss (nats)", fontsize=8, labelpad=-7)


def _contour(
  ax: axes.Axes,
  coefficients: np.ndarray,
  surface: np.ndarray,
  margin: np.ndarray,
  norm: Any,
) -> None:
  x = coefficients
  # Rows of a picture are its height: b goes up.
  ax.pcolormesh(x, x, surface.T, cmap=_COLOR_MAP, norm=norm, shading="gouraud")
  own = np.linspace(surface.min(), surface.max(), _LEVELS + 2)[1:-1]
  if own[0] < own[-1]:
    ax.contour(x, x, surface.T, levels=own, colors="white", linewidths=0.5)
  if margin.min() < 0 < margin.max():
    ax.contour(
      x, x, margin.T, levels=[0], colors=style.VERMILION, linewidths=2.2
    )
  ax.plot(0, 0, "+", color="white", markersize=8, markeredgewidth=1.5)
  ax.set_aspect("equal")
  ax.grid(visible=False)
  _ends(ax, x)
  ax.tick_params(labelsize=8)
  ax.set_xlabel("a, along sign(gradient)", fontsize=9)
  ax.set_ylabel("b, Rademacher", fontsize=9)


def _ends(ax: Any, coefficients: np.ndarray) -> None:
  places = [coefficients[0], 0, coefficients[-1]]
  texts = [f"{place:.3g}" for place in places]
  ax.set_xticks(places, texts)
  ax.set_yticks(places, texts)


def _range(surface: np.ndarray) -> str:
  return f"loss {surface.min():.2g} to {surface.max():.2g}"


def _title(data: files.Arrays, image: int) -> str:
  number = int(data["indices"][image]) if "indices" in data else image + 1
  label = data["labels"][image]
  name = data["class_names"][label] if "class_names" in data else label
  return f"loss around image {number} ({str(name).replace('_', ' ')})"


def _explain(
  fig: figure.Figure, panels: list[axes.Axes], data: files.Arrays, norm: Any
) -> None:
  bar = fig.colorbar(
    cm.ScalarMappable(norm=norm, cmap=_COLOR_MAP),
    ax=panels,
    location="bottom",
    aspect=50,
    shrink=0.8,
    label="cross-entropy (nats), one scale for all panels",
  )
  bar.outline.set_visible(False)
  style.caption(
    fig,
    f"{data['protocol']}. a and b in the unit of the pixels in [0, 1]. Cross:"
    " the image. Thick line: where the prediction turns from right to wrong."
    " Thin lines: a model's own levels.",
  )
