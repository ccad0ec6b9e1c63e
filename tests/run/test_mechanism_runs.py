"""The two experiments on networks and trainings of seconds."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import attacks, models, rng
from atat_jax.models.base import standardize_images

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)


@pytest.fixture(scope="module")
def network(make_variables):
  model = models.create("wide_resnet", depth=8, width=1, stem_channels=4)
  images = np.random.default_rng(0).uniform(size=(6, 8, 8, 1))
  images = images.astype(np.float32)
  return model, make_variables(model, images), images


def test_fixed_statistics_are_those_of_the_batch(network):
  from benchmarks.support import cross_terms

  model, variables, images = network
  passes = cross_terms.passes(model, variables)
  wanted = jax.jit(passes.through)(images)
  found = jax.jit(passes.fixed)(images)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
  # With constant statistics no image depends on another.
  gradient = jax.jit(jax.grad(lambda x: passes.fixed(x)[0].sum()))(images)
  assert np.abs(gradient[0]).max() > 0
  np.testing.assert_array_equal(gradient[1:], 0)


def test_everything_with_cross_entropy_is_the_package_s_pgd(network):
  from benchmarks.support import cross_terms

  model, variables, images = network
  labels = np.arange(6, dtype=np.int32)
  numbers = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 3}
  passes = cross_terms.passes(model, variables)
  key = jax.random.key(3)
  attack = jax.jit(cross_terms.attack, static_argnames=("loss", "route"))
  found = attack(
    rng.stream(key, "start", 0),
    passes,
    images,
    labels,
    loss="cross_entropy",
    route="through",
    **numbers,
  )
  wanted = attacks.pgd(key, passes.through, images, labels, **numbers)
  # A gradient near 0 may change its sign by rounding.
  assert np.mean(np.abs(found - wanted) > 1e-6) < 0.02


def test_own_normalisations_are_the_package_s():
  from benchmarks.support import normalizations

  images = np.random.default_rng(0).uniform(size=(3, 4, 4, 3))
  images = jnp.asarray(images, jnp.float32).at[2].set(0.5)
  mean, std = jnp.array([0.5, 0.4, 0.3]), jnp.array([0.2, 0.3, 0.4])

  def made(name, x):
    own = normalizations.own_statistics(x)
    formula = normalizations.FORMULAS[name]
    return normalizations.normalize(x, own, (mean, std), formula)

  wanted = {
    "per_image": standardize_images(images),
    "constant": standardize_images(images),
    "informed": standardize_images(images),
    "dataset": (images - mean) / std,
    "none": images,
    "double": 2 * (images - mean) / std,
    "offset": (images - images.mean((1, 2, 3), keepdims=True)) / std,
  }
  for name, value in wanted.items():
    found = made(name, images)
    np.testing.assert_allclose(found[..., :3], value, atol=1e-5, err_msg=name)
    told = np.abs(found[..., 3:]).max()
    assert (told > 0) == (name == "informed")
  # To one pixel the others are constants only where it is said.
  for name, is_zero in (("per_image", False), ("constant", True)):
    gradient = jax.grad(lambda x, name=name: made(name, x)[0, 0, 0, 0])(images)
    assert (np.abs(gradient[0, 1:]).max() == 0) == is_zero, name


@pytest.mark.slow
def test_a_training_behind_a_normalisation_is_evaluated(tmp_path):
  from atat_jax import data
  from atat_jax.config import make_plan
  from benchmarks import normalization
  from benchmarks.support import normalizations

  args = normalization.parser().parse_args(["--set", "model.width=1"])
  plan = make_plan(normalization._config(args, 0))
  dataset = data.load("digits", validation_size=180)
  training = normalization.Training(plan, dataset, 3)
  model, variables = training.model, training.run("informed")
  assert model.network.width == 1
  np.testing.assert_array_equal(
    variables["params"]["formula"], normalizations.FORMULAS["informed"]
  )
  split = data.Split(dataset.test.images[:24], dataset.test.labels[:24])
  found = normalization.evaluate(
    model, variables, plan.evaluation.validation, split, 24
  )
  assert json.loads(json.dumps(found)) == found
  assert 0 <= found["pgd20"] <= found["nominal"] <= 1
  assert np.mean(found["pgd20_by_contrast"]) == pytest.approx(found["pgd20"])
  assert 0 < found["contrasts"][0] < found["contrasts"][2]
  assert 0 < found["mean_shift"] < 0.2


def test_an_anchored_network_ignores_the_attack_s_own_mean(make_variables):
  from benchmarks.support import normalizations

  inner = models.create(
    "wide_resnet", depth=8, width=1, stem_channels=4, normalization="none"
  )
  model = normalizations.Normalized(inner, (0.5,), (0.3,))
  images = np.random.default_rng(0).uniform(0.2, 0.6, (4, 8, 8, 1))
  images = images.astype(np.float32)
  variables = make_variables(model, images)
  numbers = jnp.array(normalizations.FORMULAS["per_image"])
  variables["params"]["formula"] = numbers
  classifier = jax.jit(models.classifier(model, variables))
  anchored = jax.jit(normalizations.anchored(model, variables, images))
  np.testing.assert_allclose(anchored(images), classifier(images), atol=1e-4)
  brighter = 1.3 * images + 0.1
  np.testing.assert_allclose(
    classifier(brighter), classifier(images), atol=1e-2
  )
  assert np.abs(anchored(brighter) - anchored(images)).max() > 0.1
