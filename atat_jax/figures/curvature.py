"""How strongly the loss bends at the images, by model."""

import pathlib

import numpy as np
from matplotlib import axes

from atat_jax.drawing import style
from atat_jax.runs import files


def draw(path: pathlib.Path, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws a row for each network: the eigenvalues' spread and their mean.

  Args:
    path: Of `curvature.npz`, what `evaluation.curvature` returns.
    directory: Where to.

  Returns:
    The path of `curvature.png`; nothing if there is no file.

  Raises:
    UserError: The file cannot be read.
  """
  data = files.read_arrays(path)
  if data is None:
    return []
  names = data["networks"]
  with style.context():
    fig = style.new_figure(5.2, 2.0 + 0.38 * len(names))
    ax = fig.add_subplot()
    ax.set_title("curvature of the loss: its Hessian in the pixels")
    ax.set_xscale("log")
    for number in range(len(names)):
      _row(ax, data, number)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)  # the first model on top
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("largest |eigenvalue| (nats per squared unit of pixels)")
    style.caption(fig, _sentences(data))
    return [style.save(fig, directory / "curvature.png")]


def _row(ax: axes.Axes, data: files.Arrays, number: int) -> None:
  name = data["networks"][number]
  values = np.abs(data[f"{name}_eigenvalue"])
  color = style.model_colors(data["networks"])[name]
  low, quarter, median, three_quarters, high = np.percentile(
    values[values > 0] if (values > 0).any() else [np.nan],
    [5, 25, 50, 75, 95],
  )
  ax.plot([low, high], [number, number], color=color, linewidth=1.2)
  ax.barh(
    number,
    three_quarters - quarter,
    0.5,
    left=quarter,
    facecolor="white",
    edgecolor=color,
    linewidth=1.6,
  )
  ax.plot([median, median], [number - 0.25, number + 0.25], color=color)
  mean = abs(float(data[f"{name}_mean"]))
  ends = np.sort(abs(data[f"{name}_interval"]))
  ax.plot(ends, [number, number], color=style.BLACK, linewidth=2.5)
  ax.plot(mean, number, "D", color=style.BLACK, markersize=5)


def _sentences(data: files.Arrays) -> str:
  names = data["networks"]
  eigenvalues = [data[f"{name}_eigenvalue"] for name in names]
  residuals = [data[f"{name}_residual"] for name in names]
  negative = 100 * np.mean([(values < 0).mean() for values in eigenvalues])
  converged = 100 * np.mean(
    [(values <= data["tolerance"]).mean() for values in residuals]
  )
  return (
    f"{int(data['num_examples']):,} images. Diamond: mean with its 95 %"
    " interval; box: quartiles and median; line: 5th to 95th percentile."
    f" {negative:.1f} % of the eigenvalues are negative."
    f" {converged:.1f} % have converged ({data['protocol']})."
  )
