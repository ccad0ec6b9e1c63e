"""Certified bounds against exact minima, CROWN by hand, and auto_LiRPA."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from scipy import optimize

from atat_jax import attacks, bounds
from atat_jax.errors import UserError

SIZES = (6, 4, 3, 3)  # pixels, two hidden layers, classes


def images(count, *shape, seed=0):
  generator = np.random.default_rng(seed)
  return generator.uniform(size=(count, *shape)).astype(np.float32)


def layers(sizes=SIZES, seed=1):
  generator = np.random.default_rng(seed)
  return [
    (
      generator.normal(size=(n, m)).astype(np.float32) * 1.5 / n**0.5,
      generator.normal(size=m).astype(np.float32) * 0.2,
    )
    for n, m in itertools.pairwise(sizes)
  ]


def mlp(weights, x):
  x = x.reshape(len(x), -1)
  for number, (kernel, bias) in enumerate(weights, 1):
    x = x @ kernel + bias
    x = x if number == len(weights) else jax.nn.relu(x)
  return x


WEIGHTS = layers()
IMAGES = images(3, 2, 3, 1)
LABELS = np.asarray(mlp(WEIGHTS, IMAGES)).argmax(-1)
MLP = jax.tree_util.Partial(mlp, WEIGHTS)
EPSILON = 0.12


@pytest.fixture(scope="module")
def found():
  return {
    method: getattr(bounds, method)(MLP, IMAGES, LABELS, epsilon=EPSILON)
    for method in bounds.METHODS
  }


def ball(image, epsilon=EPSILON):
  x = image.astype(np.float64).ravel()
  return np.clip(x - epsilon, 0, 1), np.clip(x + epsilon, 0, 1)


def crown_by_hand(image, label, given=WEIGHTS):
  """Lower bounds of all margins, in float64, layer by layer."""
  low, high = ball(image)
  weights = [(w.astype(float), b.astype(float)) for w, b in given]
  ranges = []

  def apart(rows, depth):
    """The same as `least`, but from the ranges of the layer before."""
    kernel, bias = weights[depth]
    start = [np.maximum(x, 0) for x in ranges[-1]] if depth else (low, high)
    slopes = rows @ kernel.T
    lowest = np.maximum(slopes, 0) @ start[0] + np.minimum(slopes, 0) @ start[1]
    return lowest + rows @ bias

  def least(rows, depth):
    """Minimum of rows @ (output of affine layer number depth)."""
    total = np.zeros(len(rows))
    for number in range(depth, -1, -1):
      kernel, bias = weights[number]
      total += rows @ bias
      rows = rows @ kernel.T
      if number:
        lo, up = ranges[number - 1]
        both = (lo < 0) & (up > 0)
        chord = np.where(both, up / np.where(both, up - lo, 1), lo >= 0)
        steep = np.where(both, chord > 0.5, lo >= 0)
        total += np.minimum(rows, 0) @ np.where(both, -chord * lo, 0)
        rows = np.maximum(rows, 0) * steep + np.minimum(rows, 0) * chord
    return total + np.maximum(rows, 0) @ low + np.minimum(rows, 0) @ high

  def better(rows, depth):
    return np.maximum(least(rows, depth), apart(rows, depth))

  for depth in range(len(weights) - 1):
    eye = np.eye(weights[depth][0].shape[1])
    ranges.append((better(eye, depth), -better(-eye, depth)))
  gaps = np.eye(SIZES[-1])[label] - np.eye(SIZES[-1])
  return better(gaps, len(weights) - 1)


def exact_margin(image, label, other):
  """Least margin over the ball: a linear program for each ReLU pattern."""
  low, high = ball(image)
  (w1, b1), (w2, b2), (w3, b3) = [
    (w.astype(float), b.astype(float)) for w, b in WEIGHTS
  ]
  best = np.inf
  for pattern in itertools.product((0, 1), repeat=w1.shape[1] + w2.shape[1]):
    on = np.array(pattern, float)
    one, two = on[: w1.shape[1]], on[w1.shape[1] :]
    first, offset = w1 * one, b1 * one
    second, shift = first @ w2, offset @ w2 + b2
    last = (second * two) @ (w3[:, label] - w3[:, other])
    constant = (shift * two) @ (w3[:, label] - w3[:, other])
    constant += b3[label] - b3[other]
    sign_one, sign_two = 1 - 2 * one, 1 - 2 * two  # active: -z <= 0
    program = optimize.linprog(
      last,
      A_ub=np.concatenate([(w1 * sign_one).T, (second * sign_two).T]),
      b_ub=np.concatenate([-b1 * sign_one, -shift * sign_two]),
      bounds=list(zip(low, high, strict=True)),
    )
    if program.status == 0:
      best = min(best, program.fun + constant)
  return best


def test_crown_is_that_of_the_formulas_in_float64(found):
  for image, label, row in zip(
    IMAGES, LABELS, np.asarray(found["crown"].lower), strict=True
  ):
    expected = crown_by_hand(image, label)
    assert np.all(row <= expected + 1e-7)  # every rounding is taken off
    np.testing.assert_allclose(row, expected, atol=2e-5)


def test_crown_is_nowhere_below_intervals(found):
  assert np.all(found["crown"].lower >= found["interval"].lower)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.1, 30, 1000])
def test_large_weights_cost_their_rounding_and_no_more(scale):
  large = [(scale * kernel, scale * bias) for kernel, bias in WEIGHTS]
  network = jax.tree_util.Partial(mlp, large)
  rows = bounds.crown(network, IMAGES, LABELS, epsilon=EPSILON).lower
  for image, label, row in zip(IMAGES, LABELS, np.asarray(rows), strict=True):
    expected = crown_by_hand(image, label, large)
    # Largest logits that the magnitudes could add up to.
    size = image.ravel().astype(float)
    for kernel, bias in large:
      size = size @ np.abs(kernel).astype(float) + np.abs(bias)
    assert np.all(row <= expected + 1e-12 * size.max())
    unit = 2.0**-24  # with at most sum(SIZES) + 3 operations on the way
    assert np.all(expected - row <= 4 * sum(SIZES) * unit * size.max())


def test_bounds_are_below_the_exact_minimum_and_attacks_above(found):
  adversarial = attacks.pgd(
    jax.random.key(0),
    MLP,
    IMAGES,
    LABELS,
    epsilon=EPSILON,
    step_size=0.03,
    num_steps=20,
    loss="margin",
  )
  logits = np.asarray(MLP(adversarial))
  looser = 0
  for number in range(2):
    label = LABELS[number]
    for other in set(range(3)) - {label}:
      truth = exact_margin(IMAGES[number], label, other)
      attacked = logits[number, label] - logits[number, other]
      assert truth <= attacked + 1e-6
      for method in bounds.METHODS:
        lower = float(found[method].lower[number, other])
        assert lower <= truth, (method, number, other)
        looser += lower < truth - 1e-3
  assert looser  # some units change their sign


class Affine(nn.Module):
  """Layers of every kind that are affine."""

  @nn.compact
  def __call__(self, images):
    x = (images - 0.5) / jnp.array([0.2, 0.3])
    x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2)(x)
    y = nn.Conv(6, (2, 3), padding="VALID", kernel_dilation=2)(images)
    y = nn.BatchNorm(use_running_average=True)(y)
    x = jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=0.3)
    y = nn.avg_pool(jnp.flip(y, 1), (2, 2))[:, :, ::2]
    parts = [x.reshape(len(x), -1), y.transpose(0, 3, 1, 2).reshape(len(x), -1)]
    z = jnp.concatenate([*parts, jnp.ones((len(x), 1))], -1)
    z = jnp.where(jnp.arange(z.shape[1]) % 3 == 0, 0.5, -z) + z.mean()
    z = jnp.cumsum(z[:, jnp.array([0, 5, 3, 8, 21])], 1) - 0.5 * z[:, :5]
    there = jnp.array([4, 99, 2, -7])  # two are not, and count as a constant
    filled = z.at[:, there].get(mode="fill", fill_value=0.4)
    return nn.Dense(3)(jnp.concatenate([z, filled], -1))


@pytest.mark.slow
def test_affine_networks_have_their_exact_minimum():
  x = images(2, 7, 8, 2, seed=3)
  labels, epsilon = np.array([0, 2]), 0.2
  variables = Affine().init(jax.random.key(0), x)

  def classifier(x):  # no gradient passes, but values do
    return Affine().apply(variables, jax.lax.stop_gradient(x))

  found = np.asarray(
    bounds.crown(classifier, x[:1], labels[:1], epsilon=epsilon).lower
  )
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)

    def logits(flat):
      return Affine().apply(wide, flat.reshape(1, 7, 8, 2))[0]

    start = x[0].astype(np.float64).ravel()
    slopes = np.asarray(jax.jacobian(logits)(start))
    at_start = np.asarray(logits(start))
  low, high = ball(x[0], epsilon)
  gaps = slopes[labels[0]] - slopes
  expected = at_start[labels[0]] - at_start
  expected += (np.maximum(gaps, 0) * (low - start)).sum(1)
  expected += (np.minimum(gaps, 0) * (high - start)).sum(1)
  assert np.all(found[0] <= expected)
  np.testing.assert_allclose(found[0], expected, atol=1e-4)


class Pooled(nn.Module):
  """Max pooling with padding, of windows that overlap."""

  @nn.compact
  def __call__(self, images):
    x = nn.max_pool(nn.Conv(3, (2, 2))(images), (3, 3), (2, 2), "SAME")
    x = nn.max_pool(nn.relu(nn.Conv(3, (2, 2))(x)), (2, 2), (1, 1), "SAME")
    return nn.Dense(3)(x.reshape(len(x), -1))


class Bent(nn.Module):
  """Nonlinear parts of every kind, one after another."""

  @nn.compact
  def __call__(self, images):
    centred = images - images.mean((1, 2, 3), keepdims=True)
    variance = jnp.square(centred).mean((1, 2, 3), keepdims=True)
    x = centred / jnp.sqrt(jnp.maximum(variance, 0.01))
    x = nn.leaky_relu(nn.Conv(3, (3, 3))(x), 0.1)
    x = nn.max_pool(x, (2, 2), (1, 1)) + 0.1 * nn.softplus(x[:, 1:, 1:])
    x = jnp.where(x > 1.0, 2.0 - x, x) + jnp.clip(x, -0.5, 0.7)
    x = x.reshape(len(x), -1)
    y = nn.Dense(4)(x)
    z = nn.silu(y) + nn.elu(y) + jnp.tanh(y) + jnp.abs(y) + (y > 0) * 0.3
    return nn.log_softmax(nn.Dense(3)(jnp.maximum(z, y[:, ::-1])))


@pytest.mark.slow
@pytest.mark.parametrize("network", [Bent(), Pooled()], ids=["bent", "pooled"])
@pytest.mark.parametrize("method", bounds.METHODS)
def test_no_image_of_the_ball_is_below_the_bounds(network, method):
  x = images(2, 4, 4, 2, seed=5)
  labels = np.array([0, 2])
  variables = network.init(jax.random.key(1), x)
  classifier = jax.tree_util.Partial(network.apply, variables)
  generator = np.random.default_rng(0)
  for epsilon in (1e-9, 0.003, 0.03, 0.2):
    found = getattr(bounds, method)(classifier, x, labels, epsilon=epsilon)
    signs = generator.choice([-1, 0, 1, 1.0], size=(4000, *x.shape))
    tried = np.clip(x + epsilon * signs, 0, 1).astype(np.float32)
    logits = np.asarray(classifier(tried.reshape(-1, 4, 4, 2)), np.float64)
    logits = logits.reshape(4000, 2, 3)
    own = np.take_along_axis(logits, labels[None, :, None], 2)
    least = (own - logits).min(0)
    lower = np.asarray(found.lower)
    assert np.all(lower <= least)
    if epsilon == 1e-9:  # pixels are widened by what float32 rounds
      np.testing.assert_allclose(lower, least, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("network", [nn.silu, jax.nn.mish, nn.softmax])
def test_compiled_bounds_are_those_of_one_operation_after_another(network):
  """XLA may round a number otherwise each time it uses it."""
  generator = np.random.default_rng(0)
  last = generator.normal(size=(4, 3)).astype(np.float32)
  first = generator.normal(size=(4, 4)).astype(np.float32)
  x = images(2, 2, 2, 1)
  labels = np.array([0, 2])

  def classifier(x):
    return network(x.reshape(-1, 4) @ first) @ last

  found = bounds.crown(classifier, x, labels, epsilon=0.03)
  with jax.enable_x64(True), jax.disable_jit():
    expected, _, _ = bounds._propagate(
      classifier, jnp.asarray(x), labels, np.float64(0.03), method="crown"
    )
  np.testing.assert_allclose(found.lower, expected, atol=1e-6)
  signs = generator.choice([-1, 1.0], size=(4000, *x.shape))
  tried = np.clip(x + 0.03 * signs, 0, 1).astype(np.float32)
  logits = np.asarray(classifier(tried.reshape(-1, 2, 2, 1)), np.float64)
  logits = logits.reshape(4000, 2, 3)
  own = np.take_along_axis(logits, labels[None, :, None], 2)
  assert np.all(found.lower <= (own - logits).min(0))


def test_attacks_in_float32_never_go_below_the_bound_of_a_linear_network():
  generator = np.random.default_rng(2)
  weights = generator.normal(size=(300, 2)).astype(np.float32)
  x = images(40, 10, 10, 3, seed=6)
  labels = np.zeros(40, int)

  def classifier(x):
    return x.reshape(len(x), -1) @ weights

  found = bounds.interval(classifier, x, labels, epsilon=8 / 255)
  sign = np.sign(weights[:, 1] - weights[:, 0]).reshape(x.shape[1:])
  moved = np.clip(x + np.float32(8 / 255) * sign, 0, 1).astype(np.float32)
  logits = np.asarray(jax.jit(classifier)(moved))
  gap = logits[:, 0] - logits[:, 1]
  lower = np.asarray(found.lower)[:, 1]
  assert np.all(lower <= gap)
  np.testing.assert_allclose(lower, gap, atol=1e-2)  # n units of the sum


def refused(classifier, message):
  with pytest.raises(UserError, match=message):
    bounds.interval(classifier, IMAGES, LABELS, epsilon=0.1)


def test_what_has_no_bounds_is_named():
  refused(lambda x: mlp(WEIGHTS, jnp.sin(x)), "sin of values that depend")
  refused(lambda x: mlp(WEIGHTS, jnp.sort(x, 1)), "sort of values")
  refused(
    lambda x: mlp(WEIGHTS, x.astype(jnp.bfloat16)), "bfloat16; allowed: float32"
  )
  refused(
    lambda x: mlp(WEIGHTS, x - x.mean(0)), "depend on the others in its batch"
  )


@pytest.mark.parametrize("method", bounds.METHODS)
def test_numbers_that_are_not_finite_certify_nothing(method):
  def classifier(last, x):  # a large margin against the second class
    x = jax.nn.relu(x.reshape(len(x), -1)[:, :3]) * 1e-3
    return x + jnp.array([1.0, -1.0, last])

  labels = np.zeros(3, int)
  for bad, fine in ((np.nan, False), (-np.inf, False), (-2.0, True)):
    found = getattr(bounds, method)(
      jax.tree_util.Partial(classifier, jnp.float32(bad)),
      IMAGES,
      labels,
      epsilon=0.01,
    )
    assert np.all(np.asarray(found.certified) == fine)


def reference(network, method, epsilon, x, labels):
  """Bounds of a PyTorch network by auto_LiRPA."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lirpa = pytest.importorskip("auto_LiRPA")
    inputs = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))
    low, high = (inputs - epsilon).clamp(0, 1), (inputs + epsilon).clamp(0, 1)
    perturbation = lirpa.PerturbationLpNorm(norm=np.inf, x_L=low, x_U=high)
    bounded = lirpa.BoundedModule(
      network,
      torch.zeros_like(inputs[:1]),
      # By default it takes intervals of units whose sign they settle, in layers
      # where that is for enough of them, and CROWN's elsewhere.
      bound_opts={
        "sparse_intermediate_bounds": False,
        "compare_crown_with_ibp": True,
      },
    )
    eye = torch.eye(network(inputs).shape[1])
    gaps = eye[torch.tensor(labels)][:, None] - eye[None]
    lower, _ = bounded.compute_bounds(
      x=(lirpa.BoundedTensor(inputs, perturbation),),
      method=method,
      C=gaps,
      bound_upper=False,
    )
  return lower.detach().numpy()


def torch_mlp():
  torch.manual_seed(0)
  parts = [torch.nn.Flatten()]
  for n, m in itertools.pairwise((27, 16, 12, 5)):
    parts += [torch.nn.Linear(n, m), torch.nn.ReLU()]
  return torch.nn.Sequential(*parts[:-1])


def torch_cnn(activation=torch.nn.ReLU):
  torch.manual_seed(0)
  return torch.nn.Sequential(
    torch.nn.Conv2d(2, 4, 3, padding=1),
    torch.nn.BatchNorm2d(4),
    activation(),
    torch.nn.Conv2d(4, 4, 3, stride=2),
    activation(),
    torch.nn.AvgPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(16, 8),
    activation(),
    torch.nn.Linear(8, 4),
  )


def torch_pooled(*layers):
  """Layers "C", "R", "P" or "K", and a dense one at the end.

  Padding is left out: auto_LiRPA 0.7.1 takes indices of the operand without it
  for those of the one with it, and an attack finds images below its bounds.
  """
  torch.manual_seed(0)
  made = {
    "R": torch.nn.ReLU,
    "K": lambda: torch.nn.LeakyReLU(0.1),
    "P": lambda: torch.nn.MaxPool2d(2),
  }
  parts, channels = [], 2
  for layer in layers:
    if layer == "C":
      parts.append(torch.nn.Conv2d(channels, 4, 3, padding=1))
      channels = 4
    else:
      parts.append(made[layer]())
  side = 8 // 2 ** layers.count("P")
  dense = torch.nn.Linear(4 * side * side, 4)
  return torch.nn.Sequential(*parts, torch.nn.Flatten(), dense)


def as_jax(network):
  """The same network in JAX, channels last outside and first inside."""

  def apply(x):
    x = x.transpose(0, 3, 1, 2)
    for layer in network:
      state = {k: jnp.asarray(v) for k, v in layer.state_dict().items()}
      match type(layer).__name__:
        case "Linear":
          x = x @ state["weight"].T + state["bias"]
        case "Conv2d":
          x = jax.lax.conv_general_dilated(
            x, state["weight"], layer.stride, [(n, n) for n in layer.padding]
          )
          x += state["bias"][:, None, None]
        case "BatchNorm2d":
          scale = state["weight"] / jnp.sqrt(state["running_var"] + layer.eps)
          shift = state["bias"] - state["running_mean"] * scale
          x = x * scale[:, None, None] + shift[:, None, None]
        case "Flatten":
          x = x.reshape(len(x), -1)
        case "ReLU":
          x = jax.nn.relu(x)
        case "LeakyReLU":
          x = jax.nn.leaky_relu(x, layer.negative_slope)
        case "AvgPool2d":
          n, c, h, w = x.shape
          x = x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
        case "MaxPool2d":
          sides = (1, 1, layer.kernel_size, layer.kernel_size)
          x = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, sides, sides, "VALID"
          )
        case other:
          raise AssertionError(other)
    return x

  return apply


POOLED = ("CRP", "CRCP", "CRCPR", "CRCRP", "CRPCRP", "CPP", "CRCKP")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("network", "shape"),
  [
    (torch_mlp(), (3, 3, 3)),
    (torch_cnn(), (10, 10, 2)),
    (torch_cnn(lambda: torch.nn.LeakyReLU(0.1)), (10, 10, 2)),
    *((torch_pooled(*layers), (8, 8, 2)) for layers in POOLED),
  ],
  ids=["mlp", "cnn", "leaky", *POOLED],
)
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.2])
def test_bounds_are_those_of_auto_lirpa(network, shape, epsilon):
  network.eval()
  x = images(3, *shape)
  labels = np.array([0, 1, 3])
  classifier = as_jax(network)
  for method, theirs in (("interval", "IBP"), ("crown", "CROWN")):
    expected = reference(network, theirs, epsilon, x, labels)
    lower = getattr(bounds, method)(
      classifier, x, labels, epsilon=epsilon
    ).lower
    np.testing.assert_allclose(lower, expected, atol=1e-4, rtol=1e-4)
