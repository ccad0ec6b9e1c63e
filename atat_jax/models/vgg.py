"""VGG-16 (Simonyan and Zisserman, 2015), as in torchvision."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from atat_jax.errors import UserError
from atat_jax.models import base
from atat_jax.typing import Array

_GRID = 7  # side of the pooled maps, whatever the size of the image


def _bins(size: int) -> np.ndarray:
  """Returns the matrix [_GRID, size] of PyTorch's adaptive average pooling.

  Bin i covers floor(i n / 7) to ceil((i + 1) n / 7) of an axis of length n.
  """
  means = np.zeros((_GRID, size))
  for i in range(_GRID):
    start, end = i * size // _GRID, -(-(i + 1) * size // _GRID)
    means[i, start:end] = 1 / (end - start)
  return means


class VGG16(base.Network):
  """VGG: images [B, H, W, C] in [0, 1] to float32 logits [B, num_classes].

  Tappable layers: `stage<s>`, each stage's last activation before pooling, and
  `features`, the last of them. There is no dropout: fine-tuning would need it,
  explaining and attacking do not.

  Attributes:
    stage_sizes: Number of convolutions in each stage.
    stage_channels: Channels of each stage.
    hidden: Units of each of the two hidden dense layers.
    use_batch_norm: Whether BatchNorm follows each convolution.
  """

  stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
  stage_channels: tuple[int, ...] = (64, 128, 256, 512, 512)
  hidden: int = 4096
  use_batch_norm: bool = False

  def __post_init__(self) -> None:
    """Checks the fields."""
    base.check_sizes("stage_sizes", self.stage_sizes)
    base.check_sizes("stage_channels", self.stage_channels)
    if len(self.stage_sizes) != len(self.stage_channels):
      raise UserError(
        f"stage_channels: {self.stage_channels}; allowed: as many as"
        f" stage_sizes has, {len(self.stage_sizes)}"
      )
    base.check_size("hidden", self.hidden)
    super().__post_init__()

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; `train` uses batch statistics and updates running ones."""
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
    # PyTorch's dense weights expect channels first, then rows and columns.
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
  """VGG-16 with BatchNorm after every convolution."""

  use_batch_norm: bool = True
