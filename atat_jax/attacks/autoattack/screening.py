"""Screening: AutoAttack on a cheaper network, confirmed by the network itself.

The attacks first run on a screening network, for instance the same one in
bfloat16. Nothing that it says is counted: every image that fools it, and every
image that a run ends with, is scored by the network itself, and counts only if
it fools that. Then the network itself is attacked, by the whole ensemble and
with the same random numbers, at the images where the screening network is no
good stand-in: where it was fooled by an image that does not fool the network,
and where an attack came so near the boundary that the difference of the two
networks could decide. These images get exactly the verdicts of an evaluation
without screening.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from atat_jax import checks, models
from atat_jax.attacks import base, diagnostics
from atat_jax.attacks.autoattack.slots import Job
from atat_jax.attacks.diagnostics import Diagnostic
from atat_jax.errors import UserError, shown
from atat_jax.runs import wording
from atat_jax.typing import Classifier

SCREENINGS = ("bfloat16",)
"""Screening networks by name: the network itself in another dtype."""

_SUFFIX = "-screening"
_MOST = 0.25


def pair(
  classifier: Classifier, screening: Classifier | str | None
) -> tuple[Classifier, Classifier | None, str]:
  """Returns the classifier that judges and the one that is attacked first.

  Args:
    classifier: Callable from images to logits; of `models.classifier` where
      `screening` is a name.
    screening: One of `SCREENINGS`, whose judge is the network in float32, a
      classifier, or None.

  Returns:
    The classifier that judges, the screening one or None, and its name in
    protocols.

  Raises:
    UserError: An unknown name, a network without a dtype, or randomness.
  """
  if screening is None:
    return classifier, None, ""
  for one in (classifier, screening):
    if isinstance(one, base.Randomized):
      raise UserError(
        "screening: with a Randomized classifier; allowed: classifiers that"
        " give the same answer every time"
      )
  if isinstance(screening, str):
    checks.choice("screening", screening, SCREENINGS)
    judge = models.with_dtype(classifier, jnp.float32)
    return judge, models.with_dtype(classifier, screening), screening
  if not callable(screening):
    raise UserError(
      f"screening: {shown(screening)}; allowed: {', '.join(SCREENINGS)}, a"
      " classifier, or None"
    )
  return classifier, screening, "another classifier"


def jobs(plain: Sequence[Job]) -> tuple[Job, ...]:
  """Returns the jobs on the screening network, and then the plain ones."""
  screened = [
    dataclasses.replace(job, name=job.name + _SUFFIX, screened=True)
    for job in plain
  ]
  return *screened, *plain


def attack_of(name: str) -> str:
  """Returns the name of a job's attack, the same with and without screening."""
  return name.removesuffix(_SUFFIX)


def merged(accuracies: dict[str, float]) -> dict[str, float]:
  """Joins what an attack found on both networks.

  Args:
    accuracies: "clean" and jobs to the accuracy after them, in order.

  Returns:
    "clean" and attacks to the accuracy after them, as if each attack had run
    on both networks before the next one.
  """
  if not any(name.endswith(_SUFFIX) for name in accuracies):
    return dict(accuracies)
  lowered: dict[str, float] = {}
  previous = accuracies["clean"]
  for name, value in accuracies.items():
    attack = attack_of(name)
    lowered[attack] = lowered.get(attack, 0.0) + previous - value
    previous = value
  found, left = {}, accuracies["clean"]
  for attack, loss in lowered.items():
    left -= loss
    found[attack] = left
  return found


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Computes max_{i != y} z_i - z_y in float64, [N]; NaN if not finite."""
  own = np.arange(logits.shape[-1]) == labels[:, None]
  wide = np.where(np.isfinite(logits).all(-1)[:, None], logits, np.nan)
  wide = wide.astype(np.float64)
  return np.where(own, -np.inf, wide).max(-1) - np.where(own, wide, 0).sum(-1)


def tolerance(
  logits: np.ndarray, screened: np.ndarray, labels: np.ndarray
) -> float:
  """Measures how far the margins of the two networks can be apart.

  Args:
    logits: Logits of the network itself, [N, K].
    screened: Logits of the screening network on the same images, [N, K].
    labels: True classes, [N].

  Returns:
    The largest difference of the margins on any image; 0 if none is finite.
  """
  apart = np.abs(margins(logits, labels) - margins(screened, labels))
  return float(apart[np.isfinite(apart)].max(initial=0.0))


class Confirmation:
  """Scores the images with which runs on the screening network have ended.

  Args:
    predict: Images [B, H, W, C] to logits [B, K] of the network itself.
    labels: True classes of all examples, int32 [N].
    tolerance: Margin below 0 at which an image is near the boundary.
    batch_size: Number of images that are scored together.
    on_fooled: Function of examples and of images that fool the network.
    on_near: Function of examples that the network itself must be attacked at.
  """

  def __init__(
    self,
    predict: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    *,
    tolerance: float,
    batch_size: int,
    on_fooled: Callable[[np.ndarray, np.ndarray], None],
    on_near: Callable[[np.ndarray], None],
  ):
    self._predict, self._labels = predict, labels
    self._tolerance, self._batch_size = tolerance, batch_size
    self._on_fooled, self._on_near = on_fooled, on_near
    self._examples: list[np.ndarray] = []
    self._images: list[np.ndarray] = []

  def add(self, examples: np.ndarray, images: np.ndarray) -> None:
    """Takes images in; scores them once there are enough for a batch."""
    self._examples.append(examples.copy())
    self._images.append(images)
    if sum(map(len, self._examples)) >= self._batch_size:
      self.flush()

  def flush(self) -> None:
    """Scores all images that were taken in and not scored."""
    if not self._examples:
      return
    examples = np.concatenate(self._examples)
    images = np.concatenate(self._images)
    self._examples, self._images = [], []
    labels = self._labels[examples]
    logits = self._predict(images)
    finite = np.isfinite(logits).all(-1)
    fooled = finite & (logits.argmax(-1) != labels)
    far = margins(logits, labels) < -self._tolerance  # False for NaN
    self._on_near(np.setdiff1d(examples[~fooled & ~far], examples[fooled]))
    rows = np.flatnonzero(fooled)
    if len(rows):
      # Several runs may have fooled the network at the same example.
      _, first = np.unique(examples[rows], return_index=True)
      self._on_fooled(examples[rows[first]], images[rows[first]])


def diagnose(
  near: np.ndarray, correct: np.ndarray, tolerance: float, name: str
) -> Diagnostic:
  """Says how many images the network itself was attacked at.

  Args:
    near: Whether it was, bool [N].
    correct: Whether an image is classified correctly without an attack, [N].
    tolerance: Margin below which it was not.
    name: Screening network in words.

  Returns:
    The diagnostic, with the share of the correctly classified images.
  """
  count, total = int((near & correct).sum()), int(correct.sum())
  share = count / max(total, 1)
  counted = f"{count} of {wording.plural(total, 'image')}"
  return diagnostics.diagnostic(
    share > _MOST,
    flagged=(
      "Screening decides little",
      f"The network itself had to be attacked at {counted}: the screening"
      f" network ({name}) is no good stand-in and saves little.",
    ),
    passed=(
      "Screening is confirmed",
      f"The network itself was attacked at {counted}; elsewhere no attack on the"
      f" screening network ({name}) came near the boundary.",
    ),
    rule="share of the correctly classified images at which an image fooled the"
    " screening network alone, or a run ended at a margin above"
    f" {-tolerance:.3g} (the networks' largest difference on clean images);"
    f" flag above {_MOST}",
    value=share,
  )
