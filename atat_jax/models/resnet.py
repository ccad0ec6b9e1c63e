"""ResNet-18 and -50 (He et al., 2016), as in torchvision.

By fields also the networks of this kind for CIFAR: ResNet-18 to -152 with a
stem of one 3x3 convolution, and ResNet-20 to -110 with three stages; and the
wide ResNet-50-2.
"""

import jax.numpy as jnp
from flax import linen as nn

from atat_jax.models import base
from atat_jax.typing import Array


class ResNet18(base.ResidualNetwork):
  """ResNet: images [B, H, W, C] in [0, 1] to float32 logits [B, num_classes].

  Tappable layers: `stage<s>_unit<u>`, the activated residual sums, and
  `features`, the last of them.

  Attributes:
    bottleneck: Whether a unit has 1x1, 3x3 (with the stride) and 1x1
      convolutions, four times as many channels at its end, rather than two 3x3
      convolutions.
    small_images: Whether the stem is a 3x3 convolution without stride and
      pooling, as for CIFAR; otherwise ImageNet's.
    padded_shortcut: Whether a shortcut drops every second row and column and
      adds channels of zeros ("option A"), rather than being a convolution.
    inner_width: Factor on the inner channels of bottleneck units.
  """

  bottleneck: bool = False
  small_images: bool = False
  padded_shortcut: bool = False
  inner_width: int = 1

  def __post_init__(self) -> None:
    """Checks the fields."""
    base.check_size("inner_width", self.inner_width)
    super().__post_init__()

  def _shortcut(
    self, x: Array, name: str, features: int, stride: int, train: bool
  ) -> Array:
    if self.padded_shortcut:
      extra = features - x.shape[-1]
      sides = (extra // 2, extra - extra // 2)
      x = x[:, ::stride, ::stride]
      return jnp.pad(x, ((0, 0), (0, 0), (0, 0), sides))
    x = self._conv(f"{name}_shortcut", features, stride, 1)(x)
    return self._norm(x, f"{name}_shortcut_bn", train)

  def _unit(
    self, x: Array, name: str, features: int, stride: int, train: bool
  ) -> Array:
    if self.bottleneck:
      inner = self.inner_width * features
      layers = [(inner, 1, 1), (inner, stride, 3), (4 * features, 1, 1)]
    else:
      layers = [(features, stride, 3), (features, 1, 3)]
    h = x
    for index, (channels, step, kernel_size) in enumerate(layers, start=1):
      h = self._conv(f"{name}_conv{index}", channels, step, kernel_size)(h)
      h = self._norm(h, f"{name}_bn{index}", train)
      if index < len(layers):
        h = nn.relu(h)
    if stride > 1 or x.shape[-1] != h.shape[-1]:
      x = self._shortcut(x, name, h.shape[-1], stride, train)
    return base.Features(name=name)(nn.relu(x + h))

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; `train` uses batch statistics and updates running ones."""
    x = self._normalize(images)
    if self.small_images:
      x = self._conv("stem", self.base_channels)(x)
      x = nn.relu(self._norm(x, "stem_bn", train))
    else:
      x = self._stem(x, self.base_channels, train)
    x = self._stages(x, train)
    return self._head(base.Features(name="features")(x))


class ResNet50(ResNet18):
  """ResNet with the sizes and bottleneck units of ResNet-50."""

  stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
  bottleneck: bool = True
