"""Pictures of a run, drawn from the files of its working directory alone.

Nothing here needs a model or a device, so a picture can be redone anywhere.
"""

import os
import pathlib

from atat_jax.drawing import style
from atat_jax.runs import files, locations


def draw_all(workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Draws every figure whose inputs are there.

  Args:
    workdir: Directory of a run. Read: `metrics.jsonl`,
      `teacher/metrics.jsonl`, `results.json` and the files of the analyses,
      each if it exists.

  Returns:
    Paths of the PNG files written, all in `workdir/figures`, in the order in
    which a reader wants them; empty if there is nothing to draw.

  Raises:
    UserError: An input exists and cannot be read.
  """
  from atat_jax import analyses  # it imports JAX, which takes long

  workdir = locations.find("workdir", workdir)
  return [
    *draw_results(workdir),
    *draw_curves(workdir),
    *analyses.draw(workdir, workdir / files.FIGURES),
  ]


def draw_results(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws the bars of `results.json`; see `robustness.draw`."""
  # Here and not above: a terminal table must not wait for matplotlib.
  style.import_matplotlib()
  from atat_jax.figures import robustness

  return robustness.draw(locations.find("workdir", workdir))


def draw_curves(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws the curves of the training; see `curves.draw`."""
  style.import_matplotlib()
  from atat_jax.figures import curves

  return curves.draw(locations.find("workdir", workdir))


def draw_comparison(path: pathlib.Path) -> list[pathlib.Path]:
  """Draws the methods of a comparison side by side.

  Args:
    path: A `comparison.json`.

  Returns:
    Paths of the PNG files, beside it, one for each data set.

  Raises:
    UserError: The file cannot be read.
  """
  style.import_matplotlib()
  from atat_jax.figures import comparison

  return comparison.draw(locations.find("path", path))
