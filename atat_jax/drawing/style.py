"""Style that every figure shares, and writing a figure to a file."""

import contextlib
import io
import itertools
import os
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from atat_jax.drawing.text import plain
from atat_jax.process import stops
from atat_jax.runs import files, roles

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
else:  # matplotlib takes long to import
  Axes = Figure = Any

# Okabe and Ito's palette: told apart with every common kind of colour vision.
BLACK = "#000000"
BLUE = "#0072B2"
GREEN = "#009E73"
ORANGE = "#E69F00"
VERMILION = "#D55E00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
GREY = "#777777"
# Two of Paul Tol's, for the eighth method and more.
WINE = "#882255"
OLIVE = "#999933"


class Look(NamedTuple):
  """Colour, line style and marker of a model, told apart without colour too.

  No line is dotted: dotted lines are reference lines.
  """

  color: str
  line: str | tuple[int, tuple[int, ...]]
  marker: str


_DASH_DOT_DOT = (0, (7, 2, 1, 2, 1, 2))

_ROLE_LOOKS = {
  roles.TEACHER: Look(ORANGE, "--", "s"),
  roles.STUDENT: Look(BLUE, "-", "o"),
}
_OTHER_LOOKS = (
  Look(GREEN, "-.", "^"),
  Look(PURPLE, "-", "v"),
  Look(BLACK, _DASH_DOT_DOT, "D"),
  Look(VERMILION, "--", "X"),
  Look(SKY, "-.", "P"),
  Look(GREY, _DASH_DOT_DOT, "p"),
  Look(WINE, "-", "*"),
  Look(OLIVE, "--", "h"),
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


# Settings of a session, which no style has.
_SESSION = ("backend", "interactive", "timezone", "date.epoch", "toolbar")


def import_matplotlib() -> None:
  """Imports matplotlib, whatever backend the environment names.

  A command started from a notebook inherits the notebook's backend, which this
  interpreter may lack. No figure here needs any; a user's pyplot may.
  """
  if "matplotlib" in sys.modules:
    return
  backend = os.environ.pop("MPLBACKEND", None)
  try:
    import matplotlib
  finally:
    if backend is not None:
      os.environ["MPLBACKEND"] = backend
  if backend:
    with contextlib.suppress(ValueError):
      matplotlib.rcParams["backend"] = backend


@contextlib.contextmanager
def context() -> Iterator[None]:
  """Draws and saves figures in this style, whatever the user's settings are."""
  import_matplotlib()
  import matplotlib

  settings: Any = {
    name: value
    for name, value in matplotlib.rcParamsDefault.items()
    if not name.startswith(_SESSION)
  }
  with matplotlib.rc_context(settings | _STYLE):
    yield


def new_figure(width: float, height: float, pad: float = 0.04) -> Figure:
  """Returns a figure that belongs to no window and no pyplot.

  Args:
    width: Width in inches.
    height: Height in inches.
    pad: Space around each of its axes, in inches.
  """
  import_matplotlib()
  from matplotlib import figure, layout_engine

  layout = layout_engine.ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
  return figure.Figure(figsize=(width, height), layout=layout)


def model_looks(names: Iterable[str]) -> dict[str, Look]:
  """Returns one look a model, the same in every figure of these models.

  Teacher and student, also those of a named run ("atat (student)"), have looks
  of their own; other models take theirs from a fixed cycle, in the order of
  their names.

  Args:
    names: Names of the models, in any order.
  """
  known = dict.fromkeys(str(name) for name in names)
  roles_of = {name: _role(name) for name in known}
  shared = list(roles_of.values())
  looks = {
    name: _ROLE_LOOKS[role]
    for name, role in roles_of.items()
    if role in _ROLE_LOOKS and shared.count(role) == 1
  }
  others = sorted(name for name in known if name not in looks)
  looks |= dict(zip(others, itertools.cycle(_OTHER_LOOKS), strict=False))
  return {name: looks[name] for name in known}


def _role(name: str) -> str:
  """Returns "student" for "student" and for "atat (student)"."""
  return name.rpartition("(")[2].rstrip(")")


def model_colors(names: Iterable[str]) -> dict[str, str]:
  """Returns one colour a model; see `model_looks`."""
  return {name: look.color for name, look in model_looks(names).items()}


def line(look: Look, *, marked: bool = False) -> dict[str, Any]:
  """Returns the arguments of `plot` that draw a model's line."""
  found = {"color": look.color, "linestyle": look.line, "linewidth": 1.6}
  return found | ({"marker": look.marker} if marked else {})


def legend(fig: Figure, ax: Axes) -> None:
  """Draws the legend of one of the axes above the figure, in rows that fit."""
  handles, names = ax.get_legend_handles_labels()
  fig.legend(
    handles, names, loc="outside upper center", ncols=legend_columns(fig, names)
  )


def legend_columns(fig: Figure, names: Sequence[str]) -> int:
  """Returns how many columns of a legend fit into the width of a figure."""
  fits = sum(len(name) + 6 for name in names) <= 12 * fig.get_figwidth()
  return len(names) if fits else 2


def letters(size: float, text: str, room: int) -> float:
  """Returns the size, less for a text of more letters than there is room."""
  return size * min(1, room / max(len(text), 1))


def caption(fig: Figure, text: str, size: float = 8) -> None:
  """Writes sentences below a figure, broken to its width.

  Args:
    fig: The figure.
    text: The sentences.
    size: Size of the letters, in points.
  """
  width = int(fig.get_figwidth() * 72 / (0.52 * size))
  text = "\n".join(textwrap.wrap(text[0].upper() + text[1:], width))
  fig.supxlabel(plain(text), fontsize=size, color="#444444")


def save(fig: Figure, path: pathlib.Path) -> pathlib.Path:
  """Writes a figure as PNG and, beside it, as PDF; each atomically.

  The same figure gives the same bytes: no date is written.

  Args:
    fig: The figure.
    path: Path of the PNG file.

  Returns:
    That path.
  """
  stops.check()
  for suffix, metadata in ((".png", None), (".pdf", {"CreationDate": None})):
    content = io.BytesIO()
    fig.savefig(content, format=suffix[1:], metadata=metadata)
    files.write_bytes(path.with_suffix(suffix), content.getvalue())
    fig.set_layout_engine("none")  # found once is enough: it takes longest
  return path
