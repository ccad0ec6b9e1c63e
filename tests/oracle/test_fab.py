"""FAB: an independent implementation, closed forms, and its contract."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from atat_jax import compilation
from atat_jax.attacks import base, search
from atat_jax.attacks.fast_boundary import FAB, fab
from atat_jax.errors import NonFiniteWarning, UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
NORMS = ("linf", "l2", "l1")
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
EPSILON = {"linf": 0.05, "l2": 0.2, "l1": 0.6}
SHAPE = (8, 3, 3, 2)
CLASSES = 4


def _mlp(params: Any, images: jax.Array) -> jax.Array:
  centred = 3 * (images.reshape(len(images), -1) - 0.5)
  return jnp.tanh(centred @ params["w1"]) @ params["w2"]


def _linear(weights: Any, bias: Any, images: jax.Array) -> jax.Array:
  return images.reshape(len(images), -1) @ weights + bias


def _length(norm: str, x: Any) -> np.ndarray:
  x = np.asarray(x, np.float64)
  return np.linalg.norm(x.reshape(len(x), -1), ORDER[norm], axis=1)


class Case(NamedTuple):
  """A smooth network that is right about the images."""

  params: dict[str, np.ndarray]
  images: np.ndarray
  labels: np.ndarray
  targets: np.ndarray

  def classifier(self, dtype: Any = np.float32) -> Partial:
    return Partial(
      _mlp, {name: jnp.asarray(w, dtype) for name, w in self.params.items()}
    )

  def problem(self, dtype: Any = np.float32, restart: int = 0):
    rows = jnp.arange(len(self.images), dtype=jnp.int32)
    return search.make_problem(
      KEY,
      jnp.asarray(self.images, dtype),
      jnp.asarray(self.labels, jnp.int32),
      jnp.asarray(self.targets, jnp.int32),
      examples=rows,
      runs=jnp.zeros_like(rows),
      restarts=jnp.full_like(rows, restart),
    )


def _settings(epsilon: float, dtype: Any = np.float32) -> search.SearchSettings:
  return search.SearchSettings(jnp.asarray(epsilon, dtype), jnp.int32(20))


@functools.partial(compilation.jit, static_argnums=0)
def _start(algorithm: FAB, problem: Any, settings: Any) -> Any:
  return algorithm.start(problem, settings)


@functools.partial(compilation.jit, static_argnums=0)
def _step(algorithm: FAB, *args: Any) -> Any:
  return algorithm.step(*args)


@pytest.fixture(scope="module")
def case() -> Case:
  generator = np.random.default_rng(0)
  params = {
    "w1": generator.normal(size=(18, 10)) / 2,
    "w2": generator.normal(size=(10, CLASSES)),
  }
  images = generator.integers(20, 235, SHAPE) / 255
  images[0], images[1] = images[0].round(), images[1].round()
  images[2:4] = np.where(generator.random((2, 3, 3, 2)) < 0.5, 0, images[2:4])
  images = images.astype(np.float32).astype(np.float64)
  order = np.argsort(-_numpy(params, images)[0], axis=1)
  targets = order[np.arange(8), [1, 1, 1, 1, 1, 2, 2, 3]]
  assert len(set(order[:, 0].tolist())) > 2
  return Case(params, images, order[:, 0], targets)


# An independent implementation, from the description of the algorithm.


def _numpy(params, x):
  """Logits [B, K] and their gradients [B, K, D], derived by hand."""
  hidden = np.tanh(3 * (x.reshape(len(x), -1) - 0.5) @ params["w1"])
  slope = (1 - hidden**2)[:, :, None] * params["w2"]
  return hidden @ params["w2"], 3 * np.einsum(
    "dh,bhk->bkd", params["w1"], slope
  )


def _onto(norm, t, w, b):
  """One point onto one hyperplane in the box, by sorting."""
  left = b - w @ t
  sign = np.sign(left) * np.sign(w)
  room, w, left = np.where(sign > 0, 1 - t, t) * (w != 0), np.abs(w), abs(left)
  if w @ room <= left:
    return sign * room
  move = np.zeros_like(room)
  if norm == "l1":
    for i in np.argsort(-w):
      move[i] = min(room[i], left / w[i])
      left -= w[i] * move[i]
      if left <= 0:
        break
    return sign * move
  unit = np.ones_like(w) if norm == "linf" else w
  free = w > 0
  for i in np.argsort(np.where(free, room, 9) / np.where(free, unit, 1)):
    length = left / (w * unit)[free].sum()
    if length * unit[i] <= room[i]:
      break
    move[i], free[i] = room[i], False
    left -= w[i] * room[i]
  return sign * np.where(free, length * unit, move)


def _reference(case, norm, targeted, x, num_steps):
  """All iterates x, with the closest points and their distances."""
  x0 = case.images.reshape(8, -1)
  x = x.reshape(8, -1).copy()
  closest, distance = x0.copy(), np.full(8, np.inf)
  for _ in range(num_steps):
    logits, gradients = _numpy(case.params, x)
    for n in range(8):
      y = case.labels[n]
      choices = [case.targets[n]] if targeted else range(CLASSES)
      _, f, w = min(
        (
          (
            abs(logits[n, k] - logits[n, y])
            / (np.linalg.norm(gradients[n, k] - gradients[n, y], DUAL[norm])),
            logits[n, k] - logits[n, y],
            gradients[n, k] - gradients[n, y],
          )
          for k in choices
          if k != y
        ),
        key=lambda found: found[0],
      )
      b = w @ x[n] - f
      from_x, from_x0 = _onto(norm, x[n], w, b), _onto(norm, x0[n], w, b)
      a1, a2 = (
        max(np.linalg.norm(d, ORDER[norm]), 1e-8) for d in (from_x, from_x0)
      )
      alpha = min(max(a1 / (a1 + a2), 0), 0.1)
      x[n] = (1 - alpha) * (x[n] + 1.05 * from_x)
      x[n] += alpha * (x0[n] + 1.05 * from_x0)
    x = x.clip(0, 1)
    wrong = _numpy(case.params, x)[0].argmax(1) != case.labels
    length = np.linalg.norm(x - x0, ORDER[norm], axis=1)
    closer = wrong & (length < distance)
    closest[closer], distance[closer] = x[closer], length[closer]
    x[wrong] = x0[wrong] + 0.9 * (x[wrong] - x0[wrong])
    yield x.reshape(SHAPE), closest.reshape(SHAPE), distance.copy()


@pytest.mark.parametrize("targeted", [True, False], ids=["targeted", "any"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_step_equals_an_independent_loop(norm, targeted, case, x64):
  algorithm = FAB(norm, targeted)
  problem = case.problem(np.float64)
  settings = _settings(EPSILON[norm], np.float64)
  generator = np.random.default_rng(1)
  x = case.images + generator.uniform(-0.02, 0.02, SHAPE)
  x = x.clip(0, 1)
  x[::2] = case.images[::2]
  state = _start(algorithm, problem, settings)._replace(x=jnp.asarray(x))
  classifier = case.classifier(np.float64)

  @compilation.jit
  def step(state, i):
    i = jnp.zeros(8, jnp.int32) + i
    return algorithm.step(classifier, KEY, problem, settings, state, i)

  expected = _reference(case, norm, targeted, x, 12)
  for i, (x, closest, distance) in enumerate(expected):
    state = step(state, i)
    close = dict(rtol=0, atol=1e-9)
    np.testing.assert_allclose(state.x, x, **close)
    np.testing.assert_allclose(state.closest, closest, **close)
    np.testing.assert_allclose(state.distance, distance, **close)
    assert (state.fooled == (distance <= EPSILON[norm])).all()
    _check_attempt(norm, case, state, x, closest, distance)
  assert np.isfinite(distance).sum() >= 6
  assert 0 < state.fooled.sum() < 8


def _check_attempt(norm, case, state, x, closest, distance):
  """The point itself within the ball, else what it is brought to."""
  epsilon = EPSILON[norm]
  adversarial = np.asarray(state.adversarial)
  fooled = np.asarray(state.fooled)
  assert (adversarial[fooled] == np.asarray(state.closest)[fooled]).all()
  assert (adversarial >= 0).all() and (adversarial <= 1).all()
  delta = adversarial - case.images
  assert (_length(norm, delta) <= epsilon * (1 + 1e-12)).all()
  # Towards the misclassified point or, without one, the last iterate; as far
  # as the ball reaches.
  found = np.isfinite(distance)[:, None, None, None]
  towards = np.where(found, closest, x) - case.images
  far = _length(norm, towards) > epsilon
  np.testing.assert_allclose(_length(norm, delta)[far], epsilon)
  assert ((delta * towards).sum((1, 2, 3)) >= 0).all()


def test_the_clean_image_comes_first(case):
  for norm in NORMS:
    problem = case.problem()
    state = _start(FAB(norm), problem, _settings(EPSILON[norm]))
    assert (state.x == problem.images).all()
    assert not state.fooled.any() and (state.distance == np.inf).all()


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_begin_halfway_to_the_surface(norm, case):
  """At a random point, each row with its own key."""
  epsilon = 0.1
  middle = case._replace(images=np.full(SHAPE, 0.5))
  problem = middle.problem(restart=1)
  start = functools.partial(_start, FAB(norm))
  state = start(problem, _settings(epsilon))
  delta = np.asarray(state.x - problem.images)
  np.testing.assert_allclose(_length(norm, delta), epsilon / 2, rtol=1e-5)
  assert 0.2 < (delta > 0).mean() < 0.8
  assert len(np.unique(delta)) > 0.9 * delta.size
  backwards = jax.tree.map(lambda x: x[::-1], problem)
  again = start(backwards, _settings(epsilon))
  np.testing.assert_array_equal(again.x[::-1], state.x)
  corner = middle._replace(images=np.zeros(SHAPE)).problem(restart=2)
  clipped = start(corner, _settings(epsilon)).x
  np.testing.assert_allclose(clipped, np.maximum(delta, 0), atol=1e-7)
  mixed = problem._replace(restart=jnp.arange(8) % 2)
  x = start(mixed, _settings(epsilon)).x
  np.testing.assert_array_equal(x[::2], problem.images[::2])
  np.testing.assert_array_equal(x[1::2], state.x[1::2])


# Closed forms.


@pytest.mark.parametrize("targeted", [True, False], ids=["targeted", "any"])
@pytest.mark.parametrize("norm", NORMS)
def test_breaks_a_linear_model_at_its_distance(norm, targeted):
  """Two classes: |f| / the dual norm of its gradient, and not below."""
  generator = np.random.default_rng(2)
  weights = generator.normal(size=(18, 2))
  weights -= weights.mean(0)
  difference = weights[:, 1] - weights[:, 0]
  # From the boundary, the same distance away from it by the shortest way.
  images = generator.uniform(0.4, 0.6, (8, 18))
  images -= np.outer(images @ difference, difference) / (difference**2).sum()
  shortest = {
    "linf": np.sign(difference),
    "l2": difference / np.linalg.norm(difference),
    "l1": np.sign(difference) * (np.abs(difference) == abs(difference).max()),
  }
  distance = 0.1
  side = np.where(np.arange(8) % 2, 1, -1)[:, None]
  images += distance * side * shortest[norm]
  assert images.min() > distance and images.max() < 1 - distance
  images = jnp.asarray(images.reshape(SHAPE), jnp.float32)
  labels = np.arange(8) % 2
  classifier = Partial(_linear, jnp.asarray(weights, jnp.float32), 0.0)
  for factor, broken in ((0.998, False), (1.01, True)):
    adversarial = fab(
      KEY,
      classifier,
      images,
      labels,
      epsilon=factor * distance,
      num_steps=10,
      norm=norm,
      targeted=targeted,
    )
    assert ((classifier(adversarial).argmax(-1) != labels) == broken).all()
    limit = factor * distance * (1 + 1e-5)
    assert (_length(norm, adversarial - images) <= limit).all()


@pytest.mark.parametrize(
  ("norm", "nearest"), [("linf", 1), ("l2", 2), ("l1", 3)]
)
def test_untargeted_goes_to_the_nearest_boundary(norm, nearest):
  """Which boundary that is depends on the norm."""
  weights = np.zeros((4, 4), np.float32)
  weights[:, 1], weights[:2, 2], weights[0, 3] = 1.1, 2.1, 2.5
  bias = -0.1 - 0.5 * weights.sum(0)
  bias[0] = 0
  classifier = Partial(_linear, jnp.asarray(weights), jnp.asarray(bias))
  rows = jnp.zeros(1, jnp.int32)
  problem = search.make_problem(
    KEY,
    jnp.full((1, 2, 2, 1), 0.5, jnp.float32),
    rows,
    rows,
    examples=rows,
    runs=rows,
    restarts=rows,
  )
  settings, algorithm = _settings(0.5), FAB(norm, targeted=False)
  state = _start(algorithm, problem, settings)
  state = _step(algorithm, classifier, KEY, problem, settings, state, rows)
  assert classifier(state.closest).argmax(-1) == nearest


@pytest.mark.parametrize("norm", NORMS)
def test_fooled_means_within_epsilon_and_no_more(norm, case):
  """To the last bit of the distance."""
  problem = case.problem()
  step = functools.partial(_step, FAB(norm))
  rows = jnp.zeros(8, jnp.int32)

  def after(epsilon):
    settings = _settings(epsilon)
    state = _start(FAB(norm), problem, settings)
    for _ in range(3):
      state = step(case.classifier(), KEY, problem, settings, state, rows)
    return state

  found = np.asarray(after(1e-3).distance)
  row = int(found.argmin())
  assert 1e-3 < found[row] < np.inf
  for epsilon in (found[row], np.nextafter(found[row], np.float32(0))):
    state = after(epsilon)
    assert state.distance[row] == found[row]
    assert state.fooled[row] == (epsilon == found[row])


# The public function.


@pytest.mark.parametrize("targeted", [True, False], ids=["targeted", "any"])
@pytest.mark.parametrize("norm", NORMS)
def test_contract(norm, targeted, case):
  classifier = case.classifier()
  images = jnp.asarray(case.images, jnp.float32)
  labels = case.labels.copy()
  labels[7] = (labels[7] + 1) % CLASSES  # misclassified from the start
  broken = []
  for factor in (0.1, 1, 3):
    epsilon = min(factor * EPSILON[norm], 1)
    adversarial = fab(
      KEY,
      classifier,
      images,
      labels,
      epsilon=epsilon,
      num_steps=15,
      norm=norm,
      targeted=targeted,
      num_restarts=2,
    )
    assert adversarial.shape == SHAPE and adversarial.dtype == np.float32
    assert (adversarial >= 0).all() and (adversarial <= 1).all()
    length = _length(norm, np.asarray(adversarial) - np.asarray(images))
    assert (length <= epsilon * (1 + 1e-5)).all()
    wrong = np.asarray(classifier(adversarial).argmax(-1) != labels)
    assert wrong[7] and (adversarial[7] == images[7]).all()
    # An attempt that failed is an attempt.
    assert (length[:7] > 0.5 * epsilon)[~wrong[:7]].all()
    broken.append(wrong)
  assert (broken[0] <= broken[1]).all() and (broken[1] <= broken[2]).all()
  assert broken[0].sum() < broken[1].sum()


def test_targets_beyond_the_classes_are_left_out(case, monkeypatch):
  """And each one tried can only help."""
  run, tried = search.run, []

  def spy(*args, num_targets, **kwargs):
    tried.append(num_targets)
    return run(*args, num_targets=num_targets, **kwargs)

  monkeypatch.setattr(search, "run", spy)
  classifier = case.classifier()
  arguments = (
    KEY,
    classifier,
    jnp.asarray(case.images, jnp.float32),
    case.labels,
  )
  results = [
    np.asarray(fab(*arguments, epsilon=0.06, num_steps=8, num_targets=number))
    for number in (1, 3, 9, 1000)
  ]
  assert tried == [1, CLASSES - 1, CLASSES - 1, CLASSES - 1]
  np.testing.assert_array_equal(results[1], results[2])
  np.testing.assert_array_equal(results[1], results[3])
  wrong = [np.asarray(classifier(x).argmax(-1) != case.labels) for x in results]
  assert (wrong[0] <= wrong[1]).all()


def test_a_second_target_finds_what_the_first_does_not():
  """The runner-up is out of reach; the third class is not."""
  weights = jnp.array([[0.0, 0.1, 0.0], [0.0, 0.0, 9.0]])
  classifier = Partial(_linear, weights, jnp.array([5.0, 4.8, -0.5]))
  images = jnp.full((2, 2, 1, 1), 0.5)
  labels = jnp.zeros(2, jnp.int32)
  for num_targets, fools in ((1, False), (2, True)):
    adversarial = fab(
      KEY,
      classifier,
      images,
      labels,
      epsilon=0.2,
      num_steps=5,
      num_targets=num_targets,
    )
    assert ((classifier(adversarial).argmax(-1) == 2) == fools).all()


@pytest.mark.parametrize("targeted", [True, False], ids=["targeted", "any"])
def test_looks_at_the_classifier(targeted, case):
  """Two forward passes and one backward one, which stands in a loop over the
  classes where no class is the target."""
  problem, settings = case.problem(), _settings(0.1)
  algorithm = FAB("linf", targeted)
  program = str(
    jax.make_jaxpr(algorithm.step)(
      case.classifier(),
      KEY,
      problem,
      settings,
      algorithm.start(problem, settings),
      jnp.zeros(8, jnp.int32),
    )
  )
  assert program.count("dot_general[") == 3 * 2  # layers
  assert algorithm.num_evaluations(7) == 7


def test_a_randomised_classifier_gets_new_keys(case):
  """At every look: half the time the other class wins, whatever the image."""

  def function(key, images):
    wins = jax.random.bernoulli(key, 0.5, (len(images),))
    logits = images.sum((1, 2, 3))[:, None] * jnp.array([1e-3, 0.0])
    return logits + jnp.stack([~wins, wins], -1)

  images = jnp.full((64, 2, 2, 1), 0.5)
  classifier = base.Randomized(Partial(function))
  algorithm = FAB("linf")
  rows = jnp.zeros(64, jnp.int32)
  problem = search.make_problem(
    KEY, images, rows, rows + 1, examples=rows, runs=rows, restarts=rows
  )
  state = _start(algorithm, problem, _settings(0.4))
  step = functools.partial(_step, algorithm)
  found = []
  for i in range(4):
    key = jax.random.key(i)
    new = step(classifier, key, problem, _settings(0.4), state, rows)
    found.append(np.isfinite(new.distance))
  assert 0.3 < np.mean(found) < 0.7
  assert len({row.tobytes() for row in found}) == 4
  adversarial = fab(KEY, classifier, images, rows, epsilon=0.4, num_steps=3)
  assert np.isfinite(adversarial).all()


@pytest.mark.parametrize(
  ("norm", "targeted"),
  [("linf", True), ("linf", False), ("l2", False), ("l1", True)],
)
def test_gradients_that_are_no_numbers_move_nothing(norm, targeted):
  """And those that are zero."""

  def classifier(images):
    x = images.sum((1, 2, 3))
    broken = jnp.sqrt(x - jax.lax.stop_gradient(x))  # 0, with slope inf
    flat = 0 * x
    return jnp.where(
      (jnp.arange(len(x)) < 2)[:, None],
      jnp.stack([broken + 1, -broken, -broken], -1),
      jnp.stack([flat + 1, flat, flat], -1),
    )

  images = jnp.linspace(0.1, 0.9, 16).reshape(4, 2, 2, 1)
  with pytest.warns(NonFiniteWarning, match="^fab: "):
    adversarial = fab(
      KEY,
      classifier,
      images,
      jnp.zeros(4, jnp.int32),
      epsilon=0.1,
      num_steps=3,
      norm=norm,
      targeted=targeted,
    )
  np.testing.assert_array_equal(adversarial, images)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"norm": "l3"}, "norm: 'l3'; allowed: l1, l2, linf"),
    ({"epsilon": 0}, "epsilon: 0; allowed"),
    ({"epsilon": 1.5}, "epsilon: 1.5; allowed: at most 1"),
    ({"num_steps": 0}, "num_steps: 0; allowed: an integer > 0"),
    ({"num_steps": 2.5}, "num_steps: 2.5; allowed"),
    ({"num_targets": 0}, "num_targets: 0; allowed"),
    ({"num_restarts": -1}, "num_restarts: -1; allowed"),
    ({"labels": np.full(8, CLASSES)}, "labels: "),
    ({"images": np.zeros((8, 4))}, "images: "),
    ({"classifier": 3}, "classifier: int; allowed"),
    (
      {"classifier": lambda x: x[:, 0, 0, :1], "labels": np.zeros(8, int)},
      "classifier: returns shape (8, 1) for 8 images; allowed: logits [8, K]",
    ),
  ],
)
def test_bad_arguments(change, message, case):
  arguments = dict(
    classifier=case.classifier(),
    images=case.images.astype(np.float32),
    labels=case.labels,
    epsilon=0.1,
  )
  with pytest.raises(UserError) as error:
    fab(KEY, **arguments | change)
  assert str(error.value).startswith(message)
