"""Surfaces over a plane, in space and as contours: one panel of each a model."""

from typing import Any, NamedTuple

import numpy as np

from atat_jax.drawing import style
from atat_jax.drawing.style import Axes, Figure
from atat_jax.drawing.text import plain

_COLOR_MAP = "viridis"  # perceptually ordered
_LEVELS = 6  # lines of a contour


class Surface(NamedTuple):
  """One model's surface.

  Attributes:
    name: Name of the model.
    values: [P, P] over (a, b), finite.
    border: [P, P], 0 where a line is drawn.
  """

  name: str
  values: np.ndarray
  border: np.ndarray


def draw(
  surfaces: list[Surface],
  *,
  title: str,
  unit: str,
  axis_names: tuple[str, str],
) -> Figure:
  """Draws each surface in space, on one common scale, and as contours on its own.

  Args:
    surfaces: The surfaces, over the square from -1 to 1.
    title: Title of the figure.
    unit: Unit of the values.
    axis_names: Names of the axes a and b.

  Returns:
    The figure; at most three surfaces stand beside each other.
  """
  from matplotlib import colors

  down = -(-len(surfaces) // 3)
  across = -(-len(surfaces) // down)
  highest = max(float(surface.values.max()) for surface in surfaces)
  norm = colors.Normalize(0.0, highest if highest > 0 else 1.0)
  fig = style.new_figure(max(3.6, 2.9 * across), 1.1 + 4.7 * down, pad=0.06)
  grid = fig.add_gridspec(2 * down, across, height_ratios=[1.2, 1] * down)
  for number, surface in enumerate(surfaces):
    row, column = divmod(number, across)
    upper = fig.add_subplot(grid[2 * row, column], projection="3d")
    _in_space(upper, surface, norm, unit)
    lower = fig.add_subplot(grid[2 * row + 1, column])
    _contours(fig, lower, surface)
    lower.set_xlabel(axis_names[0], fontsize=9)
    lower.set_ylabel(axis_names[1] if column == 0 else "", fontsize=9)
  fig.suptitle(plain(title), fontsize=11)
  return fig


def _in_space(ax: Any, surface: Surface, norm: Any, unit: str) -> None:
  from matplotlib import ticker

  place = _places(surface)
  a, b = np.meshgrid(place, place, indexing="ij")
  ax.plot_surface(
    a,
    b,
    surface.values,
    cmap=_COLOR_MAP,
    norm=norm,
    rcount=len(a),
    ccount=len(a),
    linewidth=0,
    antialiased=False,
    rasterized=True,  # thousands of faces: a PDF of them is slow to show
  )
  low, high = surface.values.min(), surface.values.max()
  title = f"{plain(surface.name)}\n{low:.2g} to {high:.2g} {unit}"
  ax.set_title(title, fontsize=10, pad=0)
  ax.set_zlim(norm.vmin, norm.vmax)
  ax.view_init(elev=22, azim=-120)
  ax.set_box_aspect((1, 1, 0.85), zoom=0.9)
  ax.set_xticks([-1, 0, 1])
  ax.set_yticks([-1, 0, 1])
  ax.zaxis.set_major_locator(ticker.MaxNLocator(3))
  ax.tick_params(labelsize=7, pad=-2)
  ax.set_xlabel("a", fontsize=9, labelpad=-8)
  ax.set_ylabel("b", fontsize=9, labelpad=-8)
  ax.set_zlabel(unit, fontsize=8, labelpad=-5)


def _contours(fig: Figure, ax: Axes, surface: Surface) -> None:
  place, values = _places(surface), surface.values
  # Rows of a picture are its height: b goes up.
  picture = ax.pcolormesh(
    place, place, values.T, cmap=_COLOR_MAP, shading="gouraud"
  )
  levels = np.linspace(values.min(), values.max(), _LEVELS + 2)[1:-1]
  if levels[0] < levels[-1]:
    ax.contour(
      place, place, values.T, levels=levels, colors="white", linewidths=0.5
    )
  border = surface.border
  if border.min() < 0 < border.max():
    ax.contour(
      place, place, border.T, levels=[0], colors=style.VERMILION, linewidths=2.2
    )
  ax.plot(0, 0, "+", color="white", markersize=8, markeredgewidth=1.5)
  ax.set_aspect("equal")
  ax.grid(visible=False)
  ax.set_xticks([-1, 0, 1])
  ax.set_yticks([-1, 0, 1])
  ax.tick_params(labelsize=8)
  bar = fig.colorbar(picture, ax=ax, shrink=0.85, format="%.2g")
  bar.ax.locator_params(nbins=4)
  bar.ax.tick_params(labelsize=7)
  bar.outline.set_visible(False)


def _places(surface: Surface) -> np.ndarray:
  return np.linspace(-1, 1, len(surface.values))
