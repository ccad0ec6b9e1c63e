"""Wide ResNet (Zagoruyko and Komodakis, 2016), by default the paper's variant.

The defaults are those of the paper's released network: leaky ReLU 0.1,
shortcuts by average pooling and zero channels, per-image standardisation
inside the network. `shortcut="conv"` gives the usual WRN-28-10 and WRN-34-10
of the robustness literature.
"""

import functools
import math

import jax.numpy as jnp
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.models.convolution import CONVOLUTIONS, Conv
from atat_jax.typing import Array

ACTIVATIONS = {"leaky_relu": nn.leaky_relu, "relu": nn.relu, "silu": nn.silu}


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


def average_pool(x: Array, stride: int) -> Array:
  """Means of squares beside each other.

  As `nn.avg_pool` with a window of that stride, by plain sums: on CPU XLA's
  windows, and what autodiff makes of them, are slower.

  Args:
    x: [B, H, W, C]; `stride` divides H and W.
    stride: Side of the squares.

  Returns:
    [B, H / stride, W / stride, C].
  """
  batch, height, width, channels = x.shape
  rows = x.reshape(batch, height // stride, stride, width, channels)
  x = functools.reduce(jnp.add, (rows[:, :, i] for i in range(stride)))
  columns = x.reshape(*x.shape[:2], width // stride, stride, channels)
  x = functools.reduce(jnp.add, (columns[..., i, :] for i in range(stride)))
  return x / stride**2


class WideResNet(nn.Module):
  """Images [B, H, W, C] in [0, 1] to logits float32 [B, num_classes].

  Tappable layers: `stage<s>_unit<u>` (the residual sums) and `features`, the
  tensor before global pooling that the paper calls the topmost convolution
  layer.

  Attributes:
    depth: 6n + 2, or 6n + 4 in the usual count: n units in each stage.
    width: Factor on the channels of the stages, 16, 32, 64.
    num_classes: K.
    activation: "leaky_relu", "relu" or "silu".
    negative_slope: Of the leaky ReLU.
    shortcut: "pad" (average pooling, zero channels on both sides; the paper)
      or "conv" (1x1 convolution of the activated input; the usual network).
    normalization: "per_image" (the paper), "dataset" (needs mean and std) or
      "none".
    mean: Per-channel mean of the data set's pixels in [0, 1].
    std: Per-channel standard deviation.
    strides: Of the three stages.
    stem_channels: Channels of the first convolution and unit of the widths.
    padding: "same" (TensorFlow's, the paper) or "symmetric" (PyTorch's).
    batch_norm_momentum: Decay of the running statistics.
    batch_norm_epsilon: Added to the variance.
    dtype: Of the convolutions; parameters, statistics and logits stay float32.
    convolution: See `convolution.convolve`.
  """

  depth: int = 32
  width: int = 10
  num_classes: int = 10
  activation: str = "leaky_relu"
  negative_slope: float = 0.1
  shortcut: str = "pad"
  normalization: str = "per_image"
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  strides: tuple[int, int, int] = (1, 2, 2)
  stem_channels: int = 16
  padding: str = "same"
  batch_norm_momentum: float = 0.9
  batch_norm_epsilon: float = 1e-3
  dtype: jnp.dtype = jnp.float32
  convolution: str = "auto"

  def __post_init__(self) -> None:
    """Refuses fields that make no network."""
    checks.positive("depth", self.depth, integer=True)
    if self.depth < 8 or (self.depth - 2) % 6 not in (0, 2):
      raise UserError(
        f"depth: {self.depth}; allowed: 6n + 2 (8, 14, 20, 26, 32) or"
        " 6n + 4 (10, 16, 22, 28, 34)"
      )
    for name in ("width", "num_classes", "stem_channels"):
      checks.positive(name, getattr(self, name), integer=True)
    checks.positive("batch_norm_epsilon", self.batch_norm_epsilon)
    if not 0 < self.batch_norm_momentum < 1:
      raise UserError(
        f"batch_norm_momentum: {self.batch_norm_momentum}; allowed: (0, 1)"
      )
    if not math.isfinite(self.negative_slope):
      raise UserError(
        f"negative_slope: {self.negative_slope}; allowed: a finite number"
      )
    checks.choice("activation", self.activation, ACTIVATIONS)
    checks.choice("shortcut", self.shortcut, ("pad", "conv"))
    checks.choice("padding", self.padding, ("same", "symmetric"))
    checks.choice("convolution", self.convolution, CONVOLUTIONS)
    checks.choice(
      "normalization", self.normalization, ("per_image", "dataset", "none")
    )
    if len(self.strides) != 3 or not all(
      isinstance(stride, int) and stride >= 1 for stride in self.strides
    ):
      raise UserError(f"strides: {self.strides}; allowed: three integers >= 1")
    if self.normalization == "dataset" and not (self.mean and self.std):
      raise UserError(
        "mean, std: missing; normalization='dataset' needs both, one number"
        " a channel"
      )
    if self.std and min(self.std) <= 0:
      raise UserError(f"std: {self.std}; allowed: > 0")
    super().__post_init__()

  def _conv(
    self, name: str, features: int, stride: int = 1, kernel_size: int = 3
  ) -> Conv:
    return Conv(
      features=features,
      kernel_size=kernel_size,
      stride=stride,
      padding=self.padding,
      dtype=self.dtype,
      convolution=self.convolution,
      name=name,
    )

  def _norm_act(self, x: Array, name: str, train: bool) -> Array:
    x = nn.BatchNorm(
      use_running_average=not train,
      momentum=self.batch_norm_momentum,
      epsilon=self.batch_norm_epsilon,
      dtype=self.dtype,
      name=name,
    )(x)
    if self.activation == "leaky_relu":
      return nn.leaky_relu(x, self.negative_slope)
    return ACTIVATIONS[self.activation](x)

  def _unit(
    self, x: Array, name: str, features: int, stride: int, train: bool
  ) -> Array:
    """A pre-activation residual unit."""
    widens = x.shape[-1] != features
    # In the paper's network the very first unit shares its activation with the
    # shortcut, in the usual one every unit that changes the width.
    shared = widens if self.shortcut == "conv" else name == "stage1_unit1"
    h = self._norm_act(x, f"{name}_bn1", train)
    shortcut = h if shared else x
    h = self._conv(f"{name}_conv1", features, stride)(h)
    h = self._norm_act(h, f"{name}_bn2", train)
    h = self._conv(f"{name}_conv2", features)(h)
    if self.shortcut == "conv":
      if widens or stride > 1:
        shortcut = self._conv(f"{name}_shortcut", features, stride, 1)(shortcut)
    else:
      if stride > 1:
        if any(side % stride for side in shortcut.shape[1:3]):
          raise UserError(
            f"strides: {stride} on {shortcut.shape[1:3]} pixels; allowed with"
            " shortcut='pad': strides that divide the height and the width"
          )
        shortcut = average_pool(shortcut, stride)
      if widens:
        extra = features - shortcut.shape[-1]
        sides = (extra // 2, extra - extra // 2)
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), sides))
    return Features(name=name)(shortcut + h)

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """One forward pass; `train` uses and moves the batch statistics."""
    x = images
    if self.mean and len(self.mean) != images.shape[-1]:
      raise UserError(
        f"mean: {len(self.mean)} numbers for {images.shape[-1]} channels;"
        " allowed: one a channel"
      )
    if self.normalization == "per_image":
      x = standardize_images(x)
    elif self.normalization == "dataset":
      x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)
    x = self._conv("stem", self.stem_channels)(x)
    for stage, stride in enumerate(self.strides, start=1):
      features = self.stem_channels * self.width * 2 ** (stage - 1)
      for unit in range(1, (self.depth - 2) // 6 + 1):
        x = self._unit(
          x,
          f"stage{stage}_unit{unit}",
          features,
          stride if unit == 1 else 1,
          train,
        )
    x = Features(name="features")(self._norm_act(x, "final_bn", train))
    # Pooled and classified in float32: attacks need exact logits.
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype)).mean((1, 2))
    # TensorFlow 1's uniform unit scaling: variance 1 / fan_in.
    init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    return nn.Dense(
      self.num_classes, dtype=x.dtype, kernel_init=init, name="head"
    )(x)
