"""Vision transformer (Dosovitskiy et al., 2021), as ViT and DeiT."""

import jax.numpy as jnp
from flax import linen as nn

from atat_jax.errors import UserError
from atat_jax.models import base, blocks
from atat_jax.typing import Array


class ViT(blocks.BlockNetwork):
  """ViT: images [B, H, W, C] in [0, 1] to float32 logits [B, num_classes].

  The defaults are ViT-B/16. Tappable: `features`, the normalised tokens that
  enter the last block's attention, as a grid without the class token. What
  follows mixes them into the class token only.

  Attributes:
    image_size: Height and width of the images in pixels.
    patch_size: Side of a patch in pixels.
    channels: Channels of a token.
    num_blocks: Number of transformer blocks.
    num_heads: Attention heads of a block; weights do not show them.
    hidden: Units of the hidden layer of a perceptron.
    conv_stem: Channels of the 3x3 convolutions with stride 2 of a ConvStem
      (Singh et al., 2023), whose strides make the patch; empty: none.
  """

  image_size: int = 224
  patch_size: int = 16
  channels: int = 768
  num_blocks: int = 12
  num_heads: int = 12
  hidden: int = 3072
  conv_stem: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    """Checks the fields."""
    names = "image_size patch_size channels num_blocks num_heads hidden"
    for name in names.split():
      base.check_size(name, getattr(self, name))
    if self.image_size % self.patch_size:
      raise UserError(
        f"patch_size: {self.patch_size}; allowed: divisors of image_size,"
        f" {self.image_size}"
      )
    if self.channels % self.num_heads:
      raise UserError(
        f"num_heads: {self.num_heads}; allowed: divisors of channels,"
        f" {self.channels}"
      )
    base.check_sizes("conv_stem", self.conv_stem, empty=True)
    if self.conv_stem:
      if self.patch_size != 2 ** len(self.conv_stem):
        raise UserError(
          f"conv_stem: {self.conv_stem}; allowed: as many convolutions as halve"
          f" {self.patch_size} pixels to 1"
        )
    super().__post_init__()

  def _patches(self, images: Array) -> Array:
    """Returns the grid of embedded patches [B, h, w, channels]."""
    x = self._normalize(images)
    if images.shape[1:3] != (self.image_size,) * 2:
      raise UserError(
        f"images: {images.shape[1]}x{images.shape[2]} pixels; allowed:"
        f" {self.image_size}x{self.image_size}, the positions that were learnt"
      )
    if self.conv_stem:
      x = self._conv_stem(x, self.conv_stem, len(self.conv_stem))
      return self._wide_conv(x, "embedding", self.channels, 1)
    size = self.patch_size
    return self._wide_conv(x, "stem", self.channels, size, size)

  def _attention(self, x: Array, name: str) -> Array:
    qkv = self._dense(x, f"{name}_qkv", 3 * self.channels)
    heads = [
      blocks.split_heads(part, self.num_heads)
      for part in jnp.split(qkv, 3, axis=-1)
    ]
    x = blocks.merge_heads(blocks.attend(*heads))
    return self._dense(x, f"{name}_proj", self.channels)

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; there is no BatchNorm, `train` changes nothing."""
    del train
    x = self._patches(images)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, -1, channels)
    token = blocks.Parameter((1, 1, channels), name="class_token")()
    token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, channels))
    x = jnp.concatenate([token, x], axis=1)
    shape = (1, x.shape[1], channels)
    x += blocks.Parameter(shape, name="positions")().astype(x.dtype)
    for number in range(1, self.num_blocks + 1):
      name = f"block{number}"
      h = self._layer_norm(x, f"{name}_norm1")
      if number == self.num_blocks:
        grid = h[:, 1:].reshape(batch, height, width, channels)
        grid = base.Features(tapped_by_default=True, name="features")(grid)
        grid = grid.reshape(batch, -1, channels)
        h = jnp.concatenate([h[:, :1], grid], axis=1)
      x += self._attention(h, name)
      h = self._layer_norm(x, f"{name}_norm2")
      x += self._mlp(h, name, self.hidden)
    return self._head(self._layer_norm(x, "final_norm")[:, 0])
