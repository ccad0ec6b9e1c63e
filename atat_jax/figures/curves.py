"""Training curves: losses by term, accuracies, learning rate."""

import pathlib
import textwrap
from typing import Any

import numpy as np
from matplotlib import axes, ticker

from atat_jax.drawing import style
from atat_jax.runs import files

Lines = list[dict[str, Any]]

# (key, name, colour, line style, width). Curves differ in colour and in line,
# so that they are told apart in grey too; the total lies under its terms. No
# method has two terms that look the same.
_LOSSES = (
  ("loss", "total", "#b8b8b8", "-", 4.0),
  ("cross_entropy", "cross-entropy", style.BLUE, "-", 1.6),
  ("attention", "attention", style.VERMILION, "--", 1.6),
  ("logit_pairing", "logit pairing", style.GREEN, "-.", 1.6),
  ("triplet", "triplets", style.VERMILION, "--", 1.6),
  ("embedding_square", "embeddings' squares", style.GREEN, "-.", 1.6),
  ("kl", "KL divergence", style.VERMILION, "--", 1.6),
  ("margin", "margin", style.GREEN, "-.", 1.6),
  ("transfer_clean", "transfer, clean", style.GREEN, "-.", 1.6),
  ("transfer_adversarial", "transfer, attacked", style.VERMILION, "--", 1.6),
)
_TRAINING = (
  ("accuracy_clean", "clean images", style.BLUE, "-", 1.6),
  ("accuracy_adversarial", "attacked images", style.VERMILION, "--", 1.6),
)
_LEARNING_RATE = (("learning_rate", "", style.BLACK, "-", 1.6),)


def draw(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Draws the curves of the teacher's and the student's training.

  Args:
    workdir: reads `teacher/metrics.jsonl` and `metrics.jsonl`.

  Returns:
    Paths of `figures/curves_{teacher,student}_{panel}.png`.
  """
  paths = []
  for model, name in (
    ("teacher", "teacher/metrics.jsonl"),
    ("student", "metrics.jsonl"),
  ):
    splits = files.read_metrics(workdir / name)
    for panel, title, draw_panel in (
      ("loss", "training loss by term", _loss),
      ("training", "training accuracy", _training),
      ("validation", "validation accuracy", _validation),
      ("learning_rate", "learning rate", _learning_rate),
    ):
      with style.context():
        fig = style.new_figure(4.8, 3.2)
        ax = fig.add_subplot()
        if not draw_panel(ax, splits):
          continue
        ax.set_title(f"{model}: {title}")
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        path = workdir / "figures" / f"curves_{model}_{panel}.png"
        paths.append(style.save(fig, path))
  return paths


def _loss(ax: axes.Axes, splits: dict[str, Lines]) -> bool:
  ax.set_ylabel("loss per example")
  drawn = _plot(ax, splits.get("train", []), _LOSSES)
  if any(np.nanmax(line.get_ydata(), initial=0) > 0 for line in ax.lines):
    ax.set_yscale("log")  # the terms differ by orders of magnitude
    low, high = ax.get_ylim()
    if high / low < 100:  # less than two decades: powers of ten say too little
      ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
  return drawn


def _training(ax: axes.Axes, splits: dict[str, Lines]) -> bool:
  _percent(ax)
  return _plot(ax, splits.get("train", []), _TRAINING, scale=100)


def _validation(ax: axes.Axes, splits: dict[str, Lines]) -> bool:
  lines = splits.get("validation", [])
  _percent(ax)
  attack = next((line["attack"] for line in lines if line.get("attack")), None)
  robust = f"under {attack}" if attack else "attacked images"
  robust = textwrap.fill(robust, 50)  # the width of the figure
  clean, adversarial = _TRAINING
  curves = (clean, (adversarial[0], robust, *adversarial[2:]))
  return _plot(ax, lines, curves, scale=100)


def _learning_rate(ax: axes.Axes, splits: dict[str, Lines]) -> bool:
  ax.set_ylabel("learning rate")
  drawn = _plot(ax, splits.get("train", []), _LEARNING_RATE)
  ax.set_ylim(bottom=0)
  return drawn


def _percent(ax: axes.Axes) -> None:
  ax.set_ylabel("accuracy (%)")
  ax.set_ylim(-2, 102)


def _plot(
  ax: axes.Axes,
  lines: Lines,
  curves: tuple[tuple[str, str, str, str, float], ...],
  scale: float = 1,
) -> bool:
  """Plots the given keys against the epoch; False if no line has any."""
  drawn = False
  for key, name, color, line_style, width in curves:
    points = [
      (line["epoch"], scale * line[key])
      for line in lines
      if line.get(key) is not None
    ]
    if not points:
      continue
    epochs, values = np.array(points, float).T
    # A single point or a few need a mark to be seen.
    marker = "o" if len(points) <= 30 else ""
    ax.plot(
      epochs,
      np.where(np.isfinite(values), values, np.nan),
      label=name,
      color=color,
      linestyle=line_style,
      linewidth=width,
      marker=marker,
      markersize=width + 2,
    )
    drawn = True
  _, names = ax.get_legend_handles_labels()
  if names:
    # Below the axes, where it hides no curve.
    beside = all(len(name) <= 20 for name in names)
    ax.figure.legend(loc="outside lower center", ncols=2 if beside else 1)
  return drawn
