"""Accuracy of a classifier on a whole split, clean or attacked.

Logits that are not all finite are no prediction: such an image counts as not
classified correctly, and is counted besides, so that it can neither raise an
accuracy nor lower it silently.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import checks, compilation, rng, sharding
from atat_jax.attacks import base, nonfinite
from atat_jax.data import augment, batches
from atat_jax.data.base import Split
from atat_jax.errors import UserError
from atat_jax.evaluation.protocols import Protocol
from atat_jax.process import stops
from atat_jax.typing import Array, Classifier


@dataclasses.dataclass(frozen=True)
class Judged:
  """Images of a split after an attack, judged by a classifier.

  Attributes:
    correct: Whether each is classified correctly, bool [N]; False where its
      logits are not finite.
    finite: Whether its logits are all finite, bool [N].
    points: Number of evaluations within the attack whose logits or loss were
      not finite.
    gradients: Number of evaluations within the attack whose gradient was not
      finite.
  """

  correct: np.ndarray
  finite: np.ndarray
  points: int = 0
  gradients: int = 0

  @property
  def accuracy(self) -> float:
    """Share of the images that are classified correctly, in [0, 1]."""
    return float(self.correct.mean())

  @property
  def nonfinite(self) -> int:
    """Number of images whose logits are not finite."""
    return int((~self.finite).sum())


def _take(data: Split, indices: Array) -> tuple[Array, Array]:
  images = data.images[indices]
  if images.dtype == np.uint8:
    images = augment.to_float(images)
  return images, data.labels[indices]


def _score(
  classifier: Classifier, images: Array, labels: Array
) -> tuple[Array, Array]:
  logits = classifier(images)
  finite = nonfinite.usable(logits)
  return (logits.argmax(-1) == labels) & finite, finite


_jitted_take = compilation.jit(_take)
score = compilation.jit(_score)
"""(classifier, images, labels) to who is right and whose logits are finite.

Both bool [B]; compiled.
"""


def _check(
  classifier: Classifier, data: Any, protocol: Any, batch_size: Any
) -> tuple[Classifier, Split]:
  """Checks what is to be judged; returns the classifier as a pytree, and data."""
  checks.count("batch_size", batch_size)
  checks.instance("data", data, Split, "a data.Split: images and labels")
  if not callable(getattr(protocol, "run", None)):
    raise UserError(
      f"protocol: {protocol!r}; allowed: what evaluation.parse returns"
    )
  images, labels = (
    checks.array(array, f"data.{name}")
    for name, array in data._asdict().items()
  )
  known = images.dtype in (np.uint8, np.float32)
  if not known or images.ndim != 4 or 0 in images.shape:
    raise UserError(
      f"data.images: {images.dtype} of shape {images.shape}; allowed: uint8"
      " pixels, or float32 in [0, 1], [N, H, W, C], not empty"
    )
  if images.dtype == np.float32:
    checks.inspect_images(images, "data.images")
  one = jnp.zeros((1, *images.shape[1:]), jnp.float32)
  classifier, *_, num_classes = base.check_arguments(
    classifier, one, jnp.zeros(1, jnp.int32)
  )
  checks.inspect_labels(labels, len(images), num_classes, "data.labels")
  return classifier, Split(images, labels)  # type: ignore[arg-type]


def judge(
  key: Array,
  classifier: Classifier,
  data: Split,
  *,
  protocol: Protocol,
  batch_size: int,
  mesh: Mesh,
  on_batch: Callable[[int], object] = lambda count: None,
  first_batch: int = 0,
) -> Judged:
  """Attacks the images of a split and classifies them.

  The last batch is filled up with the first images, so that batch statistics
  are those of real images; the fill does not count, but for what the attack
  counts.

  Args:
    key: Random key; batch i draws from the i-th key of its stream.
    classifier: Callable from images to logits; best a pytree.
    data: Split to evaluate, images uint8 or float32 in [0, 1], resident on the
      devices.
    protocol: Attack that the images undergo before they are classified.
    batch_size: Images at a time; with batch statistics part of the protocol.
    mesh: The devices.
    on_batch: Called with the number of images done after every batch.
    first_batch: Number of the first batch, where the split is part of another.

  Returns:
    Correct images, and those whose logits are finite.

  Raises:
    UserError: An argument of a wrong kind, shape, dtype or range, by name.
  """
  checks.key(key)
  classifier, data = _check(classifier, data, protocol, batch_size)
  sharding.check_mesh(mesh)
  checks.instance("on_batch", on_batch, Callable, "a function of a number")  # type: ignore[arg-type]
  checks.integer("first_batch", first_batch)
  num_examples = data.labels.shape[0]

  def judge_batch(place: int, indices: Array) -> tuple[Array, Array]:
    images, labels = _jitted_take(data, indices)
    number = first_batch + place
    images = protocol.run(
      rng.stream(key, "evaluation", number), classifier, images, labels
    )
    found = score(classifier, images, labels)
    on_batch(min(batch_size, num_examples - place * batch_size))
    stops.check()
    return found

  with nonfinite.collect() as counts:
    correct, finite = batches.map_batches(
      judge_batch,
      np.arange(num_examples, dtype=np.int32),
      batch_size=batch_size,
      mesh=mesh,
    )
  return Judged(correct, finite, counts.points, counts.gradients)


def count_classes(
  correct: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
  """Counts correctly classified images, and all images, class by class.

  Args:
    correct: Whether each image is classified correctly, bool [N].
    labels: True classes, int32 [N].
    num_classes: Number of classes, K.

  Returns:
    int64 [K] each.

  Raises:
    UserError: Fewer classes than the labels have.
  """
  checks.positive("num_classes", num_classes, integer=True)
  if labels.max() >= num_classes:
    raise UserError(
      f"num_classes: {num_classes}; allowed: more than {labels.max()}, the"
      " largest label"
    )
  return (
    np.bincount(labels[correct], minlength=num_classes),
    np.bincount(labels, minlength=num_classes),
  )


def by_class(
  correct: np.ndarray, labels: np.ndarray, num_classes: int
) -> list[float | None]:
  """Computes the accuracy of each class.

  Args:
    correct: Whether each image is classified correctly, bool [N].
    labels: True classes, int32 [N].
    num_classes: Number of classes, K.

  Returns:
    K accuracies in [0, 1]; None where a class has no image.
  """
  counts = count_classes(correct, labels, num_classes)
  return [
    float(right / all_) if all_ else None
    for right, all_ in zip(*counts, strict=True)
  ]


def class_counts(
  key: Array,
  classifier: Classifier,
  data: Split,
  *,
  protocol: Protocol,
  batch_size: int,
  num_classes: int,
  mesh: Mesh,
  on_batch: Callable[[int], object] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
  """Counts a split's correctly classified images, class by class.

  Args:
    key: Random key; batch i draws from the i-th key of its stream.
    classifier: Callable from images to logits; best a pytree.
    data: Split to evaluate, resident on the devices.
    protocol: Attack that the images undergo before they are classified.
    batch_size: Images at a time; with batch statistics part of the protocol.
    num_classes: Number of classes, K.
    mesh: The devices.
    on_batch: Called with the number of images done after every batch.

  Returns:
    Correctly classified images and all images of each class, int64 [K] each.
    The sum of the first over the sum of the second is `accuracy`.

  Raises:
    UserError: An argument of a wrong kind, shape, dtype or range, by name.
  """
  judged = judge(
    key,
    classifier,
    data,
    protocol=protocol,
    batch_size=batch_size,
    mesh=mesh,
    on_batch=on_batch,
  )
  labels = sharding.to_host(mesh, data.labels)
  return count_classes(judged.correct, labels, num_classes)


def accuracy(
  key: Array,
  classifier: Classifier,
  data: Split,
  *,
  protocol: Protocol,
  batch_size: int,
  mesh: Mesh,
  on_batch: Callable[[int], object] = lambda count: None,
) -> float:
  """Computes the share of a split's images that are classified correctly.

  An image whose logits are not finite counts as not classified correctly;
  `judge` also counts those.

  Args:
    key: Random key, see `judge`, as the following.
    classifier: Callable from images to logits; best a pytree.
    data: Split to evaluate, images uint8 or float32 in [0, 1], resident on the
      devices.
    protocol: Attack that the images undergo before they are classified.
    batch_size: Images at a time; with batch statistics part of the protocol.
    mesh: The devices.
    on_batch: Called with the number of images done after every batch.

  Returns:
    Accuracy in [0, 1].

  Raises:
    UserError: An argument of a wrong kind, shape, dtype or range, by name.
  """
  return judge(
    key,
    classifier,
    data,
    protocol=protocol,
    batch_size=batch_size,
    mesh=mesh,
    on_batch=on_batch,
  ).accuracy
