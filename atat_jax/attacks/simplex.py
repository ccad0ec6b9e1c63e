"""Exact projection onto the l1 ball within the box, without sorting."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax.typing import Array, Scalar

# Newton's method needs about five guesses. If it has not ended after ten, every
# other guess halves the bracket instead; the maximum ends any bracket.
_MAX_NEWTON_GUESSES = 10
_MAX_GUESSES = 300


class _Point(NamedTuple):
  """The l1 norm as a function of the shrinkage alpha, around one alpha.

  Attributes:
    alpha: Shrinkage, [B, 1].
    excess: The l1 norm there minus epsilon.
    shrinking: Number of entries that shrink with alpha: minus the slope.
  """

  alpha: Array
  excess: Array
  shrinking: Array


class _Bracket(NamedTuple):
  """State of the search for the root, which lies in [low, high).

  Attributes:
    guesses: int32: guesses made.
    done: bool [B, 1].
    last: The last guess.
    low: Lower end of the bracket.
    high: Upper end of the bracket, [B, 1].
  """

  guesses: Array
  done: Array
  last: _Point
  low: _Point
  high: Array


def _evaluate(
  alpha: Array, *, size: Array, room: Array, radius: Array
) -> _Point:
  """Evaluates the l1 norm of the perturbation shrunk by alpha."""
  left = size - alpha
  kept = jnp.clip(left, 0, room)
  shrinking = (kept == left) & (kept > 0)
  return _Point(
    alpha,
    kept.sum(1, keepdims=True) - radius,
    shrinking.astype(size.dtype).sum(1, keepdims=True),
  )


def _select(mask: Array, new: _Point, old: _Point) -> _Point:
  return jax.tree.map(lambda a, b: jnp.where(mask, a, b), new, old)


def _narrow(
  bracket: _Bracket, *, size: Array, room: Array, radius: Array
) -> _Bracket:
  """Makes one guess, by Newton's method or by bisection."""
  guesses, done, last, low, high = bracket
  newton = last.alpha + last.excess / jnp.maximum(last.shrinking, 1)
  halve = (newton <= low.alpha) | (newton >= high) | (last.shrinking == 0)
  halve = halve | ((guesses > _MAX_NEWTON_GUESSES) & (guesses % 2 == 1))
  middle = low.alpha + (high - low.alpha) / 2
  guess = _evaluate(
    jnp.where(halve, middle, newton), size=size, room=room, radius=radius
  )
  # A bracket without another float between its ends is done, too.
  done = done | (guess.alpha <= low.alpha) | (guess.alpha >= high)
  tolerance = 8 * jnp.finfo(size.dtype).eps * radius
  close = jnp.abs(guess.excess) <= tolerance
  rises = ~done & (close | (guess.excess > 0))
  return _Bracket(
    guesses + 1,
    done | close,
    guess,
    _select(rises, guess, low),
    jnp.where(done | rises, high, guess.alpha),
  )


def _continues(bracket: _Bracket) -> Array:
  return (bracket.guesses < _MAX_GUESSES) & ~bracket.done.all()


def project_l1(delta: Array, images: Array, epsilon: Scalar) -> Array:
  """Projects perturbations onto the l1 ball, keeping the images in [0, 1].

  Every entry keeps its sign and shrinks by the same alpha >= 0, stopping at 0
  and at its room in the box. The l1 norm of the rest is a decreasing, piecewise
  linear function of alpha; Newton's method finds its root within a bracket. The
  root is kept as a float and a correction, so that a tiny epsilon is met as
  accurately as a large one.

  Args:
    delta: Perturbations [B, H, W, C].
    images: Clean images, in [0, 1].
    epsilon: Radius > 0, one for all or [B, 1, 1, 1].

  Returns:
    The nearest perturbations of l1 norm at most epsilon, [B, H, W, C]; one that
    is in the ball and in the box already is returned unchanged.
  """
  dtype = jnp.promote_types(delta.dtype, jnp.float32)
  radius = jnp.asarray(epsilon, dtype).reshape(-1, 1)
  # On CPU, reducing one axis is several times as fast as reducing three.
  size = jnp.abs(delta).astype(dtype).reshape(delta.shape[0], -1)
  room = jnp.where(delta > 0, 1 - images, images).astype(dtype)
  room = room.reshape(size.shape)
  high = size.max(1, keepdims=True)
  low = _evaluate(jnp.zeros_like(high), size=size, room=room, radius=radius)
  inside = low.excess <= 0
  low = lax.while_loop(
    _continues,
    functools.partial(_narrow, size=size, room=room, radius=radius),
    _Bracket(jnp.int32(0), inside, low, low, high),
  ).low
  # Zero where the excess at the lower end is not positive.
  correction = jnp.maximum(low.excess, 0) / jnp.maximum(low.shrinking, 1)
  kept = jnp.clip((size - low.alpha) - correction, 0, room)
  return jnp.sign(delta) * kept.reshape(delta.shape).astype(delta.dtype)
