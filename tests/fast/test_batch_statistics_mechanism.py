"""Gradients through batch statistics in parts, and the tables made of them."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import losses

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)


IMAGES = np.random.default_rng(0).uniform(size=(5, 2, 2, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1], np.int32)
WEIGHTS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def _logits(images, statistics):
  """A layer that is normalised, bent, and mixed: the statistics matter."""
  mean, std = statistics
  x = (images.reshape(len(images), -1) - mean) / std
  return 9 * jnp.tanh(x) @ WEIGHTS


def _statistics(images):
  x = images.reshape(len(images), -1)
  return x.mean(0), x.std(0) + 0.1


def _network():
  from benchmarks.support import cross_terms

  return cross_terms.Passes(
    lambda x: _logits(x, _statistics(x)),
    lambda x: _logits(x, jax.lax.stop_gradient(_statistics(x))),
  )


def _loss(logits):
  return losses.cross_entropy(logits, LABELS)


def test_the_parts_are_the_derivatives_they_are_named_after():
  from benchmarks.support import cross_terms

  network = _network()
  logits = network.through(IMAGES)
  pull = cross_terms.pull("cross_entropy", logits, LABELS)
  found = jax.jit(lambda x: cross_terms.terms(network, x, pull))(IMAGES)
  # All derivatives d loss_j / d x_i, the slow and plain way.
  every = jax.jit(jax.jacrev(lambda x: _loss(network.through(x))))(IMAGES)
  numbers = np.arange(len(IMAGES))
  own = every[numbers, numbers]
  direct = jax.grad(lambda x: _loss(network.fixed(x)).sum())(IMAGES)
  np.testing.assert_allclose(found.direct, direct, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    found.statistics, own - direct, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    found.cross, every.sum(0) - own, rtol=1e-4, atol=1e-5
  )
  total = jax.grad(lambda x: _loss(network.through(x)).sum())(IMAGES)
  np.testing.assert_allclose(sum(found), total, rtol=1e-4, atol=1e-5)
  assert all(np.abs(part).max() > 1e-3 for part in found)


@pytest.mark.parametrize("route", ["through", "fixed", "own", "cross"])
def test_an_attack_follows_the_part_that_it_names(route):
  from benchmarks.support import cross_terms

  network = _network()
  pull = cross_terms.pull("cross_entropy", network.through(IMAGES), LABELS)
  parts = jax.jit(lambda x: cross_terms.terms(network, x, pull))(IMAGES)
  wanted = {
    "through": sum(parts),
    "fixed": parts.direct,
    "own": parts.direct + parts.statistics,
    "cross": parts.cross,
  }[route]
  gradient = jax.jit(
    functools.partial(
      cross_terms.gradient, network, loss="cross_entropy", route=route
    )
  )
  found = gradient(IMAGES, LABELS)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_pulls_are_gradients_and_their_lengths_are_as_said():
  from benchmarks.support import cross_terms

  # The last image is so sure that the square of its gradient is 0 in float32.
  logits = jnp.array([[1.0, 0, 0], [2, 1, 0], [0, 60, 0]])
  labels = jnp.array([0, 1, 1])
  exact = np.asarray(jax.nn.softmax(logits)) - np.eye(3)[labels]
  found = {
    loss: np.asarray(cross_terms.pull(loss, logits, labels))
    for loss in cross_terms.LOSSES
  }
  numbered = jax.vmap(lambda n: cross_terms.pull(n, logits, labels))
  np.testing.assert_array_equal(
    numbered(jnp.arange(len(found))), list(found.values())
  )
  np.testing.assert_allclose(found["cross_entropy"][:2], exact[:2], rtol=1e-5)
  np.testing.assert_allclose(
    np.linalg.norm(found["unit"], axis=-1), 1, rtol=1e-5
  )
  np.testing.assert_allclose(
    found["unit"][:2],
    exact[:2] / np.linalg.norm(exact[:2], axis=-1, keepdims=True),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(found["unfooled"][1], 0)
  np.testing.assert_array_equal(
    found["unfooled"][[0, 2]], found["cross_entropy"][[0, 2]]
  )
  np.testing.assert_array_equal(found["margin"][1], [1, -1, 0])


def test_bins_count_every_image_once_and_average_their_own():
  from benchmarks import mechanism

  margin = np.array([-1.0, 0.0, 1.0, 5.0, 50.0])
  parts = {
    "margin": margin,
    "pull": np.arange(5.0),
    "direct": np.array([1.0, 1, 2, 0, 1]),
    "statistics": np.zeros(5),
    "cross": np.array([2.0, 3, 10, 1, 1]),
    "cosine": np.ones(5),
    "agreement": np.full(5, 0.5),
  }
  rows = mechanism.binned(parts, margin < 5, margin < 1)
  assert [row["count"] for row in rows] == [1, 2, 0, 1, 0, 1]
  assert rows[1]["cross_over_direct"] == 4
  assert (rows[1]["rescued"], rows[3]["rescued"]) == (0.5, 0)
  assert math.isfinite(rows[3]["cross_over_direct"])
  assert rows[0]["margin"] == [None, 0.0]
  assert "pull" not in rows[2]


def test_attacks_on_fewer_images_are_compared_on_these():
  from atat_jax.runs import worst_case
  from benchmarks import mechanism

  def attack(route, correct):
    return {
      "attack": "fgsm",
      "loss": "cross_entropy",
      "route": route,
      "num_examples": len(correct),
      "correct": worst_case.pack(np.array(correct, bool)),
    }

  row = {
    "network": "at",
    "attacks": [attack("through", [1, 0, 1, 1]), attack("own", [0, 0])],
  }
  lines = mechanism.attack_table([row]).splitlines()
  cells = {
    line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines
  }
  published = "cross-entropy, everything (as published)"
  assert cells[published] == "75.0"
  assert cells[f"{published}, first 2 images"] == "50.0"
  assert cells["cross-entropy, own terms only, first 2 images"] == "0.0"
  assert "margin, everything" not in cells


def test_normalisations_are_compared_seed_by_seed():
  from benchmarks import normalization

  def row(formula, seed, pgd20):
    return {
      "formula": formula,
      "training_seed": seed,
      "nominal": 1.0,
      "pgd20": pgd20,
      "pgd20-margin": 0.5,
      "pgd20_anchored": 0.5,
      "mean_shift": 0.1,
      "pgd20_by_contrast": [0.1, 0.2, 0.3],
    }

  rows = [
    row("dataset", 0, 0.7),
    row("offset", 0, 0.6),
    row("dataset", 1, 0.5),
    row("offset", 1, 0.4),
    row("offset", 2, 0.0),
  ]
  _, _, _, found = normalization.table(rows).splitlines()
  # A seed without `dataset` counts in the mean, not in the difference.
  assert "33.3" in found
  assert "-10.0 ± 0.0" in found


def test_thirds_are_in_order_and_of_equal_size():
  from benchmarks import normalization

  values = np.array([5.0, 1, 4, 2, 6, 3])
  np.testing.assert_array_equal(
    normalization.thirds(values), [2, 0, 1, 0, 2, 1]
  )
