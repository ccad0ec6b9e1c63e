"""Schedules at named steps, the decay mask, and the update by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from atat_jax import models, optim
from atat_jax.errors import UserError

PEAK, STEPS = 0.4, 200


def _schedule(name: str, **options) -> np.ndarray:
  schedule = optim.make_schedule(
    name, learning_rate=PEAK, total_steps=STEPS, **options
  )
  rates = quick.jit(jax.vmap(schedule))(np.arange(STEPS + 1))
  return np.asarray(rates, np.float64)


def test_constant():
  np.testing.assert_allclose(_schedule("constant"), PEAK)


def test_piecewise_changes_at_the_boundary_itself():
  rates = _schedule("piecewise", boundaries=(40, 60), factor=0.1)
  expected = [PEAK] * 40 + [PEAK / 10] * 20 + [PEAK / 100] * 141
  np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_piecewise_of_the_released_code():
  """0.1, from step 40 000 on 0.01, from step 60 000 on 0.001."""
  schedule = optim.make_schedule(
    "piecewise",
    learning_rate=0.1,
    total_steps=80_000,
    boundaries=[40_000, 60_000],
  )
  for step, rate in (
    (0, 0.1),
    (39_999, 0.1),
    (40_000, 0.01),
    (59_999, 0.01),
    (60_000, 0.001),
  ):
    assert math.isclose(float(schedule(step)), rate, rel_tol=1e-6)


def test_cosine():
  expected = [
    PEAK * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    for step in range(STEPS + 1)
  ]
  np.testing.assert_allclose(_schedule("cosine"), expected, atol=1e-6)


def test_cosine_with_linear_warm_up():
  expected = [PEAK * step / 20 for step in range(20)]
  expected += [
    PEAK * 0.5 * (1 + math.cos(math.pi * (step - 20) / (STEPS - 20)))
    for step in range(20, STEPS + 1)
  ]
  rates = _schedule("cosine", warmup_fraction=0.1)
  np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_one_cycle_rises_and_falls_as_a_cosine():
  """The rate goes from peak / 25 to the peak, then to peak / 25e4 (Smith, 2018)."""

  def between(start, end, share):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))

  expected = [between(PEAK / 25, PEAK, step / 60) for step in range(60)]
  expected += [
    between(PEAK, PEAK / 25e4, (step - 60) / 140) for step in range(60, 201)
  ]
  rates = _schedule("one_cycle", warmup_fraction=0.3)
  np.testing.assert_allclose(rates, expected, atol=1e-6)
  assert rates.argmax() == 60


def test_triangular_rises_and_falls_linearly():
  """As `np.interp` in the code of Wong et al. (2020)."""
  expected = np.interp(np.arange(STEPS + 1), [0, 0.4 * STEPS, STEPS], [0, 1, 0])
  rates = _schedule("triangular", warmup_fraction=0.4)
  np.testing.assert_allclose(rates, PEAK * expected, atol=1e-7)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_triangular_is_finite_in_the_shortest_runs(total):
  schedule = optim.make_schedule(
    "triangular", learning_rate=PEAK, total_steps=total, warmup_fraction=0.25
  )
  rates = np.array([float(schedule(step)) for step in range(total)])
  peaks = [0, 0.25 * total, total]
  expected = PEAK * np.interp(np.arange(total), peaks, [0, 1, 0])
  np.testing.assert_allclose(rates, expected, atol=1e-7)


def test_decay_is_on_kernels_only(wrn):
  params = models.create("wide_resnet", depth=8, width=2, shortcut="conv")
  params = jax.eval_shape(params.init, jax.random.key(0), wrn.images)["params"]
  mask = optim.decay_mask(params)
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, value in jax.tree_util.tree_leaves_with_path(mask)
    if value
  }
  convolutions = {
    f"stage{stage}_unit1_{name}/kernel"
    for stage in (1, 2, 3)
    for name in ("conv1", "conv2", "shortcut")
  }
  assert decayed == convolutions | {"stem/kernel", "head/kernel"}
  assert jax.tree.structure(mask) == jax.tree.structure(params)


def _trajectory(optimizer, params, gradients):
  @quick.jit
  def update(gradient, state, params):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state, path = optimizer.init(params), []
  for gradient in gradients:
    params, state = update(gradient, state, params)
    path.append(params)
  return path


@pytest.fixture
def problem(x64):
  generator = np.random.default_rng(0)

  def draw():
    return {
      "conv": {"kernel": generator.normal(size=(3, 3, 2, 4))},
      "bn": {
        "scale": generator.normal(size=4),
        "bias": generator.normal(size=4),
      },
      "head": {
        "kernel": generator.normal(size=(4, 3)),
        "bias": generator.normal(size=3),
      },
    }

  return draw(), [draw() for _ in range(5)]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_update_equals_a_loop_by_hand(momentum, nesterov, problem):
  params, gradients = problem
  schedule = optim.make_schedule(
    "piecewise", learning_rate=0.2, total_steps=5, boundaries=(3,)
  )
  optimizer = optim.make_optimizer(
    schedule, momentum=momentum, nesterov=nesterov, weight_decay=0.05
  )
  path = _trajectory(optimizer, params, gradients)
  weights = jax.tree.map(np.copy, params)
  velocity = jax.tree.map(np.zeros_like, params)
  for step, (gradient, actual) in enumerate(zip(gradients, path, strict=True)):
    rate = 0.2 if step < 3 else 0.02
    for layer in weights:
      for name in weights[layer]:
        g = gradient[layer][name]
        if name == "kernel":
          g = g + 0.05 * weights[layer][name]  # the penalty's gradient
        velocity[layer][name] = momentum * velocity[layer][name] + g
        change = velocity[layer][name]
        if nesterov and momentum:
          change = g + momentum * change
        weights[layer][name] = weights[layer][name] - rate * change
        np.testing.assert_allclose(
          actual[layer][name],
          weights[layer][name],
          rtol=1e-6,
          err_msg=f"{step} {layer} {name}",
        )


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_update_equals_pytorch(name, problem, twin):
  torch = twin.torch
  params, gradients = problem
  optimizer = optim.make_optimizer(
    lambda step: 0.1, weight_decay=0.05, name=name, second_momentum=0.95
  )
  path = _trajectory(optimizer, params, gradients)
  weights = twin.tree(params, requires_grad=True)
  groups = [
    {
      "params": [w["kernel"] for w in weights.values() if "kernel" in w],
      "weight_decay": 0.05,
    },
    {
      "params": [
        leaf
        for layer in weights.values()
        for kind, leaf in layer.items()
        if kind != "kernel"
      ],
      "weight_decay": 0.0,
    },
  ]
  if name == "sgd":
    theirs = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
  else:
    theirs = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
  for gradient, actual in zip(gradients, path, strict=True):
    for layer in weights:
      for kind in weights[layer]:
        weights[layer][kind].grad = torch.tensor(gradient[layer][kind])
    theirs.step()
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b.detach(), rtol=5e-6),
      actual,
      weights,
    )


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("step", {}, "schedule: 'step'; allowed: constant, cosine, one_cycle, pie"),
    ("constant", dict(learning_rate=0.0), "learning_rate: 0.0; allowed: "),
    ("constant", dict(learning_rate=float("nan")), "learning_rate: nan; "),
    ("constant", dict(total_steps=0), "total_steps: 0; allowed: "),
    ("constant", dict(total_steps=1.5), "total_steps: 1.5; allowed: "),
    ("cosine", dict(warmup_fraction=1.0), "warmup_fraction: 1.0; allowed: [0"),
    ("cosine", dict(warmup_fraction=-0.1), "warmup_fraction: -0.1; allowed: "),
    ("one_cycle", {}, "warmup_fraction: 0.0; allowed: (0, 1) for one_cycle"),
    ("triangular", {}, "warmup_fraction: 0.0; allowed: (0, 1) for triangular"),
    ("piecewise", dict(boundaries=(9, 3)), "boundaries: (9, 3); allowed: "),
    ("piecewise", dict(boundaries=(3, 3)), "boundaries: (3, 3); allowed: "),
    ("piecewise", dict(boundaries=(0, 3)), "boundaries: (0, 3); allowed: "),
    ("piecewise", dict(boundaries=()), "boundaries: (); allowed: "),
  ],
)
def test_bad_schedules_are_named(name, options, message):
  arguments = dict(learning_rate=0.1, total_steps=10) | options
  with pytest.raises(UserError) as error:
    optim.make_schedule(name, **arguments)
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)


def test_bad_optimizers_are_named():
  with pytest.raises(UserError, match=r"momentum: 1\.0; allowed: \[0, 1\)"):
    optim.make_optimizer(lambda step: 0.1, momentum=1.0)
  with pytest.raises(
    UserError, match="weight_decay: -1; allowed: a number >= 0"
  ):
    optim.make_optimizer(lambda step: 0.1, weight_decay=-1)
  for options, message in (
    (dict(name="adam"), "optimizer: 'adam'; allowed: adamw, sgd"),
    (dict(second_momentum=1.0), "second_momentum: 1.0; allowed: "),
    (dict(name="adamw", nesterov=True), "nesterov: True with adamw"),
  ):
    with pytest.raises(UserError) as error:
      optim.make_optimizer(lambda step: 0.1, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("length", [0.5, 2.0, 40.0])
def test_the_losss_gradient_is_clipped_before_the_penalty_joins(length):
  """By hand; at a norm of 2 nothing happens below it, all above."""
  generator = np.random.default_rng(0)
  params = {
    name: {"kernel": np.float32(generator.normal(size=(3, 2)))} for name in "ab"
  }
  direction = generator.normal(size=(2, 3, 2))
  direction *= length / np.linalg.norm(direction.ravel())
  gradient = {
    name: {"kernel": np.float32(g)}
    for name, g in zip("ab", direction, strict=True)
  }
  optimizer = optim.make_optimizer(
    lambda step: 0.1, weight_decay=0.5, clip_norm=2.0
  )
  state = optimizer.init(params)
  updates, _ = quick.jit(optimizer.update)(gradient, state, params)
  for name, g in zip("ab", direction, strict=True):
    clipped = g * min(1, 2.0 / length)
    expected = -0.1 * (clipped + 0.5 * np.asarray(params[name]["kernel"]))
    np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-5)


def test_without_clipping_the_optimizers_state_is_what_it_was():
  params = {"kernel": jnp.ones(3)}
  states = [
    jax.tree.structure(
      optim.make_optimizer(lambda step: 0.1, **options).init(params)
    )
    for options in ({}, {"clip_norm": 0.0}, {"clip_norm": 1.0})
  ]
  assert states[0] == states[1] != states[2]
