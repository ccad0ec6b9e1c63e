"""ResNet-18 and ResNet-50 (He et al., 2016), ImageNet's, as torchvision has them."""

from flax import linen as nn

from atat_jax.models import base
from atat_jax.typing import Array


class ResNet18(base.ResidualNetwork):
  """Images [B, H, W, C] in [0, 1] to logits float32 [B, num_classes].

  Tappable layers: `stage<s>_unit<u>`, the activated residual sums, and
  `features`, the last of them.

  Attributes:
    bottleneck: Units of 1x1, 3x3 (with the stride) and 1x1 convolutions with
      four times the channels at the end; else of two 3x3 convolutions.
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
    """One forward pass; `train` uses and moves the batch statistics."""
    x = self._stem(self._normalize(images), self.base_channels, train)
    x = self._stages(x, train)
    return self._head(base.Features(name="features")(x))


class ResNet50(ResNet18):
  """The network of 50 layers."""

  stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
  bottleneck: bool = True
