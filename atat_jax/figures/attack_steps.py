"""Accuracy against the steps of an attack (Fig. 8), and against its radius."""

import pathlib
from typing import Any

import numpy as np
from matplotlib import axes, figure, ticker

from atat_jax.drawing import style
from atat_jax.runs import files

_STEP_TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw(path: pathlib.Path, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws a line for each network: accuracy at the iterate after each step.

  A thin dotted line of its colour is AutoAttack's accuracy, where a
  `results.json` beside the file has it with the same norm and epsilon.

  Args:
    path: Of `attack_steps.npz`, what `evaluation.attack_steps` returns.
    directory: Where to.

  Returns:
    The path of `attack_steps.png`; nothing if there is no file.

  Raises:
    UserError: The file cannot be read.
  """
  data = files.read_arrays(path)
  if data is None:
    return []
  steps = data["steps"]
  with style.context():
    fig, ax = _axes(data)
    _plot(ax, data, steps)
    autoattack = files.read_autoattack(
      path.parent, float(data["epsilon"]), str(data["norm"])
    )
    known = [
      autoattack[name] for name in data["networks"] if name in autoattack
    ]
    colors = style.model_colors(data["networks"])
    for name in data["networks"]:
      if name in autoattack:
        accuracy = 100 * autoattack[name]["accuracy"]
        color = colors[name]
        ax.axhline(accuracy, color=color, linestyle=":", linewidth=1.2)
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)
    ax.set_xlim(0, steps[-1])
    _ticks(ax, [tick for tick in _STEP_TICKS if tick <= steps[-1]], "{:g}")
    ax.set_xlabel("steps of PGD (0: the random start)")
    # By its own name: a run may have had two of its attacks only.
    attacks = [f"{r['attack']}, {r['num_examples']:,} images" for r in known]
    found = " / ".join(dict.fromkeys(attacks))
    notes = [f"Dotted, in a model's colour: {found}."] if known else []
    _finish(fig, data, notes)
    return [style.save(fig, directory / "attack_steps.png")]


def draw_epsilons(
  path: pathlib.Path, directory: pathlib.Path
) -> list[pathlib.Path]:
  """Draws a line for each network: accuracy at each radius of the ball.

  Args:
    path: Of `attack_epsilons.npz`, what `evaluation.attack_epsilons` returns.
    directory: Where to.

  Returns:
    The path of `attack_epsilons.png`; nothing if there is no file.

  Raises:
    UserError: The file cannot be read.
  """
  data = files.read_arrays(path)
  if data is None:
    return []
  epsilons = data["epsilons"]
  with style.context():
    fig, ax = _axes(data)
    _plot(ax, data, epsilons, marked=True)
    positive = epsilons[epsilons > 0]
    if len(positive) > 1 and positive[-1] > 10 * positive[0]:
      ax.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    levels = 255 * epsilons
    in_levels = bool(np.all(abs(levels - levels.round()) < 0.02))
    unit = "pixels in [0, 1]"
    if in_levels and data["norm"] == "linf":
      _ticks(ax, epsilons, lambda x: f"{255 * x:.0f}")
      unit = "in 1/255 of the pixels' range"
    else:
      _ticks(ax, epsilons, "{:.3g}")
    ax.set_xlabel(f"epsilon, {data['norm']} ({unit})")
    left = [
      f"{name} {100 * data[f'{name}_worst_case'][-1]:.1f} %"
      for name in data["networks"]
      if data[f"{name}_worst_case"][-1] > 0
    ]
    notes = [
      "Never fooled up to the largest epsilon, which only a failing attack"
      f" leaves: {', '.join(left) or 'no image of any model'}."
    ]
    _finish(fig, data, notes)
    return [style.save(fig, directory / "attack_epsilons.png")]


def _axes(data: files.Arrays) -> tuple[figure.Figure, axes.Axes]:
  rows = -(-len(data["networks"]) // 3)
  fig = style.new_figure(5.2, 4.1 + 0.2 * rows)
  ax = fig.add_subplot()
  ax.set_ylabel("accuracy (%)")
  ax.set_ylim(-2, 102)
  chance = 100 * float(data["chance"])
  ax.axhline(chance, color=style.GREY, linewidth=1, zorder=1)
  ax.annotate(
    "chance",
    (1, chance),
    (-3, 2),
    xycoords=("axes fraction", "data"),
    textcoords="offset points",
    ha="right",
    fontsize=8,
    color=style.GREY,
  )
  return fig, ax


def _plot(
  ax: axes.Axes, data: files.Arrays, x: np.ndarray, *, marked: bool = False
) -> None:
  for name, look in style.model_looks(data["networks"]).items():
    ax.plot(
      x,
      100 * data[f"{name}_accuracy"],
      label=name,
      markersize=4.5,
      clip_on=False,
      **style.line(look, marked=marked),
    )


def _ticks(ax: axes.Axes, places: Any, text: Any) -> None:
  write = text if callable(text) else text.format
  ax.xaxis.set_major_locator(ticker.FixedLocator(list(places)))
  ax.xaxis.set_major_formatter(
    ticker.FixedFormatter([write(place) for place in places])
  )
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.tick_params(axis="x", labelsize=9)


def _finish(fig: figure.Figure, data: files.Arrays, notes: list[str]) -> None:
  """The legend on top, and below what was done."""
  fig.legend(loc="outside upper center", ncols=3)
  count = int(data["num_examples"])
  # Of a share of one half, the widest.
  margin = 100 * 1.96 * (0.25 / count) ** 0.5
  sample = (
    f"{count:,} images: a 95 % interval is ± {margin:.1f} points at most."
  )
  style.caption(fig, " ".join([f"{data['protocol']}.", sample, *notes]))
