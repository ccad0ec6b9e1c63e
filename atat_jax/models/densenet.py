"""DenseNet-121 for ImageNet (Huang et al., 2017), as in torchvision."""

import jax.numpy as jnp
from flax import linen as nn

from atat_jax.models import base
from atat_jax.typing import Array


class DenseNet121(base.Network):
  """DenseNet: images [B, H, W, C] in [0, 1] to float32 logits [B, num_classes].

  Tappable layers: `stage<s>`, the output of each dense block, and `features`,
  the last of them normalised and activated.

  Attributes:
    stage_sizes: Number of units in each dense block.
    growth: Channels that each unit adds.
    bottleneck: Channels between a unit's two convolutions, as a multiple of
      growth.
    base_channels: Channels of the stem.
  """

  stage_sizes: tuple[int, ...] = (6, 12, 24, 16)
  growth: int = 32
  bottleneck: int = 4
  base_channels: int = 64

  def __post_init__(self) -> None:
    """Checks the fields."""
    base.check_sizes("stage_sizes", self.stage_sizes)
    for name in ("growth", "bottleneck", "base_channels"):
      base.check_size(name, getattr(self, name))
    super().__post_init__()

  def _norm_act_conv(
    self, x: Array, name: str, index: str, features: int, size: int, train: bool
  ) -> Array:
    x = nn.relu(self._norm(x, f"{name}_bn{index}", train))
    return self._conv(f"{name}_conv{index}", features, 1, size)(x)

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; `train` uses batch statistics and updates running ones."""
    # Stem and pool halve the side rounding up, each transition rounding down.
    smallest = 4 * 2 ** (len(self.stage_sizes) - 1) - 3
    x = self._normalize(images, smallest)
    x = self._stem(x, self.base_channels, train)
    inner = self.bottleneck * self.growth
    for stage, size in enumerate(self.stage_sizes, start=1):
      for unit in range(1, size + 1):
        name = f"stage{stage}_unit{unit}"
        h = self._norm_act_conv(x, name, "1", inner, 1, train)
        h = self._norm_act_conv(h, name, "2", self.growth, 3, train)
        x = jnp.concatenate([x, h], axis=-1)
      x = base.Features(name=f"stage{stage}")(x)
      if stage < len(self.stage_sizes):
        name, half = f"stage{stage}_transition", x.shape[-1] // 2
        x = self._norm_act_conv(x, name, "", half, 1, train)
        x = nn.avg_pool(x, (2, 2), (2, 2))
    x = nn.relu(self._norm(x, "final_bn", train))
    return self._head(base.Features(name="features")(x))
