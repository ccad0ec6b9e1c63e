"""Numbers and protocols in words, the same in every table, page and message."""

import math
from collections.abc import Sequence


def pixels(value: float | None) -> str:
  """Writes a distance, pixels in [0, 1], the usual way.

  Returns:
    Levels of 8-bit images ("8/255") where that is what the number means; a
    decimal for short ones ("0.2") and for all others ("0.0098").
  """
  if value is None:
    return "none"
  levels = 255 * value
  whole = round(levels)
  is_short = math.isclose(value, round(value, 2), abs_tol=1e-9)
  if whole >= 1 and abs(levels - whole) < 0.02 and not is_short:
    return f"{whole}/255"
  return f"{value:.4g}"


def percent(share: float | None, digits: int = 1) -> str:
  """Writes a share in [0, 1] as a percentage: "63.8%"; a dash for None."""
  return "–" if share is None else f"{100 * share:.{digits}f}%"


def plural(number: int, noun: str) -> str:
  """Writes a number with its noun: "1 image", "10,000 queries"."""
  if number != 1:
    noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
  return f"{number:,} {noun}"


def listed(parts: Sequence[str]) -> str:
  """Joins parts of a sentence: "a", "a and b", "a, b and c"."""
  *first, last = parts
  return f"{', '.join(first)} and {last}" if first else last


def duration(seconds: float) -> str:
  """Writes a time: "0.04 s", "2.3 s", "3 min 20 s", "2 h 1 min"."""
  if seconds < 9.95:
    return f"{seconds:.{1 if seconds >= 1 else 2}f} s"
  minutes, rest = divmod(round(seconds), 60)
  if not minutes:
    return f"{rest} s"
  hours, minutes_left = divmod(minutes, 60)
  if not hours:
    return f"{minutes} min {rest} s"
  return f"{hours} h {minutes_left} min"


def attack(
  *,
  norm: str | None = None,
  epsilon: float | None = None,
  step_size: float | None = None,
  num_steps: int | None = None,
  num_restarts: int | None = None,
  loss: str | None = None,
  unit: str = "step",
  options: Sequence[tuple[str, object]] = (),
) -> str:
  """Describes an attack on one line; None where a number does not apply.

  Args:
    norm: "linf", "l2" or "l1".
    epsilon: Radius, pixels in [0, 1].
    step_size: Length of a step, in the same unit.
    num_steps: Number of steps or queries.
    num_restarts: Number of restarts.
    loss: Loss that the attack increases.
    unit: Noun for what `num_steps` counts.
    options: Further numbers, as (name, value).

  Returns:
    For example "linf, epsilon 8/255, 20 steps of 2/255, 1 restart,
    cross_entropy loss".
  """
  parts = []
  if norm is not None:
    parts.append(norm)
  if epsilon is not None:
    parts.append(f"epsilon {pixels(epsilon)}")
  if num_steps is not None:
    size = "" if step_size is None else f" of {pixels(step_size)}"
    parts.append(plural(num_steps, unit) + size)
  if num_restarts is not None:
    parts.append(plural(num_restarts, "restart"))
  if loss is not None:
    parts.append(f"{loss} loss")
  parts += [f"{name} {value}" for name, value in options]
  return ", ".join(parts)
