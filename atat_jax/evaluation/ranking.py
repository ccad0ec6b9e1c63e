"""Does a score tell two groups apart? Area under the ROC curve, with its error."""

import numpy as np


def auc(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
  """The area under the ROC curve and its standard error (DeLong et al., 1988).

  The area is the probability that a positive example scores higher than a
  negative one, ties counting one half. The error is that of a sample of both
  groups, without assuming a distribution: DeLong's, from the variances of each
  example's share of won comparisons, S10 / m + S01 / n.

  Args:
    scores: [n].
    positive: bool [n].

  Returns:
    Area and error, float64. Both are NaN where one of the groups is empty: then
    there is nothing to tell apart. The error is NaN where one has a single
    example, whose variance is unknown.
  """
  scores = np.asarray(scores, np.float64)
  positive = np.asarray(positive, bool)
  above, below = scores[positive], scores[~positive]
  if not len(above) or not len(below):
    return float("nan"), float("nan")
  won = _share_below(above, below)  # V10
  lost = 1 - _share_below(below, above)  # V01
  area = float(won.mean())
  if min(len(above), len(below)) < 2:
    return area, float("nan")
  variance = won.var(ddof=1) / len(won) + lost.var(ddof=1) / len(lost)
  return area, float(np.sqrt(variance))


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Of each value: the share of the others below it, ties counting one half."""
  ordered = np.sort(others)
  low = np.searchsorted(ordered, values, side="left")
  high = np.searchsorted(ordered, values, side="right")
  return (low + high) / (2 * len(others))
