"""From pixels at rest to the batch that an objective is given."""

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
  data: Split, indices: Array, extra: Split | None, mesh: jax.sharding.Mesh
) -> tuple[Array, Array]:
  """The images of a batch: those of the resident data, then extra ones.

  Args:
    data: The training split, on the device.
    indices: int32 [M].
    extra: E further images, or None.
    mesh: The devices.

  Returns:
    uint8 [M + E, H, W, C] and int32 [M + E].
  """
  images, labels = (jnp.asarray(x)[indices] for x in data)
  if extra is None:
    return images, labels
  # Neither part need divide by the devices, and what all of them hold whole
  # they would also all compute.
  return jax.lax.with_sharding_constraint(
    (
      jnp.concatenate([images, extra.images]),
      jnp.concatenate([labels, extra.labels]),
    ),
    sharding.batch_sharding(mesh, len(labels) + len(extra.labels)),
  )


def epsilon_scale(step: Array, warmup: int) -> Array:
  """(step + 1) / warmup, at most 1: a linear rise of the attack's radius."""
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
  """Augments, mixes, and makes the targets.

  Args:
    key: The run's key.
    step: int32 scalar.
    images: uint8 [B, H, W, C].
    labels: int32 [B].
    num_classes: K.
    padding: Pixels of zero padding before the random crop; 0: no crop.
    flip: Whether to flip at random.
    options: Which of these are on.

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
