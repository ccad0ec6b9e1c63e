"""Attacks: closed forms, an independent PGD, and a contract for all of them.

The contract runs on whatever `ATTACKS` lists, in the norms that each attack
supports, and once on a toy attack for one norm.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.tree_util import Partial
from scipy import stats

from atat_jax import (
  attacks,
  compilation,
  evaluation,
  losses,
  models,
  rng,
  sharding,
)
from atat_jax.attacks import balls, base, projected_gradient
from atat_jax.data.base import Split
from atat_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(7)
EPSILON = 0.1
SHAPE = (8, 4, 3, 2)  # 24 pixels
CLASSES = 4


def _linear(weights: Any, bias: Any, images: jax.Array) -> jax.Array:
  return images.reshape(len(images), -1) @ weights + bias


def _mlp(params: Any, images: jax.Array) -> jax.Array:
  centred = 3 * (images.reshape(len(images), -1) - 0.5)
  return jnp.tanh(centred @ params["w1"]) @ params["w2"]


def _network(params: Any, images: jax.Array) -> jax.Array:
  """An MLP and a linear model in one, to compile one program for both."""
  return _mlp(params, images) + _linear(params["w3"], params["b"], images)


class Case:
  """Images far from the borders of the box, and networks for them."""

  def __init__(self) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(77, 179, SHAPE)
    self.images = jnp.asarray(pixels / 255, jnp.float32)
    self.labels = jnp.asarray(generator.integers(0, CLASSES, 8), jnp.int32)
    self.weights = generator.normal(size=(24, CLASSES))
    self.bias = generator.normal(size=CLASSES)
    self.params = {
      "w1": generator.normal(size=(24, 10)),
      "w2": 2 * generator.normal(size=(10, CLASSES)),
    }
    none = {"w3": 0 * self.weights, "b": 0 * self.bias}
    self.mlp = self._classifier(self.params | none)
    linear = {"w3": self.weights, "b": self.bias}
    no_mlp = {"w2": 0 * self.params["w2"]}
    self.linear = self._classifier(self.params | no_mlp | linear)
    # Right before the attack: what an attack changes is the attack's work.
    self.predicted = self.mlp(self.images).argmax(-1)
    assert len(set(self.predicted.tolist())) > 2

  def _classifier(self, params: Any) -> Partial:
    return Partial(
      _network, jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    )


@pytest.fixture(scope="module")
def case() -> Case:
  return Case()


def _length(delta: Any, norm: str) -> np.ndarray:
  flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
  order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
  return np.linalg.norm(flat, ord=order, axis=1)


# Closed forms.


def test_fgsm_of_a_linear_model_is_the_optimum(case):
  """Two classes: the best perturbation is epsilon times the sign of w."""
  weights = case.weights[:, :2]
  classifier = Partial(_linear, jnp.asarray(weights, jnp.float32), 0.0)
  labels = np.arange(8) % 2
  away = (weights[:, 1 - labels] - weights[:, labels]).T.reshape(SHAPE)
  adversarial = attacks.fgsm(
    KEY, classifier, case.images, labels, epsilon=EPSILON
  )
  np.testing.assert_allclose(
    adversarial, case.images + EPSILON * np.sign(away), atol=1e-6
  )
  gain = losses.margin(classifier(adversarial), labels) - losses.margin(
    classifier(case.images), labels
  )
  np.testing.assert_allclose(
    gain, EPSILON * np.abs(away).sum((1, 2, 3)), rtol=1e-4
  )


def test_fgsm_at_the_border_of_the_box():
  """Towards the border: stays. Away from it: the whole epsilon."""
  weights = jnp.array([[0, 1], [0, -1], [0, 1], [0, -1.0]])
  images = jnp.array([0.0, 0.0, 1.0, 1.0]).reshape(1, 2, 2, 1)
  adversarial = attacks.fgsm(
    KEY, Partial(_linear, weights, 0.0), images, [0], epsilon=0.25
  )
  assert adversarial.ravel().tolist() == [0.25, 0.0, 1.0, 0.75]


@pytest.mark.parametrize("random_start", [True, False])
def test_l2_pgd_of_a_linear_model_reaches_the_optimum(random_start, case):
  weights = case.weights[:, :2]
  classifier = Partial(_linear, jnp.asarray(weights, jnp.float32), 0.0)
  labels = np.arange(8) % 2
  away = (weights[:, 1 - labels] - weights[:, labels]).T
  away /= np.linalg.norm(away, axis=1, keepdims=True)
  adversarial = attacks.pgd(
    KEY,
    classifier,
    case.images,
    labels,
    epsilon=0.2,
    step_size=0.1,
    num_steps=50,
    norm="l2",
    random_start=random_start,
  )
  np.testing.assert_allclose(
    adversarial, case.images + 0.2 * away.reshape(SHAPE), atol=1e-5
  )


# An independent implementation.


def _numpy_logits_and_gradient(params, x, labels, loss, targets=None):
  """The loss's gradient with respect to the images, derived by hand."""
  hidden = np.tanh(3 * (x.reshape(len(x), -1) - 0.5) @ params["w1"])
  logits = hidden @ params["w2"]
  basis = np.eye(CLASSES)
  one_hot = basis[labels]
  best = np.where(one_hot > 0, -np.inf, logits).argmax(-1)
  order = logits.argsort(-1)[:, ::-1].T
  if loss == "cross_entropy":
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    d_logits = softmax - one_hot
  elif loss in ("margin", "targeted_margin"):
    d_logits = basis[best if targets is None else targets] - one_hot
  else:  # a ratio
    d_margin = basis[best if targets is None else targets] - one_hot
    d_scale = basis[order[0]] - basis[order[2]]
    if targets is not None:
      d_scale = basis[order[0]] - (basis[order[2]] + basis[order[3]]) / 2
    scale = (d_scale * logits).sum(-1, keepdims=True)
    value = (d_margin * logits).sum(-1, keepdims=True) / scale
    d_logits = (d_margin - value * d_scale) / scale
  d_hidden = d_logits @ params["w2"].T * (1 - hidden**2)
  return (3 * d_hidden @ params["w1"].T).reshape(x.shape)


def _numpy_l1_projection(delta, images, epsilon):
  """Shrinks every pixel's change by as much as it takes, by bisection."""
  room = np.where(delta > 0, 1 - images, images)

  def shrunk(alpha):
    return np.minimum(np.maximum(np.abs(delta) - alpha, 0), room)

  low = np.zeros((len(delta), 1, 1, 1))
  high = np.full_like(low, 2.0)
  for _ in range(100):
    middle = (low + high) / 2
    outside = shrunk(middle).sum((1, 2, 3), keepdims=True) > epsilon
    low, high = np.where(outside, middle, low), np.where(outside, high, middle)
  inside = shrunk(0.0).sum((1, 2, 3), keepdims=True) <= epsilon
  return np.sign(delta) * shrunk(np.where(inside, 0.0, high))


def _numpy_pgd(
  gradient_fn, start, images, *, norm, sign, step, num_steps, momentum=None
):
  x, total = start, np.zeros_like(start)
  for _ in range(num_steps):
    gradient = sign * gradient_fn(x)
    if momentum is not None:
      length = _length(gradient, "l1")[:, None, None, None]
      total = gradient = momentum * total + gradient / length
    if norm == "linf":
      moved = x + step * np.sign(gradient)
      moved = np.minimum(np.maximum(moved, images - EPSILON), images + EPSILON)
    elif norm == "l2":
      length = _length(gradient, "l2")[:, None, None, None]
      delta = x + step * gradient / length - images
      length = _length(delta, "l2")[:, None, None, None]
      moved = images + delta * np.minimum(1, EPSILON / length)
    else:  # the steepest hundredth of the pixels: one of 24
      slope = np.abs(gradient)
      steepest = slope == slope.max((1, 2, 3), keepdims=True)
      delta = x + step * np.sign(gradient) * steepest - images
      moved = images + _numpy_l1_projection(delta, images, EPSILON)
    x = np.minimum(np.maximum(moved, 0), 1)
  return x


def _images_and_start(case, norm):
  """Some at the border of the box; starts in the ball, some near its surface."""
  generator = np.random.default_rng(1)
  images = np.asarray(case.images, np.float64)
  images[0], images[1] = 0.0, 1.0
  delta = generator.uniform(-0.02, 0.02, SHAPE)
  if norm == "l1":
    delta *= 0.3
  return images, np.clip(images + delta, 0, 1)


@pytest.mark.parametrize(
  ("norm", "loss", "targeted"),
  [
    ("linf", "cross_entropy", False),
    ("linf", "cross_entropy", True),
    ("linf", "margin", False),
    ("linf", "margin", True),
    ("linf", "dlr", True),
    ("linf", "targeted_dlr", False),
    ("l2", "cross_entropy", False),
    ("l2", "cross_entropy", True),
    ("l2", "margin", False),
    ("l2", "dlr", False),
    ("l2", "targeted_margin", False),
    ("l1", "cross_entropy", False),
    ("l1", "margin", True),
  ],
)
def test_every_step_equals_an_independent_loop(norm, loss, targeted, case, x64):
  images, start = _images_and_start(case, norm)
  labels = np.asarray(case.labels)
  if loss == "dlr":  # is 1, its gradient 0, where the label is third
    labels = np.asarray(_mlp(case.params, images).argmax(-1))
  targets = None
  if loss in losses.TARGETED_LOSSES:
    targets = (labels + 1 + np.arange(8) % (CLASSES - 1)) % CLASSES

  @compilation.jit
  def ours(num_steps):
    return projected_gradient.ascend(
      lambda state, x: (_mlp(case.params, x), state + 1),
      0,
      start,
      images,
      labels,
      epsilon=EPSILON,
      step_size=0.03,
      num_steps=num_steps,
      norm=norm,
      loss=loss,
      targeted=targeted,
      targets=targets,
    )

  for num_steps in range(7):
    expected = _numpy_pgd(
      lambda x: _numpy_logits_and_gradient(
        case.params, x, labels, loss, targets
      ),
      start,
      images,
      norm=norm,
      sign=-1 if targeted else 1,
      step=0.03,
      num_steps=num_steps,
    )
    actual, passes = ours(num_steps)
    assert passes == num_steps  # one pass of the network a step
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)
  assert np.abs(expected - start).max() > 0.05


@pytest.mark.parametrize("norm", balls.BALLS)
def test_momentum_equals_an_independent_loop(norm, case, x64):
  """Algorithm 1 of Dong et al. (2018) for linf, its sum in the other norms."""
  images, start = _images_and_start(case, norm)
  labels = np.asarray(case.labels)

  @compilation.jit
  def ours(num_steps, momentum):
    return projected_gradient.ascend(
      lambda state, x: (_mlp(case.params, x), state),
      (),
      start,
      images,
      labels,
      epsilon=EPSILON,
      step_size=0.03,
      num_steps=num_steps,
      norm=norm,
      momentum=momentum,
    )[0]

  expected = {}
  for momentum in (0.0, 0.5, 1.0):
    for num_steps in (0, 1, 2, 5, 10):
      expected[momentum] = _numpy_pgd(
        lambda x: _numpy_logits_and_gradient(
          case.params, x, labels, "cross_entropy"
        ),
        start,
        images,
        norm=norm,
        sign=1,
        step=0.03,
        num_steps=num_steps,
        momentum=momentum,
      )
      np.testing.assert_allclose(
        ours(num_steps, momentum), expected[momentum], rtol=0, atol=1e-11
      )
  assert np.abs(expected[1.0] - expected[0.0]).max() > 1e-3


def test_momentum_survives_a_vanishing_gradient():
  """A classifier that saturates: nothing to divide by."""
  images = jnp.full((2, 2, 2, 1), 0.5)
  adversarial = attacks.pgd(
    KEY,
    Partial(_linear, jnp.zeros((4, 2)), 0.0),
    images,
    [0, 1],
    epsilon=0.1,
    step_size=0.05,
    num_steps=3,
    momentum=1.0,
    random_start=False,
  )
  np.testing.assert_array_equal(adversarial, images)


def test_attack_of_the_wide_resnet_equals_pytorch(wrn, twin, x64):
  torch = twin.torch
  model, variables, images, labels = wrn.astype(np.float64)
  start = np.clip(
    np.asarray(images)
    + np.random.default_rng(1).uniform(-EPSILON, EPSILON, images.shape),
    0,
    1,
  )
  classifier = models.classifier(model, variables)
  actual = compilation.jit(
    lambda start: projected_gradient.ascend(
      lambda state, x: (classifier(x), state),
      (),
      start,
      images,
      labels,
      epsilon=EPSILON,
      step_size=0.03,
      num_steps=4,
    )[0]
  )(start)
  params, collections = (
    twin.tree(variables[name]) for name in ("params", "batch_stats")
  )

  def gradient(x):
    x = torch.tensor(x, requires_grad=True)
    logits = twin.wide_resnet(model, params, collections, x, train=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits, torch.tensor(np.array(labels)).long(), reduction="sum"
    )
    return torch.autograd.grad(loss, x)[0].numpy()

  expected = _numpy_pgd(
    gradient,
    start,
    np.asarray(images),
    norm="linf",
    sign=1,
    step=0.03,
    num_steps=4,
  )
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_pgd_is_the_loop_from_its_random_start(case):
  """And fgsm and ifgsm are the same loop from the clean image."""

  @compilation.jit
  def loop(start, step_size, num_steps):
    return projected_gradient.ascend(
      lambda state, x: (case.mlp(x), state),
      (),
      start,
      case.images,
      case.labels,
      epsilon=EPSILON,
      step_size=step_size,
      num_steps=num_steps,
    )[0]

  args = KEY, case.mlp, case.images, case.labels
  steps = dict(epsilon=EPSILON, step_size=0.03, num_steps=5)
  start = projected_gradient.random_start(
    rng.stream(KEY, "start", 0), case.images, epsilon=EPSILON
  )
  np.testing.assert_allclose(
    attacks.pgd(*args, **steps), loop(start, 0.03, 5), atol=1e-6
  )
  clean = loop(case.images, 0.03, 5)
  np.testing.assert_allclose(
    attacks.pgd(*args, **steps, random_start=False), clean, atol=1e-6
  )
  np.testing.assert_allclose(attacks.ifgsm(*args, **steps), clean, atol=1e-6)
  np.testing.assert_allclose(
    attacks.fgsm(*args, epsilon=EPSILON), loop(case.images, 1.0, 1), atol=1e-6
  )


# Random starts.


@pytest.mark.parametrize("norm", balls.BALLS)
def test_pgd_starts_uniformly_in_the_ball(norm):
  """Seen through the attack itself: a step that moves nothing."""
  images = jnp.full((4000, 1, 2, 2), 0.5)
  adversarial = attacks.pgd(
    KEY,
    Partial(_linear, jnp.ones((4, 2)), 0.0),
    images,
    jnp.zeros(4000, jnp.int32),
    epsilon=0.25,
    step_size=1e-6,
    num_steps=1,
    norm=norm,
  )
  delta = np.asarray(adversarial - 0.5, np.float64).reshape(4000, 4) / 0.25
  if norm == "linf":
    for column in delta.T:
      assert stats.kstest(column, "uniform", args=(-1, 2)).pvalue > 1e-3
    np.testing.assert_allclose(np.cov(delta.T), np.eye(4) / 3, atol=0.03)
  else:
    radius = _length(delta, norm)
    assert stats.kstest(radius**4, "uniform").pvalue > 1e-3
    # 1 / (n + 2) a coordinate, and 2 / ((n + 1) (n + 2)).
    variance = {"l2": 1 / 6, "l1": 1 / 15}[norm]
    np.testing.assert_allclose(
      np.cov(delta.T), np.eye(4) * variance, atol=0.12 * variance
    )


def test_start_is_clipped_to_the_box():
  draw = compilation.jit(projected_gradient.random_start)
  start = draw(KEY, jnp.zeros((4, 5, 5, 1)), epsilon=0.2)
  assert (start >= 0).all() and 0.4 < (start == 0).mean() < 0.6


# Restarts, losses, targets.


def _weak(case, **changes):
  """One small step: what it finds is decided by where it starts."""
  return np.asarray(
    attacks.pgd(
      changes.pop("key", KEY),
      case.mlp,
      case.images,
      case.predicted,
      **dict(epsilon=0.12, step_size=0.01, num_steps=1) | changes,
    )
  )


def test_restarts_never_weaken(case):
  fooled, strength = [], []
  for restarts in (1, 6):
    logits = case.mlp(_weak(case, num_restarts=restarts))
    fooled.append(np.asarray(logits.argmax(-1) != case.predicted))
    strength.append(np.asarray(losses.cross_entropy(logits, case.predicted)))
  assert (fooled[1] | ~fooled[0]).all()  # the fooled stay fooled
  alike = fooled[1] == fooled[0]
  assert (strength[1] >= strength[0] - 1e-6)[alike].all()
  assert (strength[1] > strength[0] + 1e-3).any()


@pytest.mark.parametrize(
  ("loss", "targeted"),
  [("cross_entropy", False), ("margin", False), ("cross_entropy", True)],
)
def test_restarts_keep_the_strongest_of_each_example(loss, targeted, case):
  targets = (case.predicted + 1) % CLASSES if targeted else None
  goal = targets if targeted else case.predicted

  @compilation.jit
  def attempt(restart):
    start = projected_gradient.random_start(
      rng.stream(KEY, "start", restart), case.images, epsilon=0.12
    )
    return projected_gradient.ascend(
      lambda state, x: (case.mlp(x), state),
      (),
      start,
      case.images,
      goal,
      epsilon=0.12,
      step_size=0.01,
      num_steps=1,
      loss=loss,
      targeted=targeted,
    )[0]

  attempts, ranks = [], []
  for restart in range(6):
    images_adv = attempt(restart)
    logits = np.asarray(case.mlp(images_adv), np.float64)
    own = logits[np.arange(8), goal]
    if loss == "margin":
      others = np.where(np.eye(CLASSES)[goal] > 0, -np.inf, logits)
      value = others.max(-1) - own
    else:
      value = np.log(np.exp(logits).sum(-1)) - own
    hit = logits.argmax(-1) == np.asarray(goal)
    attempts.append(np.asarray(images_adv))
    # Being fooled weighs more than any loss.
    ranks.append(1e6 * hit - value if targeted else 1e6 * ~hit + value)
  chosen = np.argmax(ranks, 0)
  assert len(set(chosen.tolist())) > 2
  expected = np.stack(attempts)[chosen, np.arange(8)]
  actual = _weak(case, num_restarts=6, loss=loss, targets=targets)
  np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_fooled_attempt_beats_one_of_higher_loss():
  """Cross-entropy can be higher without the label being left.

  Three classes of one pixel t in [0, 1], label 0. Below 1/2 class 1 wins
  narrowly. Above it nothing beats class 0, but classes 1 and 2 tie closely
  behind, which costs more cross-entropy.
  """

  def classifier(images):
    t = images.mean((1, 2, 3))
    low = jnp.stack([0 * t, 0 * t + 0.01, 0 * t - 9], -1)
    high = jnp.stack([0 * t, 0 * t - 0.01, 0 * t - 0.01], -1)
    return jnp.where((t < 0.5)[:, None], low, high)

  images = jnp.full((64, 1, 1, 1), 0.5)
  labels = jnp.zeros(64, jnp.int32)
  arguments = dict(epsilon=0.4, step_size=1e-3, num_steps=1)
  single = attacks.pgd(KEY, classifier, images, labels, **arguments)
  share = (single < 0.5).mean()
  assert 0.3 < share < 0.7
  several = attacks.pgd(
    KEY, classifier, images, labels, num_restarts=8, **arguments
  )
  assert (several < 0.5).mean() > 0.95


def test_targeted_attack_reaches_the_targets(case):
  targets = (case.predicted + 1) % CLASSES
  adversarial = attacks.pgd(
    KEY,
    case.mlp,
    case.images,
    case.predicted,
    epsilon=0.5,
    step_size=0.1,
    num_steps=40,
    targets=targets,
    num_restarts=3,
  )
  reached = case.mlp(adversarial).argmax(-1) == targets
  assert not (case.mlp(case.images).argmax(-1) == targets).any()
  assert reached.mean() > 0.8


@pytest.mark.parametrize("loss", losses.TARGETED_LOSSES)
def test_several_targets_keep_the_strongest_of_each_example(loss, case):
  """Runs made one by one: two from each of the three other classes."""
  logits = np.asarray(case.mlp(case.images), np.float64)
  targets = logits.argsort(-1)[:, ::-1][:, 1:]  # the nearest first

  @compilation.jit
  def attempt(run, targets):
    start = projected_gradient.random_start(
      rng.stream(KEY, "start", run), case.images, epsilon=0.12
    )
    return projected_gradient.ascend(
      lambda state, x: (case.mlp(x), state),
      (),
      start,
      case.images,
      case.predicted,
      epsilon=0.12,
      step_size=0.03,
      num_steps=2,
      loss=loss,
      targets=targets,
    )[0]

  arguments = dict(loss=loss, step_size=0.03, num_steps=2)
  attempts, ranks = [], []
  for run in range(6):
    images_adv = attempt(run, jnp.asarray(targets[:, run // 2], jnp.int32))
    logits = np.asarray(case.mlp(images_adv), np.float64)
    own = logits[np.arange(8), case.predicted]
    others = np.where(np.eye(CLASSES)[case.predicted] > 0, -np.inf, logits)
    attempts.append(np.asarray(images_adv))
    ranks.append(others.max(-1) - own)  # positive where fooled
  chosen = np.argmax(ranks, 0)
  assert len(set((chosen // 2).tolist())) > 1
  expected = np.stack(attempts)[chosen, np.arange(8)]
  actual = _weak(case, num_restarts=2, num_targets=3, **arguments)
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  # Nine are asked for by default; there are three.
  np.testing.assert_array_equal(
    _weak(case, num_restarts=2, **arguments), actual
  )
  # One target, one run: the last iterate, whatever it is worth.
  first = attempt(0, jnp.asarray(targets[:, 0], jnp.int32))
  np.testing.assert_allclose(
    _weak(case, num_targets=1, **arguments), first, atol=1e-6
  )


def test_losses_for_two_classes(case):
  """A targeted margin has one target; ratios need more classes."""
  classifier = Partial(_linear, jnp.float32(case.weights[:, :2]), 0.0)
  arguments = dict(epsilon=EPSILON, step_size=0.05, num_steps=3)

  def attack(loss):
    labels = classifier(case.images).argmax(-1)
    return attacks.pgd(
      KEY, classifier, case.images, labels, loss=loss, **arguments
    )

  np.testing.assert_allclose(
    attack("targeted_margin"), attack("margin"), atol=1e-6
  )
  for loss in ("dlr", "targeted_dlr"):
    with pytest.raises(UserError, match=f"^loss: '{loss}' with 2 classes; "):
      attack(loss)


# Classifiers that draw random numbers.


def _spying() -> tuple[attacks.Randomized, list[bytes]]:
  """Two classes; the slope between them is drawn at each look, and noted."""
  seen: list[bytes] = []

  def function(key, images):
    jax.debug.callback(
      lambda data: seen.append(np.array(data).tobytes()),
      jax.random.key_data(key),
    )
    slope = jax.random.rademacher(key, (24, 1), images.dtype)
    score = images.reshape(len(images), -1) @ slope
    return jnp.concatenate([0 * score, score], -1)

  return attacks.Randomized(Partial(function)), seen


def test_a_randomised_classifier_is_drawn_anew_at_every_look():
  classifier, seen = _spying()
  samples = 2
  labels = jnp.zeros(8, jnp.int32)
  images = jnp.full(SHAPE, 0.5)

  def attack(key=KEY, **changes):
    arguments = dict(epsilon=0.2, step_size=0.001, num_steps=20)
    arguments |= dict(random_start=False, eot_samples=samples) | changes
    seen.clear()
    adversarial = attacks.pgd(key, classifier, images, labels, **arguments)
    jax.effects_barrier()
    return np.asarray(adversarial)

  first = attack()
  keys = set(seen)
  assert len(seen) == len(keys) == 20 * samples
  # A walk of 20 random signs in each pixel, not 20 times the same one.
  steps = np.round((first - 0.5) / 0.001)
  assert 1 < steps[0].std() < 8 and np.abs(steps).max() < 20
  np.testing.assert_array_equal(attack(), first)
  assert set(seen) == keys
  assert not np.array_equal(attack(jax.random.key(8)), first)
  assert not keys & set(seen)
  # Restarts look anew, and once more each to be compared.
  attack(num_restarts=3)
  assert len(seen) == len(set(seen)) == 3 * (20 * samples + 1)


def test_samples_are_averaged():
  """One step, with the slopes of the keys that were seen."""
  classifier, seen = _spying()
  images = jnp.full(SHAPE, 0.5)
  adversarial = attacks.pgd(
    KEY,
    classifier,
    images,
    jnp.zeros(8, jnp.int32),
    epsilon=1.0,
    step_size=0.1,
    num_steps=1,
    norm="l2",
    loss="margin",
    random_start=False,
    eot_samples=5,
  )
  jax.effects_barrier()
  slope = np.mean(
    [
      jax.random.rademacher(
        jax.random.wrap_key_data(np.frombuffer(data, np.uint32)), (24,)
      )
      for data in seen
    ],
    axis=0,
  )
  assert len(seen) == 5
  expected = 0.1 * slope / np.linalg.norm(slope)
  delta = np.asarray(adversarial - images).reshape(8, -1)
  np.testing.assert_allclose(delta, np.tile(expected, (8, 1)), atol=1e-6)


def test_margin_loss_fools_at_the_margin(case):
  """The margin attack leaves the label where cross-entropy does, too."""
  arguments = dict(epsilon=0.3, step_size=0.05, num_steps=30)
  for loss in losses.ATTACK_LOSSES:
    adversarial = attacks.pgd(
      KEY, case.mlp, case.images, case.predicted, loss=loss, **arguments
    )
    logits = case.mlp(adversarial)
    assert (losses.margin(logits, case.predicted) > 0).mean() > 0.8


# The contract: whatever is listed in ATTACKS.

# These are other numbers for pgd's program, see
# `test_what_is_swept_compiles_nothing`.
SAME_PROGRAM = ("fgsm", "ifgsm")
# These run in the loop of `search.run`, as apgd does.
SAME_LOOP = ("fab", "square")

every_attack = pytest.mark.parametrize("name", attacks.ATTACKS)
every_program = pytest.mark.parametrize(
  "name", [name for name in attacks.ATTACKS if name not in SAME_PROGRAM]
)
every_loop = pytest.mark.parametrize(
  "name",
  [name for name in attacks.ATTACKS if name not in (*SAME_PROGRAM, *SAME_LOOP)],
)


def _norms(name: str) -> tuple[str, ...]:
  return base.norms(attacks.ATTACKS[name])


def _arguments(name: str, epsilon: float = EPSILON) -> dict[str, Any]:
  """Few and large steps, for the attacks that have them."""
  offered = dict(
    epsilon=epsilon, step_size=epsilon / 3, num_steps=5, num_queries=30
  )
  known = inspect.signature(attacks.ATTACKS[name]).parameters
  return {key: value for key, value in offered.items() if key in known}


def _attack(name: str, case: Case, classifier: Any = None, **changes: Any):
  images = changes.pop("images", case.images)
  labels = changes.pop("labels", case.predicted)
  return attacks.ATTACKS[name](
    changes.pop("key", KEY),
    case.mlp if classifier is None else classifier,
    images,
    labels,
    **_arguments(name) | changes,
  )


@every_attack
def test_signature(name):
  parameters = inspect.signature(attacks.ATTACKS[name]).parameters
  first = ["key", "classifier", "images", "labels"]
  assert list(parameters)[:4] == first
  for parameter in list(parameters.values())[4:]:
    assert parameter.kind == parameter.KEYWORD_ONLY
  assert parameters["epsilon"].default is inspect.Parameter.empty


@every_attack
def test_stays_in_ball_and_box(name, case):
  for norm in _norms(name):
    _assert_in_ball_and_box(name, norm, case)


def _assert_in_ball_and_box(name, norm, case):
  images = jnp.concatenate([case.images[:4], case.images[4:].round()])
  changes = {} if norm == "linf" else {"norm": norm}
  # Each pixel is rounded on its own when the perturbation is added.
  rounding = 1e-7 + 3e-8 * _length(np.ones((1, 24)), norm)[0]
  for epsilon in (8 / 255, 0.3, 1.0):
    adversarial = _attack(
      name, case, images=images, **_arguments(name, epsilon) | changes
    )
    assert adversarial.shape == images.shape
    assert adversarial.dtype == np.float32
    assert (adversarial >= 0).all() and (adversarial <= 1).all()
    delta = np.asarray(adversarial, np.float64) - np.asarray(images)
    assert (_length(delta, norm) <= epsilon * (1 + 1e-6) + rounding).all()
    # FAB goes no further than it must, in l1 there is little room to go to.
    most = 0 if name == "fab" or norm == "l1" else 0.5 * min(epsilon, 0.5)
    assert _length(delta, norm).max() > most


@every_program
def test_never_lowers_the_loss_of_a_linear_model(name, case):
  labels = case.linear(case.images).argmax(-1)
  adversarial = _attack(name, case, case.linear, labels=labels)
  loss = losses.margin if name == "square" else losses.cross_entropy
  before = loss(case.linear(case.images), labels)
  after = loss(case.linear(adversarial), labels)
  assert (after > before).all()


HALVES = (jnp.bfloat16, jnp.float16)


@every_program
def test_images_of_16_bits_are_attacked_in_float32(name, case):
  """Seen in float64: the ball around the image that came in, and the box.

  8/255 is not a number of 16 bits, nor is an image plus 8/255.
  """
  for norm, radius in (("linf", 8 / 255), ("l2", 0.3), ("l1", 0.9)):
    if norm not in _norms(name):
      continue
    changes = {} if norm == "linf" else {"norm": norm}
    arguments = _arguments(name, radius) | changes
    for dtype in HALVES:
      for module in (jnp, np):  # numpy has bfloat16 by ml_dtypes
        images = module.asarray(case.images.astype(dtype))
        adversarial = _attack(name, case, images=images, **arguments)
        assert adversarial.dtype == np.float32
        assert (adversarial >= 0).all() and (adversarial <= 1).all()
        wide = np.asarray(images, np.float64)
        length = _length(np.asarray(adversarial, np.float64) - wide, norm)
        rounding = 3e-8 * _length(np.ones((1, 24)), norm)[0]
        assert (length <= radius * (1 + 1e-6) + rounding).all()
        assert length.max() > (0.2 if name == "fab" else 0.5) * radius
        # The same as of the same image in float32.
        np.testing.assert_array_equal(
          adversarial,
          _attack(name, case, images=images.astype(np.float32), **arguments),
        )


def _as_dtype(dtype, params, images):
  return _network(params, images).astype(dtype)


@every_program
def test_logits_of_16_bits_are_compared_in_float32(name, case):
  """What a network computes in 16 bits is right as far as these go."""
  for dtype in HALVES[: 1 if name == "fab" else 2]:
    classifier = Partial(functools.partial(_as_dtype, dtype), *case.mlp.args)
    adversarial = _attack(name, case, classifier)
    assert adversarial.dtype == np.float32
    assert np.isfinite(adversarial).all()
    delta = np.asarray(adversarial, np.float64) - np.asarray(case.images)
    assert _length(delta, "linf").max() <= EPSILON + 1e-7


def test_autoattack_keeps_what_the_ball_needs_of_a_dtype(case, x64):
  """16 bits become float32, float64 stays, in the state's identity, too."""
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), case.params)
  arguments = dict(
    epsilon=8 / 255,
    version=["apgd-ce"],
    options={"apgd-ce": {"num_steps": 5}},
    progress=False,
  )
  for dtype, wide in (
    (np.float64, np.float64),
    (jnp.bfloat16, np.float32),
  ):
    images = np.asarray(case.images).astype(dtype)
    found = attacks.autoattack(
      KEY, Partial(_mlp, params), images, case.predicted, **arguments
    )
    assert found.adversarial.dtype == wide
    assert (found.adversarial >= 0).all() and (found.adversarial <= 1).all()
    delta = found.adversarial.astype(np.float64) - images.astype(np.float64)
    rounding = 1e-15 if wide == np.float64 else 6e-8
    assert _length(delta, "linf").max() <= 8 / 255 + rounding
    assert _length(delta, "linf").max() > 7.9 / 255


@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64])
def test_logits_that_are_no_floats_are_refused(dtype, case):
  classifier = Partial(functools.partial(_as_dtype, dtype), *case.mlp.args)
  name = jnp.dtype(dtype).name
  with pytest.raises(UserError, match=rf"^classifier: returns {name} "):
    _attack("square", case, classifier)
  with pytest.raises(UserError, match=rf"^classifier: returns {name} "):
    attacks.autoattack(
      KEY, classifier, case.images, case.predicted, epsilon=0.1
    )


@every_program
def test_float64_is_kept(name, case, x64):
  images = np.asarray(case.images, np.float64)
  classifier = Partial(_mlp, case.params)
  adversarial = _attack(name, case, classifier, images=images)
  assert adversarial.dtype == np.float64
  norm = _norms(name)[0]
  assert _length(adversarial - images, norm).max() <= EPSILON * (1 + 1e-12)


@every_program
def test_not_worse_than_the_clean_image(name, case):
  """In its own loss, for the attacks that keep the best point they have seen."""
  if name not in ("apgd", "fab", "square"):
    pytest.skip("promises nothing: its last iterate is what it returns")
  for loss in ("cross_entropy", "margin"):
    if name != "apgd" and loss == "cross_entropy":
      continue  # these know the margin alone
    changes = {"loss": loss} if name == "apgd" else {}
    for epsilon in (1e-3, 0.03, 0.3):
      adversarial = _attack(name, case, **_arguments(name, epsilon) | changes)
      before, after = (
        losses.ATTACK_LOSSES[loss](case.mlp(x), case.predicted)
        for x in (case.images, adversarial)
      )
      fooled = case.mlp(adversarial).argmax(-1) != case.predicted
      assert ((after >= before - 1e-6) | fooled).all()


@every_program
def test_no_second_compilation(name, case, compilations):
  _attack(name, case)
  before = compilations()
  results = [
    _attack(name, case, key=jax.random.key(1)),
    _attack(name, case, **_arguments(name, 0.2)),
    _attack(name, case, jax.tree.map(lambda w: 0.9 * w, case.mlp)),
  ]
  known = inspect.signature(attacks.ATTACKS[name]).parameters
  for number in {"num_steps", "num_queries"} & set(known):
    results.append(_attack(name, case, **{number: 11}))
  jax.block_until_ready(results)
  assert compilations() - before <= 4  # 0.9 times each weight


@every_program
def test_tiny_ball_is_the_identity(name, case):
  adversarial = _attack(name, case, **_arguments(name, 1e-9))
  np.testing.assert_allclose(adversarial, case.images, rtol=0, atol=1e-7)


@every_program
def test_same_key_same_result(name, case):
  first, second = _attack(name, case), _attack(name, case)
  assert np.array_equal(first, second)
  other = _attack(name, case, key=jax.random.key(8))
  is_random = name in ("pgd", "apgd", "square")
  if is_random:
    assert not np.array_equal(first, other)


@dataclasses.dataclass
class Unhashable:
  """A user's own object; dataclasses with == have no hash."""

  params: Any

  def __call__(self, images: jax.Array) -> jax.Array:
    return _network(self.params, images)


@pytest.mark.parametrize("name", ["pgd"])
def test_any_callable_is_a_classifier(name, case):
  """By `base.as_pytree`; all attacks need it for what has no hash, below."""
  params = case.mlp.args[0]
  expected = _attack(name, case)
  for classifier in (
    lambda images: _network(params, images),
    jax.jit(lambda images: _network(params, images)),
    functools.partial(_network, params),
    Partial(functools.partial(_network), params),
  ):
    np.testing.assert_allclose(
      _attack(name, case, classifier), expected, atol=1e-6
    )


@every_program
def test_an_unhashable_object_is_a_classifier(name, case):
  classifier = Unhashable(case.mlp.args[0])
  np.testing.assert_allclose(
    _attack(name, case, classifier), _attack(name, case), atol=1e-6
  )


@pytest.mark.parametrize("name", ["pgd"])
def test_a_bound_module_is_a_classifier(name, small):
  """And its weights are not taken for another one's."""
  for factor in (1.0, -1.0):
    variables = jax.tree.map(lambda x, f=factor: f * x, small.variables)
    variables["batch_stats"] = small.variables["batch_stats"]
    args = small.images, small.labels
    by_binding, by_partial = (
      attacks.ATTACKS[name](KEY, classifier, *args, **_arguments(name))
      for classifier in (
        small.model.bind(variables),
        models.classifier(small.model, variables),
      )
    )
    np.testing.assert_allclose(by_binding, by_partial, atol=1e-6)


def test_a_sequential_network_is_a_classifier(case):
  """flax keeps its layers in a list, which has no hash."""
  model = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(CLASSES)])
  variables = model.init(jax.random.key(0), case.images)
  adversarial = attacks.fgsm(
    KEY,
    models.classifier(model, variables),
    case.images,
    case.labels,
    epsilon=EPSILON,
  )
  assert np.abs(adversarial - case.images).max() > 0.9 * EPSILON


@every_program
def test_inside_jit(name, case):
  def attack(images, labels, epsilon):
    arguments = _arguments(name)
    if "step_size" in arguments:
      arguments["step_size"] = epsilon / 3
    return _attack(
      name,
      case,
      images=images,
      labels=labels,
      **arguments | {"epsilon": epsilon},
    )

  np.testing.assert_allclose(
    compilation.jit(attack)(case.images, case.predicted, EPSILON),
    _attack(name, case),
    atol=1e-6,
  )


@every_program
def test_inside_vmap(name, case):
  """Over batches, over keys, and over the weights of the classifier."""
  images = jnp.stack([case.images, case.images[::-1]])
  labels = jnp.stack([case.predicted, case.predicted[::-1]])
  keys = jax.random.split(KEY, 2)
  params = jax.tree.map(lambda w: jnp.stack([w, -w]), case.mlp.args[0])

  def attack(key, params, images, labels):
    classifier = Partial(_network, params)
    return _attack(
      name, case, classifier, key=key, images=images, labels=labels
    )

  together = compilation.jit(jax.vmap(attack))(keys, params, images, labels)
  for i in range(2):
    one = jax.tree.map(lambda w, i=i: w[i], params)
    np.testing.assert_allclose(
      together[i], attack(keys[i], one, images[i], labels[i]), atol=1e-6
    )


@every_loop
@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
def test_a_function_that_closes_over_traced_values(name, transform, case):
  """Only the closure is traced: key, images and labels are plain arrays."""
  params = case.mlp.args[0]

  def attack(scale):
    def classifier(images):
      return scale * _network(params, images)

    return jax.lax.stop_gradient(_attack(name, case, classifier))

  expected = _attack(name, case)
  if transform == "jit":
    np.testing.assert_allclose(
      compilation.jit(attack)(1.0), expected, atol=1e-6
    )
  elif transform == "vmap":
    several = jax.vmap(attack)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(several[0], expected, atol=1e-6)
  else:
    slope = jax.grad(lambda s: s * attack(s).sum())(1.0)
    np.testing.assert_allclose(slope, expected.sum(), rtol=1e-5)


@every_program
def test_eight_devices_equal_one(name, case, eight_devices):
  mesh = sharding.make_mesh(eight_devices)
  images = sharding.put_batch(mesh, np.asarray(case.images))
  labels = sharding.put_batch(mesh, np.asarray(case.predicted))
  assert len(images.sharding.device_set) == 8
  adversarial = _attack(
    name,
    case,
    sharding.put_replicated(mesh, case.mlp),
    images=images,
    labels=labels,
    key=sharding.put_replicated(mesh, KEY),
  )
  assert adversarial.sharding.is_equivalent_to(images.sharding, images.ndim)
  np.testing.assert_allclose(adversarial, _attack(name, case), atol=1e-6)


# What compiles.


def test_what_is_swept_compiles_nothing(small, compilations):
  model, variables, images, labels = small
  steps = dict(epsilon=0.1, step_size=0.02, num_steps=3)
  other = jax.tree.map(lambda x: 0.9 * x, variables)
  classifier = models.classifier(model, variables)

  def attack(classifier=classifier, **changes):
    return attacks.pgd(KEY, classifier, images, labels, **steps | changes)

  first = attack()
  before = compilations()
  results = [
    attack(epsilon=0.05),
    attack(epsilon=8 / 255, step_size=2 / 255),
    attack(step_size=np.float32(0.01)),
    attack(num_steps=10),
    attack(random_start=False),
    attack(classifier=models.classifier(model, other)),
    attack(classifier=models.classifier(model.clone(), other)),
    attacks.ifgsm(KEY, classifier, images, labels, **steps),
    attacks.fgsm(KEY, classifier, images, labels, epsilon=0.1),
  ]
  assert compilations() == before
  for result in results:  # and each did change something
    assert np.abs(np.asarray(first) - np.asarray(result)).max() > 1e-4
  attack(norm="l2")
  assert compilations() > before
  attack(momentum=1.0)
  before = compilations()
  attack(momentum=0.5, num_steps=4)
  assert compilations() == before


def test_a_plain_function_compiles_once(case, compilations):
  def classifier(images):
    return case.mlp(images)

  _attack("pgd", case, classifier)
  before = compilations()
  _attack("pgd", case, classifier, epsilon=0.2)
  assert compilations() == before


# Errors.


def _flat(images: jax.Array) -> jax.Array:
  return images.reshape(-1)


Changes = Callable[[jax.Array, jax.Array], dict[str, Any]]

# Name to what is wrong, from images and labels, and how the message begins.
_BAD: dict[str, tuple[Changes, str]] = {
  "above 1": (lambda x, y: dict(images=x + 0.5), "images: values in ["),
  "below 0": (lambda x, y: dict(images=x - 0.5), "images: values in [-"),
  "nan": (
    lambda x, y: dict(images=x.at[0, 0, 0, 0].set(np.nan)),
    "images: values in [nan, nan]",
  ),
  "uint8": (
    lambda x, y: dict(images=(x * 255).astype(np.uint8)),
    "images: dtype uint8",
  ),
  "rank 3": (lambda x, y: dict(images=x[0]), "images: shape (4, 3, 2)"),
  "empty": (lambda x, y: dict(images=x[:0]), "images: shape (0, 4, 3, 2)"),
  "label K": (
    lambda x, y: dict(labels=y.at[0].set(CLASSES)),
    "labels: values in [",
  ),
  "label -1": (
    lambda x, y: dict(labels=y.at[0].set(-1)),
    "labels: values in [-1",
  ),
  "float labels": (
    lambda x, y: dict(labels=y.astype(np.float32)),
    "labels: dtype float32",
  ),
  "one-hot labels": (
    lambda x, y: dict(labels=np.eye(4)[y]),
    "labels: shape (8, 4)",
  ),
  "too few labels": (lambda x, y: dict(labels=y[:5]), "labels: shape (5,)"),
  "epsilon 0": (lambda x, y: dict(epsilon=0.0), "epsilon: 0.0; "),
  "epsilon -1": (lambda x, y: dict(epsilon=-1), "epsilon: -1; "),
  "epsilon nan": (lambda x, y: dict(epsilon=np.nan), "epsilon: nan; "),
  "epsilon inf": (lambda x, y: dict(epsilon=np.inf), "epsilon: inf; "),
  "epsilon list": (
    lambda x, y: dict(epsilon=[0.1, 0.2]),
    "epsilon: [0.1, 0.2]; ",
  ),
  "epsilon text": (lambda x, y: dict(epsilon="8/255"), "epsilon: '8/255'; "),
  "epsilon None": (lambda x, y: dict(epsilon=None), "epsilon: None; "),
  "epsilon 8": (
    lambda x, y: dict(epsilon=8),
    "epsilon: 8; allowed: at most 1 for linf",
  ),
  "not callable": (lambda x, y: dict(classifier=3), "classifier: int; "),
  "flat logits": (
    lambda x, y: dict(classifier=_flat),
    "classifier: returns shape (192,) for 8 images; ",
  ),
  "tuple": (
    lambda x, y: dict(classifier=lambda images: (_flat(images), {})),
    "classifier: returns ",
  ),
}


_BAD_PGD = {
  "steps 0": (dict(num_steps=0), "num_steps: 0; "),
  "steps 2.5": (dict(num_steps=2.5), "num_steps: 2.5; "),
  "steps True": (dict(num_steps=True), "num_steps: True; "),
  "step -0.1": (dict(step_size=-0.1), "step_size: -0.1; "),
  "restarts 0": (dict(num_restarts=0), "num_restarts: 0; "),
  "norm": (dict(norm="l0"), "norm: 'l0'; allowed: l1, l2, linf"),
  "loss": (
    dict(loss="hinge"),
    "loss: 'hinge'; allowed: cross_entropy, dlr, margin, targeted_dlr,"
    " targeted_margin",
  ),
  "momentum -1": (dict(momentum=-1), "momentum: -1; "),
  "momentum nan": (dict(momentum=float("nan")), "momentum: nan; "),
  "momentum text": (dict(momentum="1"), "momentum: '1'; "),
  "samples 0": (dict(eot_samples=0), "eot_samples: 0; "),
  "samples 1.5": (dict(eot_samples=1.5), "eot_samples: 1.5; "),
  "number of targets 0": (dict(num_targets=0), "num_targets: 0; "),
  "two kinds of targets": (
    dict(targets=[0] * 8, loss="targeted_margin"),
    "targets: given with loss 'targeted_margin'; ",
  ),
  "target K": (dict(targets=[CLASSES] * 8), "targets: values in [4, 4]"),
  "targets": (dict(targets=[0]), "targets: shape (1,)"),
}


def _assert_refused(name: str, case: Case, changes: Any, start: str) -> None:
  with pytest.raises(UserError) as error:
    _attack(name, case, **changes)
  message = str(error.value)
  assert message.startswith(start), message
  assert "allowed: " in message and "\n" not in message


@every_attack
@pytest.mark.parametrize("what", _BAD)
def test_bad_arguments_are_named(name, what, case):
  if what == "epsilon 8" and "linf" not in _norms(name):
    pytest.skip("a radius of 8 is none too many in other norms")
  changes, start = _BAD[what]
  _assert_refused(name, case, changes(case.images, case.predicted), start)


def test_an_l2_ball_may_be_wider_than_a_pixel(case):
  adversarial = _attack("pgd", case, norm="l2", epsilon=3.0, step_size=2.0)
  assert (_length(adversarial - case.images, "l2") > 1).all()


@pytest.mark.parametrize("what", _BAD_PGD)
def test_bad_arguments_of_pgd_are_named(what, case):
  _assert_refused("pgd", case, *_BAD_PGD[what])


def test_errors_come_before_any_compilation(case, compilations):
  def fresh(images):
    return case.mlp(images)

  _attack("pgd", case)
  before = compilations()
  with pytest.raises(UserError, match="labels"):
    _attack("pgd", case, fresh, labels=case.predicted + CLASSES)
  assert compilations() - before <= 1  # the sum in this line


# One more attack: one file and one line in ATTACKS.


def lunge(
  key: jax.Array,
  classifier: Any,
  images: jax.Array,
  labels: jax.Array,
  *,
  epsilon: float,
  norm: Literal["l2"] = "l2",
) -> jax.Array:
  """A toy for one norm: one l2 step along the gradient of the margin."""
  del key
  base.check_norm(norm, epsilon)
  classifier, images, labels, _ = base.check_arguments(
    classifier, images, labels
  )
  return _lunge(classifier, images, labels, jnp.asarray(epsilon, images.dtype))


def _make_lunge(classifier, images, labels, epsilon):
  gradient = jax.grad(lambda x: losses.margin(classifier(x), labels).sum())
  step = epsilon * balls.BALLS["l2"].direction(gradient(images))
  return jnp.clip(images + step, 0, 1)


_lunge = compilation.jit(_make_lunge)


@pytest.fixture
def toy(monkeypatch):
  monkeypatch.setitem(attacks.ATTACKS, "lunge", lunge)
  return "lunge"


def test_a_toy_attack_for_one_norm_passes_the_contract(
  toy, case, compilations, eight_devices
):
  assert _norms(toy) == ("l2",)
  test_signature(toy)
  test_stays_in_ball_and_box(toy, case)
  test_never_lowers_the_loss_of_a_linear_model(toy, case)
  test_images_of_16_bits_are_attacked_in_float32(toy, case)
  test_logits_of_16_bits_are_compared_in_float32(toy, case)
  with jax.enable_x64(True):
    test_float64_is_kept(toy, case, None)
  test_no_second_compilation(toy, case, compilations)
  test_tiny_ball_is_the_identity(toy, case)
  test_same_key_same_result(toy, case)
  test_any_callable_is_a_classifier(toy, case)
  test_an_unhashable_object_is_a_classifier(toy, case)
  test_inside_jit(toy, case)
  test_inside_vmap(toy, case)
  for transform in ("jit", "vmap", "grad"):
    test_a_function_that_closes_over_traced_values(toy, transform, case)
  test_eight_devices_equal_one(toy, case, eight_devices)
  for what in _BAD:
    if what != "epsilon 8":
      test_bad_arguments_are_named(toy, what, case)


def test_a_toy_attack_is_a_protocol(toy, case):
  """Nothing but the signature says what it can be asked for."""
  numbers = {"epsilon": 0.5, "step_size": 0.1}
  protocol = evaluation.parse(f"{toy}:norm=l2:epsilon=0.2", **numbers)
  assert protocol.arguments() == {"epsilon": 0.2, "norm": "l2"}
  assert protocol.describe() == f"{protocol.name}: l2, epsilon 0.2"
  with pytest.raises(UserError, match="norm: 'linf'; allowed: l2 for lunge"):
    evaluation.parse(toy, **numbers)
  for name in (f"{toy}5", f"{toy}-margin"):
    with pytest.raises(UserError, match=r"allowed: nominal, .*, lunge, auto"):
      evaluation.parse(name, norm="l2", **numbers)
  pixels = np.asarray(case.images * 255).round().astype(np.uint8)
  protocol = evaluation.parse(toy, norm="l2", **numbers)
  accuracy = evaluation.accuracy(
    KEY,
    case.mlp,
    Split(pixels, np.asarray(case.predicted)),
    protocol=protocol,
    batch_size=8,
    mesh=sharding.make_mesh(jax.devices()[:1]),
  )
  adversarial = lunge(
    KEY, case.mlp, jnp.float32(pixels / 255), case.predicted, epsilon=0.5
  )
  found = case.mlp(adversarial).argmax(-1) == case.predicted
  assert accuracy == found.mean() < 1
