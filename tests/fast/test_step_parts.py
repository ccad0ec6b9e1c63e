"""Parts of the train step that need no compiled step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from atat_jax import objectives, rng, sharding, steps
from atat_jax.errors import UserError
from atat_jax.training import averaging, awp
from atat_jax.training.batch import epsilon_scale
from atat_jax.training.options import OFF, Options


def test_metric_and_term_names():
  adversarial = objectives.create("atat")
  assert steps.metric_names(adversarial) == (
    "loss",
    "cross_entropy",
    "attention",
    "logit_pairing",
    "accuracy_clean",
    "accuracy_adversarial",
    "gradient_norm",
  )
  standard = objectives.create("standard")
  assert steps.metric_names(standard) == (
    "loss",
    "cross_entropy",
    "accuracy_clean",
    "gradient_norm",
  )
  assert steps.term_names(standard) == ("cross_entropy", "gradient")


def test_a_batch_that_does_not_divide_is_replicated(eight_devices):
  mesh = sharding.make_mesh(eight_devices)
  whole = sharding.put_batch(mesh, np.arange(100.0))
  assert whole.sharding.is_fully_replicated
  split = sharding.put_batch(mesh, np.arange(96.0))
  assert [shard.data.shape for shard in split.addressable_shards] == [(12,)] * 8
  np.testing.assert_array_equal(split, np.arange(96.0))


def test_streams_depend_on_key_name_and_step_only():
  def bits(seed, name, step):
    return jax.random.bits(rng.stream(jax.random.key(seed), name, step))

  draw = quick.jit(bits, static_argnames="name")
  cases = [
    (seed, name, step)
    for seed in (0, 1)
    for name in ("attack", "augmentation")
    for step in (0, 1, 2)
  ]
  assert len({int(draw(*case)) for case in cases}) == len(cases)
  assert draw(0, "attack", 1) == draw(0, "attack", 1)
  assert draw(0, "attack", 1) == bits(0, "attack", 1)  # traced or not


def test_perturbation_of_weights_in_float64(x64):
  generator = np.random.default_rng(0)
  params = {
    "kernel": generator.normal(size=(3, 3, 2, 4)),
    "dense": generator.normal(size=(4, 3)),
    "unused": generator.normal(size=(2, 2)),
    "bias": generator.normal(size=3),
  }
  gradient = jax.tree.map(lambda x: generator.normal(size=x.shape), params)
  gradient["unused"] = np.zeros((2, 2))
  moved = quick.jit(awp.perturb)(params, gradient, 0.07)
  for name in ("kernel", "dense"):
    delta = np.asarray(moved[name]) - params[name]
    norms = [np.linalg.norm(x.ravel()) for x in (delta, params[name])]
    assert norms[0] == pytest.approx(0.07 * norms[1], rel=1e-12)
    cosine = (delta * gradient[name]).sum() / norms[0]
    assert cosine == pytest.approx(np.linalg.norm(gradient[name].ravel()))
  for name in ("unused", "bias"):
    np.testing.assert_array_equal(moved[name], params[name])


def weights_at(step):
  return {"params": np.sin([step + 1.0, 2.0 * step]), "batch_stats": step + 0.0}


update_average = quick.jit(averaging.update, static_argnums=3)


def run_average(options, number):
  average = weights_at(-1)
  for step in range(number):
    average = update_average(average, weights_at(step), step, options)
  return average


def test_ema_by_its_sum(x64):
  decay, number = 0.8, 60
  found = run_average(Options(ema_decay=decay), number)
  decays = [min(decay, (1 + t) / (10 + t)) for t in range(number)]
  assert decays[0] == 0.1 and decays[-1] == decay
  for name in ("params", "batch_stats"):
    weight = np.cumprod([1, *decays[::-1]])[::-1]  # of the start and each step
    expected = weight[0] * np.asarray(weights_at(-1)[name])
    for t in range(number):
      expected = expected + weight[t + 1] * (1 - decays[t]) * np.asarray(
        weights_at(t)[name]
      )
    np.testing.assert_allclose(found[name], expected, rtol=1e-12)


@pytest.mark.parametrize("number", [300, 5700])
def test_the_warm_up_of_ema_is_a_share_of_a_short_run(x64, number):
  """Until step 8,990 a decay of 0.999 averages over the last ninth of a run."""
  moved = averaging.share(jnp.arange(number), Options(ema_decay=0.999))
  kept = np.cumprod(1 - np.asarray(moved)[::-1])[::-1]
  weight = np.asarray(moved) * np.append(kept[1:], 1)  # of each step's weights
  # The product of (1 + t) / (10 + t) telescopes: a polynomial of degree 8.
  steps = np.arange(float(number))
  expected = 9 * np.prod([steps + i for i in range(2, 10)], 0)
  expected /= np.prod([float(number + i) for i in range(1, 10)])
  np.testing.assert_allclose(weight, expected, rtol=1e-9)
  age = number - 1 - (weight * np.arange(number)).sum()
  assert age / number == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("number", [3, 5, 6, 40])
def test_swa_is_the_mean_since_its_start(x64, number):
  options = Options(swa_start=5, statistics_batches=1)
  found = run_average(options, number)
  entered = [weights_at(t)["params"] for t in range(min(5, number - 1), number)]
  expected = np.mean(entered, 0)
  np.testing.assert_allclose(found["params"], expected, rtol=1e-12)
  # Statistics wait for their estimate.
  assert float(found["batch_stats"]) == number - 1


def test_nothing_is_averaged_where_there_is_no_average():
  assert averaging.update(None, weights_at(0), 0, OFF) is None


def test_epsilon_rises_linearly_and_stays():
  scales = [float(epsilon_scale(jnp.int32(t), 4)) for t in range(7)]
  assert scales == [0.25, 0.5, 0.75, 1, 1, 1, 1]


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"awp_gamma": -0.1}, "awp_gamma: -0.1"),
    ({"ema_decay": 1.0}, "ema_decay: 1.0"),
    ({"label_smoothing": 1.0}, "label_smoothing: 1.0"),
    ({"accumulate_steps": 0}, "accumulate_steps: 0"),
    ({"statistics_batches": -1}, "statistics_batches: -1"),
    ({"epsilon_warmup": -1}, "epsilon_warmup: -1"),
    ({"mix": "cutout"}, "mix: 'cutout'"),
    ({"swa_start": 5}, "statistics_batches: 0"),
    (
      {"swa_start": 5, "statistics_batches": 9, "ema_decay": 0.9},
      "ema_decay: 0.9 with swa_start",
    ),
  ],
)
def test_bad_values_are_named(fields, named):
  with pytest.raises(UserError, match=named) as error:
    Options(**fields)
  assert len(str(error.value).splitlines()) == 1


def test_options_are_off():
  assert OFF == Options() and not OFF.averages and not OFF.estimates
  for field in dataclasses.fields(Options):
    if field.name not in ("mix", "mix_alpha", "accumulate_steps"):
      assert getattr(OFF, field.name) == 0
