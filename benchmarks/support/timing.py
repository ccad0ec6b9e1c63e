"""Times two sides in turn, so that other work on the machine affects both."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

_BURST = 0.2


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
  """Returns the median and half the interquartile range."""
  if len(values) < 2:
    return values[0], 0.0
  low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
  return middle, (high - low) / 2


def run_in_turn(
  sides: Sequence[Callable[[], Any]],
  *,
  repeats: int,
  clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
  """Times each side `repeats` times, alternating between them.

  A call shorter than `_BURST` seconds is repeated in a burst after one that is
  not timed: the other side's threads may still spin and take a core.

  Args:
    sides: Functions that return when their work is done; each has run before.
    repeats: Number of timed runs.
    clock: Function that returns seconds; `time.process_time` for CPU time.

  Returns:
    Seconds per call, one list per side.
  """
  times: list[list[float]] = [[] for _ in sides]
  for _ in range(repeats):
    for side, seconds in zip(sides, times, strict=True):
      began = clock()
      side()
      one = clock() - began
      if one < _BURST:
        count = math.ceil(_BURST / one)
        began = clock()
        for _ in range(count):
          side()
        one = (clock() - began) / count
      seconds.append(one)
  return times


def summary(times: Sequence[Sequence[float]]) -> dict[str, Any]:
  """Summarises times by medians and spreads.

  Args:
    times: Result of `run_in_turn`: ours and, where there is one, the peer's.

  Returns:
    "seconds", "spread"; with a peer "peer_seconds", "peer_spread", and "ratio",
    "ratio_spread": peer / ours, computed pair by pair.
  """
  found = dict(
    zip(("seconds", "spread"), median_and_spread(times[0]), strict=True)
  )
  if len(times) > 1:
    pairs = [peer / ours for ours, peer in zip(*times, strict=True)]
    found["peer_seconds"], found["peer_spread"] = median_and_spread(times[1])
    found["ratio"], found["ratio_spread"] = median_and_spread(pairs)
  return found


def line(row: dict[str, Any]) -> str:
  """Formats one measurement as a line."""
  if "seconds" not in row:
    return f"{row['name']}: compiled in {row['seconds_compiling']:.1f} s"
  text = f"{row['name']}: {1e3 * row['seconds']:.1f} ms"
  if "ratio" in row:
    text += (
      f", peer {1e3 * row['peer_seconds']:.1f} ms, peer / ours"
      f" {row['ratio']:.2f} +- {row['ratio_spread']:.2f}"
    )
  return text
