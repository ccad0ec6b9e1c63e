"""Parts of networks with LayerNorm and multilayer perceptrons."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from atat_jax.models import base
from atat_jax.typing import Array

_EPSILON = 1e-6  # all published networks of this kind have it


class Parameter(nn.Module):
  """Array of numbers under a name of its own, as `value`."""

  shape: tuple[int, ...]
  start: float | None = None

  @nn.compact
  def __call__(self) -> Array:
    """Returns the array: `start` everywhere, or normal with deviation 0.02."""
    init = nn.initializers.normal(0.02)
    if self.start is not None:
      init = nn.initializers.constant(self.start)
    return self.param("value", init, self.shape)


def attend(q: Array, k: Array, v: Array) -> Array:
  """Computes scaled dot-product attention.

  Args:
    q: Queries [B, h, M, d].
    k: Keys [B, h, N, d].
    v: Values [B, h, N, d].

  Returns:
    [B, h, M, d].
  """
  scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
  return jax.nn.softmax(scores, axis=-1) @ v


def split_heads(x: Array, num_heads: int) -> Array:
  """Maps tokens [B, N, C] to heads [B, num_heads, N, C / num_heads]."""
  batch, tokens, channels = x.shape
  x = x.reshape(batch, tokens, num_heads, channels // num_heads)
  return x.transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
  """Maps heads [B, h, N, d] to tokens [B, N, h * d]."""
  batch, heads, tokens, channels = x.shape
  return x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * channels)


class BlockNetwork(base.Network):
  """Base class of ConvNeXt and the vision transformers."""

  def _dense(self, x: Array, name: str, features: int) -> Array:
    init = nn.initializers.truncated_normal(0.02)
    return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)(x)

  def _layer_norm(self, x: Array, name: str) -> Array:
    # The fast variance E[x^2] - E[x]^2 loses digits that PyTorch keeps.
    return nn.LayerNorm(
      epsilon=_EPSILON, dtype=self.dtype, use_fast_variance=False, name=name
    )(x)

  def _scale(self, x: Array, name: str, start: float) -> Array:
    """Multiplies channels by learnt numbers ("layer scale")."""
    value = Parameter(shape=(x.shape[-1],), start=start, name=name)()
    return x * value.astype(x.dtype)

  def _mlp(self, x: Array, name: str, hidden: int) -> Array:
    channels = x.shape[-1]
    x = nn.gelu(self._dense(x, f"{name}_fc1", hidden), approximate=False)
    return self._dense(x, f"{name}_fc2", channels)

  def _wide_conv(
    self,
    x: Array,
    name: str,
    features: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = True,
  ) -> Array:
    """Convolves with PyTorch's padding, size // 2; none for patches."""
    pad = 0 if stride == size else size // 2
    return nn.Conv(
      features,
      (size, size),
      stride,
      padding=[(pad, pad)] * 2,
      feature_group_count=groups,
      use_bias=use_bias,
      dtype=self.dtype,
      kernel_init=nn.initializers.truncated_normal(0.02),
      name=name,
    )(x)

  def _conv_stem(
    self, x: Array, channels: Sequence[int], halvings: int
  ) -> Array:
    """Applies 3x3 convolutions with LayerNorm and GELU ("ConvStem").

    Singh et al., "Revisiting adversarial training for ImageNet" (2023); the
    first `halvings` of them have stride 2.
    """
    for index, features in enumerate(channels, start=1):
      stride = 2 if index <= halvings else 1
      name = "stem" if index == 1 else f"stem{index}"
      x = self._wide_conv(x, name, features, 3, stride)
      x = self._layer_norm(x, f"{name}_norm")
      x = nn.gelu(x, approximate=False)
    return x
