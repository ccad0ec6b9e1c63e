"""Lines around functions of one number lie on their side, everywhere."""

import jax
import numpy as np
import pytest

from atat_jax.bounds import curves
from atat_jax.bounds.nodes import Interval

DOMAINS = {
  "log": (0.05, 4.0),
  "log1p": (-0.9, 4.0),
  "sqrt": (0.01, 4.0),
  "rsqrt": (0.05, 4.0),
}
PIECES = {
  "relu": (0.0, (0.0, 0.0), (1.0, 0.0)),
  "min": (0.7, (1.0, 0.0), (0.0, 0.7)),
  "leaky": (0.0, (0.1, 0.0), (1.0, 0.0)),
  "abs": (0.0, (-1.0, 0.0), (1.0, 0.0)),
  "tent": (1.0, (1.0, 0.0), (-1.0, 2.0)),
  "step": (0.2, (0.0, 0.0), (0.0, 1.0)),
  "jump": (-0.5, (2.0, 1.0), (-0.5, -1.0)),
}


def intervals(low, high):
  generator = np.random.default_rng(0)
  ends = np.sort(generator.uniform(low, high, (200, 2)), 1)
  ends[:20, 1] = ends[:20, 0]  # single points
  ends[20:40, 1] = ends[20:40, 0] + 1e-9
  return ends[:, 0], ends[:, 1]


def check(values, found, lines, x, low, high):
  """Compares with values at points x of each interval."""
  a, b, c, d = (np.asarray(v)[:, None] for v in lines)
  slack = 1e-9 * (1 + np.abs(values))
  assert np.all(a * x + b <= values + slack)
  assert np.all(values <= c * x + d + slack)
  assert np.all(np.asarray(found.lower)[:, None] <= values + slack)
  assert np.all(values <= np.asarray(found.upper)[:, None] + slack)
  # The interval is the range, and no line is far from the function.
  wide = high - low > 0.5
  gap = (c - a) * x + d - b
  assert np.all(gap[wide].min(1) <= np.ptp(values, 1)[wide] + 0.1)


@pytest.mark.parametrize("name", [*curves.CURVES, "reciprocal", "cube"])
def test_curves(name):
  with jax.enable_x64(True):
    curve = {
      "reciprocal": curves.RECIPROCAL,
      "cube": curves.CURVES["integer_pow"]({"y": 3}),
    }.get(name) or curves.CURVES[name]({"y": 4})
    domain = (0.05, 4.0) if name == "reciprocal" else DOMAINS.get(name, (-3, 3))
    low, high = intervals(*domain)
    x = np.linspace(low, high, 101, axis=1)
    ends = Interval(jax.numpy.asarray(low), jax.numpy.asarray(high))
    values = np.asarray(curve.value(jax.numpy.asarray(x)))
    found = curves.interval(curve, ends)
    check(values, found, curves.slopes(curve, ends), x, low, high)
    below = Interval(ends.lower - 10, ends.upper)
    defined = curve.above is None
    assert np.isfinite(curves.interval(curve, below).lower).all() == defined


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name):
  point, left, right = PIECES[name]
  with jax.enable_x64(True):
    pieces = curves.Pieces(point, left, right)
    low, high = intervals(-2, 2)
    x = np.linspace(low, high, 101, axis=1)
    values = np.where(x < point, left[0] * x + left[1], right[0] * x + right[1])
    ends = Interval(jax.numpy.asarray(low), jax.numpy.asarray(high))
    found = curves.pieces_interval(pieces, ends)
    check(values, found, curves.pieces_slopes(pieces, ends), x, low, high)
