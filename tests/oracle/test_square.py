"""Square Attack: schedule, draws, and every proposal against slices in numpy."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from atat_jax import compilation
from atat_jax.attacks import base, search
from atat_jax.attacks.simplex import project_l1
from atat_jax.attacks.square_search import (
  Draws,
  Square,
  SquareState,
  level,
  schedule,
  square,
)
from atat_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
EPSILON = {"linf": 0.05, "l2": 0.5, "l1": 3.0}
NORMS = ("linf", "l2", "l1")
SHAPES = [(7, 5, 1), (3, 8, 2), (1, 1, 1)]

# The first query of each level.
BEGINS = [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]


def _linear(weights: Any, images: jax.Array) -> jax.Array:
  return images.reshape(len(images), -1) @ weights


def _constant(margins: Any, images: jax.Array) -> jax.Array:
  """Logits of two classes with these margins, whatever the images."""
  return jnp.stack([margins, 0 * margins], -1) + 0 * images[:, 0, 0, :1]


def _images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  generator = np.random.default_rng(seed)
  images = generator.uniform(size=shape)
  return np.where(generator.uniform(size=shape) < 0.2, images.round(), images)


def _problem(images: Any, labels: Any = None, examples: Any = None) -> Any:
  count = len(images)
  rows = jnp.arange(count, dtype=jnp.int32)
  labels = jnp.zeros_like(rows) if labels is None else jnp.asarray(labels)
  return search.make_problem(
    KEY,
    jnp.asarray(images),
    labels,
    labels,
    examples=rows if examples is None else jnp.asarray(examples),
    runs=jnp.zeros_like(rows),
    restarts=jnp.zeros_like(rows),
  )


def _settings(images: Any, norm: str, epsilon: float | None = None) -> Any:
  value = EPSILON[norm] if epsilon is None else epsilon
  return search.SearchSettings(jnp.asarray(value, images.dtype), jnp.int32(100))


_project_l1 = compilation.jit(project_l1)


@functools.partial(compilation.jit, static_argnums=0)
def _start(attack: Square, problem: Any, settings: Any) -> SquareState:
  return attack.start(problem, settings)


@functools.partial(compilation.jit, static_argnums=0)
def _step(attack: Square, *args: Any) -> SquareState:
  return attack.step(*args)


@functools.partial(compilation.jit, static_argnums=0)
def _draw(attack: Square, *args: Any) -> Draws:
  return attack.draw(*args)


@functools.partial(compilation.jit, static_argnums=0)
def _query(
  attack: Square, keys: Any, x: Any, images: Any, epsilon: Any, steps: Any
) -> tuple[Draws, jax.Array]:
  """Draws and the point that they propose."""
  draws = attack.draw(keys, steps, images)
  return draws, attack.propose(draws, x, images, epsilon, steps)


@functools.partial(compilation.jit, static_argnums=0)
def _advance(attack: Square, *args: Any) -> Any:
  *args, limit, count = args
  return search.advance(attack, *args, limit=limit, count=count)


def _check_within(x: Any, images: Any, norm: str, epsilon: float) -> None:
  assert x.dtype == images.dtype and x.shape == images.shape
  x, images = np.asarray(x, np.float64), np.asarray(images, np.float64)
  assert x.min() >= 0 and x.max() <= 1
  order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
  flat = (x - images).reshape(len(x), -1)
  # x is rounded, each pixel on its own, when it is added up.
  rounding = 3e-8 * np.linalg.norm(np.ones(flat.shape[1]), order)
  longest = np.linalg.norm(flat, order, axis=1).max()
  assert longest <= epsilon * (1 + 1e-6) + rounding


# The schedule.


def test_sides_on_cifar():
  assert schedule((32, 32), "linf") == [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
  for norm in ("l2", "l1"):  # odd, and at least 3
    assert schedule((32, 32), norm) == [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]


def test_levels_change_where_the_paper_says():
  """Query 0 is step 1, and step 0 looks at the initial point."""
  queries = [0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001]
  queries += [4000, 4001, 6000, 6001, 8000, 8001, 100000]
  expected = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
  steps = jnp.array(queries) + 1
  assert level(steps).tolist() == expected
  assert level(jnp.zeros(1, jnp.int32)).tolist() == [0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
  "shape", [(32, 32), (7, 5), (3, 8), (1, 1), (224, 224)]
)
@pytest.mark.parametrize("p_init", [0.8, 0.3])
def test_sides_follow_the_formula(norm, shape, p_init):
  height, width = shape
  for query, side in zip(BEGINS, schedule(shape, norm, p_init), strict=True):
    share = p_init
    for bound in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
      share = share / 2 if query > bound else share
    expected = round(math.sqrt(share * height * width))
    if norm == "linf":
      expected = max(expected, 1)
    else:
      expected = max(expected, 3)
      expected += expected % 2 == 0
    assert side == min(expected, height, width)


# The draws.


@pytest.mark.parametrize("norm", NORMS)
def test_draws_are_uniform(norm):
  """Offsets on 0 .. size - side - 1: the last place is never used."""
  count, shape = 4000, (1, 9, 12, 3)
  attack = Square(norm)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(count))
  steps = jnp.full(count, 52, jnp.int32)
  side = schedule(shape[1:3], norm)[2]
  draws = _draw(attack, keys, steps, np.zeros(shape))
  windows = 1 if norm == "linf" else 2
  columns = []
  for offsets, size in ((draws.rows, 9), (draws.columns, 12)):
    assert offsets.shape == (count, windows)
    for drawn in np.asarray(offsets).T:
      frequencies = np.bincount(drawn, minlength=size - side)
      assert len(frequencies) == size - side
      assert stats.chisquare(frequencies).pvalue > 1e-3
      columns.append(drawn)
  assert set(np.unique(draws.signs)) == {-1, 1}
  columns += list(np.asarray(draws.signs).T)
  if norm != "linf":
    columns.append(np.asarray(draws.transposed))
    assert abs(draws.transposed.mean() - 0.5) < 0.03
  assert np.abs(np.asarray(draws.signs).mean(0)).max() < 0.06
  # Independent of each other.
  correlation = np.corrcoef(np.asarray(columns, float))
  assert np.abs(correlation - np.eye(len(columns))).max() < 0.07


@pytest.mark.parametrize("norm", NORMS)
def test_draws_change_with_the_step_and_a_full_window_has_one_place(norm):
  attack = Square(norm)
  keys = jnp.stack([KEY, KEY, KEY])
  images = np.zeros((3, 64, 64, 8))
  draws = _draw(attack, keys, jnp.array([5, 6, 5]), images)
  for field in (draws.rows, draws.columns, draws.signs):
    assert (field[0] == field[2]).all()
  assert (draws.signs[0] != draws.signs[1]).any()
  assert (draws.rows[0] != draws.rows[1]).any()
  draws = _draw(attack, keys, jnp.array([1, 1, 9]), np.zeros((3, 3, 3, 1)))
  assert not draws.rows.any() and not draws.columns.any()


# One proposal, against slices.


def _numpy_pyramid(height: int, width: int, power: int) -> np.ndarray:
  """Layers of ever larger rectangles around the middle, ever lighter."""
  out = np.zeros((height, width))
  middle = height // 2, width // 2
  for layer in range(max(middle) + 1):
    top, left = max(middle[0] - layer, 0), max(middle[1] - layer, 0)
    bottom, right = middle[0] + layer + 1, middle[1] + layer + 1
    out[top:bottom, left:right] += (layer + 1.0) ** -power
  return out


def _numpy_stamp(side: int, norm: str, transposed: bool) -> np.ndarray:
  power, order = (2, 2) if norm == "l2" else (4, 1)
  halves = []
  for height, sign in ((side // 2, 1), (side - side // 2, -1)):
    half = _numpy_pyramid(height, side, power)
    if half.size:
      half = half / np.linalg.norm(half.ravel(), order)
    halves.append(sign * half)
  stamp = np.concatenate(halves)
  stamp = stamp / np.linalg.norm(stamp.ravel(), order)
  return stamp.T if transposed else stamp


def _numpy_linf(x, image, epsilon, side, rows, columns, signs, transposed):
  out = x.copy()
  window = np.s_[rows[0] : rows[0] + side, columns[0] : columns[0] + side]
  out[window] = out[window] + 2 * epsilon * signs
  out = np.minimum(np.maximum(out, image - epsilon), image + epsilon)
  return np.clip(out, 0, 1)


def _numpy_lp(
  x, image, epsilon, side, rows, columns, signs, transposed, *, norm
):
  order = 2 if norm == "l2" else 1
  length = functools.partial(np.linalg.norm, ord=order)
  delta = x - image
  one, two = (
    np.s_[row : row + side, column : column + side]
    for row, column in zip(rows, columns, strict=True)
  )
  union = np.zeros(image.shape[:2], bool)
  union[one] = union[two] = True
  free = max(epsilon**order - length(delta.ravel()) ** order, 0)
  stamp = _numpy_stamp(side, norm, transposed)
  channels = image.shape[2]
  added = []
  for channel in range(channels):
    old = delta[*one, channel]
    new = signs[channel] * stamp + old / (1e-12 + length(old.ravel()))
    both = length(delta[union, channel])
    if norm == "l2":
      wanted = math.sqrt(free / channels + both**2)
    else:
      wanted = (free / channels + both) * channels
    added.append(new / (1e-12 + length(new.ravel())) * wanted)
  delta[two] = 0
  delta[one] = np.stack(added, -1)
  return _numpy_into(delta, image, epsilon, norm)


def _numpy_into(delta, image, epsilon, norm):
  if norm == "l1":  # tested on its own
    radius = epsilon * (1 - 1e-6)
    return image + np.asarray(_project_l1(delta[None], image[None], radius))[0]
  length = np.linalg.norm(delta.ravel())
  return np.clip(image + delta / (length + 1e-12) * epsilon, 0, 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [*SHAPES, (12, 13, 3)])
def test_proposals_equal_slices(norm, shape, x64):
  """Rows at different levels of the schedule, after other proposals."""
  attack = Square(norm)
  steps = jnp.array([1, 12, 52, 202, 502, 1002, 3000, 9000], jnp.int32)
  images = _images((len(steps), *shape))
  problem, settings = _problem(images), _settings(images, norm)
  epsilon = EPSILON[norm]
  x = np.asarray(_start(attack, problem, settings).adversarial)
  sides = schedule(shape[:2], norm)
  slices = {"linf": _numpy_linf}.get(
    norm, functools.partial(_numpy_lp, norm=norm)
  )
  for turn in range(4):
    draws, actual = _query(
      attack, problem.keys, x, images, epsilon, steps + turn
    )
    expected = [
      slices(
        x[row],
        images[row],
        epsilon,
        sides[int(stage)],
        *(np.asarray(field[row]) for field in draws),
      )
      for row, stage in enumerate(level(steps + turn))
    ]
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, np.stack(expected), atol=1e-11)
    x = np.asarray(actual)


def test_a_linf_query_changes_one_square():
  """From the clean image it is the window itself, and all of it."""
  attack, shape = Square("linf"), (6, 32, 32, 3)
  images = np.full(shape, 0.5, np.float32)
  problem = _problem(images)
  for stage, side in enumerate(schedule((32, 32), "linf")):
    steps = jnp.full(6, BEGINS[stage] + 1, jnp.int32)
    draws, x = _query(attack, problem.keys, images, images, 0.125, steps)
    changed = np.asarray(x) != images
    for row in range(6):
      top, left = int(draws.rows[row, 0]), int(draws.columns[row, 0])
      expected = np.zeros((32, 32, 3), bool)
      expected[top : top + side, left : left + side] = True
      np.testing.assert_array_equal(changed[row], expected)
      inside = np.asarray(x)[row, top, left]
      np.testing.assert_array_equal(inside, 0.5 + 0.125 * draws.signs[row])


# The initial point.


def test_linf_starts_with_stripes(x64):
  images = _images((50, 6, 7, 3))
  x = _start(Square(), _problem(images), _settings(images, "linf")).adversarial
  free = np.full_like(images, 0.5)
  stripes = _start(
    Square(), _problem(free), _settings(free, "linf")
  ).adversarial
  delta = np.asarray(stripes) - free
  np.testing.assert_allclose(np.abs(delta), EPSILON["linf"], rtol=1e-12)
  assert (delta == delta[:, :1]).all()
  assert abs(delta[:, 0].mean()) < 0.1 * EPSILON["linf"]
  flat = np.sign(delta[:, 0]).reshape(50, -1)
  assert np.abs(np.corrcoef(flat.T) - np.eye(21)).max() < 0.6
  np.testing.assert_allclose(x, np.clip(images + delta, 0, 1), atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize(
  "shape", [(32, 32, 3), (17, 21, 2), (4, 4, 3), (9, 2, 1)]
)
def test_lp_starts_with_a_grid_of_stamps(norm, shape, x64):
  """Which way each lies is read off the result, the rest is rebuilt."""
  height, width, _ = shape
  side = min(max(height // 5, 1), width)
  margin = max((height - 5 * side) // 2, 0)
  images = np.full((20, *shape), 0.5)
  settings = _settings(images, norm, 0.05)
  x = np.asarray(_start(Square(norm), _problem(images), settings).adversarial)
  upright = _numpy_stamp(side, norm, False)[..., None]
  turned = _numpy_stamp(side, norm, True)[..., None]
  ways, signs = [], []
  for row in range(20):
    delta, rebuilt = x[row] - 0.5, np.zeros(shape)
    for top in range(margin, margin + side * (height // side), side):
      first = min(margin, width - side)
      for left in range(first, first + side * (width // side), side):
        tile = np.s_[top : top + side, left : left + side]
        depth, length = rebuilt[tile].shape[:2]  # cut off at the border
        stamps = [stamp[:depth, :length] for stamp in (upright, turned)]
        fits = [(delta[tile] * stamp).sum((0, 1)) for stamp in stamps]
        way = int(np.abs(fits[1]).sum() > np.abs(fits[0]).sum())
        sign = np.sign(fits[way])
        rebuilt[tile] += stamps[way] * sign
        ways.append(way)
        signs.append(sign)
    expected = _numpy_into(rebuilt, images[row], 0.05, norm)
    np.testing.assert_allclose(x[row], expected, atol=1e-12)
  if side > 1:
    assert abs(np.mean(ways) - 0.5) < 0.1
  assert np.abs(np.mean(signs, 0)).max() < 0.25


# The step.


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_kept(norm):
  """The first point always, then what lowers the margin or is wrong."""
  #        new   old    i  kept
  cases = [
    (5.0, 9.0, 0, True),
    (5.0, 1.0, 0, True),
    (5.0, 9.0, 1, True),
    (5.0, 5.0, 1, False),
    (5.0, 4.0, 3, False),
    (0.5, 0.25, 700, False),
    (0.0, 1.0, 20, True),
    (-1.0, 1.0, 1, True),
    (-1.0, -2.0, 1, True),
    (0.0, 0.0, 5, True),
    (np.nan, 1.0, 5, False),
  ]
  new, old, steps, kept = (
    jnp.array(column) for column in zip(*cases, strict=True)
  )
  attack = Square(norm)
  images = jnp.asarray(_images((len(cases), 8, 8, 2)), jnp.float32)
  problem, settings = _problem(images), _settings(images, norm)
  x = _start(attack, problem, settings).adversarial
  state = SquareState(x, old, jnp.zeros(len(cases), bool))
  after = _step(
    attack, Partial(_constant, new), KEY, problem, settings, state, steps
  )
  _, proposal = _query(attack, problem.keys, x, images, settings.epsilon, steps)
  moved = kept & (steps > 0)
  assert (after.adversarial[~moved] == x[~moved]).all()
  np.testing.assert_allclose(
    after.adversarial[moved], proposal[moved], atol=1e-6
  )
  assert (after.adversarial[moved] != x[moved]).any((1, 2, 3)).all()
  np.testing.assert_array_equal(after.margin, jnp.where(kept, new, old))
  np.testing.assert_array_equal(after.fooled, after.margin <= 0)


@pytest.mark.parametrize("norm", NORMS)
def test_the_margin_falls_until_it_is_not_positive(norm):
  generator = np.random.default_rng(2)
  images = jnp.asarray(generator.uniform(size=(8, 6, 5, 2)), jnp.float32)
  weights = jnp.asarray(generator.normal(size=(60, 4)), jnp.float32)
  classifier = Partial(_linear, weights)
  labels = classifier(images).argmax(-1)
  attack = Square(norm)
  problem = _problem(images, labels)
  settings = _settings(images, norm, EPSILON[norm] / 2)
  state = _start(attack, problem, settings)
  assert np.isinf(state.margin).all() and not state.fooled.any()
  steps, history = jnp.zeros(8, jnp.int32), [state.margin]
  for turn in range(1, 41):
    before = state
    state, steps = _advance(
      attack, classifier, KEY, problem, settings, state, steps, 1000, 1
    )
    assert (state.margin <= before.margin).all()
    logits = classifier(state.adversarial)
    is_label = jnp.arange(4) == labels[:, None]
    margin = logits[is_label] - jnp.where(is_label, -jnp.inf, logits).max(-1)
    np.testing.assert_allclose(state.margin, margin, rtol=1e-3, atol=1e-4)
    # Left alone once fooled.
    done = np.asarray(before.fooled)
    assert (state.adversarial == before.adversarial)[done].all()
    assert (steps[~done] == turn).all()
    history.append(state.margin)
  assert 0 < state.fooled.sum() < 8
  assert (history[-1] < history[1]).all()
  _check_within(state.adversarial, images, norm, EPSILON[norm] / 2)


@pytest.mark.parametrize("norm", NORMS)
def test_neighbours_change_nothing(norm):
  """Others in the batch, and how far they are."""
  generator = np.random.default_rng(4)
  images = generator.uniform(size=(8, 6, 5, 2)).astype(np.float32)
  classifier = Partial(
    _linear, jnp.asarray(generator.normal(size=(60, 4)), jnp.float32)
  )
  labels = np.asarray(classifier(jnp.asarray(images)).argmax(-1))
  others = images[::-1].copy()
  others[2] = images[2]
  other_labels = np.array([0, 1, labels[2], 2, 0, 1, 3, 0])
  attack, results = Square(norm), []
  for x, y, examples, steps in (
    (images, labels, [0, 1, 9, 3, 4, 5, 6, 7], [0] * 8),
    (
      others,
      other_labels,
      [11, 8, 9, 6, 5, 4, 2, 1],
      [0, 300, 0, 9000, 12, 999, 52, 2],
    ),
  ):
    problem = _problem(jnp.asarray(x), jnp.asarray(y, jnp.int32), examples)
    settings = _settings(x, norm, 0.02)
    state = _start(attack, problem, settings)
    steps = jnp.array(steps, jnp.int32)
    state, steps = _advance(
      attack, classifier, KEY, problem, settings, state, steps, 9030, 30
    )
    assert steps[2] == 30
    results.append(jax.tree.map(lambda leaf: np.asarray(leaf[2]), state))
  for one, two in zip(*results, strict=True):
    np.testing.assert_array_equal(one, two)


# The function.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 3)])
def test_in_ball_and_box(norm, shape):
  images = _images((16, *shape), 5).astype(np.float32)
  weights = np.random.default_rng(6).normal(size=(math.prod(shape), 3))
  classifier = Partial(_linear, jnp.asarray(weights, jnp.float32))
  labels = classifier(jnp.asarray(images)).argmax(-1)
  epsilon = 1e-3 * EPSILON[norm]  # so that most go on to the end
  x = square(
    KEY, classifier, images, labels, epsilon=epsilon, num_queries=60, norm=norm
  )
  _check_within(x, images, norm, epsilon)
  assert (np.asarray(x) != images).any()


@pytest.mark.parametrize(
  ("norm", "dtype"),
  [
    # linf is in the contract of all attacks
    ("l2", jnp.float16),
    ("l1", jnp.bfloat16),
  ],
)
def test_images_of_16_bits_become_float32(norm, dtype, x64):
  images = jnp.asarray(_images((3, 6, 6, 3)), dtype)
  classifier = Partial(
    _linear, jnp.ones((108, 2), dtype) * jnp.array([1, 0.5], dtype)
  )
  x = square(
    KEY, classifier, images, [0, 0, 0], epsilon=0.25, num_queries=5, norm=norm
  )
  assert x.dtype == jnp.float32
  assert jnp.isfinite(x).all()
  delta = x.astype(jnp.float64) - images.astype(jnp.float64)
  assert (delta != 0).any()
  order = {"linf": jnp.inf, "l2": 2, "l1": 1}[norm]
  length = jnp.linalg.norm(delta.reshape(3, -1), order, axis=1)
  assert length.max() <= 0.25 * (1 + 2e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_breaks_an_easy_model_and_leaves_what_is_wrong_alone(norm):
  """Within three times the radius that is needed; weights as smooth as photos."""
  generator = np.random.default_rng(7)
  images = generator.uniform(0.3, 0.7, (16, 8, 8, 3)).astype(np.float32)
  weights = np.zeros((192, 3), np.float32)
  weights[:, 2] = -9  # never wins
  smooth = np.sign(np.arange(8) - 3.5)[:, None] * generator.uniform(
    1, 2, (8, 8)
  )
  weights[:, 0] = np.repeat(smooth.ravel(), 3)
  classifier = Partial(_linear, jnp.asarray(weights))
  logits = np.asarray(classifier(jnp.asarray(images)))
  labels = logits.argmax(-1)
  assert set(labels) == {0, 1}
  labels[:3] = 1 - labels[:3]
  distance = np.abs(logits[:, 0] - logits[:, 1])
  dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
  needed = distance.max() / np.linalg.norm(weights[:, 0], dual)
  x = square(
    KEY,
    classifier,
    images,
    labels,
    epsilon=float(3 * needed),
    num_queries=300,
    norm=norm,
  )
  assert (classifier(x).argmax(-1) != labels).all()
  np.testing.assert_array_equal(x[:3], images[:3])
  _check_within(x, images, norm, 3 * needed)


def test_queries_are_counted():
  """One look at the initial point, one for each query, two to rate them."""
  looks = []

  def classifier(images):
    jax.debug.callback(lambda _: looks.append(1), images[0, 0, 0, 0])
    return images[:, 0, 0, :1] * jnp.array([0.0, -1.0]) + jnp.array([2.0, 0.0])

  assert Square().num_evaluations(7) == 8
  images = np.full((2, 4, 4, 1), 0.5, np.float32)
  arguments = {"epsilon": 0.1, "num_queries": 7}
  jax.block_until_ready(square(KEY, classifier, images, [0, 0], **arguments))
  jax.effects_barrier()
  assert len(looks) == 7 + 1 + 2


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_more_restarts_are_other_runs(norm):
  images = _images((16, 8, 8, 3), 8).astype(np.float32)
  weights = np.random.default_rng(9).normal(size=(192, 3))
  classifier = Partial(_linear, jnp.asarray(weights, jnp.float32))
  labels = classifier(jnp.asarray(images)).argmax(-1)

  def margins(num_restarts):
    x = square(
      KEY,
      classifier,
      images,
      labels,
      epsilon=1e-2 * EPSILON[norm],
      num_queries=15,
      norm=norm,
      num_restarts=num_restarts,
    )
    logits = np.sort(classifier(x), -1)
    fooled = classifier(x).argmax(-1) != labels
    return np.where(fooled, -1.0, logits[:, -1] - logits[:, -2])

  one, three = margins(1), margins(3)
  assert (three <= one + 1e-6).all() and (three < one - 1e-6).any()


def test_a_random_classifier_draws_anew_at_every_query():
  """Margins that are noise alone: the lowest of many falls on and on."""

  def noise(key, images):
    return jnp.abs(jax.random.normal(key, (len(images), 1))) * jnp.array(
      [1.0, 0]
    )

  images = jnp.full((5, 4, 4, 1), 0.5)
  classifier = base.Randomized(Partial(noise))
  problem, settings = _problem(images), _settings(images, "linf")
  state = _start(Square(), problem, settings)
  steps, lowest = jnp.zeros(5, jnp.int32), []
  for turn in (1, 10, 100):
    state, steps = _advance(
      Square(),
      classifier,
      jax.random.fold_in(KEY, turn),
      problem,
      settings,
      state,
      steps,
      1000,
      turn,
    )
    lowest.append(float(state.margin.mean()))
  assert lowest[0] > lowest[1] > lowest[2] > 0


def test_numbers_are_not_compiled(compilations):
  images = jnp.asarray(_images((3, 5, 5, 1)), jnp.float32)
  classifier = Partial(_linear, jnp.ones((25, 2)) * jnp.array([1.0, 0.0]))
  for first, (epsilon, queries, restarts) in enumerate(
    [(0.01, 3, 1), (0.02, 5, 2), (0.03, 4, 1)]
  ):
    before = compilations()
    square(
      jax.random.key(first),
      classifier,
      images,
      [0, 0, 0],
      epsilon=epsilon,
      num_queries=queries,
      num_restarts=restarts,
    )
    if first:
      assert compilations() == before


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"norm": "l0"}, ["norm", "l0", "linf"]),
    ({"epsilon": 0.0}, ["epsilon", "> 0"]),
    ({"epsilon": 8}, ["epsilon", "at most 1"]),
    ({"num_queries": 0}, ["num_queries", "> 0"]),
    ({"num_queries": 2.5}, ["num_queries", "integer"]),
    ({"num_restarts": 0}, ["num_restarts", "> 0"]),
    ({"labels": [0, 5]}, ["labels", "0 to 1"]),
    ({"images": np.full((2, 4, 4, 1), 2.0, np.float32)}, ["images", "[0, 1]"]),
    (
      {"classifier": lambda x: x[:, 0, 0, :1]},
      ["classifier: returns shape (2, 1)", "K > 1"],
    ),
  ],
)
def test_bad_arguments_are_refused(changes, words):
  arguments = {
    "classifier": lambda x: x[:, 0, :2, 0],
    "images": np.zeros((2, 4, 4, 1), np.float32),
    "labels": [0, 0],
    "epsilon": 0.1,
    "num_queries": 3,
  } | changes
  with pytest.raises(UserError) as caught:
    square(KEY, **arguments)
  for word in words:
    assert word in str(caught.value)
