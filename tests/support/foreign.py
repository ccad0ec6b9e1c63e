"""Networks that a user may bring, in linen and nnx, at toy size."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from atat_jax.models.base import Features

NUM_CLASSES = 3


def _head(x: jax.Array) -> jax.Array:
  return nn.Dense(NUM_CLASSES, name="head")(x.mean((1, 2)))


class Vgg(nn.Module):
  """Convolutions and pooling, one after the other."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for number in (1, 2):
      x = nn.relu(nn.Conv(4, (3, 3), name=f"conv{number}")(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    return _head(x)


class ResidualBlock(nn.Module):
  """A block that is a submodule of its own."""

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False
  ) -> tuple[jax.Array, None]:
    y = nn.Conv(4, (3, 3), name="conv")(nn.relu(x))
    norm = nn.BatchNorm(use_running_average=not train, name="norm")
    return x + norm(y), None


class ResNet(nn.Module):
  """Blocks as modules that return (x, None), as nn.scan asks for."""

  @nn.compact
  def __call__(self, x: jax.Array, training: bool) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="stem")(x)
    for number in (1, 2):
      x, _ = ResidualBlock(name=f"block{number}")(x, training)
    return _head(x)


class SumsAtTheTop(nn.Module):
  """Residual sums that no submodule returns."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="stem")(x)
    return _head(x + nn.Conv(4, (3, 3), name="branch")(nn.relu(x)))


class Inception(nn.Module):
  """Two branches that are concatenated outside any submodule."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="stem")(x)
    branches = [nn.Conv(2, (n, n), name=f"branch{n}")(x) for n in (1, 3)]
    return _head(jnp.concatenate(branches, -1))


class DenseNet(nn.Module):
  """Concatenations, and a last norm over all of them."""

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = False) -> jax.Array:
    for number in (1, 2):
      y = nn.Conv(2, (3, 3), name=f"conv{number}")(x)
      y = nn.Dropout(0.5, deterministic=deterministic)(y)
      x = jnp.concatenate([x, y], -1)
    return _head(nn.relu(nn.LayerNorm(name="norm")(x)))


class ConvNextBlock(nn.Module):
  """Depthwise convolution, norm and two dense layers on [B, h, w, C]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
    y = nn.Dense(8, name="up")(nn.LayerNorm(name="norm")(y))
    return x + nn.Dense(4, name="down")(nn.gelu(y))


class ConvNext(nn.Module):
  """Patches, blocks, and a norm of the pooled vector."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (2, 2), strides=2, name="patches")(x)
    x = ConvNextBlock(name="block2")(ConvNextBlock(name="block1")(x))
    x = nn.LayerNorm(name="norm")(x.mean((1, 2)))
    return nn.Dense(NUM_CLASSES, name="head")(x)


class Gated(nn.Module):
  """Squeeze and excitation, and a convolution of the pooled pixel."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="conv")(x)
    pooled = x.mean((1, 2), keepdims=True)
    x = x * nn.sigmoid(nn.Conv(4, (1, 1), name="gate")(pooled))
    pooled = x.mean((1, 2), keepdims=True)
    return _head(nn.relu(nn.Conv(4, (1, 1), name="pooled")(pooled)))


class Vit(nn.Module):
  """A vision transformer, with a class token or the mean of all tokens."""

  class_token: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(8, (2, 2), strides=2, name="patches")(x)
    x = x.reshape(len(x), -1, 8)
    if self.class_token:
      token = self.param("token", nn.initializers.normal(), (1, 1, 8))
      x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], 1)
    for number in (1, 2):
      y = nn.LayerNorm(name=f"norm{number}")(x)
      # As many heads as the grid has rows.
      x = x + nn.MultiHeadDotProductAttention(4, name=f"attention{number}")(y)
      x = Features(name=f"block{number}")(x)
    x = x[:, 0] if self.class_token else x.mean(1)
    return nn.Dense(NUM_CLASSES, name="head")(x)


class AttentionPool(nn.Module):
  """Heads of attention with as many tokens as heads, after convolutions."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="conv")(x)
    y = nn.DenseGeneral((4, 2), name="query")(x.mean(1)[:, :4])
    return nn.Dense(NUM_CLASSES, name="head")(
      x.mean((1, 2)) + y.sum((1, 3)) / 8
    )


class Twice(nn.Module):
  """One module called twice after another: the fault of the default layer."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="first")(x)
    last = nn.Conv(4, (3, 3), name="last")
    return _head(last(nn.relu(last(nn.relu(x)))))


class Remat(nn.Module):
  """A block under nn.remat; its output has a name if it is asked for."""

  named: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="first")(x)
    x, _ = nn.remat(ResidualBlock)(name="block")(x)
    return _head(Features(name="features")(x) if self.named else x)


class Scan(nn.Module):
  """Three blocks under nn.scan."""

  named: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="first")(x)
    blocks = nn.scan(
      ResidualBlock,
      variable_axes={"params": 0, "batch_stats": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=3,
    )
    x, _ = blocks(name="blocks")(x, False)
    return _head(Features(name="features")(x) if self.named else x)


class Auxiliary(nn.Module):
  """A convolution of which the logits know nothing."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="first")(x)
    self.sow("intermediates", "aux", nn.Conv(4, (3, 3), name="aux")(x))
    return _head(x)


class RawConvolution(nn.Module):
  """A convolution that no submodule makes."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(4, (3, 3), name="first")(x)
    kernel = self.param("kernel", nn.initializers.normal(), (3, 3, 4, 4))
    numbers = ("NHWC", "HWIO", "NHWC")
    return _head(
      jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers
      )
    )


class ReturnsATuple(nn.Module):
  """Logits and a tensor beside them."""

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = nn.Conv(4, (3, 3), name="conv")(x)
    return _head(x), x


class NeedsAMask(nn.Module):
  """A network with an argument that is no mode."""

  @nn.compact
  def __call__(self, x: jax.Array, mask: Any) -> jax.Array:
    return _head(nn.Conv(4, (3, 3), name="conv")(x) * mask)


class NnxTwice(nnx.Module):
  """One module called twice; neither statistics nor dropout."""

  def __init__(self) -> None:
    rngs = nnx.Rngs(0)
    self.first = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.last = nnx.Conv(4, 4, (3, 3), rngs=rngs)
    self.head = nnx.Linear(4, NUM_CLASSES, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.last(nnx.relu(self.last(nnx.relu(self.first(x)))))
    return self.head(x.mean((1, 2)))


class NnxRemat(NnxTwice):
  """The last module under nnx.remat."""

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.remat(lambda last, x: last(x))(self.last, self.first(x))
    return self.head(x.mean((1, 2)))


class NnxBlock(nnx.Module):
  """A residual block with BatchNorm."""

  def __init__(self, rngs: nnx.Rngs):
    self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return x + nnx.relu(self.norm(self.conv(x)))


class NnxResNet(nnx.Module):
  """A stem, blocks in a list, dropout and a head; made in training mode."""

  def __init__(self, seed: int):
    rngs = nnx.Rngs(seed)
    self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(4, NUM_CLASSES, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return self.head(self.dropout(x.mean((1, 2))))
