"""Builds a training batch from stored uint8 images."""

import jax
import jax.numpy as jnp
import optax

from atat_jax import rng, sharding
from atat_jax.data import augment, mixing
from atat_jax.data.base import Split
from atat_jax.objectives import Batch, make_batch
from atat_jax.training.options import Options
from atat_jax.typing import Array


def gather(
  data: Split | None,
  indices: Array,
  extra: Split | None,
  mesh: jax.sharding.Mesh,
) -> tuple[Array, Array]:
  """Gathers a batch: images of the resident data, then the extra ones.

  Args:
    data: Training split, on the device; None: it is streamed, so that all
      images of the batch are extra ones.
    indices: int32 [M].
    extra: E further images, or None.
    mesh: Devices.

  Returns:
    uint8 [M + E, H, W, C] and int32 [M + E]; [E] without resident data.
  """
  if data is None:
    assert extra is not None  # noqa: S101 - narrows the type
    return jnp.asarray(extra.images), jnp.asarray(extra.labels)
  images, labels = (jnp.asarray(x)[indices] for x in data)
  if extra is None:
    return images, labels
  # Either part alone may not divide by the number of devices and would then be
  # replicated, and every device would compute all of it.
  return jax.lax.with_sharding_constraint(
    (
      jnp.concatenate([images, extra.images]),
      jnp.concatenate([labels, extra.labels]),
    ),
    sharding.batch_sharding(mesh, len(labels) + len(extra.labels)),
  )


def epsilon_scale(step: Array, warmup: int) -> Array:
  """Returns (step + 1) / warmup, at most 1: a linear rise of the radius."""
  return jnp.minimum(1.0, (step + 1) / warmup)


def assemble(
  key: Array,
  step: Array,
  images: Array,
  labels: Array,
  *,
  num_classes: int,
  padding: int,
  flip: bool,
  options: Options,
) -> Batch:
  """Augments and mixes images, and computes the targets.

  Args:
    key: Key of the run.
    step: Number of the step, int32 scalar.
    images: uint8 [B, H, W, C].
    labels: int32 [B].
    num_classes: K.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether images are flipped at random.
    options: Mixing, label smoothing and the warm-up of epsilon.

  Returns:
    The batch.
  """
  images = augment.pad_crop_flip(
    rng.stream(key, "augmentation", step),
    images,
    padding=padding,
    flip=flip,
  )
  batch = make_batch(augment.to_float(images), labels, num_classes)
  if options.mix != "none":
    images, labels, targets = mixing.mix(
      rng.stream(key, "mixing", step),
      *batch[:3],
      name=options.mix,
      alpha=options.mix_alpha,
    )
    batch = batch._replace(images=images, labels=labels, targets=targets)
  if options.label_smoothing:
    smoothed = optax.smooth_labels(batch.targets, options.label_smoothing)
    batch = batch._replace(targets=smoothed)
  if options.epsilon_warmup:
    scale = epsilon_scale(step, options.epsilon_warmup)
    batch = batch._replace(epsilon_scale=scale)
  return batch
