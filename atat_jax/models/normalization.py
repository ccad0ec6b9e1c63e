"""BatchNorm over groups of a fixed number of images.

Statistics over the whole batch make the recipe depend on its size, and every
layer wait for all devices. Statistics of groups of g consecutive images are the
same on any number of devices; where a device has a multiple of g images, they
need no communication ("ghost" BatchNorm; Hoffer et al., "Train longer,
generalize better", 2017, Section 4).
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from atat_jax.errors import UserError
from atat_jax.typing import Array


class GroupedBatchNorm(nn.Module):
  """BatchNorm whose training statistics are those of groups of images.

  Variables are those of `flax.linen.BatchNorm`; in evaluation it computes the
  same. The running averages move by the mean of the groups' statistics.

  Attributes:
    group_size: Number of consecutive images in a group, g.
    use_running_average: Whether to normalise by the running averages.
    momentum: Decay of the running averages.
    epsilon: Constant added to the variance.
    dtype: Dtype of the result.
  """

  group_size: int
  use_running_average: bool
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Normalises a batch.

    Args:
      x: [B, ..., C], B a multiple of g in training.

    Returns:
      The same shape, of `dtype`.

    Raises:
      UserError: The batch does not divide into groups.
    """
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    variance = self.variable("batch_stats", "var", jnp.ones, shape)
    if self.use_running_average:
      return self._apply(x, mean.value, variance.value, scale, bias)
    if self.is_initializing():
      return self._apply(x, *_moments(x[None]), scale, bias)
    if len(x) % self.group_size:
      raise UserError(
        f"batch_norm_group_size: {self.group_size} with a batch of {len(x)}"
        " images; allowed: a divisor of every batch that is normalised by its"
        " own statistics, or 0"
      )
    groups = x.reshape(-1, self.group_size, *x.shape[1:])
    means, variances = _moments(groups)
    for average, found in ((mean, means), (variance, variances)):
      average.value = self.momentum * average.value + (
        1 - self.momentum
      ) * found.mean(0)
    wide = (-1, *(1,) * (x.ndim - 1), x.shape[-1])
    normalized = self._apply(
      groups, means.reshape(wide), variances.reshape(wide), scale, bias
    )
    return normalized.reshape(x.shape)

  def _apply(
    self, x: Array, mean: Array, variance: Array, scale: Array, bias: Array
  ) -> Array:
    factor = lax.rsqrt(variance + self.epsilon) * scale
    return ((x - mean) * factor + bias).astype(self.dtype)


def _moments(groups: Array) -> tuple[Array, Array]:
  """Means and variances [G, C] of groups [G, g, ..., C], at least float32."""
  groups = groups.astype(jnp.promote_types(jnp.float32, groups.dtype))
  axes = tuple(range(1, groups.ndim - 1))
  mean = groups.mean(axes)
  # As flax computes it: both sums in one pass.
  variance = jnp.square(groups).mean(axes) - jnp.square(mean)
  return mean, jnp.maximum(variance, 0)
