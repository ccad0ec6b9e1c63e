"""VGG-16 (Simonyan and Zisserman, 2015), as torchvision has it."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.models import base
from atat_jax.typing import Array

_GRID = 7  # of the last maps, whatever the size of the image


def _bins(size: int) -> np.ndarray:
  """[_GRID, size]: means over bins that cover the axis, as PyTorch cuts it.

  Bin i goes from floor(i n / 7) to ceil((i + 1) n / 7).
  """
  means = np.zeros((_GRID, size))
  for i in range(_GRID):
    start, end = i * size // _GRID, -(-(i + 1) * size // _GRID)
    means[i, start:end] = 1 / (end - start)
  return means


class VGG16(base.Network):
  """Images [B, H, W, C] in [0, 1] to logits float32 [B, num_classes].

  Tappable layers: `stage<s>`, each stage's last activation before pooling, and
  `features`, the last of them. There is no dropout: fine-tuning would need it,
  explaining and attacking do not.

  Attributes:
    stage_sizes: Convolutions in each stage.
    stage_channels: Their channels.
    hidden: Units of the two hidden dense layers.
    use_batch_norm: Whether each convolution has one behind it.
  """

  stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
  stage_channels: tuple[int, ...] = (64, 128, 256, 512, 512)
  hidden: int = 4096
  use_batch_norm: bool = False

  def __post_init__(self) -> None:
    """Refuses fields that make no network."""
    base.check_sizes("stage_sizes", self.stage_sizes)
    base.check_sizes("stage_channels", self.stage_channels)
    if len(self.stage_sizes) != len(self.stage_channels):
      raise UserError(
        f"stage_channels: {self.stage_channels}; allowed: as many as"
        f" stage_sizes has, {len(self.stage_sizes)}"
      )
    checks.positive("hidden", self.hidden, integer=True)
    super().__post_init__()

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """One forward pass; `train` uses and moves the batch statistics."""
    x = self._normalize(images, smallest=2 ** len(self.stage_sizes))
    stages = zip(self.stage_sizes, self.stage_channels, strict=True)
    for stage, (size, channels) in enumerate(stages, start=1):
      for layer in range(1, size + 1):
        name = f"stage{stage}_conv{layer}"
        x = self._conv(name, channels, use_bias=True)(x)
        if self.use_batch_norm:
          x = self._norm(x, f"stage{stage}_bn{layer}", train)
        x = nn.relu(x)
      x = base.Features(name=f"stage{stage}")(x)
      if stage == len(self.stage_sizes):
        x = base.Features(name="features")(x)
      x = nn.max_pool(x, (2, 2), (2, 2))
    rows, columns = (jnp.asarray(_bins(n), x.dtype) for n in x.shape[1:3])
    # Channels first, then flat: so the dense layer's weights are laid out.
    x = jnp.einsum("bhwc,ih,jw->bcij", x, rows, columns)
    x = x.reshape(x.shape[0], -1)
    for layer in (1, 2):
      dense = nn.Dense(
        self.hidden,
        dtype=self.dtype,
        kernel_init=nn.initializers.normal(0.01),
        name=f"hidden{layer}",
      )
      x = nn.relu(dense(x))
    return self._head(x)


class VGG16BN(VGG16):
  """VGG-16 with BatchNorm behind every convolution."""

  use_batch_norm: bool = True
