"""Figures: real pictures that show the numbers in the files."""

import json

import numpy as np
import pytest
import run_files
from analysis_files import curvature_arrays, maps

from atat_jax import figures
from atat_jax.errors import UserError
from atat_jax.runs import roles

pytest_plugins = ("pictures",)

CURVES = ("loss", "gradients", "training", "validation", "learning_rate")


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
      validation = {
        "split": "validation",
        "step": step,
        "epoch": step / 10,
        "accuracy_clean": 0.9,
        "accuracy_adversarial": 0.1,
        "attack": "pgd10 linf epsilon=0.2",
      }
      if adversarial:
        validation |= {"gradient_ratio/attention": 1e-9 * step}
        validation |= {"gradient_ratio/logit_pairing": 0.0}
      lines.append(validation)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_nothing_to_draw(tmp_path):
  assert figures.draw_all(tmp_path) == []
  assert list(tmp_path.iterdir()) == []


def test_draws_every_figure_whose_inputs_are_there(figures_drawn, tmp_path):
  write_metrics(tmp_path / "metrics.jsonl", adversarial=True)
  write_metrics(tmp_path / "teacher" / "metrics.jsonl", adversarial=False)
  rows = [run_files.result_row("teacher", "nominal", "running", 0.9)]
  run_files.save(tmp_path, {"format": 1, "rows": rows})
  arrays = maps(roles.MODELS, ["clean", "adversarial"], n=4)
  np.savez(tmp_path / "attention.npz", **arrays)
  np.savez(tmp_path / "curvature.npz", **curvature_arrays())
  paths = figures.draw_all(str(tmp_path))
  curves = [f"curves_{m}_{c}" for m in roles.MODELS for c in CURVES]
  curves.remove("curves_teacher_gradients")  # it has one term
  names = ["robustness", *curves, "attention_1", "attention_2", "curvature"]
  assert paths == [tmp_path / "figures" / f"{name}.png" for name in names]
  assert list(figures_drawn) == names


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
