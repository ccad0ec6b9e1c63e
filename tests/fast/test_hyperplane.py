"""Projections onto a hyperplane in the box, against general-purpose solvers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from atat_jax import compilation
from atat_jax.attacks import hyperplane

pytestmark = pytest.mark.usefixtures("quick_compilation")

NORMS = ("linf", "l2", "l1")
ROWS, COLUMNS = 40, 9
_jitted = compilation.jit(hyperplane.project, static_argnames="norm")
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DTYPES = (np.float32, np.float64)


@pytest.fixture(autouse=True)
def double(x64):
  """Every test computes in the dtype it names."""


def _project(norm: str, points: Any, weights: Any, offsets: Any) -> Any:
  """Small problems as one shape, to compile one program for all of them.

  Coordinates of weight 0 do not move, and rows do not depend on each other.
  """
  count, size = points.shape
  if count <= ROWS and size <= COLUMNS:
    rows, columns = (0, ROWS - count), (0, COLUMNS - size)
    points, weights, offsets = (
      jnp.asarray(np.pad(x, widths))
      for x, widths in (
        (points, (rows, columns)),
        (weights, (rows, columns)),
        (offsets, (rows,)),
      )
    )
  moved = _jitted(norm, points, weights, offsets)
  return np.asarray(moved)[:count, :size]


class Rows(NamedTuple):
  """Problems with [B, D] points and weights and [B] offsets."""

  points: np.ndarray
  weights: np.ndarray
  offsets: np.ndarray

  def astype(self, dtype: Any) -> "Rows":
    return Rows(*(x.astype(dtype) for x in self))


def _far_corner(points, weights, up):
  """The corner with the largest (up) or smallest product with the weights."""
  return np.where(weights == 0, points, (weights > 0) == up[:, None])


def _rows(size: int, count: int = 4) -> dict[str, Rows]:
  """`count` feasible problems a kind, from very near to very far."""
  generator = np.random.default_rng(size)
  kinds = {}

  def add(kind, points, weights):
    up = generator.random(count) < 0.5
    corner = _far_corner(points, weights, up)
    share = np.linspace(0.02, 0.95, count)[:, None]
    inside = points + share * (corner - points)
    kinds[kind] = Rows(points, weights, (weights * inside).sum(-1))

  def points():
    return generator.uniform(size=(count, size))

  def weights():
    return generator.normal(size=(count, size))

  add("plain", points(), weights())
  add("corners", points().round(), weights())
  faces = points()
  faces[:, ::2] = faces[:, ::2].round()
  add("faces", faces, weights())
  zeros = weights()
  zeros[:, 1::3] = 0
  add("zero weights", points(), zeros)
  add("ties", points(), np.sign(weights()))
  steps = (1 + generator.integers(0, 3, (count, size))) * np.sign(weights())
  add("some ties", points(), steps / 2)
  add("tiny", points(), 1e-12 * weights())
  add("huge", points(), 1e6 * weights())
  mixed = weights()
  mixed[:, 1::2] *= 1e-9
  add("tiny and not", points(), mixed)
  add("wide range", points(), weights() * 10.0 ** -(np.arange(size) % 7))
  return kinds


def _solve(norm: str, t: np.ndarray, w: np.ndarray, b: float) -> float:
  """The smallest norm, by a solver that knows nothing of this problem."""
  scale = np.abs(w).max()
  w, b = w / scale, b / scale
  size, left = len(t), b - w @ t
  if norm == "l2":
    # Karush-Kuhn-Tucker: the move is the multiplier times w, clipped.
    def missing(multiplier):
      return w @ np.clip(multiplier * w, -t, 1 - t) - left

    far = 1.0
    while missing(-far) * missing(far) > 0:
      far *= 4
    multiplier = optimize.brentq(missing, -far, far, xtol=1e-300, rtol=1e-14)
    return float(np.linalg.norm(np.clip(multiplier * w, -t, 1 - t)))
  if norm == "linf":  # minimise s with -s <= move <= s
    eye, ones = np.eye(size), np.ones((size, 1))
    solution = optimize.linprog(
      np.append(np.zeros(size), 1),
      A_ub=np.block([[eye, -ones], [-eye, -ones]]),
      b_ub=np.zeros(2 * size),
      A_eq=np.append(w, 0)[None],
      b_eq=[left],
      bounds=[*zip(-t, 1 - t, strict=True), (0, None)],
    )
  else:  # move = rise - fall
    solution = optimize.linprog(
      np.ones(2 * size),
      A_eq=np.append(w, -w)[None],
      b_eq=[left],
      bounds=[*((0, r) for r in 1 - t), *((0, r) for r in t)],
    )
  assert solution.success
  return float(solution.fun)


def _check_constraints(rows: Rows, delta: Any, dtype: Any) -> np.ndarray:
  """In the box, in the dtype itself, and where weights are 0 at rest."""
  assert delta.dtype == dtype and delta.shape == rows.points.shape
  delta = np.asarray(delta)
  moved = rows.points + delta
  assert (moved >= 0).all() and (moved <= 1).all()
  assert (delta[rows.weights == 0] == 0).all()
  return delta.astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_is_the_smallest_move_onto_the_hyperplane(norm, dtype):
  tolerance = 2e-5 if dtype == np.float32 else 1e-8
  for size in (1, 2, 9):
    kinds = _rows(size)
    together = Rows(*map(np.concatenate, zip(*kinds.values(), strict=True)))
    rows = together.astype(dtype)
    delta = _check_constraints(rows, _project(norm, *rows), dtype)
    exact = rows.astype(np.float64)
    left = (exact.weights * (exact.points + delta)).sum(-1) - exact.offsets
    unit = np.abs(exact.weights).sum(-1)
    assert (np.abs(left) <= 10 * np.finfo(dtype).eps * unit).all()
    actual = np.linalg.norm(delta, ORDER[norm], axis=-1)
    expected = [_solve(norm, *row) for row in zip(*exact, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_goes_as_far_as_the_box_allows(norm, dtype):
  for size in (1, 9):
    for rows in _rows(size).values():
      up = np.arange(len(rows.points)) % 2 == 0
      corner = _far_corner(rows.points, rows.weights, up)
      beyond = (rows.weights * corner).sum(-1)
      reach = np.abs(rows.weights).sum(-1) * np.where(up, 1, -1)
      for factor in (0.1, 1e9):
        far = rows._replace(offsets=beyond + factor * reach).astype(dtype)
        delta = _check_constraints(far, _project(norm, *far), dtype)
        np.testing.assert_allclose(far.points + delta, corner, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_points_of_the_hyperplane_stay(norm):
  rows = _rows(9)["plain"]
  # Exact in binary, so that nothing is left over.
  points = (rows.points * 64).round() / 64
  weights = (rows.weights * 64).round() / 64
  offsets = (weights * points).sum(-1)
  delta = _project(norm, points, weights, offsets)
  assert (delta == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_no_hyperplane_no_move(norm):
  points = np.full((6, 4), 0.5, np.float32)
  weights = np.ones((6, 4), np.float32)
  weights[0], weights[1], weights[2], weights[4] = 0, np.nan, np.inf, 0
  weights[3, 0] = np.nan
  offsets = np.array([1, 1, 1, 1, 0, np.nan], np.float32)
  delta = _project(norm, points, weights, offsets)
  assert (delta == 0).all()
  infinite = np.full(6, -np.inf, np.float32)
  delta = _project(norm, points, np.ones_like(weights), infinite)
  assert (delta == -0.5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_known_solutions(norm):
  """Weights 2 and -1 and a residual of 1, with room and without."""
  points = np.array([[0.5, 0.5], [0.9, 0.9], [0.75, 0.5]])
  weights = np.array([[2.0, -1.0]] * 3)
  offsets = (weights * points).sum(-1) + 1
  expected = {
    "linf": [[1 / 3, -1 / 3], [0.1, -0.8], [0.25, -0.5]],
    "l2": [[0.4, -0.2], [0.1, -0.8], [0.25, -0.5]],
    "l1": [[0.5, 0], [0.1, -0.8], [0.25, -0.5]],
  }
  for project in (_project, _jitted):  # with coordinates of weight 0, without
    delta = project(norm, points, weights, offsets)
    np.testing.assert_allclose(delta, expected[norm], atol=1e-14)


def _reference(norm, t, w, b):
  """Float64 for many dimensions: sorted breakpoints, or a greedy filling."""
  left = b - w @ t
  room = np.where((w > 0) == (left > 0), 1 - t, t) * (w != 0)
  size, left = np.abs(w), abs(left)
  if norm == "l1":
    order = np.argsort(-size)
    before = np.cumsum((size * room)[order]) - (size * room)[order]
    fill = np.minimum(np.maximum(left - before, 0) / size[order], room[order])
    return fill.sum()
  units = np.ones_like(size) if norm == "linf" else size
  order = np.argsort(room / units)
  gained = np.append(0, np.cumsum((size * room)[order]))
  # Summed from the end, the last slopes are exact.
  slope = np.append(np.cumsum((size * units)[order][::-1])[::-1], 0)
  # The breakpoints passed before enough is gained.
  k = np.searchsorted(gained[1:] + slope[1:] * (room / units)[order], left)
  length = (left - gained[k]) / slope[k]
  return np.linalg.norm(np.minimum(length * units, room), ORDER[norm])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_size_of_an_image(norm, dtype):
  generator = np.random.default_rng(0)
  points = generator.uniform(size=(8, 3072))
  points[1::2] = (points[1::2] * 1.2 - 0.1).clip(0, 1)
  weights = generator.normal(size=(8, 3072)) ** 3
  share = np.array([1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9])[:, None]
  corner = _far_corner(points, weights, np.arange(8) < 4)
  inside = points + share * (corner - points)
  rows = Rows(points, weights, (weights * inside).sum(-1)).astype(dtype)
  delta = _check_constraints(rows, _project(norm, *rows), dtype)
  actual = np.linalg.norm(delta, ORDER[norm], axis=-1)
  exact = rows.astype(np.float64)
  expected = [_reference(norm, *row) for row in zip(*exact, strict=True)]
  # Of a product of 3072 terms, float32 keeps about six digits.
  rounding = 1e-6 * np.abs(exact.weights * exact.points).sum(-1)
  residual = np.abs((exact.weights * exact.points).sum(-1) - exact.offsets)
  rtol = (rounding / residual).max() if dtype == np.float32 else 1e-10
  assert rtol < 0.02
  for a, e, near in zip(actual, expected, rounding / residual, strict=True):
    limit = 1e-5 + 2 * near if dtype == np.float32 else 1e-10
    assert abs(a - e) <= limit * e


@pytest.mark.parametrize("norm", NORMS)
def test_one_breakpoint_after_the_other(norm):
  """Room halves as the weight doubles: Newton's method needs 20 steps."""
  weights = np.repeat(2.0 ** -np.arange(40)[None], 3, axis=0)
  points = 1 - weights[:, ::-1]
  share = np.array([0.5, 0.9, 0.99])[:, None]
  offsets = (weights * (points + share * (1 - points))).sum(-1)
  rows = Rows(points, weights, offsets)
  delta = _check_constraints(rows, _project(norm, *rows), np.float64)
  expected = [_reference(norm, *row) for row in zip(*rows, strict=True)]
  actual = np.linalg.norm(delta, ORDER[norm], axis=-1)
  # Offsets of 1 and residuals of 1e-11.
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_do_not_depend_on_each_other(norm):
  kinds = _rows(9).values()
  rows = Rows(*map(np.concatenate, zip(*kinds, strict=True))).astype(np.float32)
  together = _project(norm, *rows)

  @compilation.jit
  @jax.vmap
  def alone(points, weights, offset):
    row = points[None], weights[None], offset[None]
    return hyperplane.project(norm, *row)[0]

  np.testing.assert_allclose(alone(*rows), together, atol=1e-7)
  backwards = _project(norm, *(x[::-1] for x in rows))
  np.testing.assert_array_equal(backwards[::-1], together)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_computes_in_float32(norm, dtype):
  rows = [np.asarray(x).astype(dtype) for x in _rows(9)["faces"]]
  delta = _project(norm, *rows)
  assert delta.dtype == dtype
  wide = _project(norm, *(x.astype(np.float32) for x in rows))
  assert (delta == wide.astype(dtype)).all()
