"""What the networks share: normalised input, layers by name, the head."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.models.convolution import CONVOLUTIONS, Conv
from atat_jax.typing import Array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Those that torchvision's weights were trained with."""


class Features(nn.Module):
  """The identity, with a name: the place where attention is tapped."""

  def __call__(self, x: Array) -> Array:
    """Returns x."""
    return x


def standardize_images(images: Array) -> Array:
  """Subtracts each image's mean and divides by its standard deviation.

  As `tf.image.per_image_standardization`: the deviation is floored at
  1 / sqrt(H * W * C) in pixels of 0 to 255, here scaled to [0, 1].

  Args:
    images: [B, H, W, C] in [0, 1].

  Returns:
    [B, H, W, C].
  """
  # Over one long axis: on CPU a fifth of what three short ones take.
  flat = images.reshape(images.shape[0], -1)
  centred = flat - flat.mean(-1, keepdims=True)
  variance = jnp.square(centred).mean(-1, keepdims=True)
  floor = 1.0 / (255.0**2 * images[0].size)
  # The floor goes under the root: its gradient at a constant image is finite.
  standardized = centred / jnp.sqrt(jnp.maximum(variance, floor))
  return standardized.reshape(images.shape)


def check_sizes(name: str, sizes: Sequence[int]) -> None:
  """Checks a tuple of integers >= 1, one for each stage.

  Raises:
    UserError: It is empty or holds anything else.
  """
  if not sizes or not all(isinstance(n, int) and n >= 1 for n in sizes):
    raise UserError(
      f"{name}: {sizes}; allowed: integers >= 1, one for each stage"
    )


class Network(nn.Module):
  """The fields of all networks, and their layers.

  Images [B, H, W, C] in [0, 1] to logits float32 [B, num_classes]. The tensor
  of the last convolution, before pooling, is always tappable as `features`.

  Attributes:
    num_classes: K.
    normalization: "dataset" (subtract mean, divide by std), "per_image" (see
      `standardize_images`) or "none".
    mean: Per-channel mean of the data set's pixels in [0, 1].
    std: Per-channel standard deviation.
    batch_norm_momentum: Decay of the running statistics; PyTorch's momentum
      0.1 is 0.9 here.
    batch_norm_epsilon: Added to the variance.
    dtype: Of the convolutions; parameters, statistics and logits stay float32.
    convolution: See `convolution.convolve`.
  """

  num_classes: int = 1000
  normalization: str = "dataset"
  mean: tuple[float, ...] | None = IMAGENET_MEAN
  std: tuple[float, ...] | None = IMAGENET_STD
  batch_norm_momentum: float = 0.9
  batch_norm_epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32
  convolution: str = "auto"

  def __post_init__(self) -> None:
    """Refuses fields that make no network."""
    checks.positive("num_classes", self.num_classes, integer=True)
    checks.positive("batch_norm_epsilon", self.batch_norm_epsilon)
    if not 0 < self.batch_norm_momentum < 1:
      raise UserError(
        f"batch_norm_momentum: {self.batch_norm_momentum}; allowed: (0, 1)"
      )
    checks.choice("convolution", self.convolution, CONVOLUTIONS)
    checks.choice(
      "normalization", self.normalization, ("per_image", "dataset", "none")
    )
    if self.normalization == "dataset" and not (self.mean and self.std):
      raise UserError(
        "mean, std: missing; normalization='dataset' needs both, one number"
        " a channel"
      )
    if self.std and min(self.std) <= 0:
      raise UserError(f"std: {self.std}; allowed: > 0")
    super().__post_init__()

  def _normalize(self, images: Array, smallest: int = 1) -> Array:
    """Checks the images' shape and normalises them."""
    if min(images.shape[1:3]) < smallest:
      raise UserError(
        f"images: {images.shape[1]}x{images.shape[2]} pixels; allowed: at least"
        f" {smallest} a side"
      )
    if self.normalization == "per_image":
      return standardize_images(images)
    if self.normalization == "none":
      return images
    mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
    if len(mean) != images.shape[-1]:
      raise UserError(
        f"mean: {len(mean)} numbers for {images.shape[-1]} channels;"
        " allowed: one a channel"
      )
    return (images - mean) / std

  def _conv(
    self,
    name: str,
    features: int,
    stride: int = 1,
    kernel_size: int = 3,
    *,
    padding: str = "symmetric",
    use_bias: bool = False,
  ) -> Conv:
    return Conv(
      features=features,
      kernel_size=kernel_size,
      stride=stride,
      padding=padding,
      use_bias=use_bias,
      dtype=self.dtype,
      convolution=self.convolution,
      name=name,
    )

  def _norm(self, x: Array, name: str, train: bool) -> Array:
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=self.batch_norm_momentum,
      epsilon=self.batch_norm_epsilon,
      dtype=self.dtype,
      name=name,
    )(x)

  def _stem(self, x: Array, features: int, train: bool) -> Array:
    """ImageNet's: a quarter of the height and of the width."""
    x = self._conv("stem", features, 2, 7)(x)
    x = nn.relu(self._norm(x, "stem_bn", train))
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

  def _head(self, x: Array) -> Array:
    """Logits [B, K] of vectors [B, n] or, pooled, of a tensor [B, h, w, C]."""
    # Pooled and classified in float32: attacks need exact logits.
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    if x.ndim == 4:
      x = x.mean((1, 2))
    # TensorFlow 1's uniform unit scaling: variance 1 / fan_in.
    init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    return nn.Dense(
      self.num_classes, dtype=x.dtype, kernel_init=init, name="head"
    )(x)


class ResidualNetwork(Network):
  """Stages of residual units `_unit(x, name, features, stride, train)`.

  Attributes:
    stage_sizes: Residual units in each stage; the channels double from stage
      to stage, and all but the first halve the height and the width.
    base_channels: Of the first stage.
  """

  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
  base_channels: int = 64

  def __post_init__(self) -> None:
    """Refuses fields that make no network."""
    check_sizes("stage_sizes", self.stage_sizes)
    checks.positive("base_channels", self.base_channels, integer=True)
    super().__post_init__()

  def _unit(
    self, x: Array, name: str, features: int, stride: int, train: bool
  ) -> Array:
    raise NotImplementedError

  def _stages(self, x: Array, train: bool) -> Array:
    for stage, size in enumerate(self.stage_sizes, start=1):
      features = self.base_channels * 2 ** (stage - 1)
      for unit in range(1, size + 1):
        stride = 2 if unit == 1 and stage > 1 else 1
        x = self._unit(x, f"stage{stage}_unit{unit}", features, stride, train)
    return x
