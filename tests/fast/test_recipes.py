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


def row(variant, seed, margin, passes=100):
  accuracy = {"nominal": 0.5, "pgd20": margin + 0.01, "pgd10-margin": margin}
  return {
    "variant": variant,
    "seed": seed,
    "num_steps": 10,
    "passes": passes,
    "seconds_per_step": 0.5,
    "averaged": accuracy,
    "last": {**accuracy, "pgd10-margin": margin - 0.02},
  }


def test_differences_are_taken_seed_by_seed(recipes):
  text = recipes.table(
    [
      row("reference", 0, 0.20),
      row("reference", 1, 0.30),
      row("other", 0, 0.21, passes=150),
      row("other", 1, 0.31, passes=150),
    ]
  )
  cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
  assert cells == [
    *("other", "2", "10", "1.50", "1.00", "50.0 ± 0.0", "27.0 ± 5.0"),
    *("26.0 ± 5.0", "1.0 ± 0.0", "24.0 ± 5.0"),
  ]


@pytest.mark.parametrize("group", ["attacks", "training"])
def test_every_variant_is_a_plan(recipes, group):
  from atat_jax.config import make_plan

  args = recipes.parser().parse_args([group])
  names = [variant.name for variant in recipes.GROUPS[group]]
  assert names[0] == recipes.REFERENCE and len(set(names)) == len(names)
  for variant in recipes.GROUPS[group]:
    for fields in (variant.fields, {**variant.fields, **variant.early}):
      made = recipes._config(args, fields, 3)
      assert make_plan(made).stages[0].num_epochs == made.train.num_epochs
