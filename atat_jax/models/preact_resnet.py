"""PreActResNet-18 for CIFAR (He et al., "Identity Mappings", 2016).

Architecture of Rice et al., "Overfitting in adversarially robust deep learning"
(2020), with BatchNorm before the head.
"""

from flax import linen as nn

from atat_jax.models import base
from atat_jax.typing import Array


class PreActResNet18(base.ResidualNetwork):
  """PreActResNet: images [B, H, W, C] in [0, 1] to float32 logits [B, K].

  Tappable layers: `stage<s>_unit<u>`, the residual sums, and `features`, the
  last of them normalised and activated. The default mean and std are
  CIFAR-10's. The stem, too, has `base_channels` channels.

  Attributes:
    activated_shortcut: Whether a shortcut's convolution sees the activated
      input (Rice et al.) or the input itself (Wong et al., "Fast is better
      than free", 2020). Weight files of both have the same names, so that a
      file cannot tell.
  """

  num_classes: int = 10
  mean: tuple[float, ...] | None = (0.4914, 0.4822, 0.4465)
  std: tuple[float, ...] | None = (0.2471, 0.2435, 0.2616)
  activated_shortcut: bool = True

  def _unit(
    self, x: Array, name: str, features: int, stride: int, train: bool
  ) -> Array:
    h = nn.relu(self._norm(x, f"{name}_bn1", train))
    if stride > 1 or x.shape[-1] != features:
      shortcut = self._conv(f"{name}_shortcut", features, stride, 1)
      x = shortcut(h if self.activated_shortcut else x)
    h = self._conv(f"{name}_conv1", features, stride)(h)
    h = nn.relu(self._norm(h, f"{name}_bn2", train))
    h = self._conv(f"{name}_conv2", features)(h)
    return base.Features(name=name)(x + h)

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; `train` uses batch statistics and updates running ones."""
    x = self._conv("stem", self.base_channels)(self._normalize(images))
    x = self._stages(x, train)
    x = nn.relu(self._norm(x, "final_bn", train))
    return self._head(base.Features(name="features")(x))
