"""Sums and counts: means that are exact whatever the batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import metrics


def test_batches_of_any_size_add_up_to_the_whole():
  generator = np.random.default_rng(0)
  losses = generator.normal(size=103).astype(np.float32)
  correct = generator.uniform(size=103) < 0.3
  sums = metrics.zeros(("loss", "accuracy"))
  for part in np.split(np.arange(103), [1, 40, 41, 100]):
    batch = metrics.from_examples(
      {
        "loss": jnp.asarray(losses[part]),
        "accuracy": jnp.asarray(correct[part]),
      }
    )
    sums = metrics.merge(sums, batch)
  assert sums["accuracy"].tolist() == [correct.sum(), 103]
  means = metrics.compute(sums)
  assert means["accuracy"] == correct.sum() / 103
  assert math.isclose(
    means["loss"], losses.astype(np.float64).mean(), rel_tol=1e-5
  )


def test_mask_leaves_examples_out():
  values = {"loss": jnp.array([1.0, 2.0, 50.0])}
  sums = metrics.from_examples(values, jnp.array([True, True, False]))
  assert sums["loss"].tolist() == [3, 2]
  assert metrics.compute(sums) == {"loss": 1.5}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_nan_does_not_spread_and_another_does(bad):
  values = {"loss": jnp.array([1.0, bad])}
  masked = metrics.from_examples(values, jnp.array([True, False]))
  assert masked["loss"].tolist() == [1, 1]
  assert not math.isfinite(
    metrics.compute(metrics.from_examples(values))["loss"]
  )


def test_mean_of_nothing_is_nan():
  assert math.isnan(metrics.compute(metrics.zeros(("loss",)))["loss"])
  nothing = metrics.from_examples({"loss": jnp.ones(3)}, jnp.zeros(3, bool))
  assert math.isnan(metrics.compute(nothing)["loss"])


def test_counts_of_a_whole_data_set_are_exact():
  """50,000 steps of 128 would not fit; an epoch's counts must."""
  ones = {"accuracy": jnp.ones(1000, bool)}
  add = jax.jit(lambda s: metrics.merge(s, metrics.from_examples(ones)))
  sums = metrics.zeros(("accuracy",))
  for _ in range(60):
    sums = add(sums)
  assert sums["accuracy"].tolist() == [60_000, 60_000]


def test_sums_are_float32_whatever_the_values():
  for dtype in (jnp.bfloat16, bool, jnp.int32, jnp.float32):
    sums = metrics.from_examples({"x": jnp.ones(4, dtype)})
    assert sums["x"].dtype == np.float32 and sums["x"].tolist() == [4, 4]
