"""Figures of landscapes, curvature and sweeps: pictures of the numbers given."""

import json

import numpy as np
import pytest
from analysis_files import (
  curvature_arrays,
  epsilons_arrays,
  landscape_arrays,
  steps_arrays,
)
from PIL import Image

from atat_jax.drawing import style
from atat_jax.errors import UserError
from atat_jax.figures import attack_steps, curvature, loss_landscape
from atat_jax.runs import files


def pixels(path):
  with Image.open(path) as image:
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def count(array, color):
  rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return int((abs(array - rgb) <= 3).all(axis=-1).sum())


FIGURES = {
  "attack_steps": (attack_steps.draw, steps_arrays, 1),
  "attack_epsilons": (attack_steps.draw_epsilons, epsilons_arrays, 1),
  "curvature": (curvature.draw, curvature_arrays, 1),
  "loss_landscape": (loss_landscape.draw, landscape_arrays, 2),
}
every_figure = pytest.mark.parametrize("name", FIGURES)


@every_figure
def test_png_and_pdf_are_the_same_every_time(tmp_path, name):
  draw, arrays, number = FIGURES[name]
  path = tmp_path / f"{name}.npz"
  assert draw(path, tmp_path / "none") == []
  assert not (tmp_path / "none").exists()
  np.savez(path, **arrays())
  first, again = (draw(path, tmp_path / folder) for folder in ("a", "b"))
  assert len(first) == number
  for one, other in zip(first, again, strict=True):
    assert one.suffix == ".png" and one.stem.startswith(name)
    array = pixels(one)
    assert min(array.shape[:2]) > 300 and array.std() > 10
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF-")):
      content = one.with_suffix(suffix).read_bytes()
      assert content.startswith(start)
      assert content == other.with_suffix(suffix).read_bytes()
      assert b"CreationDate" not in content


@every_figure
def test_damaged_files_are_named(tmp_path, name):
  draw, arrays, _ = FIGURES[name]
  path = tmp_path / f"{name}.npz"
  for content in (b"", b"not an archive"):
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}\.npz cannot be read"):
      draw(path, tmp_path)
  given = arrays()
  lost = next(key for key in given if key.startswith("atat_"))
  del given[lost]
  np.savez(path, **given)
  with pytest.raises(UserError, match=f"it has no {lost}"):
    draw(path, tmp_path)


def autoattack_row(**changes):
  row = {
    "model": "atat",
    "attack": "autoattack",
    "norm": "linf",
    "epsilon": 8 / 255,
    "batch_norm": "running",
    "num_examples": 100,
    "accuracy": 0.5,
  }
  return row | changes


def write_rows(directory, *rows):
  results = {"format": 1, "rows": rows}
  (directory / "results.json").write_text(json.dumps(results))


def test_lines_lie_at_the_accuracies(tmp_path):
  path = tmp_path / "attack_steps.npz"
  np.savez(path, **steps_arrays())

  def long_rows():
    array = pixels(attack_steps.draw(path, tmp_path)[0])
    marked = (array[..., 1] - array[..., 0] > 50).sum(axis=1)
    rows = np.flatnonzero(marked > 150)
    return len(np.split(rows, np.flatnonzero(np.diff(rows) > 5) + 1))

  assert long_rows() == 1  # of green: the line at 60 %
  write_rows(tmp_path, autoattack_row())
  assert long_rows() == 2  # and AutoAttack's at 50 %


@pytest.mark.parametrize(
  "changes",
  [
    {"epsilon": 16 / 255},
    {"norm": "l2"},
    {"batch_norm": "batch"},
    {"attack": "pgd20"},
  ],
)
def test_only_the_same_question_has_autoattacks_answer(tmp_path, changes):
  write_rows(tmp_path, autoattack_row(**changes))
  assert files.read_autoattack(tmp_path, 8 / 255, "linf") == {}


def test_of_many_rows_the_one_of_most_images_counts(tmp_path):
  write_rows(
    tmp_path,
    autoattack_row(num_examples=10, accuracy=0.1),
    autoattack_row(accuracy=0.4, attack="autoattack-fast"),
    autoattack_row(accuracy=0.3),
  )
  found = files.read_autoattack(tmp_path, 8 / 255, "linf")
  assert found["atat"]["accuracy"] == 0.3
  assert files.read_autoattack(tmp_path / "nothing", 8 / 255, "linf") == {}


def test_what_is_left_in_the_largest_ball_is_said(tmp_path, monkeypatch):
  texts = []
  monkeypatch.setattr(style, "caption", lambda fig, text: texts.append(text))
  path = tmp_path / "attack_epsilons.npz"
  np.savez(path, **epsilons_arrays())
  attack_steps.draw_epsilons(path, tmp_path)
  arrays = epsilons_arrays()
  arrays["atat_worst_case"][-1] = 0
  np.savez(path, **arrays)
  attack_steps.draw_epsilons(path, tmp_path)
  assert "leaves: atat 10.0 %." in texts[0]
  assert "leaves: no image of any model." in texts[1]


def test_one_scale_for_all_networks(tmp_path):
  """The steep surface goes through the colours, the flat one has the lowest."""
  path = tmp_path / "loss_landscape.npz"
  np.savez(path, **landscape_arrays())
  crossed, never = (pixels(p) for p in loss_landscape.draw(path, tmp_path))
  middle = crossed.shape[1] // 2
  yellow = (crossed[..., :2] > 200).all(-1) & (crossed[..., 2] < 80)
  upper = yellow[: int(0.8 * len(yellow))]  # not the colour bar
  assert upper[:, :middle].sum() > 200 and upper[:, middle:].sum() == 0
  assert count(crossed, style.VERMILION) > 300  # both have a border there
  assert count(never, style.VERMILION) == 0


@pytest.mark.parametrize(("number", "rows"), [(1, 1), (4, 2)])
def test_any_number_of_networks(tmp_path, number, rows):
  arrays = landscape_arrays([f"net{n}" for n in range(number)])
  arrays["labels"] = arrays["labels"][:1]
  np.savez(tmp_path / "loss_landscape.npz", **arrays)
  (path,) = loss_landscape.draw(tmp_path / "loss_landscape.npz", tmp_path)
  height = len(pixels(path)) / 140  # inches
  assert 4.5 * rows < height < 4.5 * rows + 2


def test_each_model_has_one_look_whatever_the_order():
  names = ["teacher", "mart", "student", "at", "trades", "tla", "fast", "alp"]
  looks = style.model_looks(names)
  assert len({look.color for look in looks.values()}) == len(names)
  assert len({look.marker for look in looks.values()}) == len(names)
  assert style.model_looks(reversed(names)) == looks
  for some in (["student"], ["student", "other"], ["teacher", "student"]):
    assert style.model_colors(some)["student"] == style.BLUE
  assert style.model_colors(["teacher"]) == {"teacher": style.ORANGE}
  assert len(style.model_looks(map(str, range(20)))) == 20  # colours come again
