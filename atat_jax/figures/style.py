"""How every figure looks, and how it becomes a file."""

import contextlib
import io
import pathlib
import textwrap
from typing import Any

import matplotlib.style
from matplotlib import figure, layout_engine

from atat_jax.runs import files

# Okabe and Ito's palette: told apart with every common kind of colour vision.
BLACK = "#000000"
BLUE = "#0072B2"
GREEN = "#009E73"
ORANGE = "#E69F00"
VERMILION = "#D55E00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
GREY = "#777777"

# (colour, line, marker) of the n-th model: told apart without colour, too.
LOOKS = (
  (BLUE, "-", "o"),
  (VERMILION, "--", "s"),
  (GREEN, "-.", "^"),
  (BLACK, ":", "D"),
  (PURPLE, "-", "v"),
  (ORANGE, "--", "P"),
  (SKY, "-.", "X"),
  (GREY, ":", "p"),
)

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
  "pdf.fonttype": 42,  # text stays text
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


def look(number: int, *, marked: bool = False) -> dict[str, Any]:
  """How the n-th model's line looks: arguments of `plot`."""
  color, line, marker = LOOKS[number % len(LOOKS)]
  found = {"color": color, "linestyle": line, "linewidth": 1.6}
  return found | ({"marker": marker} if marked else {})


def caption(fig: figure.Figure, text: str, size: float = 8) -> None:
  """Writes sentences below a figure, broken to its width.

  Args:
    fig: The figure; what is below it already, such as a legend, is written on.
    text: The sentences.
    size: Of the letters, in points.
  """
  letters = int(fig.get_figwidth() * 72 / (0.52 * size))
  text = "\n".join(textwrap.wrap(text[0].upper() + text[1:], letters))
  fig.supxlabel(text, fontsize=size, color="#444444")


def save(fig: figure.Figure, path: pathlib.Path) -> pathlib.Path:
  """Writes a figure as PNG and, beside it, as PDF; each atomically.

  The same figure gives the same bytes: no date is written.

  Args:
    fig: the figure.
    path: of the PNG file.

  Returns:
    That path.
  """
  for suffix, metadata in ((".png", None), (".pdf", {"CreationDate": None})):
    content = io.BytesIO()
    fig.savefig(content, format=suffix[1:], metadata=metadata)
    files.write_bytes(path.with_suffix(suffix), content.getvalue())
    fig.set_layout_engine("none")  # found once is enough: it takes longest
  return path
