"""Figures of landscapes, curvature and sweeps show the numbers given."""

import json

import numpy as np
import pytest
from analysis_files import (
  curvature_arrays,
  epsilons_arrays,
  landscape_arrays,
  maps,
  shifts,
  steps_arrays,
)
from matplotlib import colors

from atat_jax import analyses
from atat_jax.drawing import style
from atat_jax.errors import UserError
from atat_jax.runs import files

pytest_plugins = ("pictures",)


def draw(name, directory, arrays):
  """Draws made-up arrays of an analysis."""
  analysis = analyses.ANALYSES[name]
  return analysis.draw(
    files.Arrays(analysis.path(directory), arrays), directory
  )


@pytest.mark.parametrize(
  ("name", "arrays", "lost"),
  [
    ("steps", steps_arrays, "atat_accuracy"),
    ("epsilons", epsilons_arrays, "atat_accuracy"),
    ("curvature", curvature_arrays, "atat_eigenvalue"),
    ("landscape", landscape_arrays, "atat_loss"),
    ("attention", lambda: maps(["a"], ["clean", "adversarial"]), "a_clean_map"),
    ("shift", lambda: shifts({"raw": 0.5}), "raw_cosine_mean"),
  ],
)
def test_a_missing_array_is_named(figures_drawn, tmp_path, name, arrays, lost):
  given = arrays()
  del given[lost]
  with pytest.raises(UserError, match=f"it has no {lost}"):
    draw(name, tmp_path, given)


def autoattack_row(**changes):
  row = {
    "model": "atat",
    "attack": "autoattack",
    "norm": "linf",
    "epsilon": 8 / 255,
    "batch_norm": "running",
    "num_examples": 360,
    "accuracy": 0.5,
  }
  return row | changes


def write_rows(directory, *rows):
  results = {"format": 1, "rows": rows}
  (directory / "results.json").write_text(json.dumps(results))


def levels(fig):
  """Heights of the horizontal lines of a figure, by colour."""
  found = {}
  for line in fig.axes[0].lines:
    y = np.asarray(line.get_ydata(), float)
    if np.ptp(y) == 0:
      found.setdefault(colors.to_hex(line.get_color()), []).append(y[0])
  return {color: sorted(heights) for color, heights in found.items()}


def test_lines_lie_at_the_accuracies(figures_drawn, tmp_path):
  green = style.model_colors(["standard", "atat"])["atat"].lower()
  draw("steps", tmp_path, steps_arrays())
  assert levels(figures_drawn["attack_steps"])[green] == [60]
  write_rows(tmp_path, autoattack_row())
  draw("steps", tmp_path, steps_arrays())
  assert levels(figures_drawn["attack_steps"])[green] == [50, 60]


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


def caption(fig):
  return fig.get_supxlabel().replace("\n", " ")


def test_images_that_the_largest_ball_leaves_are_told(figures_drawn, tmp_path):
  arrays = epsilons_arrays()
  draw("epsilons", tmp_path, arrays)
  assert "leaves: atat 10.0%." in caption(figures_drawn["attack_epsilons"])
  arrays["atat_worst_case"][-1] = 0
  draw("epsilons", tmp_path, arrays)
  text = caption(figures_drawn["attack_epsilons"])
  assert "leaves: no image of any model." in text


def planes(fig):
  """Panels with contours."""
  return [ax for ax in fig.axes if ax.get_xlabel().startswith("a, ")]


def test_surfaces_share_a_scale_and_contours_have_their_own(
  figures_drawn, tmp_path
):
  draw("landscape", tmp_path, landscape_arrays())
  crossed, never = (figures_drawn[f"loss_landscape_{k}"] for k in (1, 2))
  steep, flat = (ax for ax in crossed.axes if hasattr(ax, "get_zlim"))
  steep_below, flat_below = planes(crossed)
  assert steep.get_zlim() == flat.get_zlim() == (0, pytest.approx(8))
  peaks = [ax.collections[0].get_clim()[1] for ax in (steep_below, flat_below)]
  assert peaks == [pytest.approx(8), pytest.approx(0.04)]

  def has_border(ax):
    return any(
      style.VERMILION.lower() == colors.to_hex(color)
      for lines in ax.collections[1:]
      for color in lines.get_edgecolor()
    )

  assert has_border(steep_below) and has_border(flat_below)
  assert not has_border(
    planes(never)[0]
  )  # no point of it is classified wrongly


@pytest.mark.parametrize(
  ("number", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))]
)
def test_panels_fill_their_rows(figures_drawn, tmp_path, number, shape):
  arrays = landscape_arrays([f"net{n}" for n in range(number)])
  arrays["labels"] = arrays["labels"][:1]
  draw("landscape", tmp_path, arrays)
  panels = figures_drawn["loss_landscape_1"].axes[: 2 * number]
  grid = panels[0].get_gridspec()
  assert (grid.nrows // 2, grid.ncols) == shape


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
