"""A network in bfloat16: what stays in float32, and what reaches it.

The list that users read is in docs/performance.md.
"""

import functools

import half_precision
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax.linen import normalization

from atat_jax import (
  attacks,
  losses,
  models,
  objectives,
  optim,
  sharding,
  state,
  steps,
)
from atat_jax.attacks import balls
from atat_jax.data.base import Split
from atat_jax.models import base, convolution
from atat_jax.training.options import Options

HALF = jnp.bfloat16
LITERAL = {**quick.OPTIONS, "xla_allow_excess_precision": False}
"""Rounds where the program says so; XLA may leave a rounding out otherwise."""


@pytest.fixture(scope="module")
def half(wrn):
  """`wrn` in bfloat16, with XLA's own convolutions as on an accelerator."""
  return wrn._replace(model=wrn.model.clone(dtype=HALF, convolution="xla"))


def _attacked(attack, half, classifier, **options):
  return half_precision.complaints(
    type(half.model),
    lambda images: attack(
      jax.random.key(0), classifier, images, half.labels, epsilon=0.1, **options
    ),
    half.images,
  )


def _step(half, method, **options):
  """Train step of a method and its arguments."""
  objective = objectives.create(method, num_steps=2)
  optimizer = optim.make_optimizer(lambda _: 0.1)
  mesh = sharding.make_mesh(jax.devices()[:1])
  made = state.create(
    half.model,
    optimizer,
    jax.random.key(0),
    half.images[:1],
    metric_names=steps.metric_names(objective),
    term_names=steps.term_names(objective),
    initial=half.variables,
    averages=True,
  )
  step = functools.partial(
    steps.train_step,
    model=half.model,
    objective=objective,
    optimizer=optimizer,
    mesh=mesh,
    num_classes=10,
    options=Options(**options),
  )
  data = Split(np.zeros(half.images.shape, np.uint8), np.zeros(8, np.int32))
  return step, (made, half.variables, data, jnp.arange(8))


def test_only_layers_of_the_train_step_compute_in_16_bits(half):
  step, arguments = _step(
    half, "atat", ema_decay=0.9, awp_gamma=0.01, label_smoothing=0.1
  )
  found = half_precision.convolutions(step, *arguments)
  assert found and set(found) == {np.dtype(HALF)}
  assert not half_precision.complaints(type(half.model), step, *arguments)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("pgd", {"step_size": 0.02, "num_steps": 3}),
    ("apgd", {"num_steps": 3, "loss": "dlr"}),
    ("fab", {"num_steps": 3}),
    ("square", {"num_queries": 3}),
  ],
)
def test_only_layers_of_an_attacked_network_compute_in_16_bits(
  half, name, options
):
  classifier = models.classifier(half.model, half.variables)
  assert not _attacked(attacks.ATTACKS[name], half, classifier, **options)


def _rounded(function):
  """The function with its first array rounded to 16 bits on the way."""
  return lambda x, *args: function(x.astype(HALF), *args)


def _statistics_in_half(x, axes, **_):
  means = (jnp.mean(y, axes, dtype=x.dtype) for y in (x, x * x))
  return tuple(mean.astype(jnp.float32) for mean in means)


def _replace_linf(patch, **functions):
  linf = balls.BALLS["linf"]._replace(**functions)
  patch.setitem(balls.BALLS, "linf", linf)


PLANTED = {
  "loss of rounded logits": lambda patch: patch.setitem(
    losses.ATTACK_LOSSES, "cross_entropy", _rounded(losses.cross_entropy)
  ),
  "step along a rounded gradient": lambda patch: _replace_linf(
    patch, direction=lambda g: jnp.sign(g.astype(HALF)).astype(g.dtype)
  ),
  "rounded perturbation": lambda patch: _replace_linf(
    patch, project=lambda delta, *_: delta.astype(HALF).astype(delta.dtype)
  ),
  "rounded images": lambda patch: patch.setattr(
    base, "standardize_images", _rounded(base.standardize_images)
  ),
  "statistics in 16 bits": lambda patch: patch.setattr(
    normalization, "_compute_stats", _statistics_in_half
  ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_rounding_is_found(half, name, monkeypatch):
  PLANTED[name](monkeypatch)
  # The model is another one, so that no trace of the right code is reused.
  model = half.model.clone(negative_slope=0.2)
  classifier = models.classifier(model, half.variables, batch_norm="batch")
  assert _attacked(attacks.pgd, half, classifier, step_size=0.02, num_steps=3)


@pytest.mark.parametrize(
  ("dtype", "bits"), [(jnp.bfloat16, 16), (jnp.float16, 21)]
)
def test_both_halves_of_an_image_hold_it_to_rounding(dtype, bits):
  x = np.random.default_rng(0).uniform(0.1, 1, (4, 8, 8, 3)).astype(np.float32)
  kernel = np.zeros((3, 3, 3, 5), np.float32)

  @functools.partial(jax.jit, compiler_options=LITERAL)
  def halves(x):
    return convolution.both_halves(x, kernel, dtype)[0].astype(dtype)

  first, rest = np.split(np.asarray(halves(x)).astype(np.float64), 2, -1)
  np.testing.assert_array_equal(first, x.astype(dtype).astype(np.float64))
  assert np.abs((first + rest) / x - 1).max() <= 2.0**-bits


def test_a_perturbation_below_rounding_reaches_the_first_convolution():
  """A tenth of a level of 255, on pixels of 0.9 that bfloat16 has 1/256 apart.

  The kernels' entries are whole and sum to zero, so that the result is that of
  the perturbation alone.
  """
  generator = np.random.default_rng(0)
  delta = 0.1 / 255 * generator.choice([-1.0, 1.0], (2, 10, 10, 3))
  x = (0.9 + delta).astype(np.float32)
  kernel = generator.integers(-2, 3, (3, 3, 3, 4)).astype(np.float64)
  kernel[1, 1, 1] -= kernel.sum((0, 1, 2))
  exact = np.zeros((2, 8, 8, 4))
  for i, j in np.ndindex(3, 3):
    exact += x[:, i : i + 8, j : j + 8].astype(np.float64) @ kernel[i, j]

  def error(given):
    layer = convolution.Conv(features=4, dtype=HALF, convolution="xla")
    made = jax.jit(layer.apply, compiler_options=LITERAL)(
      {"params": {"kernel": kernel.astype(np.float32)}}, given
    )
    found = np.asarray(made[:, 1:-1, 1:-1]).astype(np.float64)
    return np.abs(found - exact).max() / np.abs(exact).max()

  assert error(x) < 0.005
  assert error(x.astype(HALF)) > 0.5  # as it was, rounded on the way


def test_the_second_half_adds_nothing_to_the_images_gradient():
  x = jax.random.uniform(jax.random.key(0), (2, 6, 6, 3))
  layer = convolution.Conv(features=4, dtype=HALF, convolution="xla")
  variables = layer.init(jax.random.key(1), x)
  gradient = jax.jit(
    jax.grad(lambda x: layer.apply(variables, x).astype(jnp.float32).sum()),
    compiler_options=LITERAL,
  )
  assert gradient(x).dtype == jnp.float32
  np.testing.assert_array_equal(gradient(x), gradient(x.astype(HALF)))


def test_one_pass_loses_less_of_a_variance_than_16_bits_do():
  """E[x^2] - E[x]^2 in float32, at means of up to 1,000 deviations.

  Its error against float64 on the same numbers stays below a quarter of the
  error that their rounding to bfloat16 makes, or below 1e-5.
  """
  generator = np.random.default_rng(0)
  for ratio in (0, 1, 10, 30, 100, 300, 1000):
    x = ratio + generator.normal(size=(16, 16, 16, 8))
    stored = jnp.asarray(x, HALF)
    made = jax.jit(
      lambda x: normalization._compute_stats(x, (0, 1, 2), dtype=HALF),
      compiler_options=LITERAL,
    )(stored)
    wide = np.asarray(stored).astype(np.float64)
    exact, true = (y.var((0, 1, 2)) for y in (wide, x))
    one_pass = np.abs(made[1] / exact - 1).max()
    rounding = np.abs(exact / true - 1).max()
    assert one_pass <= max(1e-5, rounding / 4), (ratio, one_pass, rounding)
