"""Pictures of a run, drawn from the files of its working directory alone.

Nothing here needs a model or JAX, so a picture can be redone anywhere.
"""

import os
import pathlib


def draw_all(workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Draws every figure whose inputs are there.

  Args:
    workdir: directory of a run. Read: `metrics.jsonl`,
      `teacher/metrics.jsonl`, `results.json`, `attention.npz`, each if it
      exists.

  Returns:
    Paths of the PNG files written, all in `workdir/figures`, in the order in
    which a reader wants them; empty if there is nothing to draw.

  Raises:
    UserError: an input exists and cannot be read.
  """
  # Here and not above: a terminal table must not wait for matplotlib.
  from atat_jax.figures import attention, curves, robustness

  workdir = pathlib.Path(workdir)
  return [
    *robustness.draw(workdir),
    *curves.draw(workdir),
    *attention.draw(workdir / "attention.npz", workdir / "figures"),
  ]


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
