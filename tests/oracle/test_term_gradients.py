"""Gradients of the loss's terms relative to that of the cross-entropy."""

import functools

import jax
import jax.numpy as jnp
import linear_networks
import numpy as np
import optax
import pytest
import quick

from atat_jax import objectives, rng, sharding, state
from atat_jax.data.base import Split
from atat_jax.training import awp, gradients
from atat_jax.training.options import Options

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES = 3
INDICES = np.array([3, 11, 0, 7, 15, 2, 9, 4], np.int32)
STEP = 6


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(jax.devices()[:1])


def _data(shape):
  generator = np.random.default_rng(3)
  return Split(
    generator.integers(0, 256, (16, *shape), dtype=np.uint8),
    generator.integers(0, CLASSES, 16).astype(np.int32),
  )


def _state(model, variables, shape):
  made = state.create(
    model,
    optax.sgd(0.1),
    jax.random.key(2),
    jnp.zeros((1, *shape)),
    metric_names=(),
    term_names=(),
    initial=variables,
  )
  return made.replace(step=jnp.asarray(STEP, jnp.int32))


def _softmax_gradients(images, attacked, labels, weights, biases):
  """Gradients of CE(x) and KL(p(x) || p(x_adv)) by the weights, in float64."""
  p = linear_networks.softmax(images @ weights + biases)
  q = linear_networks.softmax(attacked @ weights + biases)
  log_ratio = np.log(p) - np.log(q)
  kl = (p * log_ratio).sum(-1, keepdims=True)
  by_clean, by_attacked = p * (log_ratio - kl), q - p

  def join(clean, adversarial):
    kernel = images.T @ clean + attacked.T @ adversarial
    bias = (clean + adversarial).sum(0)
    return np.append(kernel.ravel(), bias) / len(labels)

  cross_entropy = join(p - np.eye(CLASSES)[labels], 0 * q)
  return cross_entropy, join(by_clean, by_attacked)


@pytest.mark.parametrize("beta", [0.0, 2.5])
def test_the_ratio_of_a_linear_network_is_that_of_the_formulas(
  beta, eight_devices
):
  shape = (4, 4, 1)
  network, weights, biases = linear_networks.linear(CLASSES, 16, scale=0.3)
  model, variables = network
  objective = objectives.create("trades", beta=beta, epsilon=0.1)
  data, current = _data(shape), _state(model, variables, shape)
  mesh = sharding.make_mesh(eight_devices)
  found = gradients.make_term_ratios(
    model, objective, mesh=mesh, num_classes=CLASSES, options=Options()
  )(
    *sharding.put_replicated(mesh, (current, None, data)),
    sharding.put_batch(mesh, INDICES),
  )
  assert set(found) == {"kl"}

  images = jnp.asarray(data.images[INDICES] / 255, jnp.float32)
  labels = data.labels[INDICES]
  key = rng.stream(current.rng, "attack", current.step)
  batch = objectives.make_batch(images, labels, CLASSES)
  attacked = quick.jit(
    lambda: objective.prepare(key, model, variables, None, batch).images_adv
  )()
  flat = [np.asarray(x, np.float64).reshape(8, 16) for x in (images, attacked)]
  cross_entropy, kl = _softmax_gradients(*flat, labels, weights, biases)
  expected = beta * np.linalg.norm(kl) / np.linalg.norm(cross_entropy)
  assert found["kl"] == pytest.approx(expected, rel=1e-4)
  assert (found["kl"] > 0.01) == (beta > 0)


def _norm(tree):
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
  return np.sqrt(sum(np.square(x).sum() for x in leaves))


@pytest.mark.parametrize(
  "chosen",
  [
    {"accumulate_steps": 2, "remat": True, "mix": "mixup"},
    {"awp_gamma": 0.1, "awp_start": STEP},
  ],
  ids=["parts", "awp"],
)
def test_a_term_adds_its_ratio_to_the_gradient_of_the_step(chosen, small, mesh):
  """The step's gradient with the term, less that without it, at one point."""
  # The attack is its start, so that it does not depend on the weights.
  attack = {
    "epsilon": 0.2,
    "step_size": 1e-9,
    "num_steps": 1,
    "attack_batch_norm": "running",
    "attack_moves_statistics": False,
  }
  shape, extra = small.images.shape[1:], 2
  data, current = _data(shape), _state(small.model, small.variables, shape)
  others = Split(data.images[:extra], data.labels[:extra])
  options = Options(**chosen)
  numbers = {"mesh": mesh, "num_classes": CLASSES, "padding": 1, "flip": True}
  with_term = objectives.create("alp", weight=3.0, **attack)
  batch = (None, data, INDICES[extra:], others)
  found = gradients.make_term_ratios(
    small.model, with_term, options=options, **numbers
  )(current, *batch)

  @functools.cache
  def gradient_fn(weight, options):
    objective = objectives.create("alp", weight=weight, **attack)
    return quick.jit(
      lambda current: gradients.differentiate(
        current,
        *batch,
        model=small.model,
        objective=objective,
        options=options,
        **numbers,
      )[1]
    )

  def pair(current, options):
    return [gradient_fn(weight, options)(current) for weight in (3.0, 0.0)]

  if options.awp_gamma:  # its first step has come
    options = Options()
    at_w = pair(current, options)
    moved = awp.perturb(current.params, at_w[0], chosen["awp_gamma"])
    current = current.replace(params=moved)

  def ratio(whole, rest):
    return _norm(jax.tree.map(np.subtract, whole, rest)) / _norm(rest)

  expected = ratio(*pair(current, options))
  assert found["logit_pairing"] == pytest.approx(expected, rel=2e-3)
  assert expected > 0.05
  if chosen.get("awp_gamma"):  # it would have shown
    assert abs(ratio(*at_w) - expected) > 0.02 * expected
