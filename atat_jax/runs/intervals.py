"""Confidence intervals of accuracies and of means."""

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence level of every interval."""


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
  """Returns a mean and its 95 % interval by the normal approximation.

  Args:
    values: Float [..., n, ...], independent along `axis`.
    axis: Axis of the examples.

  Returns:
    Mean [...] and interval [..., 2]; the interval of one value is NaN.
  """
  values = np.asarray(values, np.float64)
  count = values.shape[axis]
  center = values.mean(axis)
  deviation = (
    values.std(axis, ddof=1) if count > 1 else np.full_like(center, np.nan)
  )
  half = stats.norm.ppf((1 + LEVEL) / 2) * deviation / np.sqrt(count)
  return center, np.stack([center - half, center + half], -1)
