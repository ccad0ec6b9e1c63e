"""Signs, seen from a classifier alone, that an attack's result misleads.

Each diagnostic states the rule by which it judged. The first five are those of
the AutoAttack reference (its `flags_doc.md`), which has none for a classifier
whose prediction for an image depends on the other images of the batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import compilation, losses, rng, sharding
from atat_jax.attacks import base
from atat_jax.data import batches
from atat_jax.runs import wording
from atat_jax.typing import Array, Classifier


class Diagnostic(TypedDict):
  """Result of a check.

  Attributes:
    title: The result in a few words.
    rule: Rule by which the check judges.
    value: Number that it judges.
    flag: Whether the check warns.
    message: The result in a sentence.
  """

  title: str
  rule: str
  value: float
  flag: bool
  message: str


def diagnostic(
  flag: bool,
  *,
  flagged: tuple[str, str],
  passed: tuple[str, str],
  rule: str,
  value: float,
) -> Diagnostic:
  """Builds a diagnostic.

  Args:
    flag: Whether the check warns.
    flagged: Title and message if it does.
    passed: Title and message if it does not.
    rule: Rule by which the check judges.
    value: Number that it judges.

  Returns:
    The diagnostic.
  """
  title, message = flagged if flag else passed
  return Diagnostic(
    title=title,
    rule=rule,
    value=float(value),
    flag=bool(flag),
    message=message,
  )


Predict = Callable[[np.ndarray, int, Array], np.ndarray]
"""Function (images [N, H, W, C], batch size, key) to logits [N, K]."""

_jitted_logits = compilation.jit(base.apply)


class Scorer:
  """Logits of any number of images, in batches of one size: a `Predict`."""

  def __init__(self, classifier: Classifier, mesh: Mesh):
    self._classifier, self._mesh = classifier, mesh

  def __call__(
    self, images: np.ndarray, batch_size: int, key: Array
  ) -> np.ndarray:
    """Maps (images [N, H, W, C], batch size, key) to logits [N, K]."""
    return batches.map_batches(
      functools.partial(
        self._logits, sharding.put_replicated(self._mesh, key), batch_size
      ),
      images,
      batch_size=batch_size,
      mesh=self._mesh,
    )

  def _logits(
    self, key: Array, batch_size: int, number: int, images: Array
  ) -> Array:
    first = number * batch_size
    key = jax.random.fold_in(key, first)
    return _jitted_logits(self._classifier, key, images)


def _shuffled(key: Array, count: int) -> np.ndarray:
  """Draws an order on the host, as jax would compile for every count."""
  return np.random.default_rng(
    np.asarray(jax.random.key_data(key))
  ).permutation(count)


def randomized(
  evaluations: Sequence[np.ndarray], labels: np.ndarray
) -> Diagnostic:
  """Checks whether repeated evaluations of the same images differ.

  Args:
    evaluations: Logits [B, K] of two or more evaluations of the same batch.
    labels: True classes, int32 [B].

  Returns:
    The diagnostic.
  """
  correct = [int((x.argmax(-1) == labels).sum()) for x in evaluations]
  unit = [
    logits / (np.linalg.norm(logits, axis=-1, keepdims=True) + 1e-10)
    for logits in evaluations
  ]
  distance = max(
    float(np.linalg.norm(a - b, axis=-1).max())
    for n, a in enumerate(unit)
    for b in unit[:n]
  )
  return diagnostic(
    len(set(correct)) > 1 or distance > 1e-4,
    flagged=(
      "The classifier is randomised",
      "The classifier is randomised: an attack must average its gradients over"
      " the randomness (autoattack: version='rand').",
    ),
    passed=(
      "The classifier is deterministic",
      "The classifier gives the same answer every time.",
    ),
    rule=f"{len(evaluations)} evaluations of one batch; flag if the number of"
    " correct predictions differs or logits, scaled to length 1, differ by more"
    " than 1e-4",
    value=distance,
  )


def probabilities(logits: np.ndarray) -> Diagnostic:
  """Checks whether the outputs are probabilities rather than logits.

  Args:
    logits: Outputs of the classifier, [B, K].

  Returns:
    The diagnostic.
  """
  off = float(np.abs(logits.sum(-1) - 1.0).max())
  return diagnostic(
    bool(logits.max() < 1 + 1e-5 and logits.min() > -1e-5 and off < 1e-5),
    flagged=(
      "The outputs are probabilities",
      "The outputs are probabilities: a softmax saturates and hides gradients;"
      " return the logits.",
    ),
    passed=("The outputs are logits", "The outputs are logits."),
    rule="flag if all outputs are in [0, 1] and each row sums to 1, to 1e-5;"
    " value: the largest deviation of a sum from 1",
    value=off,
  )


def num_classes(
  num_classes: int, needed: Mapping[str, int], targets: Mapping[str, int]
) -> Diagnostic:
  """Checks whether there are enough classes for the losses and targets.

  Args:
    num_classes: Number of classes, K.
    needed: Attack to the number of classes that its loss needs.
    targets: Attack to the number of classes that it aims at.

  Returns:
    The diagnostic.
  """
  without = [name for name, number in needed.items() if num_classes < number]
  fewer = [name for name, number in targets.items() if number > num_classes - 1]
  text = []
  if without:
    text.append(
      f"{', '.join(without)}: the DLR loss needs more than {num_classes}"
      " classes, the margin takes its place."
    )
  if fewer:
    text.append(
      f"{', '.join(fewer)}: only {num_classes - 1} classes to aim at."
    )
  return diagnostic(
    bool(text),
    flagged=("Too few classes for some attacks", " ".join(text)),
    passed=(
      "Enough classes for every attack",
      f"{num_classes} classes are enough.",
    ),
    rule="DLR needs 3 classes, targeted DLR 4, t targets t + 1 classes",
    value=num_classes,
  )


def _has_no_gradient(
  classifier: Classifier, images: Array, labels: Array
) -> Array:
  _, _, gradient = base.evaluate(
    classifier,
    jax.random.key(0),
    images,
    lambda logits: losses.margin(logits, labels),
  )
  largest = jnp.abs(gradient).max((1, 2, 3))  # NaN if any of them is
  return ~((largest > 0) & jnp.isfinite(largest))


_jitted_has_no_gradient = compilation.jit(_has_no_gradient)


def zero_gradients(
  key: Array,
  classifier: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  radius: float,
) -> Diagnostic:
  """Checks whether the gradient vanishes where gradient attacks start.

  Args:
    key: Random key of the starts.
    classifier: Callable from images to logits.
    images: Clean images [B, H, W, C] in [0, 1].
    labels: True classes, int32 [B].
    radius: Half-width of the box of the starts.

  Returns:
    The diagnostic.
  """
  noise = jax.random.uniform(key, images.shape, images.dtype, -radius, radius)
  start = jnp.clip(images + noise, 0.0, 1.0)
  zero = np.asarray(_jitted_has_no_gradient(classifier, start, labels))
  return diagnostic(
    bool(zero.any()),
    flagged=(
      "Gradients vanish at some images",
      f"{int(zero.sum())} of {len(zero)} images have no gradient: gradient"
      " attacks are blind there and the result cannot be trusted.",
    ),
    passed=("Gradients reach the images", "Gradients reach the images."),
    rule="share of images at whose random start the gradient of the margin is"
    " zero in every pixel, or not finite; flag if there is any",
    value=zero.mean(),
  )


def masking(accuracies: Mapping[str, float]) -> Diagnostic | None:
  """Checks whether Square, which uses no gradient, finds what others missed.

  Args:
    accuracies: Attack to robust accuracy after it, in order.

  Returns:
    The diagnostic; None if Square did not run after another attack.
  """
  before = [value for name, value in accuracies.items() if name != "square"]
  if "square" not in accuracies or len(before) < 2:
    return None
  gain = min(before) - accuracies["square"]
  return diagnostic(
    gain > 0.002 + 1e-9,  # tolerates the rounding of 0.002
    flagged=(
      "Square found what gradients had not",
      f"Square lowers the robust accuracy by another {100 * gain:.2f} points:"
      " gradients are masked.",
    ),
    passed=("Square found nothing more", "Square finds nothing more."),
    rule="robust accuracy before Square minus after it; flag above 0.002: a"
    " black-box attack should find nothing that gradients have not found",
    value=gain,
  )


def batch_dependence(
  key: Array,
  predict: Predict,
  images: np.ndarray,
  logits: np.ndarray,
  *,
  batch_size: int,
) -> Diagnostic:
  """Checks whether predictions depend on the other images of the batch.

  Args:
    key: Random key of the shuffle.
    predict: Classifier for any number of images.
    images: Clean images [N, H, W, C].
    logits: Logits [N, K] of the images in their own order.
    batch_size: Batch size with which `logits` were computed.

  Returns:
    The diagnostic.
  """
  count = min(len(images), batch_size)
  order = _shuffled(key, len(images))[:count]
  again = predict(images[order], max(1, batch_size // 2), key)
  scale = float(np.abs(logits).max()) + 1e-12
  change = float(np.abs(again - logits[order]).max()) / scale
  moved = int((again.argmax(-1) != logits[order].argmax(-1)).sum())
  return diagnostic(
    # One prediction may be a tie that rounding decides.
    change > 1e-2 or moved > max(1.0, 0.01 * count),
    flagged=(
      "Predictions depend on the batch",
      "The prediction for an image depends on the images beside it"
      f" ({moved} of {count} predictions change): BatchNorm uses the batch's"
      " statistics. This is not a fixed classifier; no attack's result on it"
      " says how robust a deployed one is.",
    ),
    passed=(
      "Predictions do not depend on the batch",
      "The prediction for an image does not depend on the images beside it.",
    ),
    rule="logits of the same images with other images around them and another"
    " batch size: largest change, relative to the largest logit; flag above"
    " 0.01, or if more than 1 prediction and more than 1% of them change",
    value=change,
  )


def rescored(
  key: Array,
  predict: Predict,
  adversarial: np.ndarray,
  labels: np.ndarray,
  robust: np.ndarray,
  *,
  batch_size: int,
) -> Diagnostic:
  """Checks whether the returned images score as the attack reports.

  Args:
    key: Random key of the shuffle.
    predict: Classifier for any number of images.
    adversarial: Images that the attack returned, [N, H, W, C].
    labels: True classes, int32 [N].
    robust: Examples that are robust according to the attack, bool [N].
    batch_size: Batch size other than the attack's.

  Returns:
    The diagnostic.
  """
  order = _shuffled(key, len(labels))
  correct = predict(adversarial[order], batch_size, key).argmax(-1)
  correct = correct == labels[order]
  accuracy, reported = float(correct.mean()), float(robust.mean())
  differ = int((correct != robust[order]).sum())
  numbers = (
    f"Scored again the images give {wording.percent(accuracy, 2)}, not"
    f" {wording.percent(reported, 2)} ({wording.plural(differ, 'image')}"
    f" differ{'s' if differ == 1 else ''})."
  )
  same = "The returned images score the same in another order and batch size."
  return diagnostic(
    # One of 1000 images may differ, however the accuracies are rounded.
    abs(accuracy - reported) > 1e-3 + 1e-9 or differ > 2e-3 * len(labels),
    flagged=("The reported accuracy was not reproduced", numbers),
    passed=(
      "The reported accuracy was reproduced",
      numbers if differ else same,
    ),
    rule="accuracy of the returned images in another order and batch size minus"
    " the accuracy reported; flag if they differ by more than 0.001 or more"
    " than 0.2% of the images",
    value=accuracy - reported,
  )


def diagnose_classifier(
  key: Array,
  classifier: Classifier,
  predict: Predict,
  images: np.ndarray,
  labels: np.ndarray,
  logits: np.ndarray,
  *,
  batch_size: int,
  radius: float,
) -> dict[str, Diagnostic]:
  """Checks a classifier before any attack, mostly on its first batch.

  Args:
    key: Random key.
    classifier: Callable from images to logits.
    predict: The same classifier for any number of images.
    images: Clean images [N, H, W, C] in [0, 1].
    labels: True classes, int32 [N].
    logits: Logits [N, K] of the images in their own order.
    batch_size: Batch size with which `logits` were computed.
    radius: Half-width of the box in which gradients are computed.

  Returns:
    Name of the check to its diagnostic.
  """
  first, first_labels = images[:batch_size], labels[:batch_size]
  evaluations = [
    predict(first, batch_size, rng.stream(key, "looks", number))
    for number in range(5)
  ]
  found = {
    "probabilities": probabilities(logits[:batch_size]),
    "zero_gradients": zero_gradients(
      rng.stream(key, "gradients"),
      classifier,
      first,
      first_labels,
      radius=radius,
    ),
    "randomized": randomized(evaluations, first_labels),
  }
  if not isinstance(classifier, base.Randomized):
    found["batch_dependence"] = batch_dependence(
      rng.stream(key, "others"), predict, images, logits, batch_size=batch_size
    )
  return found
