"""Training curves: losses by term, accuracies, learning rate."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import axes, ticker

from atat_jax.drawing import style
from atat_jax.drawing.text import plain
from atat_jax.runs import files, overfitting, roles, tables

Lines = list[dict[str, Any]]


class Curve(NamedTuple):
  """Curve of one number of `metrics.jsonl`.

  Attributes:
    key: Name of the number.
    label: Name of the curve; "" for a curve that is alone.
    color: Its colour; "" for that of the model.
    line: Its line style, so that curves are told apart without colour too.
    width: Width of the line, in points.
  """

  key: str
  label: str
  color: str = ""
  line: str = "-"
  width: float = 1.6


# The total lies under its terms. No method has two terms that look the same.
_LOSSES = (
  Curve("loss", "total", "#b8b8b8", "-", 4.0),
  Curve("cross_entropy", "cross-entropy"),
  Curve("attention", "attention", style.PURPLE, "--"),
  Curve("logit_pairing", "logit pairing", style.GREEN, "-."),
  Curve("triplet", "triplets", style.PURPLE, "--"),
  Curve("embedding_square", "embeddings' squares", style.GREEN, "-."),
  Curve("kl", "KL divergence", style.PURPLE, "--"),
  Curve("margin", "margin", style.GREEN, "-."),
  Curve("transfer_clean", "transfer, clean", style.GREEN, "-."),
  Curve("transfer_adversarial", "transfer, attacked", style.PURPLE, "--"),
)
_RATIOS = tuple(
  curve._replace(key=f"{files.GRADIENT_RATIO}{curve.key}")
  for curve in _LOSSES
  if curve.key not in ("loss", "cross_entropy")
)
_CLEAN = Curve("accuracy_clean", "clean images")
_ATTACKED = Curve("accuracy_adversarial", "attacked images", line="--")
_SINGLE_STEP = Curve(overfitting.SINGLE_STEP, "under a single step", line=":")
_LEARNING_RATE = Curve("learning_rate", "")


def draw(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws the curves of the teacher's and the student's training.

  Args:
    workdir: Directory of a run. Read: `teacher/metrics.jsonl`,
      `metrics.jsonl`, and `results.json` for the network's name.

  Returns:
    Paths of `figures/curves_{teacher,student}_{panel}.png`.
  """
  paths = []
  rows = (files.read_results(workdir) or {"rows": []})["rows"]
  names = {roles.TEACHER: roles.TEACHER, roles.STUDENT: tables.trained(rows)}
  colors = style.model_colors(names.values())
  for role, directory in (
    (roles.TEACHER, workdir / roles.TEACHER),
    (roles.STUDENT, workdir),
  ):
    splits = files.read_metrics(directory / files.METRICS)
    for panel, title, draw_panel in (
      ("loss", "training loss by term", _loss),
      ("gradients", "gradients of the terms", _gradients),
      ("training", "training accuracy", _training),
      ("validation", "validation accuracy", _validation),
      ("learning_rate", "learning rate", _learning_rate),
    ):
      with style.context():
        fig = style.new_figure(4.8, 3.2)
        ax = fig.add_subplot()
        if not draw_panel(ax, splits, colors[names[role]]):
          continue
        ax.set_title(f"{plain(names[role])}: {title}")
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        path = workdir / files.FIGURES / f"curves_{role}_{panel}.png"
        paths.append(style.save(fig, path))
  return paths


def _loss(ax: axes.Axes, splits: dict[str, Lines], color: str) -> bool:
  ax.set_ylabel("loss per example")
  drawn = _plot(ax, splits.get("train", []), _LOSSES, color)
  _logarithmic(ax)  # the terms differ by orders of magnitude
  return drawn


def _gradients(ax: axes.Axes, splits: dict[str, Lines], color: str) -> bool:
  ax.set_ylabel("gradient norm relative to cross-entropy")
  drawn = _plot(ax, splits.get("validation", []), _RATIOS, color)
  _logarithmic(ax)
  return drawn


def _logarithmic(ax: axes.Axes) -> None:
  if any(np.nanmax(line.get_ydata(), initial=0) > 0 for line in ax.lines):
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 100:  # less than two decades: powers of ten say too little
      ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def _training(ax: axes.Axes, splits: dict[str, Lines], color: str) -> bool:
  _percent(ax)
  lines = splits.get("train", [])
  return _plot(ax, lines, (_CLEAN, _ATTACKED), color, scale=100)


def _validation(ax: axes.Axes, splits: dict[str, Lines], color: str) -> bool:
  lines = splits.get("validation", [])
  _percent(ax)
  attack = next((line["attack"] for line in lines if line.get("attack")), None)
  robust = f"under {attack}" if attack else "attacked images"
  robust = plain(textwrap.fill(robust, 50))  # the width of the figure
  curves = (_CLEAN, _SINGLE_STEP, _ATTACKED._replace(label=robust))
  return _plot(ax, lines, curves, color, scale=100)


def _learning_rate(ax: axes.Axes, splits: dict[str, Lines], color: str) -> bool:
  ax.set_ylabel("learning rate")
  drawn = _plot(ax, splits.get("train", []), (_LEARNING_RATE,), color)
  ax.set_ylim(bottom=0)
  return drawn


def _percent(ax: axes.Axes) -> None:
  ax.set_ylabel("accuracy (%)")
  ax.set_ylim(-2, 102)


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _plot(
  ax: axes.Axes,
  lines: Lines,
  curves: Sequence[Curve],
  color: str,
  scale: float = 1,
) -> bool:
  """Plots curves against the epoch; returns False if there are no values."""
  drawn = False
  for curve in curves:
    points = [
      (line["epoch"], scale * line[curve.key])
      for line in lines
      if _is_number(line.get(curve.key)) and _is_number(line.get("epoch"))
    ]
    if not points:
      continue
    epochs, values = np.array(points, float).T
    finite = np.isfinite(values) & np.isfinite(epochs)
    # A gap in a line is easily overlooked.
    gaps = "" if finite.all() else f" ({(~finite).sum()} not finite)"
    # A few points need marks to be seen.
    marker = "o" if len(points) <= 30 else ""
    ax.plot(
      epochs,
      np.where(finite, values, np.nan),
      label=curve.label + gaps,
      color=curve.color or color,
      linestyle=curve.line,
      linewidth=curve.width,
      marker=marker,
      markersize=curve.width + 2,
    )
    drawn = True
  _, names = ax.get_legend_handles_labels()
  if names:
    # Below the axes, where the legend hides no curve.
    beside = all(len(name) <= 20 for name in names)
    ax.figure.legend(loc="outside lower center", ncols=2 if beside else 1)
  return drawn
