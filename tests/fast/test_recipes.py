"""The comparison of recipes: its data, its variants and its tables."""

import importlib
import pathlib

import numpy as np
import pytest

from atat_jax.data import Split

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def recipes(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module("benchmarks.recipes")


def test_images_are_halved_by_the_mean_of_four_pixels(recipes):
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
  found = recipes.pooled(Split(images, np.arange(5)), 3)
  assert found.images.shape == (3, 2, 3, 3) and found.images.dtype == np.uint8
  np.testing.assert_array_equal(found.labels, [0, 1, 2])
  mean = images[1, 2:4, 4:6, 2].astype(float).mean()
  assert found.images[1, 1, 2, 2] == round(mean)


def row(variant, seed, robust, passes=100):
  accuracy = {"nominal": 0.5, "robust": robust}
  return {
    "variant": variant,
    "seed": seed,
    "passes": passes,
    "seconds": 2.0,
    "averaged": {"10": accuracy, "4": accuracy, "20": accuracy, "40": accuracy},
    "last": {"nominal": 0.4, "robust": robust - 0.02},
  }


def test_differences_are_taken_seed_by_seed(recipes):
  rows = [
    row("reference", 0, 0.20),
    row("reference", 1, 0.30),
    row("other", 0, 0.21, passes=150),
    row("other", 1, 0.31, passes=150),
  ]
  text = recipes.table(rows)
  cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
  assert cells == [
    *("other", "2", "1.50", "1.00", "50.0 ± 0.0", "26.0 ± 5.0"),
    *("1.0 ± 0.0", "24.0 ± 5.0"),
  ]
  last = recipes.averages_table(rows).splitlines()[2]
  assert last.split("|")[2].strip() == "40.0 ± 0.0"


def test_a_variant_is_an_attack_of_the_package_at_its_cost(recipes):
  from atat_jax.objectives import create
  from atat_jax.objectives.adversarial import SINGLE_STEPS
  from benchmarks.support import flops

  named = {variant.name: variant for variant in recipes.VARIANTS}
  assert len(named) == len(recipes.VARIANTS)
  for name, steps in (("pgd10", 10), ("pgd2", 2), ("n_fgsm", 1)):
    expected = 6 * flops.passes(create("at"), steps)
    assert named[name].passes() == expected, name
  for name, length in SINGLE_STEPS.items():
    assert named[name].num_steps == 1
    assert named[name].step_size == pytest.approx(8 * length)
  noise = create("at", attack_method="n_fgsm").single_step_noise
  assert named["n_fgsm"].noise == noise
  # Not projected there: a ball that no iterate leaves.
  assert named["n_fgsm"].radius == noise + SINGLE_STEPS["n_fgsm"]
