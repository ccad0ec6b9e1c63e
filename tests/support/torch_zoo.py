"""Twins of the networks in PyTorch, written from their description.

Their state dicts have the names of torchvision (VGG, ResNet, DenseNet), of Rice
et al. (PreActResNet) and of TRADES (WideResNet). A forward pass takes images
[B, C, H, W] in [0, 1] and returns logits and the tensors at our taps, in the
graph of the logits.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Output = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Normalize:
  def __init__(self, model: Any) -> None:
    self.values = None
    if model.normalization == "dataset":
      self.values = model.mean, model.std

  def __call__(self, x: torch.Tensor) -> torch.Tensor:
    if self.values is None:
      return x
    mean, std = (
      torch.tensor(v, dtype=x.dtype)[:, None, None] for v in self.values
    )
    return (x - mean) / std


def conv(
  inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = False
) -> nn.Conv2d:
  return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)


class VGG(nn.Module):
  def __init__(self, model: Any) -> None:
    super().__init__()
    self.normalize = Normalize(model)
    layers: list[nn.Module] = []
    inputs = 3
    for size, channels in zip(
      model.stage_sizes, model.stage_channels, strict=True
    ):
      for _ in range(size):
        layers.append(conv(inputs, channels, 3, bias=True))
        if model.use_batch_norm:
          layers.append(nn.BatchNorm2d(channels))
        layers.append(nn.ReLU())
        inputs = channels
      layers.append(nn.MaxPool2d(2, 2))
    self.features = nn.Sequential(*layers)
    self.classifier = nn.Sequential(
      nn.Linear(inputs * 49, model.hidden),
      nn.ReLU(),
      nn.Dropout(),
      nn.Linear(model.hidden, model.hidden),
      nn.ReLU(),
      nn.Dropout(),
      nn.Linear(model.hidden, model.num_classes),
    )

  def forward(self, x: torch.Tensor) -> Output:
    taps = {}
    x = self.normalize(x)
    for layer in self.features:
      if isinstance(layer, nn.MaxPool2d):
        taps[f"stage{len(taps) + 1}"] = x
      x = layer(x)
    taps["features"] = taps[f"stage{len(taps)}"]
    x = functional.adaptive_avg_pool2d(x, 7)
    return self.classifier(x.flatten(1)), taps


class ResidualBlock(nn.Module):
  def __init__(
    self, inputs: int, channels: int, stride: int, bottleneck: bool
  ) -> None:
    super().__init__()
    if bottleneck:
      outputs = 4 * channels
      self.conv1 = conv(inputs, channels, 1)
      self.conv2 = conv(channels, channels, 3, stride)
      self.conv3 = conv(channels, outputs, 1)
      self.bn3 = nn.BatchNorm2d(outputs)
    else:
      outputs = channels
      self.conv1 = conv(inputs, channels, 3, stride)
      self.conv2 = conv(channels, channels, 3)
    self.bn1 = nn.BatchNorm2d(channels)
    self.bn2 = nn.BatchNorm2d(channels)
    self.bottleneck = bottleneck
    self.outputs = outputs
    if stride != 1 or inputs != outputs:
      self.downsample = nn.Sequential(
        conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
      )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    out = self.bn1(self.conv1(x)).relu()
    out = self.bn2(self.conv2(out))
    if self.bottleneck:
      out = self.bn3(self.conv3(out.relu()))
    identity = self.downsample(x) if hasattr(self, "downsample") else x
    return (out + identity).relu()


class ResNet(nn.Module):
  def __init__(self, model: Any) -> None:
    super().__init__()
    self.normalize = Normalize(model)
    inputs = model.base_channels
    self.conv1 = conv(3, inputs, 7, 2)
    self.bn1 = nn.BatchNorm2d(inputs)
    self.stages = []
    for stage, size in enumerate(model.stage_sizes):
      blocks = []
      for unit in range(size):
        stride = 2 if stage and not unit else 1
        channels = model.base_channels << stage
        block = ResidualBlock(inputs, channels, stride, model.bottleneck)
        blocks.append(block)
        inputs = block.outputs
      name = f"layer{stage + 1}"
      self.add_module(name, nn.Sequential(*blocks))
      self.stages.append(name)
    self.fc = nn.Linear(inputs, model.num_classes)

  def forward(self, x: torch.Tensor) -> Output:
    taps = {}
    x = self.bn1(self.conv1(self.normalize(x))).relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    for stage, name in enumerate(self.stages, start=1):
      for unit, block in enumerate(getattr(self, name), start=1):
        x = taps[f"stage{stage}_unit{unit}"] = block(x)
    taps["features"] = x
    return self.fc(x.mean((2, 3))), taps


class DenseLayer(nn.Module):
  def __init__(self, inputs: int, bottleneck: int, growth: int) -> None:
    super().__init__()
    self.norm1 = nn.BatchNorm2d(inputs)
    self.conv1 = conv(inputs, bottleneck * growth, 1)
    self.norm2 = nn.BatchNorm2d(bottleneck * growth)
    self.conv2 = conv(bottleneck * growth, growth, 3)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    out = self.conv1(self.norm1(x).relu())
    return torch.cat([x, self.conv2(self.norm2(out).relu())], 1)


class DenseNet(nn.Module):
  def __init__(self, model: Any) -> None:
    super().__init__()
    self.normalize = Normalize(model)
    channels = model.base_channels
    parts: OrderedDict[str, nn.Module] = OrderedDict(
      conv0=conv(3, channels, 7, 2),
      norm0=nn.BatchNorm2d(channels),
      relu0=nn.ReLU(),
      pool0=nn.MaxPool2d(3, 2, 1),
    )
    for stage, size in enumerate(model.stage_sizes, start=1):
      block: OrderedDict[str, nn.Module] = OrderedDict()
      for unit in range(1, size + 1):
        layer = DenseLayer(channels, model.bottleneck, model.growth)
        block[f"denselayer{unit}"] = layer
        channels += model.growth
      parts[f"denseblock{stage}"] = nn.Sequential(block)
      if stage < len(model.stage_sizes):
        transition = OrderedDict(
          norm=nn.BatchNorm2d(channels),
          relu=nn.ReLU(),
          conv=conv(channels, channels // 2, 1),
          pool=nn.AvgPool2d(2, 2),
        )
        parts[f"transition{stage}"] = nn.Sequential(transition)
        channels //= 2
    parts["norm5"] = nn.BatchNorm2d(channels)
    self.features = nn.Sequential(parts)
    self.classifier = nn.Linear(channels, model.num_classes)

  def forward(self, x: torch.Tensor) -> Output:
    taps = {}
    x = self.normalize(x)
    for name, part in self.features.named_children():
      x = part(x)
      if name.startswith("denseblock"):
        taps[f"stage{name.removeprefix('denseblock')}"] = x
    x = taps["features"] = x.relu()
    return self.classifier(x.mean((2, 3))), taps


class PreActBlock(nn.Module):
  """Also the block of TRADES, with another name for the shortcut."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    stride: int,
    shortcut: str | None,
    activated: bool = True,
  ) -> None:
    super().__init__()
    self.bn1 = nn.BatchNorm2d(inputs)
    self.conv1 = conv(inputs, outputs, 3, stride)
    self.bn2 = nn.BatchNorm2d(outputs)
    self.conv2 = conv(outputs, outputs, 3)
    self.activated = activated
    self.name = None
    if stride != 1 or inputs != outputs:
      self.name = shortcut
      down = conv(inputs, outputs, 1, stride)
      self.add_module(
        shortcut, nn.Sequential(down) if shortcut == "shortcut" else down
      )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    out = self.bn1(x).relu()
    if self.name:
      x = getattr(self, self.name)(out if self.activated else x)
    return x + self.conv2(self.bn2(self.conv1(out)).relu())


class PreActResNet(nn.Module):
  def __init__(self, model: Any) -> None:
    super().__init__()
    self.normalize = Normalize(model)
    inputs = model.base_channels
    self.conv1 = conv(3, inputs, 3)
    self.stages = []
    for stage, size in enumerate(model.stage_sizes):
      blocks = []
      for unit in range(size):
        outputs = model.base_channels << stage
        stride = 2 if stage and not unit else 1
        activated = model.activated_shortcut
        blocks.append(
          PreActBlock(inputs, outputs, stride, "shortcut", activated)
        )
        inputs = outputs
      name = f"layer{stage + 1}"
      self.add_module(name, nn.Sequential(*blocks))
      self.stages.append(name)
    self.bn = nn.BatchNorm2d(inputs)
    self.linear = nn.Linear(inputs, model.num_classes)

  def forward(self, x: torch.Tensor) -> Output:
    taps = {}
    x = self.conv1(self.normalize(x))
    for stage, name in enumerate(self.stages, start=1):
      for unit, block in enumerate(getattr(self, name), start=1):
        x = taps[f"stage{stage}_unit{unit}"] = block(x)
    x = taps["features"] = self.bn(x).relu()
    return self.linear(x.mean((2, 3))), taps


class Group(nn.Module):
  def __init__(self, layer: Sequence[nn.Module]) -> None:
    super().__init__()
    self.layer = nn.Sequential(*layer)


class WideResNet(nn.Module):
  """TRADES's, with the second first block that its forward pass never calls."""

  def __init__(self, model: Any) -> None:
    super().__init__()
    self.normalize = Normalize(model)
    inputs = model.stem_channels
    self.conv1 = conv(3, inputs, 3)
    for stage, stride in enumerate(model.strides, start=1):
      outputs = model.stem_channels * model.width << (stage - 1)

      def group(
        inputs: int = inputs, outputs: int = outputs, stride: int = stride
      ) -> Group:
        blocks = [PreActBlock(inputs, outputs, stride, "convShortcut")]
        for _ in range((model.depth - 4) // 6 - 1):
          blocks.append(PreActBlock(outputs, outputs, 1, None))
        return Group(blocks)

      self.add_module(f"block{stage}", group())
      if stage == 1:
        self.sub_block1 = group()
      inputs = outputs
    self.bn1 = nn.BatchNorm2d(inputs)
    self.fc = nn.Linear(inputs, model.num_classes)

  def forward(self, x: torch.Tensor) -> Output:
    taps = {}
    x = self.conv1(self.normalize(x))
    for stage in (1, 2, 3):
      group = getattr(self, f"block{stage}")
      for unit, block in enumerate(group.layer, start=1):
        x = taps[f"stage{stage}_unit{unit}"] = block(x)
    x = taps["features"] = self.bn1(x).relu()
    return self.fc(x.mean((2, 3))), taps


TWINS = {
  "vgg16": VGG,
  "vgg16_bn": VGG,
  "resnet18": ResNet,
  "resnet50": ResNet,
  "densenet121": DenseNet,
  "preact_resnet18": PreActResNet,
  "wide_resnet": WideResNet,
}


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
  """Draws every number of the state dict, so that a mistake in any shows."""
  generator = torch.Generator().manual_seed(seed)
  state = network.state_dict()
  for name, tensor in state.items():
    if not tensor.is_floating_point():
      continue
    normal = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim > 1:
      value = normal * math.sqrt(2 / tensor[0].numel())
    elif name.endswith("running_var"):
      value = torch.rand(tensor.shape, generator=generator) + 0.5
    elif name.endswith("weight"):
      value = 1 + 0.2 * normal
    else:
      value = 0.2 * normal
    state[name] = value
  network.load_state_dict(state)
  return network.eval()
