"""Residual networks as users write them, with flax's own layers.

He et al. (2016), basic blocks, in the layout for CIFAR. `support.pytorch` copies
them.
"""

from typing import Any

import jax
from flax import linen as nn

NETWORKS: dict[str, dict[str, Any]] = {
  "resnet-20": {"widths": (16, 32, 64), "blocks": 3},
  "resnet-18-half": {"widths": (32, 64, 128, 256), "blocks": 2},
  "resnet-8": {"widths": (8, 16, 32), "blocks": 1},
}
"""Fields of `PlainResNet` by name."""


class PlainResNet(nn.Module):
  """Residual network of `nn.Conv`, `nn.BatchNorm` and `nn.Dense`.

  Attributes:
    widths: Channels of the stages; each but the first halves the image.
    blocks: Blocks of a stage, two convolutions each.
    num_classes: Number of classes, K.
  """

  widths: tuple[int, ...]
  blocks: int
  num_classes: int = 10

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to logits [B, K]."""

    def layer(
      name: str, x: jax.Array, features: int, side: int, stride: int
    ) -> jax.Array:
      x = nn.Conv(
        features,
        (side, side),
        stride,
        padding=side // 2,
        use_bias=False,
        name=name,
      )(x)
      norm = nn.BatchNorm(use_running_average=not train, name=f"{name}_bn")
      return norm(x)

    x = nn.relu(layer("stem", images, self.widths[0], 3, 1))
    for stage, features in enumerate(self.widths):
      for block in range(self.blocks):
        name = f"stage{stage}_block{block}"
        stride = 2 if stage and not block else 1
        h = nn.relu(layer(f"{name}_first", x, features, 3, stride))
        h = layer(f"{name}_second", h, features, 3, 1)
        if stride > 1:
          x = layer(f"{name}_shortcut", x, features, 1, stride)
        x = nn.relu(x + h)
    return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))
