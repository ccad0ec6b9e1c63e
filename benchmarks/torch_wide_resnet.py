"""The Wide ResNet in PyTorch, with the weights of a flax one.

The peer of the benchmarks: written as a PyTorch user would write it, channels
first.
"""

from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atat_jax.models.wide_resnet import WideResNet

_ACTIVATIONS = {"relu": functional.relu, "silu": functional.silu}


def _tensor(array: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.array(array))


def _conv(kernel: np.ndarray, stride: int, padding: int) -> nn.Conv2d:
  size, _, inputs, outputs = kernel.shape
  conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
  conv.weight.data = _tensor(kernel.transpose(3, 2, 0, 1))
  return conv


def _norm(params: Any, stats: Any, epsilon: float) -> nn.BatchNorm2d:
  norm = nn.BatchNorm2d(len(params["scale"]), eps=epsilon)
  norm.weight.data = _tensor(params["scale"])
  norm.bias.data = _tensor(params["bias"])
  norm.running_mean = _tensor(stats["mean"])
  norm.running_var = _tensor(stats["var"])
  return norm


def _margins(size: int, kernel: int, stride: int) -> tuple[int, int]:
  """TensorFlow's "same": the odd pixel goes below and to the right."""
  total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


class TorchWideResNet(nn.Module):
  """Images [B, C, H, W] in [0, 1] to logits [B, K].

  Args:
    model: The flax module.
    variables: Its parameters and running statistics.
    dtype: Of weights and statistics.

  Raises:
    ValueError: The flax module computes in another dtype.
  """

  def __init__(
    self,
    model: WideResNet,
    variables: Any,
    dtype: torch.dtype = torch.float32,
  ):
    super().__init__()
    if np.dtype(model.dtype) != np.float32:
      raise ValueError(f"dtype: {np.dtype(model.dtype)}; allowed: float32")
    self.model = model
    params = jax.tree.map(np.asarray, variables["params"])
    stats = jax.tree.map(np.asarray, variables["batch_stats"])
    strides = {
      f"stage{stage}_unit1_{part}": stride
      for stage, stride in enumerate(model.strides, start=1)
      for part in ("conv1", "shortcut")
    }
    self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
    for name, value in params.items():
      if name in stats:
        self.norms[name] = _norm(value, stats[name], model.batch_norm_epsilon)
      elif name != "head":
        stride, size = strides.get(name, 1), len(value["kernel"])
        # Where both rules agree the convolution pads by itself.
        own = model.padding == "symmetric" or stride == 1
        self.convs[name] = _conv(
          value["kernel"], stride, size // 2 if own else 0
        )
    head = params["head"]
    self.head = nn.Linear(*head["kernel"].shape)
    self.head.weight.data = _tensor(head["kernel"].T)
    self.head.bias.data = _tensor(head["bias"])
    if model.normalization == "dataset":
      for name in ("mean", "std"):
        value = torch.tensor(getattr(model, name)).view(1, -1, 1, 1)
        self.register_buffer(name, value)
    self.to(dtype)
    self.eval()

  def _normalize(self, x: torch.Tensor) -> torch.Tensor:
    if self.model.normalization == "per_image":
      floor = 1.0 / (255.0**2 * x[0].numel())
      mean = x.mean((1, 2, 3), keepdim=True)
      variance = ((x - mean) ** 2).mean((1, 2, 3), keepdim=True)
      return (x - mean) / variance.clamp_min(floor).sqrt()
    if self.model.normalization == "dataset":
      return (x - self.mean) / self.std
    return x

  def _convolve(self, name: str, x: torch.Tensor) -> torch.Tensor:
    conv = self.convs[name]
    (size, _), (stride, _) = conv.kernel_size, conv.stride
    if self.model.padding == "same" and stride > 1:
      height, width = (_margins(n, size, stride) for n in x.shape[2:])
      if any(margins := (*width, *height)):
        x = functional.pad(x, margins)
    return conv(x)

  def _activate(self, name: str, x: torch.Tensor) -> torch.Tensor:
    x = self.norms[name](x)
    if self.model.activation == "leaky_relu":
      return functional.leaky_relu(x, self.model.negative_slope)
    return _ACTIVATIONS[self.model.activation](x)

  def _unit(
    self, x: torch.Tensor, name: str, features: int, stride: int
  ) -> torch.Tensor:
    widens = x.shape[1] != features
    conv_shortcut = self.model.shortcut == "conv"
    shared = widens if conv_shortcut else name == "stage1_unit1"
    h = self._activate(f"{name}_bn1", x)
    shortcut = h if shared else x
    h = self._convolve(f"{name}_conv1", h)
    h = self._convolve(f"{name}_conv2", self._activate(f"{name}_bn2", h))
    if conv_shortcut:
      if widens or stride > 1:
        shortcut = self._convolve(f"{name}_shortcut", shortcut)
    else:
      if stride > 1:
        shortcut = functional.avg_pool2d(shortcut, stride)
      if widens:
        extra = features - shortcut.shape[1]
        sides = (extra // 2, extra - extra // 2)
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, *sides))
    return shortcut + h

  def features(self, x: torch.Tensor) -> torch.Tensor:
    """Images to the tensor before the pooling, [B, C, h, w]."""
    model = self.model
    x = self._convolve("stem", self._normalize(x))
    for stage, stride in enumerate(model.strides, start=1):
      features = model.stem_channels * model.width * 2 ** (stage - 1)
      for unit in range(1, (model.depth - 2) // 6 + 1):
        name = f"stage{stage}_unit{unit}"
        x = self._unit(x, name, features, stride if unit == 1 else 1)
    return self._activate("final_bn", x)

  def classify(self, features: torch.Tensor) -> torch.Tensor:
    """That tensor to logits [B, K]."""
    return self.head(features.mean((2, 3)))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """One forward pass."""
    return self.classify(self.features(x))
