"""Figures of attention maps and of attention shift: what they show."""

import numpy as np
import pytest
from analysis_files import maps, shifts
from matplotlib import colors
from pictures import pixels

from atat_jax import analyses
from atat_jax.drawing import map_grid, style
from atat_jax.evaluation.map_distances import DISTANCES
from atat_jax.runs import files

pytest_plugins = ("pictures",)

ROUNDS = ("clean", "round2", "round8", "round16")
BOTH = ("clean", "adversarial")


def draw(name, directory, arrays):
  """Draws made-up arrays of an analysis."""
  analysis = analyses.ANALYSES[name]
  return analysis.draw(
    files.Arrays(analysis.path(directory), arrays), directory
  )


def map_panels(fig):
  """Panels of maps: those that have an image and a map on top of it."""
  return [ax for ax in fig.axes if len(ax.images) == 2]


# --- Maps --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("networks", "kinds", "n", "figures", "wider"),
  [
    (("vgg16",), ROUNDS, 2, 1, True),
    (("a", "b"), BOTH, 4, 2, False),
    (tuple("abcdef"), BOTH, 1, 1, True),
  ],
)
def test_a_grid_is_as_wide_as_it_has_networks_or_rounds(
  figures_drawn, tmp_path, networks, kinds, n, figures, wider
):
  paths = draw("attention", tmp_path / "out", maps(networks, kinds, n))
  assert paths == [
    tmp_path / "out" / f"attention_{k + 1}.png" for k in range(figures)
  ]
  sizes = {tuple(fig.get_size_inches()) for fig in figures_drawn.values()}
  assert len(sizes) == 1
  ((width, height),) = sizes
  assert (width > height) == wider
  panels = [map_panels(fig) for fig in figures_drawn.values()]
  assert sum(map(len, panels)) == n * len(networks) * len(kinds)


def test_maps_are_drawn_where_they_are_and_share_a_scale(tmp_path):
  arrays = maps(("net",), BOTH, n=1, channels=1)
  corner = np.zeros((1, 4, 4))
  corner[0, 0, 3] = 1.0  # top right
  arrays["net_clean_map"] = corner
  arrays["net_adversarial_map"] = 0.9 * corner[:, ::-1, ::-1]  # bottom left
  arrays["class_names"] = np.array(["zero", "one"])
  (path,) = draw("attention", tmp_path, arrays)
  array = pixels(path)
  array = array[: int(0.7 * len(array))]  # without the colour bar
  yellow = np.argwhere(array[..., 0] - array[..., 2] > 60)
  # From left to right: the image, its clean map, its attacked map.
  border = 0.68 * array.shape[1]
  first = yellow[yellow[:, 1] < border].mean(axis=0)
  second = yellow[yellow[:, 1] >= border].mean(axis=0)
  picture = 0.3 * array.shape[1]
  down, right = second - first
  assert 0.5 * picture < down < 0.9 * picture
  assert 0.1 * picture < right < 0.6 * picture


def test_a_map_that_pales_is_not_scaled_up(figures_drawn, tmp_path):
  arrays = maps(("net",), BOTH, n=1)
  arrays["net_clean_map"] = np.ones((1, 4, 4))
  arrays["net_adversarial_map"] = np.full((1, 4, 4), 0.05)
  draw("attention", tmp_path, arrays)
  panels = map_panels(figures_drawn["attention_1"])
  assert [ax.images[1].get_clim() for ax in panels] == [(0, 1), (0, 1)]


def frames(fig):
  """Colours of the frames around the maps, "" for none."""
  return [
    "".join(colors.to_hex(frame.get_edgecolor()) for frame in ax.patches)
    for ax in map_panels(fig)
  ]


def test_wrong_and_corrected_predictions_are_framed(figures_drawn, tmp_path):
  arrays = maps(("raw", "full"), BOTH, n=1)
  draw("attention", tmp_path, arrays)
  assert frames(figures_drawn["attention_1"]) == ["", "", "", ""]
  arrays["raw_adversarial_prediction"] = np.array([1])
  draw("attention", tmp_path, arrays)
  # Above the clean maps of both networks, below the attacked ones.
  wrong, corrected = style.VERMILION.lower(), style.GREEN.lower()
  assert frames(figures_drawn["attention_1"]) == ["", "", wrong, corrected]


def test_the_cross_is_at_the_centre_of_mass(figures_drawn, tmp_path):
  corner = np.zeros((4, 4))
  corner[3, 0] = 1e-30
  arrays = maps(("net",), BOTH, n=3, channels=1)  # images of 8 x 8
  arrays["net_clean_map"] = np.stack([corner, np.ones((4, 4)), 0 * corner])
  draw("attention", tmp_path, arrays)
  clean = map_panels(figures_drawn["attention_1"])[::2]
  places = [[tuple(line.get_xydata()[0]) for line in ax.lines] for ax in clean]
  # A cell is two pixels wide, and pixels have their middle at whole numbers.
  assert places == [[(0.5, 6.5)], [(3.5, 3.5)], []]
  zeros = clean[2].images[1]
  assert not zeros.get_array().any() and zeros.get_clim()[0] == 0


def test_attacked_image_and_magnified_perturbation_are_shown(
  figures_drawn, tmp_path
):
  arrays = maps(("net",), BOTH, n=1, channels=1)
  arrays["images"] = np.full((1, 8, 8, 1), 0.5, np.float32)
  attacked = arrays["images"].copy()
  attacked[0, 2, 3] += 0.1
  attacked[0, 5, 5] -= 0.05
  arrays["net_adversarial"] = attacked
  draw("attention", tmp_path, arrays)
  fig = figures_drawn["attention_1"]
  insets = [inset for ax in fig.axes for inset in ax.child_axes]
  image, moved = (inset.images[0].get_array() for inset in insets)
  np.testing.assert_allclose(image, attacked[0, ..., 0])
  assert moved[2, 3] == pytest.approx(1) and moved[0, 0] == 0.5
  assert moved[5, 5] == pytest.approx(0.25)
  assert "magnified 5 times" in fig.get_supxlabel().replace("\n", " ")


def test_kinds_in_words():
  names = [map_grid.kind_name(k) for k in (*ROUNDS, "round0", "round1")]
  assert names == [
    "clean",
    "2 rounds",
    "8 rounds",
    "16 rounds",
    "attack's start",
    "1 round",
  ]
  assert map_grid.kind_name("adversarial") == "attacked"


# --- Shift -------------------------------------------------------------------


def test_all_pictures_of_the_shift(figures_drawn, tmp_path):
  arrays = shifts({"raw": 1.0, "full": 0.3})
  paths = draw("shift", tmp_path, arrays)
  names = [f"attention_shift_{k}.png" for k in (1, 2, 3, 4)]
  assert [path.name for path in paths] == names
  used = style.model_colors(["raw", "full"])
  for ax, distance in zip(
    figures_drawn["attention_shift_1"].axes, DISTANCES, strict=True
  ):
    for line, name in zip(ax.lines, ("raw", "full"), strict=True):
      assert line.get_color() == used[name]
      expected = arrays[f"{name}_{distance}_mean"]
      np.testing.assert_allclose(line.get_ydata(), expected)
  # The last round in which some of either kind are left: the second, the third.
  areas = figures_drawn["attention_shift_3"].axes[0].texts
  expected = [arrays["raw_cosine_auc"][1], arrays["full_cosine_auc"][2]]
  assert [text.get_text() for text in areas] == [f"{x:.2f}" for x in expected]


def test_a_network_that_cannot_be_compared_is_left_out(figures_drawn, tmp_path):
  paths = draw("shift", tmp_path, shifts({"raw": 0.0}, num_classes=30))
  assert [path.name for path in paths] == ["attention_shift_1.png"]
  draw("shift", tmp_path, shifts({"raw": 0.0, "full": 0.3}))
  text = figures_drawn["attention_shift_2"].get_supxlabel().replace("\n", " ")
  assert "Left out, as no round has 10 images of either kind: raw." in text


def test_each_model_s_classes_have_a_scale_of_their_own(
  figures_drawn, tmp_path
):
  arrays = shifts({"raw": 0.5, "full": 0.5}, num_classes=12, n=60)
  for distance in DISTANCES:
    arrays[f"raw_{distance}_class_mean"] = np.linspace(1, 0, 12)
    arrays[f"full_{distance}_class_mean"] = np.linspace(0.01, 0, 12)
    arrays[f"full_{distance}_class_mean"][3] = np.nan  # a class without images
  draw("shift", tmp_path, arrays)
  ax = figures_drawn["attention_shift_4"].axes[0]
  shares = ax.collections[0].get_array().reshape(12, 2)
  np.testing.assert_allclose(shares[0], 1)
  assert shares.mask[3].tolist() == [False, True]
  assert len(ax.texts) == 23
