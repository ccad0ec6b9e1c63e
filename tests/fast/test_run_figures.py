"""Bars and curves of a run: true lengths, one colour a model."""

import json

import numpy as np
import run_files
from pictures import is_color, pixels
from run_files import result_row

from atat_jax.drawing import style
from atat_jax.figures import curves, robustness

TEACHER, STUDENT = style.model_colors(("teacher", "student")).values()


def has_color(path, color):
  return is_color(pixels(path), color)


def write_metrics(workdir, lines):
  workdir.mkdir(exist_ok=True)
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (workdir / "metrics.jsonl").write_text(text)


def train_line(step, **numbers):
  return {"split": "train", "step": step, "epoch": step / 10, **numbers}


def test_bars_are_as_long_as_the_accuracies(tmp_path):
  rows = [
    result_row("student", "nominal", "running", 0.9),
    result_row("student", "pgd20", "running", 0.45),
    result_row("student", "pgd20", "batch", 0.6),
  ]
  run_files.save(tmp_path, {"format": 1, "rows": rows})
  (path,) = robustness.draw(tmp_path)
  # Rows of solid bars: the legend's patch, 0.9 and 0.45; no hatched one.
  lengths = has_color(path, STUDENT).sum(axis=1)
  solid = np.unique(lengths[lengths > 100])
  full = solid.max()
  half = solid[abs(solid - full / 2) <= 3]
  assert half.size, solid
  starts = np.flatnonzero(np.diff((lengths >= full - 2).astype(int)) == 1)
  assert len(starts) == 1, "one bar of 0.9"


def test_a_model_has_one_colour_in_bars_and_curves(tmp_path):
  rows = [
    result_row("teacher", "nominal", "running", 0.9),
    result_row("student", "nominal", "running", 0.8),
  ]
  run_files.save(tmp_path, {"format": 1, "rows": rows})
  (bars,) = robustness.draw(tmp_path)
  lines = [train_line(step, accuracy_clean=0.5) for step in range(40)]
  write_metrics(tmp_path, lines)
  write_metrics(tmp_path / "teacher", lines)
  paths = {path.stem: path for path in curves.draw(tmp_path)}
  assert list(paths) == ["curves_teacher_training", "curves_student_training"]
  assert has_color(bars, TEACHER).sum() > 500 < has_color(bars, STUDENT).sum()
  for model, own, other in (
    ("teacher", TEACHER, STUDENT),
    ("student", STUDENT, TEACHER),
  ):
    path = paths[f"curves_{model}_training"]
    assert has_color(path, own).sum() > 100
    assert has_color(path, other).sum() == 0


def test_the_network_of_a_run_without_a_teacher_has_its_own_colour(tmp_path):
  rows = [result_row("standard", "nominal", "running", 0.9)]
  run_files.save(tmp_path, {"format": 1, "rows": rows})
  write_metrics(
    tmp_path, [train_line(k, accuracy_clean=0.5) for k in range(40)]
  )
  (path,) = curves.draw(tmp_path)
  (color,) = style.model_colors(["standard"]).values()
  assert color not in (TEACHER, STUDENT)
  assert has_color(path, color).sum() > 100


def test_the_attention_loss_is_drawn_where_there_is_one(tmp_path):
  lines = [train_line(step, loss=1.0, cross_entropy=0.7) for step in range(40)]
  write_metrics(tmp_path / "teacher", lines)
  write_metrics(tmp_path, [line | {"attention": 0.3} for line in lines])
  teacher, student = curves.draw(tmp_path)
  assert has_color(teacher, style.PURPLE).sum() == 0
  assert has_color(student, style.PURPLE).sum() > 100


def test_curves_survive_one_point_and_not_a_number(tmp_path):
  write_metrics(
    tmp_path,
    [
      train_line(1, loss=float("nan")),
      {"split": "validation", "step": 1, "epoch": 0.1, "accuracy_clean": 0.5},
    ],
  )
  stems = [path.stem for path in curves.draw(tmp_path)]
  assert stems == ["curves_student_loss", "curves_student_validation"]
