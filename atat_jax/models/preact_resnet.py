"""PreActResNet-18 for CIFAR (He et al., "Identity Mappings", 2016).

Architecture of Rice et al., "Overfitting in adversarially robust deep learning"
(2020), with BatchNorm before the head; by fields those of Wong et al. (2020),
of Andriushchenko and Flammarion (2020), and DeepMind's of Gowal et al. (2020).
"""

import functools

from flax import linen as nn

from atat_jax import checks
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
    final_batch_norm: Whether BatchNorm and ReLU precede the head.
    family: "pytorch", or "deepmind": SiLU for ReLU, TensorFlow's padding, and
      shortcuts of 3x3 convolutions.
  """

  num_classes: int = 10
  mean: tuple[float, ...] | None = (0.4914, 0.4822, 0.4465)
  std: tuple[float, ...] | None = (0.2471, 0.2435, 0.2616)
  activated_shortcut: bool = True
  final_batch_norm: bool = True
  family: str = "pytorch"

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.choice("family", self.family, ("pytorch", "deepmind"))
    super().__post_init__()

  def _norm_act(self, x: Array, name: str, train: bool) -> Array:
    act = nn.silu if self.family == "deepmind" else nn.relu
    return act(self._norm(x, name, train))

  def _unit(
    self, x: Array, name: str, features: int, stride: int, train: bool
  ) -> Array:
    h = self._norm_act(x, f"{name}_bn1", train)
    deepmind = self.family == "deepmind"
    conv = functools.partial(
      self._conv, padding="same" if deepmind else "symmetric"
    )
    if stride > 1 or x.shape[-1] != features:
      size = 3 if deepmind else 1
      shortcut = conv(f"{name}_shortcut", features, stride, size)
      x = shortcut(h if self.activated_shortcut else x)
    h = conv(f"{name}_conv1", features, stride)(h)
    h = self._norm_act(h, f"{name}_bn2", train)
    h = self._conv(f"{name}_conv2", features)(h)
    return base.Features(name=name)(x + h)

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; `train` uses batch statistics and updates running ones."""
    x = self._conv("stem", self.base_channels)(self._normalize(images))
    x = self._stages(x, train)
    if self.final_batch_norm:
      x = self._norm_act(x, "final_bn", train)
    return self._head(base.Features(name="features")(x))
