"""The smallest network and data set, registered the way new members are."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from atat_jax import data, models
from atat_jax.data import base
from atat_jax.errors import UserError


class Network(nn.Module):
  """The least that `models` asks of a network: no BatchNorm, no dtype."""

  num_classes: int = 10

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Computes logits."""
    del train
    x = nn.relu(nn.Conv(4, (3, 3), name="conv")(images - 0.5))
    return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


SPEC = base.DatasetSpec(
  name="minimal",
  num_classes=3,
  image_shape=(6, 5, 2),
  class_names=("dark", "grey", "bright"),
  mean=(0.5, 0.5),
  std=(0.3, 0.3),
)


def read(
  *, data_dir: str | None, cache_dir: str | None, source: str
) -> tuple[base.Split, base.Split]:
  """Draws images whose class is their brightness."""
  del data_dir, cache_dir
  if source != "auto":
    raise UserError(f"source: {source!r}; allowed: 'auto' for minimal")
  generator = np.random.default_rng(0)
  splits = []
  for size in (400, 90):
    labels = generator.integers(0, 3, size)
    noise = generator.integers(0, 86, (size, *SPEC.image_shape))
    images = (labels[:, None, None, None] * 85 + noise).astype(np.uint8)
    splits.append(base.checked_split(SPEC, images, labels, where="minimal"))
  return splits[0], splits[1]


def register_network(patch: pytest.MonkeyPatch) -> None:
  """Adds the network to `models.MODELS`."""
  patch.setitem(models.MODELS, "minimal", Network)


def register_data_set(patch: pytest.MonkeyPatch) -> None:
  """Adds the data set to `data.DATASETS`."""
  patch.setitem(data.DATASETS, "minimal", base.Source(SPEC, read))
