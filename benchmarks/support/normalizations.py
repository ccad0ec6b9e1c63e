"""Normalisations of the input that the package does not offer, to compare them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax.typing import Array, Variables

Formula = Callable[[Array, Array, Array, Array, Array], Array]
"""(images, own mean and deviation, mean and deviation of the data) to the
network's input."""


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


def _constant(x: Array, m: Array, s: Array, mean: Array, std: Array) -> Array:
  del mean, std
  m, s = jax.lax.stop_gradient((m, s))
  return (x - m) / s


def _informed(x: Array, m: Array, s: Array, mean: Array, std: Array) -> Array:
  scale = std.mean()
  told = [(m - mean.mean()) / scale, (s - scale) / scale]
  shape = (*x.shape[:-1], 1)
  return jnp.concatenate(
    [(x - m) / s, *(jnp.broadcast_to(one, shape) for one in told)], -1
  )


FORMULAS: dict[str, Formula] = {
  "dataset": lambda x, m, s, mean, std: (x - mean) / std,
  "per_image": lambda x, m, s, mean, std: (x - m) / s,
  # One half of per_image each, the other half that of dataset.
  "offset": lambda x, m, s, mean, std: (x - m) / std,
  "gain": lambda x, m, s, mean, std: (x - mean) / s,
  # per_image, and the mean and the deviation as two more channels.
  "informed": _informed,
  "none": lambda x, m, s, mean, std: x,
  "double": lambda x, m, s, mean, std: 2 * (x - mean) / std,
  "half": lambda x, m, s, mean, std: 0.5 * (x - mean) / std,
  # per_image, whose gradient takes mean and deviation as constants.
  "constant": _constant,
}
"""Normalisations by name; "dataset" and "per_image" are the package's."""

OWN = ("per_image", "offset", "gain", "informed", "constant")
"""Names of those that use mean or deviation of the image itself."""


class Normalized(nn.Module):
  """Network behind a normalisation; its own must be "none".

  Attributes:
    network: The network.
    formula: Name in `FORMULAS`.
    mean: Mean of the data set's pixels, one value a channel.
    std: Standard deviation of the same pixels.
  """

  network: nn.Module
  formula: str
  mean: tuple[float, ...]
  std: tuple[float, ...]

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
    own = own_statistics(images if like is None else like)
    data = jnp.asarray(self.mean), jnp.asarray(self.std)
    found = FORMULAS[self.formula](images, *own, *data)
    return self.network(found, train=train)


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
