"""Balls: nearest points, uniform starts and steepest directions."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from atat_jax import compilation
from atat_jax.attacks import balls

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPSILON = 0.3
SHAPE = (5, 4, 3, 2)


@functools.partial(compilation.jit, static_argnums=0)
def _project(name, delta, images, epsilon):
  return balls.BALLS[name].project(delta, images, epsilon)


@functools.partial(compilation.jit, static_argnums=0)
def _direction(name, gradient):
  return balls.BALLS[name].direction(gradient)


_sparse_sign = compilation.jit(balls.sparse_sign)


def _length(name: str, delta: jax.Array) -> np.ndarray:
  flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
  order = {"linf": np.inf, "l2": 2, "l1": 1}[name]
  return np.linalg.norm(flat, ord=order, axis=1)


def _perturbations() -> tuple[np.ndarray, np.ndarray]:
  """Far outside, just outside, just inside, inside, and zero."""
  delta = np.random.default_rng(0).normal(size=SHAPE)
  scale = np.array([10, 1.01, 0.99, 0.1, 0.0])
  return delta, scale


def _simplex(size: np.ndarray, epsilon: float) -> np.ndarray:
  """By how much to shrink sizes to a sum of epsilon (Duchi et al., 2008)."""
  ordered = np.sort(size)[::-1]
  excess = (np.cumsum(ordered) - epsilon) / np.arange(1, len(size) + 1)
  return np.maximum(excess[np.nonzero(ordered > excess)[0][-1]], 0)


@pytest.mark.parametrize("name", balls.BALLS)
def test_projection_is_the_nearest_point_of_the_ball(name, x64):
  """Far from the box, which is part of the l1 projection alone."""
  images = np.full(SHAPE, 0.5)
  delta, scale = _perturbations()
  delta /= _length(name, delta)[:, None, None, None]
  delta *= (scale * EPSILON)[:, None, None, None]
  projected = np.asarray(_project(name, delta, images, EPSILON))
  if name == "linf":
    expected = np.minimum(np.maximum(delta, -EPSILON), EPSILON)
  elif name == "l2":
    factor = np.minimum(1, 1 / np.maximum(scale, 1e-9))
    expected = delta * factor[:, None, None, None]
  else:
    shrink = [_simplex(np.abs(d).ravel(), EPSILON) for d in delta]
    size = np.abs(delta) - np.array(shrink)[:, None, None, None]
    expected = np.sign(delta) * np.maximum(size, 0)
  np.testing.assert_allclose(projected, expected, rtol=1e-12, atol=1e-15)
  assert (_length(name, projected) <= EPSILON * (1 + 1e-12)).all()
  np.testing.assert_allclose(projected[2:], delta[2:], rtol=1e-15)
  # Nearest: no point of the ball is on the far side of the tangent plane.
  inside = np.random.default_rng(1).normal(size=SHAPE)
  inside *= EPSILON / _length(name, inside)[:, None, None, None]
  assert (((delta - projected) * (inside - projected)).sum() <= 1e-12).all()


@pytest.mark.parametrize("name", balls.BALLS)
def test_projection_keeps_ball_and_box(name):
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (64, 6, 5, 3)).astype(np.float32) / 255
  images[:8] = 0
  images[8:16] = 1
  outside = images + generator.normal(size=images.shape).astype(np.float32)
  outside[16] = images[16]
  project = compilation.jit(functools.partial(balls.project, balls.BALLS[name]))
  for epsilon in (8 / 255, 0.3, 2.0):
    result = np.asarray(project(outside, images, jnp.float32(epsilon)))
    assert result.dtype == np.float32
    assert (result >= 0).all() and (result <= 1).all()
    # One rounding of a number near 1, of each of 90, and of a sum of 90.
    length = _length(name, result.astype(np.float64) - images)
    rounding = {"linf": 1e-7, "l2": 1e-7, "l1": 3e-6}[name]
    assert (length <= epsilon * (1 + 1e-6) + rounding).all()
    np.testing.assert_array_equal(result[16], images[16])


@pytest.mark.parametrize("name", balls.BALLS)
def test_each_row_has_its_own_radius(name, x64):
  images = np.full(SHAPE, 0.5)
  delta, _ = _perturbations()
  radii = np.array([0.01, 0.1, 0.2, 0.3, 0.4]).reshape(-1, 1, 1, 1)
  together = np.asarray(_project(name, delta, images, radii))
  np.testing.assert_allclose(_length(name, together), radii.ravel(), rtol=1e-9)
  for row, radius in enumerate(radii.ravel()):
    alike = _project(name, delta, images, radius)
    np.testing.assert_allclose(
      together[row], alike[row], rtol=1e-12, atol=1e-15
    )


def _starts(name: str, count: int = 20_000) -> np.ndarray:
  """Starts in 6 dimensions, [count, 6], in units of the radius."""
  images = jnp.full((count, 1, 2, 3), 0.5)
  start = compilation.jit(balls.BALLS[name].start)
  delta = start(jax.random.key(3), images, EPSILON)
  assert delta.shape == images.shape
  return np.asarray(delta, np.float64).reshape(count, 6) / EPSILON


def test_linf_start_is_uniform_in_the_cube():
  delta = _starts("linf")
  assert np.abs(delta).max() <= 1
  for column in delta.T:
    assert stats.kstest(column, "uniform", args=(-1, 2)).pvalue > 1e-3
  covariance = np.cov(delta.T)  # independent, variance 1/3
  np.testing.assert_allclose(covariance, np.eye(6) / 3, atol=0.015)


def test_l2_start_is_uniform_in_the_ball():
  delta = _starts("l2")
  radius = np.linalg.norm(delta, axis=1)
  assert radius.max() <= 1 + 1e-6
  # The volume within a radius grows as its sixth power.
  assert stats.kstest(radius**6, "uniform").pvalue > 1e-3
  directions = delta / radius[:, None]
  np.testing.assert_allclose(directions.mean(0), 0, atol=0.015)
  np.testing.assert_allclose(
    directions.T @ directions / len(delta), np.eye(6) / 6, atol=0.006
  )
  # Radius and direction are independent: the covariance of a uniform ball.
  np.testing.assert_allclose(np.cov(delta.T), np.eye(6) / 8, atol=0.006)
  # A cube squeezed onto a sphere would prefer the diagonals.
  np.testing.assert_allclose((directions**4).mean(0), 3 / 48, rtol=0.06)


def test_l1_start_is_uniform_in_the_ball():
  delta = _starts("l1")
  size = np.abs(delta)
  radius = size.sum(1)
  assert radius.max() <= 1 + 1e-6
  assert stats.kstest(radius**6, "uniform").pvalue > 1e-3
  # A coordinate's share of the length: one of six parts of a stick, broken at
  # five uniform points.
  for column in (size / radius[:, None]).T:
    assert stats.kstest(column, "beta", args=(1, 5)).pvalue > 1e-3
  signs = np.sign(delta)
  np.testing.assert_allclose(signs.mean(0), 0, atol=0.03)
  np.testing.assert_allclose(signs.T @ signs / len(signs), np.eye(6), atol=0.03)
  # 2 / ((n + 1) (n + 2)) a coordinate.
  np.testing.assert_allclose(np.cov(delta.T), np.eye(6) * 2 / 56, atol=0.002)


@pytest.mark.parametrize("name", ["linf", "l2"])
def test_direction_increases_a_linear_function_most(name, x64):
  gradient = np.random.default_rng(0).normal(size=SHAPE)
  step = np.asarray(_direction(name, gradient))
  np.testing.assert_allclose(_length(name, step), 1)
  flat = gradient.reshape(len(gradient), -1)
  dual = {"linf": 1, "l2": 2}[name]  # the greatest gain is the dual norm
  np.testing.assert_allclose(
    (step * gradient).sum((1, 2, 3)),
    np.linalg.norm(flat, ord=dual, axis=1),
    rtol=1e-12,
  )


@pytest.mark.parametrize(
  ("shape", "kept"), [((4, 3, 2), 1), ((11, 10, 3), 3), ((20, 10, 1), 2)]
)
def test_l1_direction_is_the_steepest_hundredth(shape, kept, x64):
  """Rounded down, but one pixel at least; equal steps, of length 1 in all."""
  gradient = np.random.default_rng(0).normal(size=(5, *shape))
  step = np.asarray(_direction("l1", gradient))
  np.testing.assert_allclose(_length("l1", step), 1, rtol=1e-9)
  for row, slope in zip(step, gradient, strict=True):
    steepest = np.argsort(-np.abs(slope), axis=None)[:kept]
    expected = np.zeros(slope.size)
    expected[steepest] = np.sign(slope.ravel()[steepest]) / kept
    np.testing.assert_allclose(row.ravel(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", balls.BALLS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-8])
def test_direction_of_a_vanishing_gradient_is_finite(name, scale):
  gradient = jnp.full(SHAPE, scale, jnp.float32)
  step = _direction(name, gradient)
  assert np.isfinite(step).all()
  assert (_length(name, step) <= 1 + 1e-6).all()
  if scale == 0:
    assert (step == 0).all()


# Selection without sorting.


@pytest.fixture(scope="module")
def kth() -> Callable[..., np.ndarray]:
  compiled = compilation.jit(balls.kth_smallest)

  def call(x, k):
    ranks = np.broadcast_to(np.asarray(k, np.int32), len(x))
    return np.asarray(compiled(x, ranks))

  return call


def _rows(dtype: type) -> dict[str, np.ndarray]:
  """Rows of 40 that a search through the bits could stumble over."""
  generator = np.random.default_rng(0)
  info = np.finfo(dtype)
  exponents = generator.uniform(np.log2(info.tiny), np.log2(info.max), 40)
  return {
    "uniform": generator.uniform(size=40),
    "all magnitudes": np.exp2(exponents),
    "ties": generator.integers(0, 4, 40) / 3,
    "all equal": np.full(40, 0.7),
    "zeros": np.zeros(40),
    "mostly zeros": generator.permutation(np.r_[np.zeros(37), 1e-9, 1, 2]),
    "neighbours": np.full(40, 1.0) + info.eps * generator.integers(0, 9, 40),
    "subnormal": generator.integers(0, 30, 40) * float(info.smallest_subnormal),
    "extremes": generator.permutation(
      np.r_[np.full(20, np.inf), np.full(18, info.max), info.tiny, 0.0]
    ),
  }


@pytest.mark.parametrize(
  ("dtype", "wide"),
  [(np.float32, False), (np.float32, True), (np.float64, True)],
  ids=["float32", "float32 in x64", "float64"],
)
def test_kth_smallest_is_that_of_a_sort(dtype, wide, kth):
  rows = _rows(dtype)
  x = np.stack([row.astype(dtype) for row in rows.values()])
  ordered = np.sort(x, axis=1)
  with jax.enable_x64(wide):
    for k in range(40):
      found = kth(x, k)
      assert found.dtype == dtype
      # As bits: no subnormal is taken for zero.
      for name, a, b in zip(rows, found, ordered[:, k], strict=True):
        assert a.tobytes() == b.tobytes(), (name, k, a, b)
    ranks = np.arange(len(x), dtype=np.int32) * 39 // (len(x) - 1)
    mixed = kth(x, ranks)
    np.testing.assert_array_equal(mixed, ordered[np.arange(len(x)), ranks])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_kth_smallest_of_short_floats(dtype, kth):
  x = jnp.asarray(_rows(np.float32)["uniform"], dtype)[None]
  for k in (0, 17, 39):
    found = kth(x, k)
    assert found.dtype == dtype
    assert found[0] == np.sort(np.asarray(x[0], np.float32))[k]


def test_kth_smallest_of_one_column(kth):
  assert kth(np.array([[3.0], [0.0]], np.float32), 0).tolist() == [3.0, 0.0]


def test_sparse_sign_keeps_the_largest(x64):
  gradient = np.random.default_rng(0).normal(size=SHAPE)
  kept = np.array([1, 2, 10, 23, 24], np.int32)
  step = np.asarray(_sparse_sign(gradient, kept))
  for row, slope, number in zip(step, gradient, kept, strict=True):
    largest = np.argsort(-np.abs(slope), axis=None)[:number]
    expected = np.zeros(24)
    expected[largest] = np.sign(slope.ravel()[largest]) / number
    np.testing.assert_allclose(row.ravel(), expected, rtol=1e-9)


def test_sparse_sign_of_ties_and_zeros(x64):
  """What ties with the last one kept is kept; a zero has no sign."""
  gradient = np.zeros((4, 2, 2, 1))
  gradient[0, ..., 0] = [[3, -3], [3, 1]]
  gradient[1, ..., 0] = [[0, -2], [0, 0]]
  gradient[2, ..., 0] = [[1e-200, -2e-200], [0, 0]]
  step = _sparse_sign(gradient, np.array([1, 3, 1, 2], np.int32))
  expected = [[1 / 3, -1 / 3, 1 / 3, 0], [0, -1, 0, 0], [0, -1, 0, 0], [0] * 4]
  np.testing.assert_allclose(step.reshape(4, 4), expected, atol=1e-9)


def test_sparse_sign_keeps_one_at_least_and_all_at_most():
  gradient = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  for asked, number in ((0, 1), (-5, 1), (24, 24), (1000, 24)):
    step = _sparse_sign(gradient, np.full(5, asked, np.int32))
    assert ((step != 0).sum((1, 2, 3)) == number).all()
