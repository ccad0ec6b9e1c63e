"""Networks in PyTorch with the names of published code, written from papers.

Each takes normalised images [B, C, H, W] and returns logits. Sizes are free, so
that the tests are quick; names, order of operations, padding and constants are
those of the code that a docstring names.
"""

import torch
from torch import nn
from torch.nn import functional


def conv3(
  inputs: int, outputs: int, stride: int = 1, padding: int = 1
) -> nn.Conv2d:
  return nn.Conv2d(inputs, outputs, 3, stride, padding, bias=False)


def conv1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
  return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def same(x: torch.Tensor, stride: int) -> torch.Tensor:
  """TensorFlow's padding of an even number of pixels for a 3x3 kernel."""
  return functional.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


# --- DeepMind (Gowal et al., 2020; Rebuffi et al., 2021) ----------------------


class DeepMindUnit(nn.Module):
  def __init__(self, inputs: int, outputs: int, stride: int) -> None:
    super().__init__()
    self.batchnorm_0 = nn.BatchNorm2d(inputs)
    self.conv_0 = conv3(inputs, outputs, stride, 0)
    self.batchnorm_1 = nn.BatchNorm2d(outputs)
    self.conv_1 = conv3(outputs, outputs)
    self.stride = stride
    if inputs != outputs:
      self.shortcut = conv1(inputs, outputs, stride)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = functional.silu(self.batchnorm_0(x))
    if hasattr(self, "shortcut"):
      x = self.shortcut(h)
    h = self.conv_0(same(h, self.stride))
    return x + self.conv_1(functional.silu(self.batchnorm_1(h)))


class DeepMindGroup(nn.Module):
  def __init__(self, units: list[nn.Module]) -> None:
    super().__init__()
    self.block = nn.Sequential(*units)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.block(x)


class DeepMindWideResNet(nn.Module):
  """Wide ResNet of the names in `dm_wide_resnet.py`."""

  def __init__(self, units: int, width: int, stem: int, classes: int) -> None:
    super().__init__()
    self.init_conv = conv3(3, stem)
    groups, inputs = [], stem
    for stage, stride in enumerate((1, 2, 2)):
      outputs = stem * width << stage
      first = DeepMindUnit(inputs, outputs, stride)
      rest = [DeepMindUnit(outputs, outputs, 1) for _ in range(units - 1)]
      groups.append(DeepMindGroup([first, *rest]))
      inputs = outputs
    self.layer = nn.Sequential(*groups)
    self.batchnorm = nn.BatchNorm2d(inputs)
    self.logits = nn.Linear(inputs, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.layer(self.init_conv(x))
    x = functional.silu(self.batchnorm(x))
    return self.logits(x.mean((2, 3)))


class DeepMindPreActUnit(nn.Module):
  def __init__(self, inputs: int, outputs: int, stride: int) -> None:
    super().__init__()
    self.batchnorm_0 = nn.BatchNorm2d(inputs)
    self.conv_2d_1 = conv3(inputs, outputs, stride, 0)
    self.batchnorm_1 = nn.BatchNorm2d(outputs)
    self.conv_2d_2 = conv3(outputs, outputs)
    self.stride = stride
    if stride != 1 or inputs != outputs:
      self.shortcut = conv3(inputs, outputs, stride, 0)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = functional.silu(self.batchnorm_0(x))
    if hasattr(self, "shortcut"):
      x = self.shortcut(same(x, self.stride))
    h = self.conv_2d_1(same(h, self.stride))
    return x + self.conv_2d_2(functional.silu(self.batchnorm_1(h)))


class DeepMindPreActResNet(nn.Module):
  def __init__(self, sizes: tuple[int, ...], base: int, classes: int) -> None:
    super().__init__()
    self.conv_2d = conv3(3, base)
    self.sizes, inputs = sizes, base
    for stage, size in enumerate(sizes):
      outputs, units = base << stage, []
      for unit in range(size):
        stride = 2 if stage and not unit else 1
        units.append(DeepMindPreActUnit(inputs, outputs, stride))
        inputs = outputs
      self.add_module(f"layer_{stage}", nn.Sequential(*units))
    self.batchnorm = nn.BatchNorm2d(inputs)
    self.logits = nn.Linear(inputs, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.conv_2d(x)
    for stage in range(len(self.sizes)):
      x = getattr(self, f"layer_{stage}")(x)
    x = functional.silu(self.batchnorm(x))
    return self.logits(x.mean((2, 3)))


# --- TRADES; Rice, Wong and Andriushchenko ------------------------------------


class PreActUnit(nn.Module):
  """Unit of TRADES ("convShortcut") and of the PreActResNets ("shortcut")."""

  def __init__(
    self, inputs: int, outputs: int, stride: int, name: str, activated: bool
  ) -> None:
    super().__init__()
    self.bn1 = nn.BatchNorm2d(inputs)
    self.conv1 = conv3(inputs, outputs, stride)
    self.bn2 = nn.BatchNorm2d(outputs)
    self.conv2 = conv3(outputs, outputs)
    self.activated, self.changes = activated, inputs != outputs
    self.name = name
    if self.changes:
      shortcut = conv1(inputs, outputs, stride)
      if name == "shortcut":
        shortcut = nn.Sequential(shortcut)
      self.add_module(name, shortcut)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = self.bn1(x).relu()
    if self.changes:
      x = getattr(self, self.name)(h if self.activated else x)
    return x + self.conv2(self.bn2(self.conv1(h)).relu())


class TradesGroup(nn.Module):
  def __init__(self, units: list[nn.Module]) -> None:
    super().__init__()
    self.layer = nn.Sequential(*units)


class TradesWideResNet(nn.Module):
  def __init__(
    self, units: int, width: int, stem: int, classes: int, channels: int = 3
  ) -> None:
    super().__init__()
    self.conv1 = conv3(channels, stem)
    inputs = stem
    for stage, stride in enumerate((1, 2, 2), start=1):
      outputs = stem * width << (stage - 1)
      widths = [inputs] + [outputs] * (units - 1)
      strides = [stride] + [1] * (units - 1)
      group = [
        PreActUnit(w, outputs, s, "convShortcut", True)
        for w, s in zip(widths, strides, strict=True)
      ]
      self.add_module(f"block{stage}", TradesGroup(group))
      if stage == 1:  # never called
        unused = PreActUnit(inputs, outputs, 1, "convShortcut", True)
        self.sub_block1 = TradesGroup([unused])
      inputs = outputs
    self.bn1 = nn.BatchNorm2d(inputs)
    self.fc = nn.Linear(inputs, classes)

  def pooled(self, x: torch.Tensor) -> torch.Tensor:
    x = self.conv1(x)
    for group in (self.block1, self.block2, self.block3):
      x = group.layer(x)
    return self.bn1(x).relu().mean((2, 3))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc(self.pooled(x))


class PreActResNet(nn.Module):
  def __init__(
    self,
    sizes: tuple[int, ...],
    base: int,
    classes: int,
    *,
    activated: bool,
    final: bool = True,
  ) -> None:
    super().__init__()
    self.conv1 = conv3(3, base)
    self.sizes, inputs = sizes, base
    for stage, size in enumerate(sizes):
      outputs, units = base << stage, []
      for unit in range(size):
        stride = 2 if stage and not unit else 1
        units.append(PreActUnit(inputs, outputs, stride, "shortcut", activated))
        inputs = outputs
      self.add_module(f"layer{stage + 1}", nn.Sequential(*units))
    if final:
      self.bn = nn.BatchNorm2d(inputs)
    self.linear = nn.Linear(inputs, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.conv1(x)
    for stage in range(len(self.sizes)):
      x = getattr(self, f"layer{stage + 1}")(x)
    if hasattr(self, "bn"):
      x = self.bn(x).relu()
    return self.linear(x.mean((2, 3)))


# --- ResNets ------------------------------------------------------------------


class ResidualUnit(nn.Module):
  def __init__(
    self,
    inputs: int,
    channels: int,
    stride: int,
    *,
    shortcut: str | None,
    inner: int | None,
  ) -> None:
    super().__init__()
    if inner is None:
      outputs = channels
      self.conv1, self.conv2 = (
        conv3(inputs, channels, stride),
        conv3(channels, channels),
      )
      self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
    else:
      outputs = 4 * channels
      self.conv1, self.conv2 = conv1(inputs, inner), conv3(inner, inner, stride)
      self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner)
      self.conv3, self.bn3 = conv1(inner, outputs), nn.BatchNorm2d(outputs)
    self.outputs, self.stride = outputs, stride
    self.name = None
    self.extra = outputs - inputs
    if (stride != 1 or inputs != outputs) and shortcut:
      self.name = shortcut
      layers = conv1(inputs, outputs, stride), nn.BatchNorm2d(outputs)
      self.add_module(shortcut, nn.Sequential(*layers))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
    if hasattr(self, "conv3"):
      h = self.bn3(self.conv3(h.relu()))
    if self.name:
      x = getattr(self, self.name)(x)
    elif self.extra:  # option A: every second pixel, channels of zeros
      side = self.extra // 2
      x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
    return (h + x).relu()


class ResNet(nn.Module):
  """torchvision's names with `head="fc"`, those of code for CIFAR otherwise."""

  def __init__(
    self,
    sizes: tuple[int, ...],
    base: int,
    classes: int,
    *,
    head: str,
    shortcut: str | None,
    large: bool = False,
    inner: int | None = None,
  ) -> None:
    super().__init__()
    self.large = large
    self.conv1 = (
      nn.Conv2d(3, base, 7, 2, 3, bias=False) if large else conv3(3, base)
    )
    self.bn1 = nn.BatchNorm2d(base)
    self.sizes, self.head, inputs = sizes, head, base
    for stage, size in enumerate(sizes):
      units = []
      for number in range(size):
        unit = ResidualUnit(
          inputs,
          base << stage,
          2 if stage and not number else 1,
          shortcut=shortcut,
          inner=inner and inner << stage,
        )
        units.append(unit)
        inputs = unit.outputs
      self.add_module(f"layer{stage + 1}", nn.Sequential(*units))
    self.add_module(head, nn.Linear(inputs, classes))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.bn1(self.conv1(x)).relu()
    if self.large:
      x = functional.max_pool2d(x, 3, 2, 1)
    for stage in range(len(self.sizes)):
      x = getattr(self, f"layer{stage + 1}")(x)
    return getattr(self, self.head)(x.mean((2, 3)))


# --- ConvNeXt -----------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
  """LayerNorm of the channels of [B, C, H, W]."""

  def __init__(self, channels: int) -> None:
    super().__init__(channels, eps=1e-6)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Perceptron(nn.Module):
  def __init__(self, channels: int, hidden: int) -> None:
    super().__init__()
    self.fc1 = nn.Linear(channels, hidden)
    self.fc2 = nn.Linear(hidden, channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(functional.gelu(self.fc1(x)))


class ConvNeXtUnit(nn.Module):
  def __init__(self, channels: int) -> None:
    super().__init__()
    self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
    self.norm = nn.LayerNorm(channels, eps=1e-6)
    self.mlp = Perceptron(channels, 4 * channels)
    self.gamma = nn.Parameter(torch.ones(channels))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
    return x + (self.gamma * h).permute(0, 3, 1, 2)


class ConvNeXtStage(nn.Module):
  def __init__(
    self, inputs: int, channels: int, size: int, first: bool
  ) -> None:
    super().__init__()
    self.downsample = nn.Identity()
    if not first:
      self.downsample = nn.Sequential(
        ChannelNorm(inputs), nn.Conv2d(inputs, channels, 2, 2)
      )
    units = [ConvNeXtUnit(channels) for _ in range(size)]
    self.blocks = nn.Sequential(*units)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.blocks(self.downsample(x))


class ConvStem(nn.Module):
  """3x3 convolutions with LayerNorm and GELU (Singh et al., 2023)."""

  def __init__(
    self, channels: tuple[int, ...], halvings: int, final: int | None = None
  ) -> None:
    super().__init__()
    layers: list[nn.Module] = []
    inputs = 3
    for index, outputs in enumerate(channels):
      stride = 2 if index < halvings else 1
      layers.append(nn.Conv2d(inputs, outputs, 3, stride, 1))
      layers += [ChannelNorm(outputs), nn.GELU()]
      inputs = outputs
    if final:
      layers.append(nn.Conv2d(inputs, final, 1))
    self.stem = nn.Sequential(*layers)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.stem(x)


class NormHead(nn.Module):
  def __init__(self, channels: int, classes: int) -> None:
    super().__init__()
    self.norm = nn.LayerNorm(channels, eps=1e-6)
    self.fc = nn.Linear(channels, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc(self.norm(x.mean((2, 3))))


class ConvNeXt(nn.Module):
  """timm's names."""

  def __init__(
    self,
    sizes: tuple[int, ...],
    channels: tuple[int, ...],
    classes: int,
    stem: tuple[int, ...] = (),
  ) -> None:
    super().__init__()
    if stem:
      self.stem: nn.Module = ConvStem(stem, 2)
    else:
      self.stem = nn.Sequential(
        nn.Conv2d(3, channels[0], 4, 4), ChannelNorm(channels[0])
      )
    inputs = (channels[0], *channels)
    self.stages = nn.Sequential(
      *(
        ConvNeXtStage(inputs[i], channels[i], size, i == 0)
        for i, size in enumerate(sizes)
      )
    )
    self.head = NormHead(channels[-1], classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.head(self.stages(self.stem(x)))


def facebook_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """The names that ConvNeXt's authors give to the tensors of timm's."""
  result = {}
  for name, tensor in state.items():
    parts = name.split(".")
    if parts[0] == "stem":
      name = f"downsample_layers.0.{parts[1]}.{parts[2]}"
    elif parts[2:3] == ["downsample"]:
      name = f"downsample_layers.{parts[1]}.{parts[3]}.{parts[4]}"
    elif parts[0] == "head":
      name = ".".join(["norm" if parts[1] == "norm" else "head", parts[2]])
    else:
      name = name.replace("blocks.", "").replace("conv_dw", "dwconv")
      name = name.replace("mlp.fc", "pwconv")
    result[name] = tensor
  return result


# --- Transformers -------------------------------------------------------------


def heads(x: torch.Tensor, number: int) -> torch.Tensor:
  batch, tokens, channels = x.shape
  return x.reshape(batch, tokens, number, channels // number).transpose(1, 2)


class Attention(nn.Module):
  def __init__(self, channels: int, number: int) -> None:
    super().__init__()
    self.number = number
    self.qkv = nn.Linear(channels, 3 * channels)
    self.proj = nn.Linear(channels, channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (heads(p, self.number) for p in self.qkv(x).chunk(3, -1))
    h = functional.scaled_dot_product_attention(q, k, v)
    return self.proj(h.transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
  def __init__(self, channels: int, number: int) -> None:
    super().__init__()
    self.norm1 = nn.LayerNorm(channels, eps=1e-6)
    self.attn = Attention(channels, number)
    self.norm2 = nn.LayerNorm(channels, eps=1e-6)
    self.mlp = Perceptron(channels, 4 * channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
  def __init__(self, proj: nn.Module) -> None:
    super().__init__()
    self.proj = proj

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.proj(x)


class ViT(nn.Module):
  """timm's names; heads of 64 channels."""

  def __init__(
    self,
    side: int,
    patch: int,
    channels: int,
    depth: int,
    classes: int,
    stem: tuple[int, ...] = (),
  ) -> None:
    super().__init__()
    proj: nn.Module = nn.Conv2d(3, channels, patch, patch)
    if stem:
      proj = ConvStem(stem, len(stem), channels)
    self.patch_embed = PatchEmbedding(proj)
    self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
    tokens = (side // patch) ** 2 + 1
    self.pos_embed = nn.Parameter(torch.zeros(1, tokens, channels))
    self.blocks = nn.Sequential(
      *(ViTBlock(channels, channels // 64) for _ in range(depth))
    )
    self.norm = nn.LayerNorm(channels, eps=1e-6)
    self.head = nn.Linear(channels, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.patch_embed(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
    x = self.blocks(x + self.pos_embed)
    return self.head(self.norm(x)[:, 0])


class CrossCovariance(nn.Module):
  def __init__(self, channels: int, number: int) -> None:
    super().__init__()
    self.number = number
    self.temperature = nn.Parameter(torch.ones(number, 1, 1))
    self.qkv = nn.Linear(channels, 3 * channels)
    self.proj = nn.Linear(channels, channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
      heads(p, self.number).transpose(-1, -2) for p in self.qkv(x).chunk(3, -1)
    )
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    scores = (q @ k.transpose(-1, -2)) * self.temperature
    h = scores.softmax(-1) @ v
    return self.proj(h.permute(0, 3, 1, 2).flatten(2))


class LocalMixing(nn.Module):
  def __init__(self, channels: int) -> None:
    super().__init__()
    self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    self.bn = nn.BatchNorm2d(channels)
    self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

  def forward(self, x: torch.Tensor, side: int) -> torch.Tensor:
    h = x.transpose(1, 2).unflatten(2, (side, side))
    h = self.conv2(self.bn(functional.gelu(self.conv1(h))))
    return h.flatten(2).transpose(1, 2)


class XCiTBlock(nn.Module):
  def __init__(self, channels: int, number: int) -> None:
    super().__init__()
    self.norm1 = nn.LayerNorm(channels, eps=1e-6)
    self.attn = CrossCovariance(channels, number)
    self.norm3 = nn.LayerNorm(channels, eps=1e-6)
    self.local_mp = LocalMixing(channels)
    self.norm2 = nn.LayerNorm(channels, eps=1e-6)
    self.mlp = Perceptron(channels, 4 * channels)
    for name in ("gamma1", "gamma2", "gamma3"):
      self.register_parameter(name, nn.Parameter(torch.ones(channels)))

  def forward(self, x: torch.Tensor, side: int) -> torch.Tensor:
    x = x + self.gamma1 * self.attn(self.norm1(x))
    x = x + self.gamma3 * self.local_mp(self.norm3(x), side)
    return x + self.gamma2 * self.mlp(self.norm2(x))


class ClassAttention(nn.Module):
  def __init__(self, channels: int, number: int) -> None:
    super().__init__()
    self.number = number
    for name in ("q", "k", "v", "proj"):
      self.add_module(name, nn.Linear(channels, channels))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    q = heads(self.q(x[:, :1]), self.number)
    k, v = heads(self.k(x), self.number), heads(self.v(x), self.number)
    h = functional.scaled_dot_product_attention(q, k, v)
    return self.proj(h.transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
  """Block of the class token, all tokens normalised (`tokens_norm`)."""

  def __init__(self, channels: int, number: int) -> None:
    super().__init__()
    self.norm1 = nn.LayerNorm(channels, eps=1e-6)
    self.attn = ClassAttention(channels, number)
    self.norm2 = nn.LayerNorm(channels, eps=1e-6)
    self.mlp = Perceptron(channels, 4 * channels)
    for name in ("gamma1", "gamma2"):
      self.register_parameter(name, nn.Parameter(torch.ones(channels)))
    self.all_tokens = channels > 128

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = self.norm1(x)
    x = x + self.gamma1 * torch.cat([self.attn(h), h[:, 1:]], 1)
    if self.all_tokens:
      x = self.norm2(x)
    else:
      x = torch.cat([self.norm2(x[:, :1]), x[:, 1:]], 1)
    token = self.gamma2 * self.mlp(x[:, :1])
    return x + torch.cat([token, x[:, 1:]], 1)


class FourierPositions(nn.Module):
  """Sines and cosines of 32 numbers for each axis, and a projection."""

  def __init__(self, channels: int) -> None:
    super().__init__()
    self.token_projection = nn.Conv2d(64, channels, 1)

  def forward(self, side: int) -> torch.Tensor:
    waves = torch.zeros(1, 64, side, side)
    for axis in (0, 1):
      for number in range(32):
        for place in range(side):
          angle = (place + 1) / (side + 1e-6) * 2 * torch.pi
          angle = torch.tensor(angle / 10_000 ** (2 * (number // 2) / 32))
          value = angle.cos() if number % 2 else angle.sin()
          if axis == 0:
            waves[0, number, place] = value
          else:
            waves[0, 32 + number, :, place] = value
    return self.token_projection(waves)


class XCiT(nn.Module):
  """timm's names."""

  def __init__(
    self,
    patch: int,
    channels: int,
    depth: int,
    number: int,
    classes: int,
  ) -> None:
    super().__init__()
    layers: list[nn.Module] = []
    inputs = 3
    for index in range(4):
      outputs = channels >> (3 - index)
      stride = 1 if index < 2 and patch == 4 else 2
      layers += [
        nn.Sequential(conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)),
        nn.GELU(),
      ]
      inputs = outputs
    self.patch_embed = PatchEmbedding(nn.Sequential(*layers[:-1]))
    self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
    self.pos_embed = FourierPositions(channels)
    blocks = [XCiTBlock(channels, number) for _ in range(depth)]
    self.blocks = nn.ModuleList(blocks)
    self.cls_attn_blocks = nn.Sequential(
      ClassBlock(channels, number), ClassBlock(channels, number)
    )
    self.norm = nn.LayerNorm(channels, eps=1e-6)
    self.head = nn.Linear(channels, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.patch_embed(x)
    side = x.shape[-1]
    x = (x + self.pos_embed(side)).flatten(2).transpose(1, 2)
    for block in self.blocks:
      x = block(x, side)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
    return self.head(self.norm(self.cls_attn_blocks(x))[:, 0])
