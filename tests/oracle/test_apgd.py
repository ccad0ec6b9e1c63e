"""Auto-PGD against the published algorithm, closed forms and invariants."""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from atat_jax import compilation, losses
from atat_jax.attacks import base, search
from atat_jax.attacks.auto_pgd import APGD, APGDState, apgd
from atat_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
ROWS, CLASSES = 16, 6
SHAPE = (6, 6, 3)
PIXELS = math.prod(SHAPE)
EPSILON = {"linf": 0.08, "l2": 0.2, "l1": 3.0}


def _mlp(weights: Any, images: Any) -> Any:
  hidden = jnp.tanh((images.reshape(len(images), -1) - 0.5) @ weights["w1"])
  return hidden @ weights["w2"]


class Case:
  """A small smooth network, and images that it classifies correctly."""

  def __init__(self) -> None:
    generator = np.random.default_rng(0)
    self.weights = {
      "w1": 5 * generator.normal(size=(PIXELS, 32)) / math.sqrt(PIXELS),
      "w2": generator.normal(size=(32, CLASSES)),
    }
    # Those that it is most certain of: not fooled at once.
    images = generator.uniform(size=(60, *SHAPE))
    images[0] = images[0].round()  # the box matters
    logits = self._logits(images)
    ordered = np.sort(logits, -1)
    chosen = np.argsort(ordered[:, -2] - ordered[:, -1])[:ROWS]
    self.images, logits = images[chosen], logits[chosen]
    self.labels = logits.argmax(-1).astype(np.int32)
    self.targets = logits.argsort(-1)[:, -2].astype(np.int32)
    self.noise = generator.uniform(-1, 1, self.images.shape)
    self.single = Partial(
      _mlp, jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), self.weights)
    )

  def _logits(self, images: np.ndarray) -> np.ndarray:
    hidden = np.tanh(
      (images.reshape(len(images), -1) - 0.5) @ self.weights["w1"]
    )
    return hidden @ self.weights["w2"]


@pytest.fixture(scope="module")
def case() -> Case:
  return Case()


# The published algorithm, in float64 and one example at a time.

# What one look at a point gives.
Look = Callable[[np.ndarray], tuple[float, np.ndarray]]


def _loss_and_gradient(
  case: Case, loss: str, label: int, target: int, x: np.ndarray
) -> tuple[float, np.ndarray]:
  """Derived by hand."""
  hidden = np.tanh((x.ravel() - 0.5) @ case.weights["w1"])
  z = hidden @ case.weights["w2"]
  basis = np.eye(CLASSES)
  order = np.argsort(z)[::-1]
  if loss == "cross_entropy":
    total = np.exp(z).sum()
    value, d_z = np.log(total) - z[label], np.exp(z) / total - basis[label]
  else:
    if loss == "dlr":
      other = order[1] if order[0] == label else order[0]
      d_scale = basis[order[0]] - basis[order[2]]
    else:
      other = target
      d_scale = basis[order[0]] - 0.5 * (basis[order[2]] + basis[order[3]])
    difference, scale = z[other] - z[label], d_scale @ z + 1e-12
    value = difference / scale
    d_z = (basis[other] - basis[label]) / scale - value / scale * d_scale
  d_hidden = (case.weights["w2"] @ d_z) * (1 - hidden**2)
  return value, (case.weights["w1"] @ d_hidden).reshape(SHAPE)


class Trace(NamedTuple):
  """Of one run: N + 1 points, and what held after each had been looked at.

  `rises` is -1 after a checkpoint, which sets the count back. `decided` is the
  number of points up to the first at which rounding decides a comparison: of
  the losses of two points, or whether a pixel is where it was.
  """

  x: list[np.ndarray]
  best_loss: list[float]
  step_size: list[float]
  rises: list[int]
  best: np.ndarray
  decided: int


def _tie(loss: float, x: np.ndarray, other: float, y: np.ndarray) -> bool:
  return abs(loss - other) < 1e-11 and not np.array_equal(x, y)


def _barely_moves(x: np.ndarray, image: np.ndarray) -> bool:
  return bool(((x != image) & (np.abs(x - image) < 1e-11)).any())


def _published(
  look: Look,
  image: np.ndarray,
  start: np.ndarray,
  epsilon: float,
  norm: str,
  num_steps: int,
  checkpoints: list[int],
) -> Trace:
  """Algorithm 1 of Croce and Hein (2020), with the quirks of their code.

  The first entry of the list of losses is empty rather than the loss of the
  start; going back to the best point leaves the point before as it was; and
  the second condition does not hold at the first checkpoint.
  """

  def project(y):
    if norm == "linf":
      y = np.minimum(np.maximum(y, image - epsilon), image + epsilon)
    else:
      length = np.linalg.norm(y - image)
      y = image + (y - image) / (length + 1e-12) * min(epsilon, length)
    return np.clip(y, 0, 1)

  def direction(g):
    return np.sign(g) if norm == "linf" else g / (np.linalg.norm(g) + 1e-12)

  x = before = start
  loss, gradient = look(x)
  best_loss, best, best_gradient = loss, x, gradient
  history = [0.0]
  size = 2 * epsilon
  last_checkpoint, last_best, halved = 0, loss, True
  trace = Trace([x], [loss], [size], [0], x, num_steps + 1)
  for k in range(1, num_steps + 1):
    share = 1.0 if k == 1 else 0.75
    z = project(x + size * direction(gradient))
    y = project(x + share * (z - x) + (1 - share) * (x - before))
    before, x = x, y
    loss, gradient = look(x)
    tie = _tie(loss, x, best_loss, best)
    if tie or (k > 1 and _tie(loss, x, history[-1], trace.x[-1])):
      trace = trace._replace(decided=min(trace.decided, k))
    history.append(loss)
    if loss > best_loss:
      best_loss, best, best_gradient = loss, x, gradient
    trace.x.append(x)
    rises = 0
    for j in range(last_checkpoint + 1, k + 1):
      if history[j] > history[j - 1]:
        rises += 1
    if k in checkpoints:
      seldom = rises <= 0.75 * (k - last_checkpoint)
      halved = seldom or (not halved and last_best >= best_loss)
      if halved:
        size = size / 2
        x, gradient = best, best_gradient
      last_checkpoint, last_best, rises = k, best_loss, -1
    trace.best_loss.append(best_loss)
    trace.step_size.append(size)
    trace.rises.append(rises)
  return trace._replace(best=best)


def _project_l1(
  delta: np.ndarray, image: np.ndarray, epsilon: float
) -> np.ndarray:
  """Nearest point of the l1 ball in the box, by sorting the breakpoints.

  The solution shrinks every entry by the same alpha, within the room that it
  has; its norm is piecewise linear in alpha.
  """
  size = np.abs(delta)
  room = np.where(delta > 0, 1 - image, image)

  def shrunk(alpha):
    return np.minimum(np.maximum(size - alpha, 0), room)

  alpha = 0.0
  if shrunk(0.0).sum() > epsilon:
    breaks = np.concatenate([[0.0], size.ravel(), (size - room).ravel()])
    breaks = np.sort(breaks[breaks >= 0])
    totals = np.array([shrunk(b).sum() for b in breaks])
    upper = int(np.argmax(totals <= epsilon))
    left, right = breaks[upper - 1], breaks[upper]
    share = (totals[upper - 1] - epsilon) / (totals[upper - 1] - totals[upper])
    alpha = left + share * (right - left)
  return np.sign(delta) * shrunk(alpha)


def _published_l1(
  look: Look,
  image: np.ndarray,
  start: np.ndarray,
  epsilon: float,
  num_steps: int,
  *,
  first: bool = True,
) -> Trace:
  """The sparse steps of Croce and Hein (2021).

  Unless it is the first, the run begins at another one's result, and is as
  sparse from the beginning as that is. The share of the pixels that a step
  moves is an exact fraction here: floats turn whole ranks into the ones below.
  """
  x = start
  support = int((x != image).sum())
  decided = 0 if _barely_moves(x, image) else num_steps + 1
  share = Fraction(support, PIXELS) / Fraction(3, 2)
  if first:
    support, share = PIXELS, Fraction(1, 5)
  window = max(int(0.04 * num_steps), 1)
  loss, gradient = look(x)
  best_loss, best, best_gradient = loss, x, gradient
  size = epsilon
  trace = Trace([x], [loss], [size], [0], x, decided)
  for k in range(1, num_steps + 1):
    rank = int(min(max((1 - share) * PIXELS, 0), PIXELS - 1))
    threshold = np.sort(np.abs(gradient), axis=None)[rank]
    sign = np.where(np.abs(gradient) >= threshold, np.sign(gradient), 0)
    step = size * sign / (np.abs(sign).sum() + 1e-10)
    x = image + _project_l1(x + step - image, image, epsilon)
    loss, gradient = look(x)
    close = _tie(loss, x, best_loss, best)
    if loss > best_loss:
      best_loss, best, best_gradient = loss, x, gradient
    trace.x.append(x)
    if k % window == 0:
      close = close or _barely_moves(best, image)
      now = int((best != image).sum())
      if now < Fraction(95, 100) * support:
        size = epsilon
        x, gradient = best, best_gradient
      else:
        size = max(size / 1.5, epsilon / 10)
      support, share = now, Fraction(now, PIXELS) / Fraction(3, 2)
    if close:
      trace = trace._replace(decided=min(trace.decided, k))
    trace.best_loss.append(best_loss)
    trace.step_size.append(size)
    trace.rises.append(-1)
  return trace._replace(best=best)


def _published_enlarged(
  look: Look,
  image: np.ndarray,
  start: np.ndarray,
  epsilon: float,
  num_steps: int,
) -> Trace:
  """Three runs: 3, 2 and 1 times epsilon."""
  first = math.ceil(0.3 * num_steps)
  trace = Trace([], [], [], [], start, 0)
  for factor, steps in (
    (3, first),
    (2, first),
    (1, num_steps - 2 * first),
  ):
    radius = factor * epsilon
    begin = image + _project_l1(trace.best - image, image, radius)
    part = _published_l1(look, image, begin, radius, steps, first=False)
    if factor > 1:  # then the next part's numbers hold
      part.best_loss[-1] = part.step_size[-1] = np.nan
    decided = trace.decided
    if decided == len(trace.x):
      decided += part.decided
    lists = (a + b for a, b in zip(trace[:4], part[:4], strict=True))
    trace = Trace(*lists, part.best, decided)
  return trace


# Ours, for comparison.


class Run(NamedTuple):
  """Options of a run whose every state is recorded."""

  norm: str
  loss: str = "cross_entropy"
  enlarged: bool = False

  @property
  def epsilon(self) -> float:
    # In a wide ball the label soon is third: its dlr is 1 and rises no more.
    if self[:2] == ("linf", "dlr"):
      return 0.025
    return EPSILON[self.norm]

  @property
  def search(self) -> APGD:
    return APGD(self.norm, self.loss, enlarged=self.enlarged)


@functools.partial(compilation.jit, static_argnames="method")
def _record(method, classifier, problem, settings, state, i):
  """The states before each of 103 steps, and after the last."""

  def body(carry, _):
    state, i = carry
    new = method.step(classifier, KEY, problem, settings, state, i)
    return (new, i + 1), state

  (last, _), states = jax.lax.scan(body, (state, i), length=103)
  return jax.tree.map(lambda a, b: jnp.append(a, b[None], 0), states, last)


class Recorded(NamedTuple):
  arguments: tuple[Any, ...]
  start: np.ndarray
  states: APGDState
  num_evaluations: int


@functools.cache
def _recorded(run: Run, num_steps: int, from_best: bool = False) -> Recorded:
  """From a given start, in float64; numpy arrays.

  `from_best` starts at the best points of a run of 100 steps.
  """
  case = Case()
  epsilon = run.epsilon
  radius = 3 * epsilon if run.enlarged else epsilon
  start = np.clip(case.images + epsilon * case.noise, 0, 1)
  if run.norm != "linf":  # inside the ball, and sparse
    delta = radius * np.where(np.abs(case.noise) > 0.5, case.noise, 0)
    order = {"l2": 0.2, "l1": 1}[run.norm]
    length = np.linalg.norm(delta.reshape(ROWS, -1), order, axis=1)
    factor = np.minimum(1, radius / length)[:, None, None, None]
    start = np.clip(case.images + factor * delta, 0, 1)
  if from_best:
    start = _recorded(run, 100).states.best[101]
  with jax.enable_x64(True):
    problem = search.Problem(
      jax.random.split(KEY, ROWS),
      jnp.asarray(case.images),
      jnp.asarray(case.labels),
      jnp.asarray(case.targets),
      jnp.zeros(ROWS, jnp.int32),
    )
    settings = search.SearchSettings(jnp.float64(epsilon), jnp.int32(num_steps))
    classifier = Partial(_mlp, jax.tree.map(jnp.asarray, case.weights))
    begin = run.search._continue if run.enlarged else run.search._restart
    first = math.ceil(0.3 * num_steps) if run.enlarged else num_steps
    state = begin(
      jnp.asarray(start),
      problem.images,
      jnp.full((ROWS, 1, 1, 1), radius),
      jnp.int32(first),
    )
    arguments = run.search, classifier, problem, settings
    states = _record(*arguments, state, jnp.zeros(ROWS, jnp.int32))
    states = jax.tree.map(np.asarray, states)
  return Recorded(
    arguments, start, states, run.search.num_evaluations(num_steps)
  )


def _traces(
  case: Case,
  run: Run,
  num_steps: int,
  *,
  from_best: bool = False,
  **options: Any,
) -> list[Trace]:
  recorded = _recorded(run, num_steps, from_best)
  traces = []
  for row in range(ROWS):
    look = functools.partial(
      _loss_and_gradient, case, run.loss, case.labels[row], case.targets[row]
    )
    arguments = (
      look,
      case.images[row],
      recorded.start[row],
      run.epsilon,
    )
    if run.enlarged:
      trace = _published_enlarged(*arguments, num_steps)
    elif run.norm == "l1":
      trace = _published_l1(*arguments, num_steps)
    else:
      trace = _published(*arguments, run.norm, num_steps, **options)
    traces.append(trace)
  return traces


def _assert_equal(recorded: Recorded, traces: list[Trace]) -> None:
  """Every point, best loss, step size and count of every row."""
  number = recorded.num_evaluations
  for row, trace in enumerate(traces):
    assert len(trace.x) == number
    n = trace.decided
    np.testing.assert_allclose(
      recorded.states.x[:n, row],
      trace.x[:n],
      rtol=0,
      atol=1e-9,
      err_msg=f"row {row}",
    )
    for name in ("best_loss", "step_size", "rises"):
      expected = np.array(getattr(trace, name)[:n], np.float64)
      actual = getattr(recorded.states, name)[1 : n + 1, row]
      known = expected != -1 if name == "rises" else ~np.isnan(expected)
      np.testing.assert_allclose(
        actual[known], expected[known], rtol=1e-6, err_msg=f"{name}, row {row}"
      )
    if n == number:
      np.testing.assert_allclose(
        recorded.states.best[n, row], trace.best, rtol=0, atol=1e-9
      )
  # Few end early, having converged, and none before a quarter of its steps.
  decided = np.array([trace.decided for trace in traces])
  assert (decided == number).sum() >= 12, decided


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["cross_entropy", "dlr", "targeted_dlr"])
@pytest.mark.parametrize(
  ("num_steps", "checkpoints"),
  [
    (100, [22, 41, 57, 70, 80, 87, 93, 99]),
    (50, [11, 21, 30, 38, 45]),
    (10, list(range(2, 11))),
  ],
  ids=["100", "50", "10"],
)
def test_every_iterate_equals_the_published_algorithm(
  norm, loss, num_steps, checkpoints, case
):
  run = Run(norm, loss)
  recorded = _recorded(run, num_steps)
  traces = _traces(case, run, num_steps, checkpoints=checkpoints)
  _assert_equal(recorded, traces)
  size = recorded.states.step_size[: num_steps + 2] / run.epsilon
  assert (size[: checkpoints[0] + 1] == 2).all() and (size[-1] < 2).any()
  if loss != "dlr":  # at some checkpoint some rows do not halve their step
    assert (size.max(1) > size.min(1)).any()


def test_the_second_condition_waits_for_the_second_checkpoint(case):
  """From an optimum: the loss falls, then rises, and nothing is as good."""
  run, checkpoints = Run("linf"), list(range(2, 11))
  recorded = _recorded(run, 10, True)
  traces = _traces(case, run, 10, from_best=True, checkpoints=checkpoints)
  _assert_equal(recorded, traces)
  states = recorded.states  # index 3: after the checkpoint at step 2
  no_better = states.best_loss[3] == states.best_loss[1]
  assert (no_better & (states.step_size[3] == 2 * run.epsilon)).sum() >= 3


@pytest.mark.parametrize("enlarged", [False, True], ids=["plain", "enlarged"])
@pytest.mark.parametrize("num_steps", [100, 50, 10])
def test_every_sparse_iterate_equals_the_published_algorithm(
  enlarged, num_steps, case
):
  run = Run("l1", "targeted_dlr", enlarged)
  recorded = _recorded(run, num_steps)
  _assert_equal(recorded, _traces(case, run, num_steps))
  number = recorded.num_evaluations
  assert number == num_steps + (3 if enlarged else 1)
  length = np.abs(recorded.states.x - case.images).sum((2, 3, 4))[:number]
  bound = np.full(number, EPSILON["l1"])
  if enlarged:
    part = num_steps * 3 // 10 + 1
    bound[:part] *= 3
    bound[part : 2 * part] *= 2
  assert (length <= bound[:, None] * (1 + 1e-12)).all()
  assert (length.max(1) > 0.99 * bound)[1:].all()
  size = recorded.states.step_size[: number + 1]
  assert (size < size[0]).any()
  if num_steps == 100:  # some rows at their smallest step, others not
    smallest = np.isclose(size[-2], EPSILON["l1"] / 10)
    assert smallest.any() and (size >= EPSILON["l1"] / 10 * 0.999).all()
    # And some take the full step again.
    assert (np.diff(size, axis=0)[-40:] > 0).any()


@pytest.mark.parametrize(
  "num_steps", [1, 2, 3, 4, 11], ids=lambda n: f"{n} steps"
)
def test_an_enlarged_run_ends_in_the_ball_and_has_looked_there(num_steps, case):
  """However few its steps, the last part is looked at."""
  recorded = _recorded(Run("l1", "targeted_dlr", enlarged=True), num_steps)
  last = recorded.num_evaluations - 1
  length = np.abs(recorded.states.x - case.images).sum((2, 3, 4))
  assert (length[last] <= EPSILON["l1"] * (1 + 1e-12)).all()
  assert (length[0] > 1.5 * EPSILON["l1"]).all()
  final = jax.tree.map(lambda x: x[last + 1], recorded.states)
  for row in range(ROWS):
    loss, _ = _loss_and_gradient(
      case, "targeted_dlr", case.labels[row], case.targets[row], final.best[row]
    )
    np.testing.assert_allclose(final.best_loss[row], loss, rtol=1e-9)
    np.testing.assert_array_equal(
      final.adversarial[row],
      recorded.states.x[last, row] if final.fooled[row] else final.best[row],
    )


# Rows, and the loop over steps.

_RUNS = pytest.mark.parametrize(
  "run",
  [Run("linf", "dlr"), Run("l1", "targeted_dlr", enlarged=True)],
  ids=["linf", "l1 enlarged"],
)


@_RUNS
def test_neighbours_that_are_further_on_change_nothing(run, case, x64):
  """The rows of one batch at 0, 6, 12, ... steps."""
  recorded = _recorded(run, 100)
  i = np.arange(ROWS, dtype=np.int32) * 6
  mixed = jax.tree.map(
    lambda x: jnp.asarray(x[i, np.arange(ROWS)]), recorded.states
  )
  onwards = _record(*recorded.arguments, mixed, jnp.asarray(i))
  # Through a checkpoint, and the end of a part, of some rows.
  for steps in range(11):
    for actual, expected in zip(onwards, recorded.states, strict=True):
      np.testing.assert_allclose(
        actual[steps], expected[i + steps, np.arange(ROWS)], atol=1e-12
      )


@functools.partial(compilation.jit, static_argnums=0)
def _advance(method, classifier, problem, settings, state, i, limit, count):
  return search.advance(
    method,
    classifier,
    KEY,
    problem,
    settings,
    state,
    i,
    limit=limit,
    count=count,
  )


def _counting(classifier: Any) -> tuple[Any, list[None]]:
  """A classifier that leaves a mark at every look."""
  looks: list[None] = []

  def counted(images):
    jax.debug.callback(lambda: looks.append(None))
    return classifier(images)

  return base.as_pytree(counted), looks


@_RUNS
def test_rows_stop_where_they_are_fooled(run, case, x64):
  """Each keeps its state from then on; the loop ends with the last of them."""
  recorded = _recorded(run, 100)
  number = recorded.num_evaluations
  # By the logits of each point looked at; those outside the ball do not count.
  logits = case._logits(recorded.states.x[:number].reshape(-1, *SHAPE))
  fooled = logits.argmax(-1).reshape(number, ROWS) != case.labels
  if run.enlarged:
    wide = 2 * (100 * 3 // 10 + 1)
    assert fooled[:wide].any()
    fooled[:wide] = False
  method, classifier, problem, settings = recorded.arguments
  counted, looks = _counting(classifier)
  start = jax.tree.map(lambda x: jnp.asarray(x[0]), recorded.states)
  state, i = _advance(
    method,
    counted,
    problem,
    settings,
    start,
    jnp.zeros(ROWS, jnp.int32),
    number,
    number,
  )
  jax.effects_barrier()
  ends = np.where(fooled.any(0), fooled.argmax(0) + 1, number)
  if run.norm == "linf":
    assert len(set(ends)) > 3 and fooled.any(0).sum() < ROWS
  np.testing.assert_array_equal(i, ends)
  np.testing.assert_array_equal(state.fooled, fooled.any(0))
  for actual, expected in zip(state, recorded.states, strict=True):
    np.testing.assert_allclose(
      actual, expected[ends, np.arange(ROWS)], atol=1e-12
    )
  assert len(looks) == ends.max()
  if run.enlarged:
    length = np.abs(state.adversarial - case.images).sum((1, 2, 3))
    assert (length <= run.epsilon * (1 + 1e-12)).all()
  # What is returned is the point at which the row was fooled first.
  last = recorded.states.x[ends - 1, np.arange(ROWS)]
  expected = np.where(fooled.any(0)[:, None, None, None], last, state.best)
  np.testing.assert_allclose(state.adversarial, expected, atol=1e-12)
  logits = classifier(state.adversarial)
  np.testing.assert_array_equal(logits.argmax(-1) != case.labels, fooled.any(0))


def test_advance_in_pieces_is_advance_at_once(x64):
  recorded = _recorded(Run("linf", "dlr"), 100)
  start = jax.tree.map(lambda x: jnp.asarray(x[0]), recorded.states)
  i = jnp.zeros(ROWS, jnp.int32)
  expected = _advance(*recorded.arguments, start, i, 101, 101)
  state = start
  for count in (1, 30, 0, 200):
    before = i
    state, i = _advance(*recorded.arguments, state, i, 101, count)
    assert ((i - before) <= count).all()
  for a, b in zip(
    jax.tree.leaves((state, i)), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_program_for_several_losses_makes_the_steps_of_each(x64):
  recorded = _recorded(Run("linf", "dlr"), 100)
  _, classifier, problem, settings = recorded.arguments
  start = jax.tree.map(lambda x: jnp.asarray(x[0]), recorded.states)
  shared = APGD("linf", ("cross_entropy", "dlr"))
  ends = []
  for place in range(2):
    chosen = settings._replace(loss=jnp.int32(place))
    arguments = shared, classifier, problem, chosen, start
    state, _ = _advance(*arguments, jnp.zeros(ROWS, jnp.int32), 40, 40)
    ends.append(state)
  alone, _ = _advance(
    *recorded.arguments, start, jnp.zeros(ROWS, jnp.int32), 40, 40
  )
  for actual, expected in zip(ends[1], alone, strict=True):
    np.testing.assert_allclose(actual, expected, atol=1e-12)
  assert not np.allclose(ends[0].x, ends[1].x, atol=1e-3)


# Starts.


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_starts_on_the_surface_of_the_ball(norm):
  """Far from the box; each row by its own key."""
  images = jnp.full((200, *SHAPE), 0.5)
  epsilon = {"linf": 0.1, "l2": 1.0, "l1": 5.0}[norm]
  zeros = jnp.zeros(200, jnp.int32)

  def make_problem(images):
    return search.make_problem(
      KEY,
      images,
      zeros,
      zeros,
      examples=jnp.arange(200),
      runs=zeros,
      restarts=zeros,
    )

  settings = search.SearchSettings(jnp.float32(epsilon), jnp.int32(100))
  start = compilation.jit(APGD(norm).start)
  state = start(make_problem(images), settings)
  delta = np.asarray(state.x - images, np.float64).reshape(200, -1)
  order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
  length = np.linalg.norm(delta, order, axis=1)
  np.testing.assert_allclose(length, epsilon, rtol=1e-5)
  # Unbiased, and no two rows alike.
  deviation = delta.std()
  assert abs(delta.mean()) < 4 * deviation / math.sqrt(delta.size)
  correlation = np.corrcoef(delta) - np.eye(200)
  assert np.abs(correlation).max() < 0.6
  expected = {"linf": math.sqrt(1 / 3), "l2": PIXELS**-0.5}.get(norm)
  if expected is not None:
    np.testing.assert_allclose(deviation, expected * epsilon, rtol=0.02)
  else:  # the nearest point to Gaussian noise: sparse
    assert 0.01 < (delta != 0).mean() < 0.5
  x = start(make_problem(0 * images), settings).x
  assert (x >= 0).all() and (x.max() <= epsilon)


# apgd itself.


def _apgd(case: Case, **changes: Any) -> jax.Array:
  arguments = dict(epsilon=0.02, num_steps=20) | changes
  return apgd(
    arguments.pop("key", KEY),
    arguments.pop("classifier", case.single),
    jnp.asarray(arguments.pop("images", case.images), jnp.float32),
    arguments.pop("labels", case.labels),
    **arguments,
  )


def _fooled(case: Case, adversarial: jax.Array) -> np.ndarray:
  return np.asarray(case.single(adversarial).argmax(-1) != case.labels)


ALL_LOSSES = [*losses.ATTACK_LOSSES, *losses.TARGETED_LOSSES]


def test_what_is_misclassified_already_comes_back_unchanged(case):
  labels = np.where(
    np.arange(ROWS) % 4 == 0, (case.labels + 1) % CLASSES, case.labels
  )
  adversarial = np.asarray(_apgd(case, labels=labels))
  images = case.images.astype(np.float32)
  np.testing.assert_array_equal(adversarial[::4], images[::4])
  others = np.arange(ROWS) % 4 != 0
  assert (adversarial != images)[others].any((1, 2, 3)).all()


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_is_never_weaker_than_the_clean_image(loss, case):
  """In its own loss; in the margin where it aims at several classes."""
  measure = losses.ATTACK_LOSSES.get(loss, losses.margin)
  before = measure(case.single(jnp.float32(case.images)), case.labels)
  for num_steps in (1, 20):
    adversarial = _apgd(case, loss=loss, num_steps=num_steps)
    after = measure(case.single(adversarial), case.labels)
    fooled = _fooled(case, adversarial)
    assert fooled.any() and not fooled.all()
    assert (fooled | np.asarray(after >= before)).all()
  delta = np.abs(np.asarray(adversarial, np.float64) - case.images)
  assert delta.max() <= 0.02 * (1 + 1e-6) + 1e-7


@pytest.mark.parametrize(
  ("loss", "name", "values"),
  [
    ("cross_entropy", "num_restarts", (1, 2, 6)),
    ("targeted_margin", "num_targets", (1, 2, 5)),
  ],
)
def test_more_runs_never_weaken(loss, name, values, case):
  """And what is fooled by an earlier run is left as it is."""
  measure = losses.ATTACK_LOSSES.get(loss, losses.margin)
  results = [
    np.asarray(_apgd(case, loss=loss, num_steps=3, **{name: value}))
    for value in values
  ]
  fooled = [_fooled(case, x) for x in results]
  value = [np.asarray(measure(case.single(x), case.labels)) for x in results]
  for few, many in ((0, 1), (1, 2)):
    np.testing.assert_array_equal(
      results[many][fooled[few]], results[few][fooled[few]]
    )
    still = ~fooled[many]
    assert (value[many] >= value[few])[still].all()
  assert (value[2] > value[0])[~fooled[2]].any()


def test_a_fooled_point_beats_one_of_higher_loss():
  """Three classes of one pixel t, label 0; cross-entropy misleads.

  Below 1/2 class 1 wins narrowly. Above it nothing beats class 0, but classes
  1 and 2 tie closely behind, which costs more cross-entropy.
  """

  def classifier(images):
    t = images.mean((1, 2, 3))
    low = jnp.stack([0 * t, 0 * t + 0.01, 0 * t - 9], -1)
    high = jnp.stack([0 * t, 0 * t - 0.01, 0 * t - 0.01], -1)
    return jnp.where((t < 0.5)[:, None], low, high)

  images = jnp.full((64, 1, 1, 1), 0.5)
  labels = jnp.zeros(64, jnp.int32)
  for restarts, low, high in ((1, 0.3, 0.7), (8, 0.95, 1.0)):
    adversarial = apgd(
      KEY,
      classifier,
      images,
      labels,
      epsilon=0.4,
      num_steps=1,
      num_restarts=restarts,
    )
    assert low < (adversarial < 0.5).mean() <= high


def test_examples_of_a_batch_do_not_touch(case, x64):
  """Nor does the size of the batch."""
  weights = jax.tree.map(jnp.asarray, case.weights)

  def attack(rows):
    return apgd(
      KEY,
      Partial(_mlp, weights),
      case.images[:rows],
      case.labels[:rows],
      epsilon=0.02,
      num_steps=20,
    )

  np.testing.assert_allclose(attack(ROWS)[:5], attack(5), atol=1e-9)


def test_keys_decide_the_start_alone(case):
  first = _apgd(case, num_steps=2)
  assert np.array_equal(first, _apgd(case, num_steps=2))
  assert not np.array_equal(
    first, _apgd(case, num_steps=2, key=jax.random.key(4))
  )


@pytest.mark.parametrize("loss", ["margin", "targeted_margin"])
def test_two_classes(loss, case):
  """num_targets is lowered to the one class that there is."""
  weights = dict(case.single.args[0])
  weights["w2"] = weights["w2"][:, :2]
  classifier = Partial(_mlp, weights)
  images = jnp.asarray(case.images, jnp.float32)
  labels = classifier(images).argmax(-1)
  arguments = dict(classifier=classifier, labels=labels, loss=loss)
  adversarial = _apgd(case, **arguments, epsilon=0.05)
  fooled = classifier(adversarial).argmax(-1) != labels
  assert 0 < fooled.mean() < 1
  np.testing.assert_array_equal(
    adversarial, _apgd(case, **arguments, epsilon=0.05, num_targets=1)
  )


@pytest.mark.parametrize(
  ("loss", "classes"),
  [("dlr", 2), ("targeted_dlr", 2), ("targeted_dlr", 3)],
)
def test_too_few_classes_for_the_loss(loss, classes, case):
  weights = dict(case.single.args[0])
  weights["w2"] = weights["w2"][:, :classes]
  with pytest.raises(UserError) as error:
    _apgd(
      case,
      classifier=Partial(_mlp, weights),
      labels=np.zeros(ROWS, np.int32),
      loss=loss,
    )
  message = str(error.value)
  assert message.startswith(f"loss: {loss!r} with {classes} classes; allowed: ")
  assert "at least" in message and "\n" not in message


_BAD = {
  "enlarged linf": (dict(enlarged=True), "enlarged: True with norm 'linf'; "),
  "enlarged l2": (
    dict(enlarged=True, norm="l2"),
    "enlarged: True with norm 'l2'; ",
  ),
  "norm": (dict(norm="l0"), "norm: 'l0'; allowed: l1, l2, linf"),
  "loss": (dict(loss="hinge"), "loss: 'hinge'; allowed: cross_entropy, dlr"),
  "epsilon": (dict(epsilon=8), "epsilon: 8; allowed: at most 1 for linf"),
  "steps 0": (dict(num_steps=0), "num_steps: 0; "),
  "steps 2.5": (dict(num_steps=2.5), "num_steps: 2.5; "),
  "targets 0": (dict(num_targets=0), "num_targets: 0; "),
  "restarts": (dict(num_restarts=-1), "num_restarts: -1; "),
  "eot 0": (dict(eot_samples=0), "eot_samples: 0; "),
  "label": (dict(labels=np.full(ROWS, 6)), "labels: values in [6, 6]"),
}


@pytest.mark.parametrize("what", _BAD)
def test_bad_arguments_are_named(what, case):
  changes, start = _BAD[what]
  with pytest.raises(UserError) as error:
    _apgd(case, **changes)
  message = str(error.value)
  assert message.startswith(start), message
  assert "allowed: " in message and "\n" not in message


def test_what_is_swept_compiles_nothing(case, compilations):
  # So few steps that no two runs have converged to the same corner.
  arguments = dict(loss="targeted_margin", num_targets=1, num_steps=3)
  first = _apgd(case, **arguments)
  other = Partial(_mlp, jax.tree.map(lambda w: 0.9 * w, case.single.args[0]))
  before = compilations()
  results = [
    _apgd(case, **arguments, epsilon=0.01),
    _apgd(case, **arguments | {"num_steps": 7}),
    _apgd(case, **arguments | {"num_targets": 3}),
    _apgd(case, **arguments, num_restarts=2),
    _apgd(case, **arguments, classifier=other),
    _apgd(case, **arguments, key=jax.random.key(9)),
  ]
  assert compilations() == before
  for result in results:  # and each did change something
    assert not np.array_equal(first, result)


# Closed forms.


def _linear(weights: Any, bias: Any, images: Any) -> Any:
  score = images.reshape(len(images), -1) @ weights + bias
  return jnp.stack([jnp.zeros_like(score), score], -1)


def _greatest_gain(
  slope: np.ndarray, image: np.ndarray, epsilon: float, norm: str
) -> float:
  """By how much a linear function can rise in the ball and the box."""
  if norm == "linf":
    moved = np.clip(image + epsilon * np.sign(slope), 0, 1)
    return float(slope @ (moved - image))
  if norm == "l2":  # far from the box
    return epsilon * float(np.linalg.norm(slope))
  room = np.where(slope > 0, 1 - image, image)
  gain, left = 0.0, epsilon
  for pixel in np.argsort(-np.abs(slope)):  # the steepest first
    used = min(room[pixel], left)
    gain, left = gain + used * abs(slope[pixel]), left - used
  return gain


@pytest.mark.parametrize(
  ("norm", "epsilon", "loss", "enlarged", "share"),
  [
    ("linf", 0.05, "margin", False, 1 - 1e-4),
    ("linf", 0.05, "targeted_margin", False, 1 - 1e-4),
    ("l2", 0.2, "margin", False, 1 - 1e-4),
    ("l1", 2.0, "margin", False, 0.95),
    ("l1", 2.0, "margin", True, 0.95),
  ],
)
def test_a_linear_model_is_attacked_optimally(
  norm, epsilon, loss, enlarged, share
):
  """Two classes, and a bias that nothing in the ball overcomes."""
  generator = np.random.default_rng(0)
  slope = generator.normal(size=PIXELS)
  images = generator.uniform(0.3, 0.7, (ROWS, *SHAPE)).astype(np.float32)
  if norm == "linf":
    images[::2] = images[::2].round()  # black and white
  flat = images.reshape(ROWS, -1).astype(np.float64)
  classifier = Partial(
    _linear, jnp.asarray(slope, jnp.float32), jnp.float32(-60)
  )
  adversarial = apgd(
    KEY,
    classifier,
    images,
    np.zeros(ROWS, np.int32),
    epsilon=epsilon,
    norm=norm,
    loss=loss,
    enlarged=enlarged,
  )
  assert adversarial.dtype == np.float32
  assert (adversarial >= 0).all() and (adversarial <= 1).all()
  assert (classifier(adversarial).argmax(-1) == 0).all()
  delta = np.asarray(adversarial, np.float64).reshape(ROWS, -1) - flat
  order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
  length = np.linalg.norm(delta, order, axis=1)
  np.testing.assert_allclose(length, epsilon, rtol=1e-5)
  best = [_greatest_gain(slope, image, epsilon, norm) for image in flat]
  share_found = delta @ slope / best
  assert (share_found <= 1 + 1e-5).all()
  assert (share_found >= share).all(), share_found


# Classifiers that draw random numbers.


def _noisy(weights: Any, key: jax.Array, images: jax.Array) -> jax.Array:
  """A linear classifier whose weights are drawn anew, around the given ones."""
  noise = jax.random.normal(key, weights.shape, weights.dtype)
  return images.reshape(len(images), -1) @ (weights + 0.5 * noise)


def _spying(weights: Any) -> tuple[base.Randomized, list[np.ndarray]]:
  """Notes the key of every look."""
  seen: list[np.ndarray] = []

  def function(key, images):
    jax.debug.callback(
      lambda data: seen.append(np.array(data)), jax.random.key_data(key)
    )
    return _noisy(weights, key, images)

  return base.Randomized(Partial(function)), seen


@pytest.mark.parametrize("samples", [1, 5])
def test_evaluate_averages_gradients_of_different_draws(samples, x64):
  generator = np.random.default_rng(0)
  weights = generator.normal(size=(PIXELS, 4))
  images = generator.uniform(size=(3, *SHAPE))
  labels = np.array([0, 3, 1])
  classifier, seen = _spying(weights)
  logits, loss, gradient, _ = compilation.jit(
    lambda key: base.evaluate(
      classifier,
      key,
      images,
      lambda logits: losses.cross_entropy(logits, labels),
      eot_samples=samples,
    )
  )(KEY)
  jax.effects_barrier()
  assert len(seen) == samples == len({key.tobytes() for key in seen})
  expected = np.zeros((3, PIXELS))
  draws = []
  for data in seen:
    noise = jax.random.normal(jax.random.wrap_key_data(data), weights.shape)
    drawn = weights + 0.5 * np.asarray(noise)
    z = images.reshape(3, -1) @ drawn
    softmax = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    expected += (softmax - np.eye(4)[labels]) @ drawn.T / samples
    draws.append((z, -np.log(softmax[np.arange(3), labels])))
  np.testing.assert_allclose(
    gradient, expected.reshape(images.shape), atol=1e-12
  )
  # Logits and loss belong together: those of one of the draws.
  one = [np.allclose(logits, z, rtol=1e-12) for z, _ in draws]
  assert sum(one) == 1
  np.testing.assert_allclose(loss, draws[one.index(True)][1], rtol=1e-9)


def test_a_fixed_classifier_needs_no_samples(case):
  """The mean of equal gradients is the gradient."""
  np.testing.assert_allclose(
    _apgd(case, num_steps=3, eot_samples=4),
    _apgd(case, num_steps=3),
    atol=1e-6,
  )


def test_apgd_draws_anew_at_every_look():
  """Every step of every run with other random numbers, by the key alone."""
  weights = jnp.zeros((PIXELS, 2)).at[:, 0].set(0.5)
  classifier, seen = _spying(weights)
  images = jnp.full((8, *SHAPE), 0.5)
  labels = np.zeros(8, np.int32)
  arguments = dict(
    epsilon=1e-3,
    num_steps=6,
    num_restarts=2,
    eot_samples=3,
    loss="margin",
  )

  def attack(key):
    return np.asarray(apgd(key, classifier, images, labels, **arguments))

  first = attack(KEY)
  jax.effects_barrier()
  # Two runs of seven looks, the clean image and what each run found.
  assert len(seen) == 2 * 7 * 3 + 3
  keys = {key.tobytes() for key in seen}
  assert len(keys) == len(seen)
  again = attack(KEY)
  jax.effects_barrier()
  np.testing.assert_array_equal(first, again)
  assert {key.tobytes() for key in seen} == keys
  assert not np.array_equal(first, attack(jax.random.key(8)))


def test_averaging_finds_the_direction_that_noise_hides():
  """A noisy slope; the mean of many draws has the sign of its mean."""
  slope = np.random.default_rng(0).choice([-0.2, 0.2], PIXELS)
  weights = jnp.stack([jnp.full(PIXELS, 0.5), jnp.asarray(slope + 0.5)], -1)
  images = jnp.full((4, *SHAPE), 0.5, jnp.float32)
  bias = base.Randomized(
    Partial(
      lambda w, key, x: _noisy(w, key, x) + jnp.array([100.0, 0.0]),
      jnp.asarray(weights, jnp.float32),
    )
  )
  found = []
  for samples in (1, 60):
    adversarial = apgd(
      KEY,
      bias,
      images,
      np.zeros(4, np.int32),
      epsilon=0.1,
      num_steps=1,
      loss="margin",
      eot_samples=samples,
    )
    delta = np.asarray(adversarial - images).reshape(4, -1)
    found.append((delta @ slope).mean() / (0.1 * np.abs(slope).sum()))
  assert found[1] > found[0] + 0.2 and found[1] > 0.8, found
