"""Confidence intervals of accuracies, of means and of areas under ROC curves.

None is of width zero: where a sample shows no spread at all, its standard error
is 0, which is no knowledge but the lack of it.
"""

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
"""Confidence level of every interval."""

_Z = stats.norm.ppf((1 + LEVEL) / 2)
_NO_SPREAD = 1e-12
"""Standard error that is 0 but for rounding."""


def proportion(share: float, count: int) -> tuple[float, float]:
  """Returns Wilson's 95 % interval of a proportion, valid at 0 and 1 too.

  Args:
    share: Observed share of successes, in [0, 1].
    count: Number of trials, at least 1.

  Returns:
    Lower and upper end, in [0, 1].
  """
  interval = stats.binomtest(round(share * count), count).proportion_ci(
    LEVEL, method="wilson"
  )
  return float(interval.low), float(interval.high)


def mean(values: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
  """Returns a mean and its 95 % interval by Student's t.

  Args:
    values: Float [..., n, ...], independent along `axis`.
    axis: Axis of the examples.

  Returns:
    Mean [...] and interval [..., 2]. The interval of one value, and of values
    that are all equal, is NaN: their spread is unknown.
  """
  values = np.asarray(values, np.float64)
  count = values.shape[axis]
  center = values.mean(axis)
  half = np.full_like(center, np.nan)
  if count > 1:
    error = values.std(axis, ddof=1) / np.sqrt(count)
    factor = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    equal = values.max(axis) == values.min(axis)
    half = np.where(equal, np.nan, factor * error)
  return center, np.stack([center - half, center + half], -1)


def area(
  share: float, error: float, positives: int, negatives: int
) -> tuple[float, float]:
  """Returns a 95 % interval of an area under the ROC curve, valid at 0 and 1.

  The interval from DeLong's standard error holds for scores of any kind, but is
  far too short near 0 and 1 and in small groups. That of Newcombe (2006, method
  5) inverts a test with the variance of Hanley and McNeil (1982), which depends
  on the area alone and holds there, for scores of the usual kind. The interval
  reaches from the lower of their lower ends to the higher of their upper ends.

  Where each example wins as many comparisons as any other of its group, as in
  perfect separation, DeLong's error is 0 and says nothing. The variance is then
  bounded by A (1 - A) / min(m, n), which holds for all scores (Birnbaum and
  Klose, 1957): the interval is Wilson's for min(m, n) trials.

  Args:
    share: Area A, in [0, 1].
    error: DeLong's standard error of it (`evaluation.ranking.auc`).
    positives: Number of positive examples, m.
    negatives: Number of negative examples, n.

  Returns:
    Lower and upper end, in [0, 1]; NaN where area or error is.
  """
  if np.isnan(share) or np.isnan(error):
    return float("nan"), float("nan")
  if error <= _NO_SPREAD:
    return _wilson(share, min(positives, negatives))
  size = (positives, negatives)
  # An area and 1 less it have one variance, with the groups exchanged.
  low, high = _newcombe(share, *size), 1 - _newcombe(1 - share, *size)
  return (
    max(0.0, min(low, share - _Z * error)),
    min(1.0, max(high, share + _Z * error)),
  )


def _wilson(share: float, count: int) -> tuple[float, float]:
  """Wilson's interval of a share that need not be a multiple of 1 / count."""
  middle = share + _Z**2 / (2 * count)
  half = _Z * np.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2)
  scale = 1 + _Z**2 / count
  # At 0 and 1, where an end is the share itself, rounding would miss it.
  low, high = (middle - half) / scale, (middle + half) / scale
  return float(max(0.0, min(low, share))), float(min(1.0, max(high, share)))


def _newcombe(share: float, positives: int, negatives: int) -> float:
  """Lower end by Newcombe's method 5."""
  extra = (positives + negatives) / 2 - 1

  def excess(area: float) -> float:
    variance = area * (1 - area) / (positives * negatives)
    variance *= 1 + extra * ((1 - area) / (2 - area) + area / (1 + area))
    return float((share - area) ** 2 - _Z**2 * variance)

  if share <= 0:
    return 0.0
  # At an area of 1 the difference and the variance are both 0.
  return float(optimize.brentq(excess, 0.0, min(share, 1 - 1e-9)))
