"""XCiT (El-Nouby et al., "Cross-covariance image transformers", 2021)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.models import base, blocks
from atat_jax.typing import Array

_FREQUENCIES = 32


def _fourier(height: int, width: int) -> np.ndarray:
  """Returns the positions of a grid as sines and cosines, [h, w, 64]."""
  exponents = 2 * (np.arange(_FREQUENCIES) // 2) / _FREQUENCIES
  parts = []
  for axis, size in enumerate((height, width)):
    angles = np.arange(1, size + 1) / (size + 1e-6) * 2 * math.pi
    waves = angles[:, None] / 10_000**exponents
    pairs = [np.sin(waves[:, 0::2]), np.cos(waves[:, 1::2])]
    part = np.stack(pairs, axis=2).reshape(size, _FREQUENCIES)
    part = np.expand_dims(part, 1 - axis)
    parts.append(np.broadcast_to(part, (height, width, _FREQUENCIES)))
  return np.concatenate(parts, axis=-1)


def _unit_length(x: Array) -> Array:
  """Divides by the length along the last axis, as PyTorch's `normalize`."""
  square = jnp.square(x).sum(-1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, 1e-24))


class XCiT(blocks.BlockNetwork):
  """XCiT: images [B, H, W, C] in [0, 1] to float32 logits [B, num_classes].

  The defaults are XCiT-S12/16. Tappable: `features`, the grid of tokens that
  the class token is read from.

  Attributes:
    patch_size: Side of a patch in pixels, a power of two; weights do not show
      it, as strides can be changed: 16 for ImageNet, 4 for CIFAR in
      Debenedetti et al., "A light recipe to train robust vision transformers"
      (2023).
    stem_convolutions: Number of convolutions that embed a patch.
    channels: Channels of a token.
    num_blocks: Number of cross-covariance blocks.
    num_class_blocks: Number of class-attention blocks.
    num_heads: Attention heads of a block.
    hidden: Units of the hidden layer of a perceptron.
    tokens_norm: Whether class-attention blocks normalise all tokens; weights
      do not show it.
  """

  patch_size: int = 16
  stem_convolutions: int = 4
  channels: int = 384
  num_blocks: int = 12
  num_class_blocks: int = 2
  num_heads: int = 8
  hidden: int = 1536
  tokens_norm: bool = True

  def __post_init__(self) -> None:
    """Checks the fields."""
    names = (
      "patch_size stem_convolutions channels num_blocks num_class_blocks"
      " num_heads hidden"
    )
    for name in names.split():
      base.check_size(name, getattr(self, name))
    checks.integer("stem_convolutions", self.stem_convolutions, 1, 16)
    if self.channels % self.num_heads:
      raise UserError(
        f"num_heads: {self.num_heads}; allowed: divisors of channels,"
        f" {self.channels}"
      )
    sizes = [2**n for n in range(self.stem_convolutions + 1)]
    if self.patch_size not in sizes:
      raise UserError(
        f"patch_size: {self.patch_size}; allowed: {', '.join(map(str, sizes))}"
      )
    super().__post_init__()

  def _patches(self, x: Array, train: bool) -> Array:
    """Returns the grid of embedded patches [B, h, w, channels]."""
    count = self.stem_convolutions
    halvings = self.patch_size.bit_length() - 1
    for index in range(1, count + 1):
      name = "stem" if index == 1 else f"stem{index}"
      features = self.channels >> (count - index)
      stride = 2 if index > count - halvings else 1
      x = self._wide_conv(x, name, features, 3, stride, use_bias=False)
      x = self._norm(x, f"{name}_bn", train)
      if index < count:
        x = nn.gelu(x, approximate=False)
    waves = jnp.asarray(_fourier(*x.shape[1:3]), x.dtype)[None]
    return x + self._wide_conv(waves, "positions", self.channels, 1)

  def _cross_covariance(self, x: Array, name: str) -> Array:
    qkv = self._dense(x, f"{name}_qkv", 3 * self.channels)
    # Attention is between channels: the tokens are the last axis.
    q, k, v = (
      blocks.split_heads(part, self.num_heads).swapaxes(-1, -2)
      for part in jnp.split(qkv, 3, axis=-1)
    )
    shape = (self.num_heads, 1, 1)
    temperature = blocks.Parameter(shape, 1.0, name=f"{name}_temperature")()
    scores = _unit_length(q) @ _unit_length(k).swapaxes(-1, -2)
    scores *= temperature.astype(x.dtype)
    x = jax.nn.softmax(scores, axis=-1) @ v
    return self._dense(
      blocks.merge_heads(x.swapaxes(-1, -2)), f"{name}_proj", self.channels
    )

  def _local(self, x: Array, name: str, train: bool) -> Array:
    """Mixes neighbours by two depthwise convolutions."""
    groups = self.channels
    x = self._wide_conv(x, f"{name}_conv1", groups, 3, groups=groups)
    x = self._norm(nn.gelu(x, approximate=False), f"{name}_bn", train)
    return self._wide_conv(x, f"{name}_conv2", groups, 3, groups=groups)

  def _block(
    self, x: Array, name: str, grid: tuple[int, ...], train: bool
  ) -> Array:
    h = self._cross_covariance(self._layer_norm(x, f"{name}_norm1"), name)
    x += self._scale(h, f"{name}_scale1", 1.0)
    h = self._layer_norm(x, f"{name}_norm3").reshape(grid)
    h = self._local(h, name, train).reshape(x.shape)
    x += self._scale(h, f"{name}_scale3", 1.0)
    h = self._mlp(self._layer_norm(x, f"{name}_norm2"), name, self.hidden)
    return x + self._scale(h, f"{name}_scale2", 1.0)

  def _class_block(self, x: Array, name: str) -> Array:
    """Lets the class token, the first, attend to all."""
    h = self._layer_norm(x, f"{name}_norm1")
    parts = {"q": h[:, :1], "k": h, "v": h}
    heads = [
      blocks.split_heads(
        self._dense(part, f"{name}_{letter}", self.channels), self.num_heads
      )
      for letter, part in parts.items()
    ]
    token = blocks.merge_heads(blocks.attend(*heads))
    token = self._dense(token, f"{name}_proj", self.channels)
    h = jnp.concatenate([token, h[:, 1:]], axis=1)
    x += self._scale(h, f"{name}_scale1", 1.0)
    normalized = self._layer_norm(
      x if self.tokens_norm else x[:, :1], f"{name}_norm2"
    )
    token = normalized[:, :1]
    rest = (normalized if self.tokens_norm else x)[:, 1:]
    h = self._scale(self._mlp(token, name, self.hidden), f"{name}_scale2", 1.0)
    # The published code adds the other tokens to themselves.
    return jnp.concatenate([token + h, 2 * rest], axis=1)

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Computes logits; `train` uses batch statistics and updates running ones."""
    x = self._patches(self._normalize(images, self.patch_size), train)
    grid = x.shape
    x = x.reshape(grid[0], -1, self.channels)
    for number in range(1, self.num_blocks + 1):
      x = self._block(x, f"block{number}", grid, train)
    x = base.Features(tapped_by_default=True, name="features")(x.reshape(grid))
    x = x.reshape(grid[0], -1, self.channels)
    shape = (1, 1, self.channels)
    token = blocks.Parameter(shape, name="class_token")().astype(x.dtype)
    token = jnp.broadcast_to(token, (grid[0], *shape[1:]))
    x = jnp.concatenate([token, x], axis=1)
    for number in range(1, self.num_class_blocks + 1):
      x = self._class_block(x, f"class_block{number}")
    return self._head(self._layer_norm(x, "final_norm")[:, 0])
