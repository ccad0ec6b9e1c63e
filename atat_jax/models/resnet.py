"""ResNet-18 and -50 for ImageNet (He et al., 2016), as in torchvision."""

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
  """

  bottleneck: bool = False

  def _unit(
    self, x: Array, name: str, features: int, stride: int, train: bool
  ) -> Array:
    if self.bottleneck:
      layers = [(features, 1, 1), (features, stride, 3), (4 * features, 1, 1)]
    else:
      layers = [(features, stride, 3), (features, 1, 3)]
    h = x
    for index, (channels, step, kernel_size) in enumerate(layers, start=1):
      h = self._conv(f"{name}_conv{index}", channels, step, kernel_size)(h)
      h = self._norm(h, f"{name}_bn{index}", train)
      if index < len(layers):
        h = nn.relu(h)
    if stride > 1 or x.shape[-1] != h.shape[-1]:
      x = self._conv(f"{name}_shortcut", h.shape[-1], stride, 1)(x)
      x = self._norm(x, f"{name}_shortcut_bn", train)
    return base.Features(name=name)(nn.relu(x + h))

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; `train` uses batch statistics and updates running ones."""
    x = self._stem(self._normalize(images), self.base_channels, train)
    x = self._stages(x, train)
    return self._head(base.Features(name="features")(x))


class ResNet50(ResNet18):
  """ResNet with the sizes and bottleneck units of ResNet-50."""

  stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
  bottleneck: bool = True
