"""Square Attack (Andriushchenko et al., 2020), which needs logits alone.

A random search: each query changes a square window of the best point so far and
is kept if it lowers the margin. The windows shrink on a fixed schedule.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atat_jax import losses
from atat_jax.attacks import base, nonfinite, search
from atat_jax.attacks.search import Problem, SearchSettings
from atat_jax.attacks.simplex import project_l1
from atat_jax.typing import Array, Classifier, Scalar

# The share of the image that a window covers is halved after these queries.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

# The l1 version projects onto a slightly smaller ball, so that rounding does
# not leave the ball of radius epsilon.
_L1_SHRINK = 1 - 1e-6

_TINY = 1e-12


class SquareState(NamedTuple):
  """State of runs, one row each.

  Attributes:
    adversarial: Best point so far; before step 0 the initial one.
    margin: z_y - max_{i != y} z_i at that point, [B].
    fooled: bool [B]: whether the margin is not positive.
    bad_points: int32 [B]: evaluations whose logits were not finite.
    bad_gradients: 0, as no gradient is computed.
  """

  adversarial: Array
  margin: Array
  fooled: Array
  bad_points: Array | int = 0
  bad_gradients: Array | int = 0


class Draws(NamedTuple):
  """Random choices of one query.

  Attributes:
    rows: int32 [B, N]: first row of each window; N is 1 for linf, else 2.
    columns: int32 [B, N]: first column of each window.
    signs: int32 [B, C], -1 or 1.
    transposed: bool [B]: whether the stamp is transposed (unused for linf).
  """

  rows: Array
  columns: Array
  signs: Array
  transposed: Array


class _Stamp(NamedTuple):
  """Two pyramids of opposite sign, one above the other, that fill a window.

  A pyramid falls with the larger of the distances to its peak along the two
  axes, so it is the minimum of a function of the row and one of the column, and
  a stamp is weight[row] * min(height[row], width[column]).
  """

  weight: np.ndarray
  height: np.ndarray
  width: np.ndarray

  def pixels(self) -> np.ndarray:
    return self.weight[:, None] * np.minimum.outer(self.height, self.width)


def _make_stamp(side: int, norm: str) -> _Stamp:
  """Builds a stamp of norm 1 for a window of `side` pixels."""
  order = 2 if norm == "l2" else 1
  # Layer k covers the pixels at a distance < k from the peak.
  layers = np.arange(1, side // 2 + 2, dtype=float)
  falling = np.cumsum(layers[::-1] ** (-2 * (3 - order)))[::-1]
  positions = np.arange(side)
  half = side // 2
  upper = positions < half
  peak = np.where(upper, half // 2, half + (side - half) // 2)
  stamp = _Stamp(
    weight=np.where(upper, 1.0, -1.0),
    height=falling[np.abs(positions - peak)],
    width=falling[np.abs(positions - half)],
  )
  # Both halves weigh the same.
  for part in (upper, ~upper):
    length = np.linalg.norm(stamp.pixels()[part].ravel(), order)
    stamp.weight[part] /= max(length, _TINY)
  length = np.linalg.norm(stamp.pixels().ravel(), order)
  return stamp._replace(weight=stamp.weight / length)


def schedule(
  shape: tuple[int, ...], norm: str, p_init: float = 0.8
) -> list[int]:
  """Lists the sides of the windows, level by level.

  Args:
    shape: Height and width of the images.
    norm: "linf", "l2" or "l1".
    p_init: Share of the image that the first windows cover.

  Returns:
    The sides in the order in which they are used.
  """
  sides = []
  for halvings in range(len(_HALVED_AFTER) + 1):
    side = round(math.sqrt(p_init / 2**halvings * math.prod(shape)))
    side = max(side, 1) if norm == "linf" else max(side, 3) // 2 * 2 + 1
    sides.append(min(side, *shape))
  return sides


def level(i: Array) -> Array:
  """Computes the level of the schedule after i steps.

  Args:
    i: Steps made, int32 [B]; step 0 evaluates the initial point, step 1 is
      query 0.

  Returns:
    Levels, int32 [B].
  """
  return ((i - 1)[:, None] > np.array(_HALVED_AFTER)).sum(-1, dtype=jnp.int32)


@functools.cache
def _stamps(shape: tuple[int, ...], norm: str, p_init: float) -> np.ndarray:
  """Tabulates the parts of each level's stamp, padded by 0: [3, levels, W]."""
  sides = schedule(shape, norm, p_init)
  table = np.zeros((3, len(sides), max(sides)))
  for row, side in enumerate(sides):
    table[:, row, :side] = _make_stamp(side, norm)
  return table


def _wide(images: Array) -> jnp.dtype:
  """Returns the dtype in which norms are computed."""
  return jnp.promote_types(images.dtype, jnp.float32)


def _signs(bits: Array) -> Array:
  return jnp.where(bits >> 31, 1, -1)


def _bits(key: Array, i: Array | int, shape: tuple[int, ...]) -> Array:
  return jax.random.bits(jax.random.fold_in(key, i), shape, jnp.uint32)


def _rows(height: int) -> np.ndarray:
  return np.arange(height, dtype=np.int32)


def _columns(width: int, channels: int) -> np.ndarray:
  """Column of each entry in a row of W * C numbers.

  A row is one vector because on CPU an axis of three channels would be slow.
  """
  return np.repeat(np.arange(width, dtype=np.int32), channels)


def _within(first: Array, side: Array, places: np.ndarray) -> Array:
  """Marks the rows, or columns, that a window covers: bool [B, places]."""
  last = first + side
  return (first[:, None] <= places) & (last[:, None] > places)


@dataclasses.dataclass(frozen=True)
class Square:
  """Square Attack as a `search.Search`.

  Step 0 evaluates the initial point, each later step is one query. The original
  shares the place of a window and its signs among all images of a batch; here
  each row draws its own, which is equivalent for a single image and makes its
  result independent of its neighbours.

  Attributes:
    norm: "linf", "l2" or "l1".
    p_init: Share of the image that the first windows cover.
  """

  norm: str = "linf"
  p_init: float = 0.8

  def num_evaluations(self, num_steps: int) -> int:
    """Number of queries, and one for the initial point."""
    return num_steps + 1

  def start(self, problem: Problem, settings: SearchSettings) -> SquareState:
    """Starts with vertical stripes (linf) or a grid of stamps (l2, l1)."""
    images = problem.images
    draw = self._stripes if self.norm == "linf" else self._tiles
    draw = functools.partial(draw, shape=images.shape[1:])
    delta = jax.vmap(draw)(problem.keys).astype(_wide(images))
    if self.norm == "linf":
      x = jnp.clip(images + settings.epsilon * delta, 0, 1)
    else:
      x = self._into(delta, images, settings.epsilon)
    margin = jnp.full(images.shape[0], jnp.inf, _wide(images))
    none = nonfinite.zeros(margin.shape)
    fooled = jnp.zeros_like(margin, bool)
    return SquareState(x.astype(images.dtype), margin, fooled, *none)

  def step(
    self,
    classifier: Classifier,
    key: Array,
    problem: Problem,
    settings: SearchSettings,
    state: SquareState,
    i: Array,
  ) -> SquareState:
    """Makes one query, kept if the margin falls or is not positive."""
    images = problem.images
    draws = self.draw(problem.keys, i, images)
    x = self.propose(draws, state.adversarial, images, settings.epsilon, i)
    initial = i == 0
    x = search.select(initial, state.adversarial, x)
    logits = base.apply(classifier, key, x)
    margin = -losses.margin(logits, problem.labels).astype(state.margin.dtype)
    usable = nonfinite.usable(logits, margin)
    margin = jnp.where(usable, margin, jnp.inf)
    kept = initial | (margin < state.margin) | (margin <= 0)
    margin = jnp.where(kept, margin, state.margin)
    x = search.select(kept, x, state.adversarial)
    bad = state.bad_points + nonfinite.count(usable).points
    return SquareState(x, margin, margin <= 0, bad, state.bad_gradients)

  def _sides(self, i: Array, images: Array) -> Array:
    sides = schedule(images.shape[1:3], self.norm, self.p_init)
    return jnp.asarray(sides, jnp.int32)[level(i)]

  def draw(self, keys: Array, i: Array, images: Array) -> Draws:
    """Draws the random choices of a query.

    Args:
      keys: Random keys [B], one per run.
      i: Steps made, int32 [B].
      images: [B, H, W, C], for their shape.

    Returns:
      The draws.
    """
    _, height, width, channels = images.shape
    windows = 1 if self.norm == "linf" else 2
    number = 2 * windows + channels + (self.norm != "linf")
    bits = jax.vmap(functools.partial(_bits, shape=(number,)))(keys, i)
    # Uniform on 0 .. size - side - 1: never the last place, as in the original.
    # 24 bits are exact in float32, so the product stays below size - side.
    share = (bits[:, : 2 * windows] >> 8).astype(jnp.float32) * 2.0**-24
    side = self._sides(i, images)[:, None]
    return Draws(
      rows=(share[:, :windows] * (height - side)).astype(jnp.int32),
      columns=(share[:, windows:] * (width - side)).astype(jnp.int32),
      signs=_signs(bits[:, 2 * windows : 2 * windows + channels]),
      transposed=_signs(bits[:, -1]) > 0,
    )

  def propose(
    self, draws: Draws, x: Array, images: Array, epsilon: Scalar, i: Array
  ) -> Array:
    """Computes the point of a query.

    Args:
      draws: Random choices of the query.
      x: Best point so far, [B, H, W, C].
      images: Clean images.
      epsilon: Radius.
      i: Steps made, int32 [B].

    Returns:
      Points in the ball and in [0, 1], [B, H, W, C].
    """
    if self.norm != "linf":
      # The first step has nothing to transfer. The branch is also a barrier,
      # without which XLA on CPU recomputes the transfer at every use of it.
      delta = (x - images).astype(_wide(images))
      delta = lax.cond(
        (i > 0).any(),
        lambda: self._transfer(draws, delta, epsilon, i),
        lambda: delta,
      )
      return self._into(delta, images, epsilon).astype(x.dtype)
    # The window goes to one end of the ball, by one sign for each channel.
    _, height, width, channels = images.shape
    side = self._sides(i, images)
    rows = _within(draws.rows[:, 0], side, _rows(height))
    columns = _within(draws.columns[:, 0], side, _columns(width, channels))
    step = 2 * epsilon * jnp.tile(draws.signs, width)
    delta = jnp.where(
      rows[:, :, None] & columns[:, None], step[:, None], 0
    ).reshape(x.shape)
    low = jnp.maximum(images - epsilon, 0)
    return jnp.clip(x + delta, low, jnp.minimum(images + epsilon, 1))

  def _transfer(
    self, draws: Draws, delta: Array, epsilon: Scalar, i: Array
  ) -> Array:
    """Moves the norm of two windows into the first and adds a stamp there."""
    batch, height, width, channels = delta.shape
    flat = delta.reshape(batch, height, -1)
    l2 = self.norm == "l2"
    # One-hot channel of each number in a row of the image.
    channel = jnp.tile(jnp.eye(channels, dtype=delta.dtype), width)
    side = self._sides(i, delta)

    def spread(values: Array) -> Array:
      """Repeats [B, C] along a row: [B, 1, W * C]."""
      return jnp.dot(values, channel, precision="highest")[:, None]

    def total(part: Array) -> Array:
      """Sums each channel of [B, H, W * C]: [B, C]."""
      part = jnp.square(part) if l2 else jnp.abs(part)
      return jnp.dot(part.sum(1), channel.T, precision="highest")

    def root(totals: Array) -> Array:
      return jnp.sqrt(totals) if l2 else totals

    def window(n: int) -> Array:
      rows = _within(draws.rows[:, n], side, _rows(height))
      columns = _within(draws.columns[:, n], side, _columns(width, channels))
      return rows[:, :, None] & columns[:, None]

    first, second = window(0), window(1)
    held = root(total(jnp.where(first, flat, 0)))
    held_by_both = total(jnp.where(first | second, flat, 0))
    used = root(total(flat).sum(1, keepdims=True))

    stamp = self._place_stamp(draws, delta, i)
    added = stamp * spread(draws.signs.astype(flat.dtype)) + flat * spread(
      1 / (_TINY + held)
    )
    added = jnp.where(first, added, 0)
    if l2:
      free = jnp.maximum(epsilon**2 - used**2, 0) / channels
      wanted = jnp.sqrt(free + held_by_both)
    else:
      free = jnp.maximum(epsilon - used, 0) / channels
      wanted = (free + held_by_both) * channels
    added = added * spread(wanted / (_TINY + root(total(added))))
    moved = jnp.where(first, added, jnp.where(second, 0, flat))
    return moved.reshape(delta.shape)

  def _place_stamp(self, draws: Draws, images: Array, i: Array) -> Array:
    """Places the stamp in the first window; elsewhere values are undefined."""
    _, height, width, channels = images.shape
    table = _stamps((height, width), self.norm, self.p_init)
    parts = jnp.asarray(table, images.dtype)

    def along(first: Array, places: np.ndarray) -> Array:
      place = places - first[:, None]
      return parts[:, level(i)[:, None], place]

    weight, up, across = along(draws.rows[:, 0], _rows(height))
    weight_t, up_t, across_t = along(
      draws.columns[:, 0], _columns(width, channels)
    )
    turned = draws.transposed[:, None]
    by_row = jnp.where(turned, across, up)[:, :, None]
    by_column = jnp.where(turned, up_t, across_t)[:, None]
    weight_row = jnp.where(turned, 1, weight)[:, :, None]
    weight_column = jnp.where(turned, weight_t, 1)[:, None]
    return weight_row * weight_column * jnp.minimum(by_row, by_column)

  def _into(self, delta: Array, images: Array, epsilon: Scalar) -> Array:
    """Projects onto the l2 sphere or into the l1 ball, and into the box."""
    if self.norm == "l1":
      return images + project_l1(delta, images, epsilon * _L1_SHRINK)
    flat = delta.reshape(len(delta), -1)
    length = jnp.sqrt(jnp.square(flat).sum(1)).reshape(-1, 1, 1, 1)
    return jnp.clip(images + delta / (length + _TINY) * epsilon, 0, 1)

  def _stripes(self, key: Array, shape: tuple[int, ...]) -> Array:
    """Draws a sign for each column and channel, [1, W, C]."""
    return _signs(_bits(key, 0, (1, *shape[1:])))

  def _tiles(self, key: Array, shape: tuple[int, ...]) -> Array:
    """Draws a grid of 5 x 5 stamps, transposed and signed at random: [H, W, C].

    If 5 does not divide the size, some pixels at the border stay 0.
    """
    height, width, channels = shape
    side = min(max(height // 5, 1), width)
    margin = max((height - 5 * side) // 2, 0)
    pixels = _make_stamp(side, self.norm).pixels()

    def along(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
      place = np.arange(size) - min(margin, size - side)
      tile = place // side
      covered = (place >= 0) & (tile < size // side)
      return covered, np.where(covered, tile, 0), place % side

    covered, tile, place = along(height)
    covered_2, tile_2, place_2 = along(width)
    covered = covered[:, None] & covered_2
    upright = np.where(covered, pixels[place][:, place_2], 0)[..., None]
    turned = np.where(covered, pixels.T[place][:, place_2], 0)[..., None]
    tiles = (height // side, width // side, channels + 1)
    random = _signs(_bits(key, 0, tiles)[tile][:, tile_2])
    stamps = jnp.where(random[..., -1:] > 0, turned, upright)
    return stamps * random[..., :-1]


def square(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  epsilon: float,
  num_queries: int = 5000,
  norm: str = "linf",
  num_restarts: int = 1,
) -> Array:
  """Square Attack (Andriushchenko et al., 2020): random search, no gradients.

  Args:
    key: Random key.
    classifier: Callable from images to logits; see `pgd`.
    images: Float [B, H, W, C] in [0, 1].
    labels: True classes, integers [B].
    epsilon: Radius of the ball, in the unit of the pixels.
    num_queries: Number of queries of a run, the initial point not counted.
    norm: "linf", "l2" or "l1".
    num_restarts: Number of runs.

  Returns:
    [B, H, W, C] in the ball and in [0, 1]: the first misclassified point found
    (the clean image, if it is one), else the point of the lowest margin.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  base.check_norm(norm, epsilon)
  classifier, images, labels, num_classes = base.check_arguments(
    classifier,
    images,
    labels,
    num_queries=num_queries,
    num_restarts=num_restarts,
  )
  base.check_loss("margin", num_classes)
  return search.run(
    key,
    classifier,
    images,
    labels,
    search=Square(norm),
    epsilon=epsilon,
    num_steps=num_queries,
    num_restarts=num_restarts,
    loss="margin",
  )
