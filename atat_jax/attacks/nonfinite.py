"""One rule for numbers that are not finite, in all attacks.

Logits that are not all finite are no prediction: such a point is neither
correct nor fooled. Its loss counts as minus infinity, so that it is never kept
where a finite one is at hand, and an entry of a gradient that is not finite
counts as 0, so that images stay finite and in ball and box. Nothing of this is
silent: an attack counts the evaluations, and tells them by a
`NonFiniteWarning`, or to the nearest `collect`. Attacks inside jit or vmap,
whose counts are not known while they are called, are silent; what classifies
their images sees the logits.
"""

import contextlib
import contextvars
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax.errors import NonFiniteWarning
from atat_jax.runs import wording
from atat_jax.typing import Array

_PACKAGE = __name__.partition(".")[0]


class Counts(NamedTuple):
  """Numbers of evaluations, an example at a step each, that were not finite.

  Attributes:
    points: Evaluations whose logits or loss are not finite, int32.
    gradients: Evaluations with finite logits and loss whose gradient has
      entries that are not finite, int32.
  """

  points: Array
  gradients: Array


def zeros(shape: tuple[int, ...] = ()) -> Counts:
  """Returns counts of 0.

  Args:
    shape: Shape of each count.

  Returns:
    The counts.
  """
  return Counts(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))


def add(first: Counts, second: Counts) -> Counts:
  """Adds counts.

  Args:
    first: Counts of any shape.
    second: Counts of the same shape.

  Returns:
    The sums.
  """
  return Counts(*(a + b for a, b in zip(first, second, strict=True)))


def total(counts: Counts) -> Counts:
  """Sums the counts of all examples.

  Args:
    counts: Counts [B].

  Returns:
    The sums, scalars.
  """
  return Counts(*(x.sum(dtype=jnp.int32) for x in counts))


def usable(logits: Array, loss: Array | None = None) -> Array:
  """Marks the examples whose logits, and loss, are all finite.

  Args:
    logits: [B, K].
    loss: [B].

  Returns:
    bool [B].
  """
  finite = jnp.isfinite(logits).all(-1)
  return finite if loss is None else finite & jnp.isfinite(loss)


def misses(logits: Array, labels: Array) -> Array:
  """Marks the examples that are classified, and not as their label.

  Args:
    logits: [B, K].
    labels: int32 [B].

  Returns:
    bool [B]; False where logits are not finite.
  """
  return (logits.argmax(-1) != labels) & usable(logits)


def clean(gradient: Array) -> Array:
  """Puts 0 in the place of entries that are not finite."""
  return jnp.where(jnp.isfinite(gradient), gradient, 0)


def count(usable: Array, gradient: Array | None = None) -> Counts:
  """Counts one evaluation of each example.

  Args:
    usable: Examples whose logits and loss are finite, bool [B].
    gradient: Gradient before `clean`, [B, ...]; None: not computed.

  Returns:
    Counts of 0 or 1, int32 [B].
  """
  points = (~usable).astype(jnp.int32)
  if gradient is None:
    return Counts(points, jnp.zeros_like(points))
  finite = jnp.isfinite(gradient).reshape(len(gradient), -1).all(-1)
  return Counts(points, (usable & ~finite).astype(jnp.int32))


class Collected:
  """Counts of the attacks that were called in a `collect` block."""

  def __init__(self) -> None:
    self._pending: list[tuple[Array, Array]] = []
    self._read = np.zeros(2, np.int64)

  def add(self, points: Array | int, gradients: Array | int) -> None:
    """Adds the counts of an attack, which need not be computed yet."""
    self._pending.append((points, gradients))  # type: ignore[arg-type]

  def _total(self) -> np.ndarray:
    pending, self._pending = self._pending, []
    for counts in jax.device_get(pending):
      self._read += np.asarray(counts, np.int64)
    return self._read

  @property
  def points(self) -> int:
    """Number of evaluations whose logits or loss were not finite."""
    return int(self._total()[0])

  @property
  def gradients(self) -> int:
    """Number of evaluations with a gradient that was not finite."""
    return int(self._total()[1])


_collector: contextvars.ContextVar[Collected | None] = contextvars.ContextVar(
  "nonfinite", default=None
)


@contextlib.contextmanager
def collect() -> Iterator[Collected]:
  """Gathers the counts of attacks instead of warning.

  The counts stay on the device until they are read, so that attacks need not
  wait for each other. The innermost block gathers.

  Yields:
    The counts of all attacks called in the block, to be read after it.
  """
  collected = Collected()
  token = _collector.set(collected)
  try:
    yield collected
  finally:
    _collector.reset(token)


def _frames_of_package() -> int:
  """Counts the frames between here and the first one outside the package."""
  frame, number = sys._getframe(1), 0
  while frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
    number += 1
    if frame.f_back is None:
      break
    frame = frame.f_back
  return number


def describe(points: int, gradients: int) -> str:
  """Puts counts into words.

  Args:
    points: Number of evaluations whose logits or loss were not finite.
    gradients: Number of evaluations with a gradient that was not finite.

  Returns:
    Sentences: what was found, and what follows.
  """
  found = []
  if points:
    found.append(
      f"{wording.plural(points, 'evaluation')} gave logits or a loss that are"
      " not finite, which count as neither correct nor fooled"
    )
  if gradients:
    found.append(
      f"{wording.plural(gradients, 'gradient')} had entries that are not"
      " finite, which count as 0"
    )
  return (
    f"{'; '.join(found)}. The attack was blind there, so that the classifier"
    " may be less robust than it seems."
  )


def report(name: str, points: Array | int, gradients: Array | int) -> None:
  """Tells the counts of an attack: to the nearest `collect`, or by a warning.

  Values that are traced (inside jit or vmap) are not told.

  Args:
    name: Name of the attack.
    points: Number of evaluations whose logits or loss were not finite.
    gradients: Number of evaluations with finite logits and loss whose gradient
      had entries that were not finite.
  """
  if any(isinstance(x, jax.core.Tracer) for x in (points, gradients)):
    return
  collected = _collector.get()
  if collected is not None:
    collected.add(points, gradients)
    return
  bad_points, bad_gradients = (int(x) for x in (points, gradients))
  if bad_points or bad_gradients:
    warnings.warn(
      f"{name}: {describe(bad_points, bad_gradients)}",
      NonFiniteWarning,
      stacklevel=_frames_of_package() + 1,
    )
