"""Balls: nearest points, uniform starts and steepest directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from atat_jax.attacks import norms

EPSILON = 0.3
SHAPE = (5, 4, 3, 2)


def _length(name: str, delta: jax.Array) -> np.ndarray:
  flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
  order = {"linf": np.inf, "l2": 2}[name]
  return np.linalg.norm(flat, ord=order, axis=1)


def _perturbations() -> np.ndarray:
  """Far outside, just outside, just inside, inside, and zero."""
  delta = np.random.default_rng(0).normal(size=SHAPE)
  scale = np.array([10, 1.01, 0.99, 0.1, 0.0])
  return delta, scale


@pytest.mark.parametrize("name", norms.NORMS)
def test_projection_is_the_nearest_point_of_the_ball(name, x64):
  delta, scale = _perturbations()
  delta /= _length(name, delta)[:, None, None, None]
  delta *= (scale * EPSILON)[:, None, None, None]
  projected = np.asarray(norms.NORMS[name].project(delta, EPSILON))
  if name == "linf":
    expected = np.minimum(np.maximum(delta, -EPSILON), EPSILON)
  else:
    factor = np.minimum(1, 1 / np.maximum(scale, 1e-9))
    expected = delta * factor[:, None, None, None]
  np.testing.assert_allclose(projected, expected, rtol=1e-12)
  assert (_length(name, projected) <= EPSILON * (1 + 1e-12)).all()
  np.testing.assert_allclose(projected[2:], delta[2:], rtol=1e-15)
  # Nearest: no point of the ball is on the far side of the tangent plane.
  inside = np.random.default_rng(1).normal(size=SHAPE)
  inside *= EPSILON / _length(name, inside)[:, None, None, None]
  assert (((delta - projected) * (inside - projected)).sum() <= 1e-12).all()


@pytest.mark.parametrize("name", norms.NORMS)
def test_projection_keeps_ball_and_box(name):
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (64, 6, 5, 3)).astype(np.float32) / 255
  images[:8] = 0
  images[8:16] = 1
  outside = images + generator.normal(size=images.shape).astype(np.float32)
  outside[16] = images[16]
  for epsilon in (8 / 255, 0.3, 2.0):
    result = np.asarray(
      norms.project(norms.NORMS[name], outside, images, jnp.float32(epsilon))
    )
    assert result.dtype == np.float32
    assert (result >= 0).all() and (result <= 1).all()
    # One rounding of a number near 1, and of a sum of 90 squares.
    assert (_length(name, result - images) <= epsilon * (1 + 1e-6) + 1e-7).all()
    np.testing.assert_array_equal(result[16], images[16])


def _starts(name: str, count: int = 20_000) -> np.ndarray:
  """Starts in 6 dimensions, [count, 6], in units of the radius."""
  images = jnp.full((count, 1, 2, 3), 0.5)
  delta = norms.NORMS[name].start(jax.random.key(3), images, EPSILON)
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


@pytest.mark.parametrize("name", norms.NORMS)
def test_direction_increases_a_linear_function_most(name, x64):
  gradient = np.random.default_rng(0).normal(size=SHAPE)
  step = np.asarray(norms.NORMS[name].direction(gradient))
  np.testing.assert_allclose(_length(name, step), 1)
  flat = gradient.reshape(len(gradient), -1)
  dual = {"linf": 1, "l2": 2}[name]  # the greatest gain is the dual norm
  np.testing.assert_allclose(
    (step * gradient).sum((1, 2, 3)),
    np.linalg.norm(flat, ord=dual, axis=1),
    rtol=1e-12,
  )


@pytest.mark.parametrize("name", norms.NORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-8])
def test_direction_of_a_vanishing_gradient_is_finite(name, scale):
  gradient = jnp.full(SHAPE, scale, jnp.float32)
  step = norms.NORMS[name].direction(gradient)
  assert np.isfinite(step).all()
  assert (_length(name, step) <= 1 + 1e-6).all()
  if scale == 0:
    assert (step == 0).all()
