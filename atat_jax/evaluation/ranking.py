"""Area under the ROC curve: whether a score tells two groups apart."""

import numpy as np
from scipy import stats

from atat_jax import checks
from atat_jax.errors import UserError


def auc(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
  """Returns the area under the ROC curve and its standard error.

  The area is the probability that a positive example scores higher than a
  negative one, ties counting one half. The error is that of DeLong et al.
  (1988), S10 / m + S01 / n, which assumes no distribution: the variances of
  each example's share of won comparisons, here from mid-ranks (Sun and Xu,
  2014).

  Args:
    scores: [n].
    positive: bool [n].

  Returns:
    Area and error, float64. Both are NaN where one of the groups is empty: then
    there is nothing to tell apart. The error is NaN where one has a single
    example, whose variance is unknown. It is 0, which is not to be
    trusted, where all examples of a group win alike, as in perfect separation;
    `intervals.area` makes an interval that holds there.

  Raises:
    UserError: Scores that are not numbers, or of another shape.
  """
  scores = np.asarray(checks.array(scores, "scores"), np.float64)
  positive = np.asarray(checks.array(positive, "positive"), bool)
  if scores.ndim != 1 or positive.shape != scores.shape:
    raise UserError(
      f"positive: shape {positive.shape} for scores of shape {scores.shape};"
      " allowed: [n] both"
    )
  if np.isnan(scores).any():
    raise UserError(
      f"scores: {int(np.isnan(scores).sum())} of {len(scores)} are not numbers;"
      " allowed: numbers, which have an order"
    )
  m, n = int(positive.sum()), int((~positive).sum())
  if not m or not n:
    return float("nan"), float("nan")
  ranks = stats.rankdata(scores)
  # A rank among all minus the rank within its group counts the other group's
  # examples below.
  won = (ranks[positive] - stats.rankdata(scores[positive])) / n
  lost = 1 - (ranks[~positive] - stats.rankdata(scores[~positive])) / m
  area = float(won.mean())
  if min(m, n) < 2:
    return area, float("nan")
  variance = won.var(ddof=1) / m + lost.var(ddof=1) / n
  return area, float(np.sqrt(variance))
