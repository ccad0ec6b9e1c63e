"""Pictures of a run, drawn from the files of its working directory alone.

Nothing here needs a model or JAX, so a picture can be redone anywhere.
"""

import os
import pathlib


def draw_all(workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Draws every figure whose inputs are there.

  Args:
    workdir: directory of a run. Read: `metrics.jsonl`,
      `teacher/metrics.jsonl`, `results.json` and the files of the analyses,
      each if it exists.

  Returns:
    Paths of the PNG files written, all in `workdir/figures`, in the order in
    which a reader wants them; empty if there is nothing to draw.

  Raises:
    UserError: an input exists and cannot be read.
  """
  workdir = pathlib.Path(workdir)
  drawn = draw_analyses(workdir, workdir / "figures")
  return [
    *draw_results(workdir),
    *draw_curves(workdir),
    *(path for paths in drawn.values() for path in paths),
  ]


def draw_results(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws the bars of `results.json`; see `robustness.draw`."""
  # Here and not above: a terminal table must not wait for matplotlib.
  from atat_jax.figures import robustness

  return robustness.draw(workdir)


def draw_curves(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws the curves of the training; see `curves.draw`."""
  from atat_jax.figures import curves

  return curves.draw(workdir)


def draw_analyses(
  source: pathlib.Path, directory: pathlib.Path
) -> dict[pathlib.Path, list[pathlib.Path]]:
  """Draws the analyses whose files are there.

  Args:
    source: Directory of the `.npz` files.
    directory: Where to.

  Returns:
    Path of a file to the PNG files drawn of it, in the order in which a reader
    wants them.

  Raises:
    UserError: A file cannot be read.
  """
  from atat_jax.figures import (
    attack_steps,
    attention,
    attention_shift,
    curvature,
    loss_landscape,
  )

  draw = {
    "attack_steps": attack_steps.draw,
    "attack_epsilons": attack_steps.draw_epsilons,
    "attention": attention.draw,
    "attention_rounds": attention.draw,
    "attention_shift": attention_shift.draw,
    "loss_landscape": loss_landscape.draw,
    "curvature": curvature.draw,
  }
  paths = {source / f"{stem}.npz": function for stem, function in draw.items()}
  return {
    path: function(path, directory)
    for path, function in paths.items()
    if path.exists()
  }


def draw_comparison(path: pathlib.Path) -> list[pathlib.Path]:
  """Draws the methods of a comparison side by side.

  Args:
    path: A `comparison.json`.

  Returns:
    Paths of the PNG files, beside it, one for each data set.

  Raises:
    UserError: The file cannot be read.
  """
  from atat_jax.figures import comparison

  return comparison.draw(path)
