"""Normalisations of the input as numbers, to compare them in one program.

All are of one form: an offset is subtracted, the difference is divided by a
gain and multiplied by a scale. Their numbers are a parameter that does not
train, so that networks behind different normalisations are compiled once and
start from the same weights.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax.typing import Array, Variables


class Formula(NamedTuple):
  """Numbers of a normalisation, most of them 0 or 1.

  Attributes:
    own_offset: Share of the image's mean in the offset.
    data_offset: Share of the data's mean in the offset.
    own_gain: Whether the image's deviation divides.
    data_gain: Whether the data's deviation divides.
    scale: Factor on the result.
    constant: Whether gradients take the image's mean and deviation as given.
    told: Factor on two more channels, the image's mean and deviation, which
      are standardised by those of the data.
  """

  own_offset: float = 0.0
  data_offset: float = 0.0
  own_gain: float = 0.0
  data_gain: float = 0.0
  scale: float = 1.0
  constant: float = 0.0
  told: float = 0.0


_DATASET = Formula(data_offset=1.0, data_gain=1.0)
_PER_IMAGE = Formula(own_offset=1.0, own_gain=1.0)

FORMULAS = {
  "dataset": _DATASET,
  "per_image": _PER_IMAGE,
  "offset": Formula(own_offset=1.0, data_gain=1.0),
  "gain": Formula(data_offset=1.0, own_gain=1.0),
  "informed": _PER_IMAGE._replace(told=1.0),
  "none": Formula(),
  "double": _DATASET._replace(scale=2.0),
  "half": _DATASET._replace(scale=0.5),
  "constant": _PER_IMAGE._replace(constant=1.0),
}
"""Normalisations by name; "dataset" and "per_image" are the package's."""


def own_statistics(images: Array) -> tuple[Array, Array]:
  """Computes mean and deviation of each image, as `standardize_images` does.

  Args:
    images: [B, H, W, C].

  Returns:
    Mean and standard deviation, [B, 1, 1, 1] each.
  """
  axes = (1, 2, 3)
  floor = 1.0 / (255.0**2 * images[0].size)
  variance = jnp.maximum(images.var(axes, keepdims=True), floor)
  return images.mean(axes, keepdims=True), jnp.sqrt(variance)


def normalize(
  images: Array,
  own: tuple[Array, Array],
  data: tuple[Array, Array],
  formula: Formula,
) -> Array:
  """Normalises images.

  Args:
    images: [B, H, W, C] in [0, 1].
    own: Mean and deviation of each image, [B, 1, 1, 1] each.
    data: Mean and deviation of the data set's pixels, [C] each.
    formula: The numbers; they may be traced.

  Returns:
    [B, H, W, C + 2], the last two channels constant over an image.
  """
  mean, std = (
    x + formula.constant * (jax.lax.stop_gradient(x) - x) for x in own
  )
  offset = formula.own_offset * mean + formula.data_offset * data[0]
  gain = jnp.where(formula.own_gain > 0, std, 1.0)
  gain = gain * jnp.where(formula.data_gain > 0, data[1], 1.0)
  found = formula.scale * (images - offset) / gain
  typical = data[1].mean()
  told = [(mean - data[0].mean()) / typical, (std - typical) / typical]
  shape = (*images.shape[:-1], 1)
  return jnp.concatenate(
    [found, *(formula.told * jnp.broadcast_to(x, shape) for x in told)], -1
  )


class Normalized(nn.Module):
  """Network behind a normalisation; its own must be "none".

  Attributes:
    network: The network.
    mean: Mean of the data set's pixels, one value a channel.
    std: Standard deviation of the same pixels.
  """

  network: nn.Module
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @nn.compact
  def __call__(
    self, images: Array, *, train: bool = False, like: Array | None = None
  ) -> Array:
    """Computes logits.

    Args:
      images: [B, H, W, C] in [0, 1].
      train: Whether BatchNorm uses the statistics of the batch.
      like: Images [B, H, W, C] whose own mean and deviation count in the place
        of those of `images`, or None.

    Returns:
      [B, K].
    """
    numbers = self.param("formula", lambda _: jnp.array(_DATASET))
    formula = Formula(*jax.lax.stop_gradient(numbers))
    own = own_statistics(images if like is None else like)
    data = jnp.asarray(self.mean), jnp.asarray(self.std)
    return self.network(normalize(images, own, data, formula), train=train)


@dataclasses.dataclass(frozen=True)
class _Anchored:
  """Pass with the statistics of given images; compares by value."""

  model: Normalized

  def __call__(self, variables: Variables, like: Array, images: Array) -> Array:
    logits: Array = self.model.apply(variables, images, like=like)
    return logits


def anchored(
  model: Normalized, variables: Variables, like: Array
) -> jax.tree_util.Partial:
  """Wraps a network whose normalisation no attack can move.

  Args:
    model: The network.
    variables: Its variables.
    like: Clean images [B, H, W, C]; their mean and deviation are used.

  Returns:
    A classifier with running statistics, a pytree.
  """
  return jax.tree_util.Partial(_Anchored(model), variables, like)
