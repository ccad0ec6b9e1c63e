"""Accuracy of a classifier on a whole split, clean or attacked."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import checks, compilation, rng, sharding
from atat_jax.attacks import base
from atat_jax.data import augment, batches
from atat_jax.data.base import Split
from atat_jax.errors import UserError
from atat_jax.evaluation.protocols import Protocol
from atat_jax.typing import Array, Classifier


def _take(data: Split, indices: Array) -> tuple[Array, Array]:
  return augment.to_float(data.images[indices]), data.labels[indices]


def _is_correct(classifier: Classifier, images: Array, labels: Array) -> Array:
  return classifier(images).argmax(-1) == labels


_jitted_take = compilation.jit(_take)
is_correct = compilation.jit(_is_correct)
"""(classifier, images, labels) to who is right, bool [B]; compiled."""


def _checked(
  key: Array,
  classifier: Classifier,
  data: Split,
  protocol: Protocol,
  batch_size: int,
  mesh: Mesh,
  on_batch: Callable[[int], object],
) -> tuple[Classifier, int]:
  """Checks the arguments; returns the classifier as a pytree, and K."""
  checks.key(key)
  checks.instance("protocol", protocol, Protocol, "see evaluation.parse")
  checks.count("batch_size", batch_size)
  checks.instance("on_batch", on_batch, Callable, "a function of a number")  # type: ignore[arg-type]
  sharding.check_mesh(mesh)
  checks.instance("data", data, Split, "a Split of images and labels")
  images, labels = (
    checks.array(part, f"data.{part_name}")
    for part_name, part in data._asdict().items()
  )
  if images.dtype != np.uint8:
    checks.inspect_images(images, "data.images")
  elif images.ndim != 4 or 0 in images.shape:
    raise UserError(
      f"data.images: shape {images.shape}; allowed: [N, H, W, C], not empty"
    )
  two = jnp.zeros((2, *images.shape[1:]), jnp.float32)
  classifier, *_, num_classes = base.check_arguments(
    classifier, two, jnp.zeros(2, jnp.int32)
  )
  checks.inspect_labels(labels, len(images), num_classes, "data.labels")
  return classifier, num_classes


def _correct(
  key: Array,
  classifier: Classifier,
  data: Split,
  *,
  protocol: Protocol,
  batch_size: int,
  mesh: Mesh,
  on_batch: Callable[[int], object],
) -> np.ndarray:
  """Whether each image of a split is classified correctly, bool [N]."""
  classifier = _checked(
    key, classifier, data, protocol, batch_size, mesh, on_batch
  )[0]
  num_examples = data.labels.shape[0]

  def score(number: int, indices: Array) -> Array:
    images, labels = _jitted_take(data, indices)
    images = protocol.run(
      rng.stream(key, "evaluation", number), classifier, images, labels
    )
    correct = is_correct(classifier, images, labels)
    on_batch(min(batch_size, num_examples - number * batch_size))
    return correct

  return batches.map_batches(
    score,
    np.arange(num_examples, dtype=np.int32),
    batch_size=batch_size,
    mesh=mesh,
  )


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
  """
  checks.count("num_classes", num_classes)
  known = _checked(key, classifier, data, protocol, batch_size, mesh, on_batch)[
    1
  ]
  if num_classes < known:
    raise UserError(
      f"num_classes: {num_classes}; allowed: at least the classifier's {known}"
    )
  correct = _correct(
    key,
    classifier,
    data,
    protocol=protocol,
    batch_size=batch_size,
    mesh=mesh,
    on_batch=on_batch,
  )
  labels = sharding.to_host(mesh, data.labels)
  return (
    np.bincount(labels[correct], minlength=num_classes),
    np.bincount(labels, minlength=num_classes),
  )


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

  The last batch is filled up with the first images, so that batch statistics
  are those of real images; the fill does not count.

  Args:
    key: Random key; batch i draws from the i-th key of its stream.
    classifier: Callable from images to logits; best a pytree.
    data: Split to evaluate, resident on the devices.
    protocol: Attack that the images undergo before they are classified.
    batch_size: Images at a time; with batch statistics part of the protocol.
    mesh: The devices.
    on_batch: Called with the number of images done after every batch.

  Returns:
    Accuracy in [0, 1].
  """
  correct = _correct(
    key,
    classifier,
    data,
    protocol=protocol,
    batch_size=batch_size,
    mesh=mesh,
    on_batch=on_batch,
  )
  return float(correct.mean())
