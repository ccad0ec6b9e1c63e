"""The projection onto the l1 ball within the box, against slower solvers."""

import bisect
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from atat_jax import compilation
from atat_jax.attacks.simplex import project_l1

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _exact(delta: Any, images: Any, epsilon: float) -> np.ndarray:
  """In fractions, by sorting the points at which the l1 norm bends."""
  size = [Fraction(abs(float(d))) for d in delta.ravel()]
  room = [
    Fraction(1 - float(x) if d > 0 else float(x))
    for d, x in zip(delta.ravel(), images.ravel(), strict=True)
  ]

  def shrink(alpha):
    pairs = zip(size, room, strict=True)
    return [min(max(s - alpha, Fraction(0)), r) for s, r in pairs]

  bends = {0, *size, *(max(s - r, 0) for s, r in zip(size, room, strict=True))}
  bends = sorted(bends)
  # The first bend at which it is inside; the root lies just before it.
  first = bisect.bisect_left(
    bends, -Fraction(epsilon), key=lambda b: -sum(shrink(b))
  )
  alpha = bends[first]
  if first > 0:
    low = bends[first - 1]
    outer, inner = sum(shrink(low)), sum(shrink(alpha))
    alpha -= (Fraction(epsilon) - inner) * (alpha - low) / (outer - inner)
  left = np.array([float(v) for v in shrink(alpha)]).reshape(delta.shape)
  return np.sign(delta) * left


def _all_exact(delta: Any, images: Any, epsilon: float) -> np.ndarray:
  return np.stack(
    [_exact(d, x, epsilon) for d, x in zip(delta, images, strict=True)]
  )


def _draw(seed: int, shape: tuple[int, ...], scale: float) -> Any:
  generator = np.random.default_rng(seed)
  images = generator.uniform(size=shape)
  images = np.where(generator.uniform(size=shape) < 0.2, images.round(), images)
  delta = scale * generator.standard_t(2, size=shape)
  return delta * (generator.uniform(size=shape) < 0.8), images


_jitted = compilation.jit(project_l1)


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (5, 3, 2, 1), (6, 8, 7, 3)])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("epsilon", [1e-9, 0.01, 0.7, 12.0])
def test_equals_exact_arithmetic(shape, scale, epsilon, x64):
  delta, images = _draw(0, shape, scale)
  expected = _all_exact(delta, images, epsilon)
  actual = np.asarray(_jitted(delta, images, epsilon))
  assert actual.dtype == np.float64
  np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)
  assert (np.abs(actual).sum((1, 2, 3)) <= epsilon * (1 + 1e-14)).all()
  assert (images + actual >= 0).all() and (images + actual <= 1).all()


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 0.7, 12.0])
def test_float32(scale, epsilon):
  delta, images = (np.float32(a) for a in _draw(1, (4, 9, 8, 3), scale))
  actual = np.asarray(_jitted(delta, images, epsilon))
  assert actual.dtype == np.float32
  expected = _all_exact(delta, images, epsilon)
  distance = np.abs(actual - expected).sum((1, 2, 3))
  assert distance.max() <= 1e-5 * epsilon
  length = np.abs(actual.astype(np.float64)).sum((1, 2, 3))
  assert length.max() <= epsilon * (1 + 2e-6)
  # In float32, as an attack adds them.
  assert (images + actual).min() >= 0 and (images + actual).max() <= 1


def test_is_the_minimiser_that_a_general_solver_finds(x64):
  """Positive and negative parts p, n >= 0 make it a smooth problem."""
  epsilon, size = 0.9, 7
  for seed in range(5):
    delta, images = _draw(seed, (1, size, 1, 1), 0.5)
    y, x = delta.ravel(), images.ravel()
    found = optimize.minimize(
      lambda z, y=y: np.square(z[:size] - z[size:] - y).sum(),
      np.zeros(2 * size),
      bounds=[(0, room) for room in [*(1 - x), *x]],
      constraints={"type": "ineq", "fun": lambda z: epsilon - z.sum()},
      method="SLSQP",
      options={"ftol": 1e-14, "maxiter": 500},
    ).x
    np.testing.assert_allclose(
      _jitted(delta, images, epsilon).ravel(),
      found[:size] - found[size:],
      atol=1e-6,
    )


def test_what_is_inside_stays_and_corners_are_met(x64):
  images = np.array([0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 0.5, 0.5]).reshape(
    4, 2, 1, 1
  )
  delta = np.array([0.3, -0.2, 0.0, 0.0, 0.4, -0.4, -9.0, 0.1]).reshape(
    images.shape
  )
  actual = _jitted(delta, images, 0.5)
  # Inside; zero; no room at all; from far beyond a corner of the diamond,
  # which is a corner of the box too.
  expected = [[0.3, -0.2], [0, 0], [0, 0], [-0.5, 0]]
  np.testing.assert_allclose(actual.reshape(4, 2), expected, atol=1e-16)
  np.testing.assert_array_equal(actual[:3].reshape(3, 2), expected[:3])
  again = _jitted(actual, images, 0.5)
  np.testing.assert_array_equal(again, actual)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_and_tiny_radii(dtype, x64):
  """Equal entries share epsilon, however small it is beside them."""
  images = np.full((1, 8, 8, 3), 0.5, dtype)
  delta = np.full_like(images, 0.25)
  delta[0, 0] *= 1 + 4 * np.finfo(dtype).eps
  for ulps in (1e4, 100, 0.1):
    epsilon = ulps * np.finfo(dtype).eps
    actual = np.asarray(_jitted(delta, images, dtype(epsilon)))
    expected = _exact(delta[0], images[0], float(dtype(epsilon)))
    distance = np.abs(actual[0] - expected).sum()
    assert distance <= 1e-4 * epsilon, ulps


def test_each_row_on_its_own(x64):
  """Neighbours, vmap and a radius for every row change no bit."""
  delta, images = _draw(3, (6, 4, 3, 2), 0.3)
  epsilon = np.array([0.01, 0.1, 0.5, 1.0, 2.0, 9.0]).reshape(6, 1, 1, 1)
  together = np.asarray(_jitted(delta, images, epsilon))
  for row in range(6):
    # Rolled, its neighbours are others; alone, it has none.
    rolled = [np.roll(x, row, axis=0) for x in (delta, images, epsilon)]
    rolled[0][(row + 1) % 6] = 0
    np.testing.assert_array_equal(_jitted(*rolled)[row], together[0])
  alone = _jitted(delta[:1], images[:1], epsilon[:1])
  np.testing.assert_array_equal(alone[0], together[0])
  mapped = compilation.jit(
    jax.vmap(lambda d, x, e: project_l1(d[None], x[None], e)[0])
  )(delta, images, epsilon)
  np.testing.assert_allclose(mapped, together, rtol=1e-12)


def test_not_a_number_ends():
  delta = jnp.full((1, 2, 2, 1), jnp.nan)
  assert jnp.isnan(_jitted(delta, jnp.zeros_like(delta), 0.5)).all()
