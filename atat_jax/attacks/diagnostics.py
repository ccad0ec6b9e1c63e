"""Signs, seen from a classifier alone, that an attack's result misleads.

Each check says by what rule it judged. The first five are those of the
AutoAttack reference (its `flags_doc.md`); it has none that would notice a
classifier whose answer for an image depends on the other images of the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import compilation, losses, rng, sharding
from atat_jax.attacks import base
from atat_jax.typing import Array, Classifier


class Finding(TypedDict):
  """What a check found: its rule, the number, whether it is a flag, and why."""

  rule: str
  value: float
  flag: bool
  message: str


Predict = Callable[[np.ndarray, int, Array], np.ndarray]
"""(images [N, H, W, C], batch size, key) to logits [N, K]."""

_jitted_logits = compilation.jit(base.apply)


class Scorer:
  """Logits of any number of images, in batches of one size: a `Predict`."""

  def __init__(self, classifier: Classifier, mesh: Mesh):
    self._classifier, self._mesh = classifier, mesh

  def __call__(
    self, images: np.ndarray, batch_size: int, key: Array
  ) -> np.ndarray:
    """(images [N, H, W, C], batch size, key) to logits [N, K]."""
    count = len(images)
    key = sharding.put_replicated(self._mesh, key)
    found = []
    for first in range(0, count, batch_size):
      # The last batch is filled up with real images.
      rows = np.arange(first, first + batch_size) % count
      batch = sharding.put_batch(self._mesh, images[rows])
      logits = _jitted_logits(
        self._classifier, jax.random.fold_in(key, first), batch
      )
      found.append(sharding.to_host(self._mesh, logits))
    return np.concatenate(found)[:count]


def _shuffled(key: Array, count: int) -> np.ndarray:
  """An order drawn on the host: jax would compile for every count."""
  return np.random.default_rng(
    np.asarray(jax.random.key_data(key))
  ).permutation(count)


def randomized(looks: Sequence[np.ndarray], labels: np.ndarray) -> Finding:
  """Whether the same images get different answers at different times.

  Args:
    looks: Logits [B, K] of two or more looks at the same batch.
    labels: int32 [B].

  Returns:
    The finding.
  """
  correct = [int((logits.argmax(-1) == labels).sum()) for logits in looks]
  unit = [
    logits / (np.linalg.norm(logits, axis=-1, keepdims=True) + 1e-10)
    for logits in looks
  ]
  distance = max(
    float(np.linalg.norm(a - b, axis=-1).max())
    for n, a in enumerate(unit)
    for b in unit[:n]
  )
  flag = len(set(correct)) > 1 or distance > 1e-4
  return Finding(
    rule=f"{len(looks)} looks at one batch; flag if the number of correct"
    " answers differs or logits, scaled to length 1, differ by more than 1e-4",
    value=distance,
    flag=flag,
    message=(
      "The classifier is randomised: an attack must average its gradients over"
      " the randomness (autoattack: version='rand')."
      if flag
      else "The classifier gives the same answer every time."
    ),
  )


def probabilities(logits: np.ndarray) -> Finding:
  """Whether what is called logits are probabilities.

  Args:
    logits: [B, K].

  Returns:
    The finding.
  """
  off = float(np.abs(logits.sum(-1) - 1.0).max())
  flag = logits.max() < 1 + 1e-5 and logits.min() > -1e-5 and off < 1e-5
  return Finding(
    rule="flag if all outputs are in [0, 1] and each row sums to 1, to 1e-5;"
    " value: the largest deviation of a sum from 1",
    value=off,
    flag=bool(flag),
    message=(
      "The outputs are probabilities: a softmax saturates and hides gradients;"
      " give the logits."
      if flag
      else "The outputs are logits."
    ),
  )


def num_classes(
  num_classes: int, needed: Mapping[str, int], targets: Mapping[str, int]
) -> Finding:
  """Whether there are enough classes for the losses and targets asked for.

  Args:
    num_classes: K.
    needed: Attack to the number of classes that its loss needs.
    targets: Attack to the number of classes that it aims at.

  Returns:
    The finding.
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
  return Finding(
    rule="DLR needs 3 classes, targeted DLR 4, t targets t + 1 classes",
    value=float(num_classes),
    flag=bool(text),
    message=" ".join(text) or f"{num_classes} classes are enough.",
  )


def _is_blind(classifier: Classifier, images: Array, labels: Array) -> Array:
  _, _, gradient = base.evaluate(
    classifier,
    jax.random.key(0),
    images,
    lambda logits: losses.margin(logits, labels),
  )
  largest = jnp.abs(gradient).max((1, 2, 3))  # NaN if any of them is
  return ~((largest > 0) & jnp.isfinite(largest))


_jitted_is_blind = compilation.jit(_is_blind)


def zero_gradients(
  key: Array,
  classifier: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  radius: float,
) -> Finding:
  """Whether gradient attacks see nothing at their starting points.

  Args:
    key: Random key of the starts.
    classifier: Callable from images to logits.
    images: [B, H, W, C] in [0, 1].
    labels: int32 [B].
    radius: Half-width of the box of the starts.

  Returns:
    The finding.
  """
  noise = jax.random.uniform(key, images.shape, images.dtype, -radius, radius)
  start = jnp.clip(images + noise, 0.0, 1.0)
  zero = np.asarray(_jitted_is_blind(classifier, start, labels))
  flag = bool(zero.any())
  return Finding(
    rule="share of images at whose random start the gradient of the margin is"
    " zero in every pixel, or not finite; flag if there is any",
    value=float(zero.mean()),
    flag=flag,
    message=(
      f"{int(zero.sum())} of {len(zero)} images have no gradient: gradient"
      " attacks are blind there and the result cannot be trusted."
      if flag
      else "Gradients reach the images."
    ),
  )


def masking(accuracies: Mapping[str, float]) -> Finding | None:
  """Whether Square, which sees no gradient, finds what the others missed.

  Args:
    accuracies: Attack to robust accuracy after it, in order.

  Returns:
    The finding; None where Square did not run after another attack.
  """
  before = [
    value for name, value in accuracies.items() if name not in ("square",)
  ]
  if "square" not in accuracies or len(before) < 2:
    return None
  gain = min(before) - accuracies["square"]
  flag = gain > 0.002 + 1e-9  # not for the rounding of 0.002
  return Finding(
    rule="robust accuracy before Square minus after it; flag above 0.002: a"
    " black-box attack should find nothing that gradients have not found",
    value=gain,
    flag=flag,
    message=(
      f"Square lowers the robust accuracy by another {100 * gain:.2f} points:"
      " gradients are masked."
      if flag
      else "Square finds nothing more."
    ),
  )


def batch_dependence(
  key: Array,
  predict: Predict,
  images: np.ndarray,
  logits: np.ndarray,
  *,
  batch_size: int,
) -> Finding:
  """Whether an image's answer depends on the other images of its batch.

  Args:
    key: Random key of the shuffle.
    predict: The classifier.
    images: [N, H, W, C].
    logits: [N, K] of the images in their own order.
    batch_size: By which `logits` were computed.

  Returns:
    The finding.
  """
  count = min(len(images), batch_size)
  order = _shuffled(key, len(images))[:count]
  again = predict(images[order], max(1, batch_size // 2), key)
  scale = float(np.abs(logits).max()) + 1e-12
  change = float(np.abs(again - logits[order]).max()) / scale
  moved = int((again.argmax(-1) != logits[order].argmax(-1)).sum())
  # One prediction may be a tie that rounding decides.
  flag = change > 1e-2 or moved > max(1.0, 0.01 * count)
  return Finding(
    rule="logits of the same images with other images around them and another"
    " batch size: largest change, relative to the largest logit; flag above"
    " 0.01, or if more than 1 prediction and more than 1 % of them change",
    value=change,
    flag=flag,
    message=(
      "An image's answer depends on the images beside it"
      f" ({moved} of {count} predictions change): BatchNorm uses the batch's"
      " statistics. This is not a fixed classifier; no attack's result on it"
      " says how robust a deployed one is."
      if flag
      else "An image's answer does not depend on the images beside it."
    ),
  )


def rescored(
  key: Array,
  predict: Predict,
  adversarial: np.ndarray,
  labels: np.ndarray,
  robust: np.ndarray,
  *,
  batch_size: int,
) -> Finding:
  """Whether the returned images score as the attack says they do.

  Args:
    key: Random key of the shuffle.
    predict: The classifier.
    adversarial: [N, H, W, C].
    labels: int32 [N].
    robust: bool [N]: what the attack says.
    batch_size: Another one than the attack's.

  Returns:
    The finding.
  """
  order = _shuffled(key, len(labels))
  right = predict(adversarial[order], batch_size, key).argmax(-1)
  right = right == labels[order]
  accuracy, claimed = float(right.mean()), float(robust.mean())
  differ = int((right != robust[order]).sum())
  # Of 1000 images one may differ, however the accuracies are rounded.
  flag = abs(accuracy - claimed) > 1e-3 + 1e-9 or differ > 2e-3 * len(labels)
  return Finding(
    rule="accuracy of the returned images in another order and batch size minus"
    " the accuracy reported; flag if they differ by more than 0.001 or more"
    " than 0.2 % of the images",
    value=accuracy - claimed,
    flag=flag,
    message=(
      f"Scored again the images give {100 * accuracy:.2f} %, not"
      f" {100 * claimed:.2f} % ({differ} images differ)."
      if flag or differ
      else "The returned images score the same in another order and batch size."
    ),
  )


def of_classifier(
  key: Array,
  classifier: Classifier,
  predict: Predict,
  images: np.ndarray,
  labels: np.ndarray,
  logits: np.ndarray,
  *,
  batch_size: int,
  radius: float,
) -> dict[str, Finding]:
  """What a classifier tells before any attack; mostly its first batch.

  Args:
    key: Random key.
    classifier: Callable from images to logits.
    predict: The same for many images.
    images: [N, H, W, C] in [0, 1].
    labels: int32 [N].
    logits: [N, K] of the images in their own order.
    batch_size: By which `logits` were computed.
    radius: Half-width of the box in which gradients are looked at.

  Returns:
    Check to what it found.
  """
  first, names = images[:batch_size], labels[:batch_size]
  looks = [
    predict(first, batch_size, rng.stream(key, "looks", look))
    for look in range(5)
  ]
  found = {
    "probabilities": probabilities(logits[:batch_size]),
    "zero_gradients": zero_gradients(
      rng.stream(key, "gradients"), classifier, first, names, radius=radius
    ),
    "randomized": randomized(looks, names),
  }
  if not isinstance(classifier, base.Randomized):
    found["batch_dependence"] = batch_dependence(
      rng.stream(key, "others"), predict, images, logits, batch_size=batch_size
    )
  return found
