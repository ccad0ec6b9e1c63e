"""The l1 ball within the box: exact projection, without sorting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax.typing import Array, Scalar

# Newton's method needs five guesses or so. Where it has not ended after ten,
# every other guess halves the bracket; this many end any bracket.
_ENOUGH_NEWTON = 10
_MOST_GUESSES = 300


class _Point(NamedTuple):
  """The l1 norm as a function of alpha, near one alpha; each [B, 1]."""

  alpha: Array
  excess: Array
  """Of the norm there over epsilon."""
  shrinking: Array
  """Entries that still shrink from there on: minus the slope."""


class _Search(NamedTuple):
  """The root lies in [low, high)."""

  guesses: Array
  done: Array
  """bool [B, 1]."""
  last: _Point
  low: _Point
  high: Array


def project_l1(delta: Array, images: Array, epsilon: Scalar) -> Array:
  """The nearest perturbation with l1 norm <= epsilon that stays in [0, 1].

  Every entry keeps its sign and shrinks by the same alpha >= 0, stopping at 0
  and at its room in the box. The l1 norm of what is left is a falling,
  piecewise linear function of alpha, whose root Newton's method finds within a
  bracket. The root is kept as a float and a correction, so that a tiny epsilon
  is met as well as a large one.

  Args:
    delta: [B, H, W, C].
    images: Clean, in [0, 1].
    epsilon: Radius > 0, one for all or [B, 1, 1, 1].

  Returns:
    [B, H, W, C]; a perturbation that is in the ball and in the box already is
    returned as it is.
  """
  dtype = jnp.promote_types(delta.dtype, jnp.float32)
  radius = jnp.asarray(epsilon, dtype).reshape(-1, 1)
  # On CPU a sum over one axis is several times as fast as one over three.
  size = jnp.abs(delta).astype(dtype).reshape(delta.shape[0], -1)
  room = jnp.where(delta > 0, 1 - images, images).astype(dtype)
  room = room.reshape(size.shape)

  def look(alpha: Array) -> _Point:
    left = size - alpha
    kept = jnp.clip(left, 0, room)
    shrinking = (kept == left) & (kept > 0)
    return _Point(
      alpha,
      kept.sum(1, keepdims=True) - radius,
      shrinking.astype(dtype).sum(1, keepdims=True),
    )

  def select(mask: Array, new: _Point, old: _Point) -> _Point:
    return jax.tree.map(lambda a, b: jnp.where(mask, a, b), new, old)

  def goes_on(search: _Search) -> Array:
    return (search.guesses < _MOST_GUESSES) & ~search.done.all()

  def body(search: _Search) -> _Search:
    guesses, done, last, low, high = search
    newton = last.alpha + last.excess / jnp.maximum(last.shrinking, 1)
    halve = (newton <= low.alpha) | (newton >= high) | (last.shrinking == 0)
    halve = halve | ((guesses > _ENOUGH_NEWTON) & (guesses % 2 == 1))
    middle = low.alpha + (high - low.alpha) / 2
    guess = look(jnp.where(halve, middle, newton))
    # Done, too, where no float is left between the ends.
    done = done | (guess.alpha <= low.alpha) | (guess.alpha >= high)
    close = jnp.abs(guess.excess) <= tolerance
    rises = ~done & (close | (guess.excess > 0))
    return _Search(
      guesses + 1,
      done | close,
      guess,
      select(rises, guess, low),
      jnp.where(done | rises, high, guess.alpha),
    )

  tolerance = 8 * jnp.finfo(dtype).eps * radius
  high = size.max(1, keepdims=True)
  low = look(jnp.zeros_like(high))
  inside = low.excess <= 0
  search = _Search(jnp.int32(0), inside, low, low, high)
  low = lax.while_loop(goes_on, body, search).low
  # None where it ended inside.
  correction = jnp.maximum(low.excess, 0) / jnp.maximum(low.shrinking, 1)
  kept = jnp.clip((size - low.alpha) - correction, 0, room)
  return jnp.sign(delta) * kept.reshape(delta.shape).astype(delta.dtype)
