"""ConvNeXt (Liu et al., "A ConvNet for the 2020s", 2022)."""

from flax import linen as nn

from atat_jax.errors import UserError
from atat_jax.models import base
from atat_jax.models.blocks import BlockNetwork
from atat_jax.typing import Array


class ConvNeXt(BlockNetwork):
  """ConvNeXt: images [B, H, W, C] in [0, 1] to float32 logits [B, num_classes].

  The defaults are ConvNeXt-T. Tappable layers: `stage<s>_unit<u>`, the residual
  sums, and `features`, the last of them.

  Attributes:
    stage_sizes: Number of blocks in each stage.
    stage_channels: Channels of each stage.
    conv_stem: Channels of the 3x3 convolutions of a ConvStem (Singh et al.,
      2023), two of them with stride 2; empty: patches of 4x4 pixels.
  """

  stage_sizes: tuple[int, ...] = (3, 3, 9, 3)
  stage_channels: tuple[int, ...] = (96, 192, 384, 768)
  conv_stem: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    """Checks the fields."""
    base.check_sizes("stage_sizes", self.stage_sizes)
    base.check_sizes("stage_channels", self.stage_channels)
    if len(self.stage_sizes) != len(self.stage_channels):
      raise UserError(
        f"stage_channels: {self.stage_channels}; allowed: as many as"
        f" stage_sizes has, {len(self.stage_sizes)}"
      )
    base.check_sizes("conv_stem", self.conv_stem, empty=True)
    if len(self.conv_stem) == 1:
      raise UserError(
        f"conv_stem: {self.conv_stem}; allowed: none, or at least two"
        " convolutions, which halve 4 pixels to 1"
      )
    super().__post_init__()

  def _unit(self, x: Array, name: str) -> Array:
    """Applies a block: depthwise 7x7 convolution, LayerNorm, perceptron."""
    channels = x.shape[-1]
    h = self._wide_conv(x, f"{name}_conv", channels, 7, groups=channels)
    h = self._layer_norm(h, f"{name}_norm")
    h = self._mlp(h, name, 4 * channels)
    h = self._scale(h, f"{name}_scale", 1e-6)
    return base.Features(name=name)(x + h)

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; there is no BatchNorm, `train` changes nothing."""
    del train
    x = self._normalize(images, 2 ** (len(self.stage_sizes) + 1))
    if self.conv_stem:
      x = self._conv_stem(x, self.conv_stem, 2)
    else:
      x = self._wide_conv(x, "stem", self.stage_channels[0], 4, 4)
      x = self._layer_norm(x, "stem_norm")
    stages = zip(self.stage_sizes, self.stage_channels, strict=True)
    for stage, (size, channels) in enumerate(stages, start=1):
      if stage > 1:
        name = f"stage{stage}_downsample"
        x = self._layer_norm(x, f"{name}_norm")
        x = self._wide_conv(x, name, channels, 2, 2)
      for unit in range(1, size + 1):
        x = self._unit(x, f"stage{stage}_unit{unit}")
    x = base.Features(name="features")(x)
    return self._head(self._layer_norm(x.mean((1, 2)), "final_norm"))
