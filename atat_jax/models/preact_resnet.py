"""PreActResNet-18 for CIFAR (He et al., "Identity Mappings", 2016).

The network of Rice et al., "Overfitting in adversarially robust deep learning"
(2020), with BatchNorm before the head.
"""

from flax import linen as nn

from atat_jax import checks
from atat_jax.models import base
from atat_jax.typing import Array


class PreActResNet18(base.Network):
  """Images [B, H, W, C] in [0, 1] to logits float32 [B, num_classes].

  Tappable layers: `stage<s>_unit<u>`, the residual sums, and `features`, the
  last of them normalised and activated. The default mean and std are
  CIFAR-10's.

  Attributes:
    stage_sizes: Residual units in each stage; the channels double from stage
      to stage, and all but the first halve the height and the width.
    base_channels: Of the stem and of the first stage.
    activated_shortcut: Whether a shortcut's convolution sees the activated
      input (Rice et al.) or the input itself (Wong et al., "Fast is better
      than free", 2020). The weights do not tell: they have the same names.
  """

  num_classes: int = 10
  mean: tuple[float, ...] | None = (0.4914, 0.4822, 0.4465)
  std: tuple[float, ...] | None = (0.2471, 0.2435, 0.2616)
  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
  base_channels: int = 64
  activated_shortcut: bool = True

  def __post_init__(self) -> None:
    """Refuses fields that make no network."""
    base.check_sizes("stage_sizes", self.stage_sizes)
    checks.positive("base_channels", self.base_channels, integer=True)
    super().__post_init__()

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
    """One forward pass; `train` uses and moves the batch statistics."""
    x = self._conv("stem", self.base_channels)(self._normalize(images))
    for stage, size in enumerate(self.stage_sizes, start=1):
      features = self.base_channels * 2 ** (stage - 1)
      for unit in range(1, size + 1):
        stride = 2 if unit == 1 and stage > 1 else 1
        x = self._unit(x, f"stage{stage}_unit{unit}", features, stride, train)
    x = nn.relu(self._norm(x, "final_bn", train))
    return self._head(base.Features(name="features")(x))
