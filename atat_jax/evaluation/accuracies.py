"""Accuracy of a classifier on a whole split, clean or attacked."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.sharding import Mesh

from atat_jax import compilation, metrics, rng, sharding
from atat_jax.attacks.base import as_pytree
from atat_jax.data import augment, batches
from atat_jax.data.base import Split
from atat_jax.evaluation.protocols import Protocol
from atat_jax.typing import Array, Classifier


def _take(data: Split, indices: Array) -> tuple[Array, Array]:
  return augment.to_float(data.images[indices]), data.labels[indices]


def _score(
  classifier: Classifier, images: Array, labels: Array, mask: Array
) -> metrics.Sums:
  correct = classifier(images).argmax(-1) == labels
  return metrics.from_examples({"accuracy": correct}, mask)


_jitted_take = compilation.jit(_take)
_jitted_score = compilation.jit(_score)


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
  """Share of a split's images that are classified correctly.

  The last batch is filled up with the first images, so that batch statistics
  are those of real images, and the fill is not counted.

  Args:
    key: Random key; batch i draws from the i-th key of its stream.
    classifier: Callable from images to logits; best a pytree.
    data: The split, resident on the devices.
    protocol: What is done to the images.
    batch_size: Images at a time; with batch statistics part of the protocol.
    mesh: The devices.
    on_batch: Called with the number of examples done after every batch.

  Returns:
    In [0, 1].
  """
  classifier = as_pytree(classifier)
  num_examples = data.labels.shape[0]
  indices, mask = batches.eval_batches(num_examples, batch_size)
  sums = metrics.zeros(("accuracy",))
  for i in range(len(indices)):
    images, labels = _jitted_take(data, sharding.put_batch(mesh, indices[i]))
    images = protocol.run(
      rng.stream(key, "evaluation", i), classifier, images, labels
    )
    sums = metrics.merge(
      sums,
      _jitted_score(
        classifier, images, labels, sharding.put_batch(mesh, mask[i])
      ),
    )
    on_batch(int(mask[i].sum()))
  counted = int(jnp.asarray(sums["accuracy"])[1])
  if counted != num_examples:
    raise AssertionError(f"scored {counted} of {num_examples} examples")
  return metrics.compute(sums)["accuracy"]
