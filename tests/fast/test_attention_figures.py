"""Figures of attention maps and of attention shift: what they show."""

import jax
import numpy as np
import pytest
from analysis_files import maps, shifts
from PIL import Image

from atat_jax import analyses, evaluation, models
from atat_jax.data.photographs import read_photograph
from atat_jax.drawing import style
from atat_jax.errors import UserError
from atat_jax.evaluation.map_distances import DISTANCES
from atat_jax.figures import attention, attention_shift


def pixels(path):
  with Image.open(path) as image:
    array = np.asarray(image.convert("RGB")).astype(int)
  assert min(array.shape[:2]) > 200 and array.std() > 10
  assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
  return array


def is_color(array, color):
  rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return (abs(array - rgb) <= 3).all(axis=-1)


def save(path, arrays):
  np.savez(path, **arrays)
  return path


# --- Maps --------------------------------------------------------------------


ROUNDS = ("clean", "round2", "round8", "round16")


@pytest.mark.parametrize(
  ("networks", "kinds", "n", "figures", "wider"),
  [
    (("vgg16",), ROUNDS, 2, 1, True),
    (("a", "b"), ("clean", "adversarial"), 4, 2, False),
    (tuple("abcdef"), ("clean", "adversarial"), 1, 1, True),
  ],
)
def test_a_grid_is_as_wide_as_it_has_networks_or_rounds(
  tmp_path, networks, kinds, n, figures, wider
):
  path = save(tmp_path / "attention.npz", maps(networks, kinds, n))
  paths = attention.draw(path, tmp_path / "out")
  assert paths == [
    tmp_path / "out" / f"attention_{k + 1}.png" for k in range(figures)
  ]
  sizes = {pixels(path).shape for path in paths}
  assert len(sizes) == 1
  ((height, width, _),) = sizes
  assert (width > height) == wider


def test_a_model_s_maps_of_an_image_share_a_scale(tmp_path):
  arrays = maps(("net",), ("clean", "adversarial"), n=1, channels=1)
  corner = np.zeros((1, 4, 4))
  corner[0, 0, 3] = 1.0
  arrays["net_clean_map"] = corner
  arrays["net_adversarial_map"] = 0.05 * corner[:, ::-1, ::-1]
  (path,) = attention.draw(save(tmp_path / "a.npz", arrays), tmp_path)
  array = pixels(path)
  array = array[: int(0.8 * len(array))]  # without the colour bar
  yellow = np.argwhere(array[..., 0] - array[..., 2] > 60)
  assert len(yellow) > 200
  # The image, the clean map, and on its right the pale one.
  assert yellow[:, 1].max() < 0.69 * array.shape[1]
  assert yellow[:, 1].min() > 0.45 * array.shape[1]


def _framed(tmp_path, arrays, color):
  (path,) = attention.draw(save(tmp_path / "a.npz", arrays), tmp_path)
  array = pixels(path)
  array = array[int(0.08 * len(array)) :]  # without the legend
  return np.argwhere(is_color(array, color)) / array.shape[:2]


def test_wrong_and_corrected_predictions_are_framed(tmp_path):
  arrays = maps(("raw", "full"), ("clean", "adversarial"), n=1)
  for color in (style.VERMILION, style.GREEN):
    assert len(_framed(tmp_path, arrays, color)) < 30
  arrays["raw_adversarial_prediction"] = np.array([1])
  wrong = _framed(tmp_path, arrays, style.VERMILION)
  corrected = _framed(tmp_path, arrays, style.GREEN)
  # Below: the first model's in the middle, the second's on the right.
  assert len(wrong) > 300 and len(corrected) > 300
  assert 0.3 < wrong[:, 1].min() and wrong[:, 1].max() < 0.7
  assert corrected[:, 1].min() > 0.6
  assert min(wrong[:, 0].min(), corrected[:, 0].min()) > 0.35


def test_the_cross_is_at_the_centre_of_mass(tmp_path):
  def drawn(map_):
    arrays = maps(("net",), ("clean", "adversarial"), n=1, channels=1)
    arrays["net_clean_map"] = arrays["net_adversarial_map"] = map_[None]
    (path,) = attention.draw(save(tmp_path / "a.npz", arrays), tmp_path)
    return pixels(path).min(-1)

  corner, even = np.zeros((4, 4)), np.ones((4, 4))
  corner[3, 0] = 1e-30
  without = drawn(np.zeros((4, 4)))  # it has none
  crosses = [
    np.argwhere((drawn(map_) > 245) & (without < 200)).mean(0)
    for map_ in (corner, even)
  ]
  # Half a cell from the corner of four: three eighths of a picture.
  down, right = crosses[0] - crosses[1]
  picture = 0.3 * without.shape[1]
  assert down == pytest.approx(3 / 8 * picture, rel=0.15)
  assert right == pytest.approx(-3 / 8 * picture, rel=0.15)


def test_kinds_in_words():
  names = [attention.kind_name(k) for k in (*ROUNDS, "round0", "round1")]
  assert names == [
    "clean",
    "2 rounds",
    "8 rounds",
    "16 rounds",
    "attack's start",
    "1 round",
  ]
  assert attention.kind_name("adversarial") == "attacked"


# --- Shift -------------------------------------------------------------------


def draw_shift(tmp_path, arrays):
  path = save(tmp_path / "attention_shift.npz", arrays)
  return attention_shift.draw(path, tmp_path / "out"), path


def test_all_pictures_of_the_shift(tmp_path):
  paths, path = draw_shift(tmp_path, shifts({"raw": 1.0, "full": 0.3}))
  names = [f"attention_shift_{k}.png" for k in (1, 2, 3, 4)]
  assert [p.name for p in paths] == names
  rounds = pixels(paths[0])
  colors = style.model_colors(["raw", "full"])
  first, second = (
    np.argwhere(is_color(rounds, colors[name])) for name in ("raw", "full")
  )
  half = len(rounds) // 2, rounds.shape[1] // 2
  ends = [
    some[(some < half).all(1) & (some[:, 1] > 0.8 * half[1])][:, 0].mean()
    for some in (first, second)
  ]
  assert ends[0] < ends[1]  # all images of the first have moved
  for p in paths[1:]:
    pixels(p)
  raw, full = attention_shift.sentences(path)
  # All are fooled in the end: what was two rounds in counts.
  assert raw.startswith("raw: after 2 rounds 30 of 60 images are fooled.")
  assert full == (
    "full: after 8 rounds 18 of 60 images are fooled. Their attention has"
    " shifted more by cosine distance (AUC 1.00), rank correlation (AUC 1.00),"
    " highest tenth (AUC 1.00), centre of mass (AUC 1.00)."
  )


def test_what_cannot_be_compared_is_left_out_and_said(tmp_path):
  arrays = shifts({"raw": 0.0}, num_classes=30)
  paths, path = draw_shift(tmp_path, arrays)
  assert [p.name for p in paths] == ["attention_shift_1.png"]
  (sentence,) = attention_shift.sentences(path)
  assert sentence == (
    "raw: not to be said, 0 images are fooled and 60 are not after the last"
    " round; 10 of either are needed."
  )


def test_classes_without_images_are_blank(tmp_path):
  arrays = shifts({"raw": 0.5}, num_classes=12, n=60)
  for distance in DISTANCES:
    arrays[f"raw_{distance}_class_mean"][3] = np.nan
  paths, _ = draw_shift(tmp_path, arrays)
  assert len(paths) == 4
  pixels(paths[3])


def test_no_file_and_a_damaged_one(tmp_path):
  for module, name in ((attention, "attention"), (attention_shift, "shift")):
    path = tmp_path / f"{name}.npz"
    assert module.draw(path, tmp_path) == []
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
      module.draw(path, tmp_path)
  assert attention_shift.sentences(tmp_path / "none.npz") == []
  arrays = shifts({"raw": 0.5})
  del arrays["raw_cosine_mean"]
  with pytest.raises(UserError, match="it has no raw_cosine_mean"):
    draw_shift(tmp_path, arrays)


# --- Photographs -------------------------------------------------------------


@pytest.mark.slow
def test_networks_of_imagenet_on_photographs(tmp_path, data_folder):
  """With random weights: no more is shown than that all of it runs."""
  names = ("vgg16", "resnet50", "densenet121")
  photos = np.stack(
    [
      read_photograph(data_folder / "photos" / name)
      for name in ("cat_chelsea.jpg", "coffee_cup.jpg")
    ]
  )
  networks = {}
  for name in names:
    model = models.create(name)
    networks[name] = model, jax.jit(model.init)(jax.random.key(0), photos[:1])
  numbers = {"epsilon": 16 / 255, "step_size": 2 / 255}
  labels = np.array([281, 504])  # tabby, coffee mug
  found = analyses.attention_maps(
    jax.random.key(0),
    networks,
    photos,
    labels,
    protocol=evaluation.parse("pgd2", **numbers),
  )
  assert found["vgg16_clean_map"].shape == (2, 14, 14)
  assert found["resnet50_clean_map"].shape == (2, 7, 7)
  (path,) = attention.draw(save(tmp_path / "models.npz", found), tmp_path)
  pixels(path)
  one = {"resnet50": networks["resnet50"]}
  found = analyses.attention_rounds(
    jax.random.key(0), one, photos, labels, rounds=(1, 2, 3), **numbers
  )
  (path,) = attention.draw(save(tmp_path / "rounds.npz", found), tmp_path)
  pixels(path)
