"""How every figure looks, and how it becomes a file."""

import contextlib
import io
import pathlib

import matplotlib.style
from matplotlib import figure, layout_engine

from atat_jax.figures import files

# Okabe and Ito's palette: told apart with every common kind of colour vision.
BLACK = "#000000"
BLUE = "#0072B2"
GREEN = "#009E73"
ORANGE = "#E69F00"
VERMILION = "#D55E00"

_STYLE = {
  "font.size": 10,
  "axes.titlesize": 11,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.axisbelow": True,
  "axes.grid": True,
  "grid.color": "#dddddd",
  "legend.frameon": False,
  "legend.fontsize": 9,
  "hatch.linewidth": 0.6,
  "savefig.dpi": 140,
}


def context() -> contextlib.AbstractContextManager[None]:
  """The style, as a context to draw and save in."""
  # On top of the defaults, or a user's matplotlibrc would show through.
  return matplotlib.style.context(["default", _STYLE])


def new_figure(width: float, height: float, pad: float = 0.04) -> figure.Figure:
  """A figure that belongs to no window and no pyplot.

  Args:
    width: in inches.
    height: in inches.
    pad: space around each of its axes, in inches.
  """
  layout = layout_engine.ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
  return figure.Figure(figsize=(width, height), layout=layout)


def save(fig: figure.Figure, path: pathlib.Path) -> pathlib.Path:
  """Writes a figure as PNG, atomically."""
  content = io.BytesIO()
  fig.savefig(content, format="png")
  return files.write_atomically(path, content.getvalue())
