"""Wide ResNet (Zagoruyko and Komodakis, 2016), by default the paper's variant.

The defaults are those of the paper's released network: leaky ReLU 0.1,
shortcuts by average pooling and zero channels, per-image standardisation
inside the network. `shortcut="conv"` gives the usual WRN-28-10 and WRN-34-10
of the robustness literature.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.models.base import Features, Network, check_size, check_sizes
from atat_jax.typing import Array

_DEEPEST = 10_000
ACTIVATIONS = {"leaky_relu": nn.leaky_relu, "relu": nn.relu, "silu": nn.silu}


def average_pool(x: Array, stride: int) -> Array:
  """Averages non-overlapping squares.

  Equal to `nn.avg_pool` with a window of that stride, but by plain sums: on CPU
  XLA's windows and their gradients are slower.

  Args:
    x: Input [B, H, W, C]; `stride` divides H and W.
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


class WideResNet(Network):
  """Wide ResNet: images [B, H, W, C] in [0, 1] to float32 logits [B, K].

  Tappable layers: `stage<s>_unit<u>` (the residual sums) and `features`, the
  tensor before global pooling that the paper calls the topmost convolution
  layer. `Network` describes the other fields.

  Attributes:
    depth: Depth 6n + 2, or 6n + 4 in the usual count, for n units a stage.
    width: Factor on the channels of the stages, 16, 32, 64.
    activation: "leaky_relu", "relu" or "silu".
    negative_slope: Slope of the leaky ReLU below zero.
    shortcut: "pad" (average pooling, zero channels on both sides; the paper)
      or "conv" (1x1 convolution of the activated input; the usual network).
    strides: Strides of the three stages.
    stem_channels: Channels of the first convolution, and of the first stage
      before `width` multiplies them.
    padding: "same" (TensorFlow's, the paper) or "symmetric" (PyTorch's).
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
  batch_norm_epsilon: float = 1e-3

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.count("depth", self.depth)
    checks.integer("depth", self.depth, 1, _DEEPEST)
    if self.depth < 8 or (self.depth - 2) % 6 not in (0, 2):
      raise UserError(
        f"depth: {self.depth}; allowed: 6n + 2 (8, 14, 20, 26, 32) or"
        " 6n + 4 (10, 16, 22, 28, 34)"
      )
    for name in ("width", "stem_channels"):
      check_size(name, getattr(self, name))
    checks.number("negative_slope", self.negative_slope)
    checks.choice("activation", self.activation, ACTIVATIONS)
    checks.choice("shortcut", self.shortcut, ("pad", "conv"))
    checks.choice("padding", self.padding, ("same", "symmetric"))
    if len(checks.sequence("strides", self.strides, "integers >= 1")) != 3:
      raise UserError(f"strides: {self.strides}; allowed: three integers >= 1")
    check_sizes("strides", self.strides)
    super().__post_init__()

  def _norm_act(self, x: Array, name: str, train: bool) -> Array:
    x = self._norm(x, name, train)
    if self.activation == "leaky_relu":
      return nn.leaky_relu(x, self.negative_slope)
    return ACTIVATIONS[self.activation](x)

  def _unit(
    self, x: Array, name: str, features: int, stride: int, train: bool
  ) -> Array:
    """Applies a pre-activation residual unit."""
    widens = x.shape[-1] != features
    # In the paper's network only the very first unit feeds the activated input
    # to its shortcut, in the usual one every unit that changes the width.
    shared = widens if self.shortcut == "conv" else name == "stage1_unit1"
    h = self._norm_act(x, f"{name}_bn1", train)
    shortcut = h if shared else x
    conv = functools.partial(self._conv, padding=self.padding)
    h = conv(f"{name}_conv1", features, stride)(h)
    h = self._norm_act(h, f"{name}_bn2", train)
    h = conv(f"{name}_conv2", features)(h)
    if self.shortcut == "conv":
      if widens or stride > 1:
        shortcut = conv(f"{name}_shortcut", features, stride, 1)(shortcut)
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
    """Computes logits; `train` uses batch statistics and updates running ones."""
    x = self._normalize(images)
    x = self._conv("stem", self.stem_channels, padding=self.padding)(x)
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
    return self._head(x)
