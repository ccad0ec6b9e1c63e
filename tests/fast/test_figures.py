"""Figures: real pictures that show the numbers in the files."""

import json

import matplotlib
import numpy as np
import pytest
from PIL import Image

from atat_jax import figures
from atat_jax.drawing import style
from atat_jax.errors import UserError
from atat_jax.runs import files

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


def attention_arrays(models=("teacher", "student"), n=4, size=8, channels=1):
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(n, size, size, channels)).astype(np.float32)
  labels = np.arange(n, dtype=np.int32)
  arrays = {
    "images": images,
    "labels": labels,
    "class_names": np.array([f"class {i}" for i in range(n + 1)]),
    "layer": "group2",
    "protocol": "pgd20, running statistics",
  }
  for model in models:
    arrays[f"{model}_adversarial"] = images
    for kind in files.KINDS:
      maps = rng.uniform(size=(n, 4, 4)).astype(np.float32)
      arrays[f"{model}_{kind}_map"] = maps
      arrays[f"{model}_{kind}_prediction"] = labels
      arrays[f"{model}_{kind}_probability"] = np.full(n, 0.75, np.float32)
  return arrays


def pixels(path):
  """An RGB picture as int [H, W, 3], checked to be a PNG with content."""
  with Image.open(path) as image:
    assert image.format == "PNG"
    array = np.asarray(image.convert("RGB")).astype(int)
  assert min(array.shape[:2]) > 200 and array.std() > 10
  return array


def is_color(array, color):
  rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return (abs(array - rgb) <= 3).all(axis=-1)


def test_nothing_to_draw(tmp_path):
  assert figures.draw_all(tmp_path) == []
  assert list(tmp_path.iterdir()) == []


def test_draws_every_figure_whose_inputs_are_there(tmp_path):
  before = matplotlib.rcParams.copy()
  write_metrics(tmp_path / "metrics.jsonl", adversarial=True)
  write_metrics(tmp_path / "teacher" / "metrics.jsonl", adversarial=False)
  write_results(tmp_path, [result_row("teacher", "nominal", "running", 0.9)])
  np.savez(tmp_path / "attention.npz", **attention_arrays())
  paths = figures.draw_all(str(tmp_path))
  curves = [f"curves_{m}_{c}" for m in files.MODELS for c in CURVES]
  names = ["robustness", *curves, "attention_1", "attention_2"]
  assert paths == [tmp_path / "figures" / f"{name}.png" for name in names]
  both = [
    path.with_suffix(suffix) for path in paths for suffix in (".png", ".pdf")
  ]
  assert sorted((tmp_path / "figures").iterdir()) == sorted(both)
  for path in paths:
    pixels(path)
  assert matplotlib.rcParams.copy() == before  # the user's own plots


def test_attention_is_drawn_where_it_is(tmp_path):
  arrays = attention_arrays(models=("teacher",), n=1)
  clean, attacked = np.zeros((2, 1, 4, 4), np.float32)
  clean[0, 0, 3] = 7.0  # top right
  attacked[0, 3, 0] = 7.0  # bottom left
  arrays["teacher_clean_map"] = clean
  arrays["teacher_adversarial_map"] = attacked
  np.savez(tmp_path / "attention.npz", **arrays)
  (path,) = figures.draw_all(tmp_path)
  array = pixels(path)
  width = array.shape[1]
  array = array[: int(0.8 * len(array))]  # without the colour bar
  yellow = np.argwhere(array[..., 0] - array[..., 2] > 60)
  # From left to right: the image, its clean map, its attacked map.
  first = yellow[yellow[:, 1] < 0.68 * width].mean(axis=0)
  second = yellow[yellow[:, 1] >= 0.68 * width].mean(axis=0)
  picture = 0.3 * width
  down, right = second - first
  assert 0.5 * picture < down < 0.9 * picture
  assert 0.1 * picture < right < 0.6 * picture


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_wrong_predictions_are_framed(tmp_path, size, channels):
  arrays = attention_arrays(n=3, size=size, channels=channels)
  np.savez(tmp_path / "attention.npz", **arrays)
  (path,) = figures.draw_all(tmp_path)
  assert is_color(pixels(path), style.VERMILION).sum() < 50
  arrays["student_adversarial_prediction"] = np.array([0, 1, 3], np.int32)
  np.savez(tmp_path / "attention.npz", **arrays)
  (path,) = figures.draw_all(tmp_path)
  rows, columns = np.nonzero(is_color(pixels(path), style.VERMILION))
  height, width = pixels(path).shape[:2]
  grid = rows > 0.1 * height  # below the legend
  assert grid.sum() > 500
  # The last of three images, the student in the last column.
  assert rows[grid].min() > 0.7 * height and columns[grid].min() > 0.6 * width


def test_map_of_zeros_is_dark_all_over(tmp_path):
  arrays = attention_arrays(models=("student",), n=1)
  for kind in files.KINDS:
    arrays[f"student_{kind}_map"][:] = 0
  np.savez(tmp_path / "attention.npz", **arrays)
  (path,) = figures.draw_all(tmp_path)
  array = pixels(path)
  array = array[: int(0.8 * len(array))]  # without the colour bar
  assert not (array[..., 0] - array[..., 2] > 60).any()


def test_damaged_inputs_are_named(tmp_path):
  path = tmp_path / "attention.npz"
  for content in (b"", b"not an archive"):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"attention\.npz cannot be read"):
      figures.draw_all(tmp_path)
  arrays = attention_arrays()
  del arrays["student_adversarial"]
  np.savez(path, **arrays)
  with pytest.raises(UserError, match="student_adversarial"):
    figures.draw_all(tmp_path)
  path.unlink()
  results = tmp_path / "results.json"
  for content, message in (
    ("{", "not valid JSON"),
    ("[]", "JSON object"),
    ('{"format": 2}', "format is 2, only 1"),
  ):
    results.write_text(content)
    with pytest.raises(UserError, match=message):
      figures.draw_all(tmp_path)
