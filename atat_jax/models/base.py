"""Base classes of the networks: normalised input, named layers, the head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError, shown
from atat_jax.models.convolution import CONVOLUTIONS, Conv
from atat_jax.models.normalization import GroupedBatchNorm
from atat_jax.typing import Array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's pixels, as torchvision's weights expect."""


class Features(nn.Module):
  """Identity with a name: makes a tensor tappable by attention.

  Attributes:
    tapped_by_default: Whether attention taps this tensor where no layer is
      named, although what follows is tokens: the last grid of a transformer.
  """

  tapped_by_default: bool = False

  def __call__(self, x: Array) -> Array:
    """Returns x."""
    return x


def standardize_images(images: Array) -> Array:
  """Subtracts each image's mean and divides by its standard deviation.

  Same formula as `tf.image.per_image_standardization`: the deviation is floored
  at 1 / sqrt(H * W * C) in pixels of 0 to 255, here scaled to [0, 1].

  Args:
    images: [B, H, W, C] in [0, 1].

  Returns:
    [B, H, W, C].
  """
  images = checks.batch(images, "images", ndim=4)
  # On CPU reducing one long axis takes a fifth of the time of three short ones.
  flat = images.reshape(images.shape[0], -1)
  centred = flat - flat.mean(-1, keepdims=True)
  variance = jnp.square(centred).mean(-1, keepdims=True)
  floor = 1.0 / (255.0**2 * images[0].size)
  # Flooring inside the root keeps the gradient at a constant image finite.
  standardized = centred / jnp.sqrt(jnp.maximum(variance, floor))
  return standardized.reshape(images.shape)


LARGEST = 1_000_000
"""Largest number of classes, channels, units or layers of a network."""


def check_size(name: str, size: object) -> None:
  """Checks that a size is an integer from 1 to `LARGEST`.

  Raises:
    UserError: Anything else.
  """
  checks.count(name, size)
  checks.integer(name, size, 1, LARGEST)


def check_sizes(
  name: str, sizes: Sequence[int], *, empty: bool = False
) -> None:
  """Checks that sizes are integers >= 1, one for each stage.

  Args:
    name: Name of the field.
    sizes: The sizes.
    empty: Whether there may be none.

  Raises:
    UserError: The tuple is empty or holds anything else.
  """
  try:
    for size in checks.numbers(name, sizes, 1, integers=True, empty=empty):
      check_size(name, size)
  except UserError:
    raise UserError(
      f"{name}: {shown(sizes)}; allowed: integers >= 1 and <= {LARGEST}, one"
      " for each stage"
    ) from None


def _check_dtype(dtype: Any) -> None:
  """Checks that a computation is to be done in floating point."""
  try:
    ok = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    ok = False
  if not ok:
    raise UserError(
      f"dtype: {shown(dtype)}; allowed: a floating-point dtype, such as"
      " jnp.bfloat16"
    )


def _check_channels(name: str, values: Any) -> tuple[float, ...] | None:
  """Checks a mean or a deviation for each channel; None: not given."""
  if values is None:
    return None
  found = checks.sequence(name, values, "numbers, one a channel")
  for value in found:
    if name == "std":
      checks.positive(name, value)
    else:
      checks.number(name, value)
  return found


class Network(nn.Module):
  """Base class with the fields and the layers that all networks share.

  Maps images [B, H, W, C] in [0, 1] to float32 logits [B, num_classes]. The
  tensor of the last convolution, before pooling, is always tappable as
  `features`.

  Attributes:
    num_classes: Number of classes, K.
    normalization: Normalisation of the input: "dataset" (subtract mean, divide
      by std), "per_image" (see `standardize_images`) or "none".
    mean: Per-channel mean of the data set's pixels in [0, 1].
    std: Per-channel standard deviation.
    batch_norm_momentum: Decay of the running statistics; PyTorch's momentum
      0.1 is 0.9 here.
    batch_norm_epsilon: Constant added to the variance.
    batch_norm_group_size: Number of consecutive images that share statistics in
      training; 0: the whole batch.
    dtype: Dtype of the convolutions; parameters, statistics and logits stay
      float32.
    convolution: Form of the convolutions, see `convolution.convolve`.
  """

  num_classes: int = 1000
  normalization: str = "dataset"
  mean: tuple[float, ...] | None = IMAGENET_MEAN
  std: tuple[float, ...] | None = IMAGENET_STD
  batch_norm_momentum: float = 0.9
  batch_norm_epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32
  convolution: str = "auto"
  batch_norm_group_size: int = 0

  def __post_init__(self) -> None:
    """Checks the fields."""
    check_size("num_classes", self.num_classes)
    checks.positive("batch_norm_epsilon", self.batch_norm_epsilon)
    checks.fraction("batch_norm_momentum", self.batch_norm_momentum)
    checks.positive("batch_norm_momentum", self.batch_norm_momentum)
    checks.count("batch_norm_group_size", self.batch_norm_group_size, 0)
    _check_dtype(self.dtype)
    for field in dataclasses.fields(self):  # also those of subclasses
      if field.type is bool:
        checks.boolean(field.name, getattr(self, field.name))
    checks.choice("convolution", self.convolution, CONVOLUTIONS)
    checks.choice(
      "normalization", self.normalization, ("per_image", "dataset", "none")
    )
    numbers = [
      _check_channels(name, getattr(self, name)) for name in ("mean", "std")
    ]
    if self.normalization == "dataset" and None in numbers:
      raise UserError(
        "mean, std: missing; allowed: both, one number a channel, for"
        " normalization='dataset'"
      )
    if None not in numbers and len(self.mean) != len(self.std):  # type: ignore[arg-type]
      raise UserError(
        f"std: {self.std}; allowed: as many numbers as mean, {self.mean}"
      )
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
    if self.batch_norm_group_size:
      return GroupedBatchNorm(
        group_size=self.batch_norm_group_size,
        use_running_average=not train,
        momentum=self.batch_norm_momentum,
        epsilon=self.batch_norm_epsilon,
        dtype=self.dtype,
        name=name,
      )(x)
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=self.batch_norm_momentum,
      epsilon=self.batch_norm_epsilon,
      dtype=self.dtype,
      name=name,
    )(x)

  def _stem(self, x: Array, features: int, train: bool) -> Array:
    """Applies ImageNet's stem: a quarter of the height and of the width."""
    x = self._conv("stem", features, 2, 7)(x)
    x = nn.relu(self._norm(x, "stem_bn", train))
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

  def _head(self, x: Array) -> Array:
    """Maps vectors [B, n], or a tensor [B, h, w, C] to be pooled, to logits."""
    # Attacks need exact logits, so that pooling and head run in float32.
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    if x.ndim == 4:
      x = x.mean((1, 2))
    # TensorFlow 1's uniform unit scaling: variance 1 / fan_in.
    init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    return nn.Dense(
      self.num_classes, dtype=x.dtype, kernel_init=init, name="head"
    )(x)


class ResidualNetwork(Network):
  """Base class of networks with stages of residual units.

  A subclass defines the unit, `_unit(x, name, features, stride, train)`.

  Attributes:
    stage_sizes: Number of residual units in each stage. Channels double from
      stage to stage; every stage but the first halves height and width.
    base_channels: Channels of the first stage.
  """

  stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
  base_channels: int = 64

  def __post_init__(self) -> None:
    """Checks the fields."""
    check_sizes("stage_sizes", self.stage_sizes)
    check_size("base_channels", self.base_channels)
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
