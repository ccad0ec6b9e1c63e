"""Figures: real pictures that show the numbers in the files."""

import json

import matplotlib
import numpy as np
import pytest
from analysis_files import curvature_arrays, maps
from pictures import is_color, pixels

from atat_jax import figures
from atat_jax.drawing import style
from atat_jax.errors import UserError
from atat_jax.runs import roles

pytest_plugins = ("pictures",)

CURVES = ("loss", "training", "validation", "learning_rate")


def write_metrics(path, adversarial, num_steps=40):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = []
  for step in range(1, num_steps + 1):
    line = {
      "split": "train",
      "step": step,
      "epoch": step / 10,
      "loss": 2.0 / step,
      "cross_entropy": 1.5 / step,
      "accuracy_clean": 1 - 0.5 / step,
      "learning_rate": 0.1,
      "gradient_norm": 1.0,
      "images_per_second": 100.0,
    }
    if adversarial:
      line |= {"attention": 0.3 / step, "logit_pairing": 0.0}
      line |= {"accuracy_adversarial": 0.5}
    lines.append(line)
    if step % 10 == 0:
      lines.append(
        {
          "split": "validation",
          "step": step,
          "epoch": step / 10,
          "accuracy_clean": 0.9,
          "accuracy_adversarial": 0.1,
          "attack": "pgd10 linf epsilon=0.2",
        }
      )
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def result_row(model, attack, batch_norm, accuracy, **changes):
  attacked = attack != "nominal"
  row = {
    "model": model,
    "dataset": "digits",
    "split": "test",
    "num_examples": 297,
    "attack": attack,
    "norm": "linf" if attacked else None,
    "epsilon": 0.2 if attacked else None,
    "step_size": 0.05 if attacked else None,
    "num_steps": 20 if attacked else None,
    "num_restarts": 1 if attacked else None,
    "loss": "cross_entropy" if attacked else None,
    "batch_norm": batch_norm,
    "seed": 0,
    "accuracy": accuracy,
    "seconds": 1.0,
    "batch_size": 100,
  }
  return row | changes


def write_results(workdir, rows):
  results = {"format": 1, "run": {}, "rows": rows, "diagnostics": {}}
  (workdir / "results.json").write_text(json.dumps(results))


def test_nothing_to_draw(tmp_path):
  assert figures.draw_all(tmp_path) == []
  assert list(tmp_path.iterdir()) == []


def test_draws_every_figure_whose_inputs_are_there(figures_drawn, tmp_path):
  write_metrics(tmp_path / "metrics.jsonl", adversarial=True)
  write_metrics(tmp_path / "teacher" / "metrics.jsonl", adversarial=False)
  write_results(tmp_path, [result_row("teacher", "nominal", "running", 0.9)])
  arrays = maps(roles.MODELS, ["clean", "adversarial"], n=4)
  np.savez(tmp_path / "attention.npz", **arrays)
  np.savez(tmp_path / "curvature.npz", **curvature_arrays())
  paths = figures.draw_all(str(tmp_path))
  curves = [f"curves_{m}_{c}" for m in roles.MODELS for c in CURVES]
  names = ["robustness", *curves, "attention_1", "attention_2", "curvature"]
  assert paths == [tmp_path / "figures" / f"{name}.png" for name in names]
  assert list(figures_drawn) == [*names[9:], *names[:9]]  # analyses first
  for panel in ("loss", "training"):
    for model in roles.MODELS:
      fig = figures_drawn[f"curves_{model}_{panel}"]
      used = {line.get_color() for line in fig.axes[0].lines}
      assert style.BLUE in used  # cross-entropy, clean images
      assert (style.VERMILION in used) == (model == "student")


def test_bars_are_as_long_as_the_accuracies(tmp_path):
  write_results(
    tmp_path,
    [
      result_row("student", "nominal", "running", 0.9),
      result_row("student", "pgd20", "running", 0.45),
      result_row("student", "pgd20", "batch", 0.6),
    ],
  )
  before = matplotlib.rcParams.copy()
  (path,) = figures.draw_all(tmp_path)
  assert matplotlib.rcParams.copy() == before  # the user's own plots
  assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
  blue = is_color(pixels(path), style.BLUE)
  # Rows of solid bars: the legend's patch, 0.9 and 0.45; no hatched one.
  lengths = blue.sum(axis=1)
  solid = np.unique(lengths[lengths > 100])
  full = solid.max()
  half = solid[abs(solid - full / 2) <= 3]
  assert half.size, solid
  starts = np.flatnonzero(np.diff((lengths >= full - 2).astype(int)) == 1)
  assert len(starts) == 1, "one bar of 0.9"


def test_curves_survive_one_point_and_not_a_number(figures_drawn, tmp_path):
  lines = [
    {"split": "train", "step": 1, "epoch": 0.1, "loss": float("nan")},
    {"split": "validation", "step": 1, "epoch": 0.1, "accuracy_clean": 0.5},
  ]
  text = "\n".join(json.dumps(line) for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  stems = [path.stem for path in figures.draw_all(tmp_path)]
  assert stems == ["curves_student_loss", "curves_student_validation"]


def test_damaged_inputs_are_named(tmp_path):
  results = tmp_path / "results.json"
  for content, message in (
    ("{", "not valid JSON"),
    ("[]", "JSON object"),
    ('{"format": 2}', "format is 2, only 1"),
  ):
    results.write_text(content)
    with pytest.raises(UserError, match=message):
      figures.draw_all(tmp_path)
