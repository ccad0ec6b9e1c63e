"""PyTorch's names of the layers of the networks in `models`, for each layout.

A function maps a network to {"stage1_unit1_conv1": "layer1.0.conv1", ...},
possibly of more layers than the network has.
"""

from collections.abc import Iterable, Sequence
from typing import Any

_SAME = {name: name for name in ("conv1", "bn1", "conv2", "bn2")}
_THREE = _SAME | {"conv3": "conv3", "bn3": "bn3"}


def _units(
  stage_sizes: Iterable[int], prefix: str, parts: dict[str, str]
) -> dict[str, str]:
  """Returns the names of layers inside residual or dense units.

  Args:
    stage_sizes: Number of units in each stage.
    prefix: PyTorch's name of a unit with {stage} (from 1) or {index} (from 0)
      and {unit} (from 0) or {number} (from 1) in it.
    parts: Our name to PyTorch's name of each layer inside a unit.
  """
  return {
    f"stage{stage}_unit{unit + 1}_{ours}": (
      prefix.format(stage=stage, index=stage - 1, unit=unit, number=unit + 1)
      + f".{theirs}"
    )
    for stage, size in enumerate(stage_sizes, start=1)
    for unit in range(size)
    for ours, theirs in parts.items()
  }


def _wide_stages(model: Any) -> list[int]:
  return [(model.depth - 2) // 6] * 3


def trades(model: Any) -> dict[str, str]:
  """Names a Wide ResNet as TRADES and RobustBench do."""
  names = {"stem": "conv1", "final_bn": "bn1", "head": "fc"}
  parts = _SAME | {"shortcut": "convShortcut"}
  prefix = "block{stage}.layer.{unit}"
  return names | _units(_wide_stages(model), prefix, parts)


def deepmind_wide(model: Any) -> dict[str, str]:
  """Names a Wide ResNet as DeepMind does."""
  names = {"stem": "init_conv", "final_bn": "batchnorm", "head": "logits"}
  parts = {"bn1": "batchnorm_0", "conv1": "conv_0", "bn2": "batchnorm_1"}
  parts |= {"conv2": "conv_1", "shortcut": "shortcut"}
  prefix = "layer.{index}.block.{unit}"
  return names | _units(_wide_stages(model), prefix, parts)


def deepmind_preact(model: Any) -> dict[str, str]:
  """Names a PreActResNet as DeepMind does."""
  names = {"stem": "conv_2d", "final_bn": "batchnorm", "head": "logits"}
  parts = {"bn1": "batchnorm_0", "conv1": "conv_2d_1", "bn2": "batchnorm_1"}
  parts |= {"conv2": "conv_2d_2", "shortcut": "shortcut"}
  return names | _units(model.stage_sizes, "layer_{index}.{unit}", parts)


def preact(model: Any) -> dict[str, str]:
  """Names a PreActResNet as Rice et al. and Wong et al. do."""
  names = {"stem": "conv1", "final_bn": "bn", "head": "linear"}
  parts = _SAME | {"shortcut": "shortcut.0"}
  return names | _units(model.stage_sizes, "layer{stage}.{unit}", parts)


def cifar_resnet(model: Any) -> dict[str, str]:
  """Names a ResNet as most code for CIFAR does."""
  names = {"stem": "conv1", "stem_bn": "bn1", "head": "linear"}
  parts = _THREE | {"shortcut": "shortcut.0", "shortcut_bn": "shortcut.1"}
  return names | _units(model.stage_sizes, "layer{stage}.{unit}", parts)


def resnet(model: Any) -> dict[str, str]:
  """Names a ResNet as torchvision and timm do."""
  names = {"stem": "conv1", "stem_bn": "bn1", "head": "fc"}
  parts = _THREE | {"shortcut": "downsample.0", "shortcut_bn": "downsample.1"}
  return names | _units(model.stage_sizes, "layer{stage}.{unit}", parts)


def vgg(model: Any) -> dict[str, str]:
  """Names a VGG as torchvision does."""
  names = {
    "hidden1": "classifier.0",
    "hidden2": "classifier.3",
    "head": "classifier.6",
  }
  # An activation follows each convolution, with BatchNorm between if any.
  index, step = 0, 3 if model.use_batch_norm else 2
  for stage, size in enumerate(model.stage_sizes, start=1):
    for layer in range(1, size + 1):
      names[f"stage{stage}_conv{layer}"] = f"features.{index}"
      names[f"stage{stage}_bn{layer}"] = f"features.{index + 1}"
      index += step
    index += 1  # the pool
  return names


def densenet(model: Any) -> dict[str, str]:
  """Names a DenseNet as torchvision does."""
  names = {
    "stem": "features.conv0",
    "stem_bn": "features.norm0",
    "final_bn": "features.norm5",
    "head": "classifier",
  }
  for stage in range(1, len(model.stage_sizes)):
    ours, theirs = f"stage{stage}_transition", f"features.transition{stage}"
    names |= {f"{ours}_bn": f"{theirs}.norm", f"{ours}_conv": f"{theirs}.conv"}
  prefix = "features.denseblock{stage}.denselayer{number}"
  parts = _SAME | {"bn1": "norm1", "bn2": "norm2"}
  return names | _units(model.stage_sizes, prefix, parts)


def _conv_stem(channels: Sequence[int], prefix: str) -> dict[str, str]:
  """Returns the names of a ConvStem: convolution, LayerNorm, GELU, ..."""
  names = {}
  for index in range(len(channels)):
    ours = "stem" if index == 0 else f"stem{index + 1}"
    names[ours] = f"{prefix}.stem.{3 * index}"
    names[f"{ours}_norm"] = f"{prefix}.stem.{3 * index + 1}"
  return names


def convnext(model: Any) -> dict[str, str]:
  """Names a ConvNeXt as timm does."""
  names = {"final_norm": "head.norm", "head": "head.fc"}
  if model.conv_stem:
    names |= _conv_stem(model.conv_stem, "stem")
  else:
    names |= {"stem": "stem.0", "stem_norm": "stem.1"}
  for stage in range(2, len(model.stage_sizes) + 1):
    ours, theirs = f"stage{stage}_downsample", f"stages.{stage - 1}.downsample"
    names |= {f"{ours}_norm": f"{theirs}.0", ours: f"{theirs}.1"}
  parts = {"conv": "conv_dw", "norm": "norm", "scale": "gamma"}
  parts |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
  prefix = "stages.{index}.blocks.{unit}"
  return names | _units(model.stage_sizes, prefix, parts)


def convnext_facebook(model: Any) -> dict[str, str]:
  """Names a ConvNeXt as its authors do."""
  names = {
    "stem": "downsample_layers.0.0",
    "stem_norm": "downsample_layers.0.1",
  }
  names |= {"final_norm": "norm", "head": "head"}
  for stage in range(2, len(model.stage_sizes) + 1):
    ours, theirs = f"stage{stage}_downsample", f"downsample_layers.{stage - 1}"
    names |= {f"{ours}_norm": f"{theirs}.0", ours: f"{theirs}.1"}
  parts = {"conv": "dwconv", "norm": "norm", "scale": "gamma"}
  parts |= {"fc1": "pwconv1", "fc2": "pwconv2"}
  return names | _units(model.stage_sizes, "stages.{index}.{unit}", parts)


def _blocks(
  number: int, ours: str, theirs: str, parts: dict[str, str]
) -> dict[str, str]:
  return {
    f"{ours}{index + 1}_{part}": f"{theirs}.{index}.{name}"
    for index in range(number)
    for part, name in parts.items()
  }


_MLP = {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "proj": "attn.proj"}
_NORMS = {"norm1": "norm1", "norm2": "norm2"}


def vit(model: Any) -> dict[str, str]:
  """Names a vision transformer as timm does."""
  names = {"class_token": "cls_token", "positions": "pos_embed"}
  names |= {"final_norm": "norm", "head": "head"}
  stem = "patch_embed.proj"
  if model.conv_stem:
    names |= _conv_stem(model.conv_stem, stem)
    names["embedding"] = f"{stem}.stem.{3 * len(model.conv_stem)}"
  else:
    names["stem"] = stem
  parts = _MLP | _NORMS | {"qkv": "attn.qkv"}
  return names | _blocks(model.num_blocks, "block", "blocks", parts)


def xcit(model: Any) -> dict[str, str]:
  """Names an XCiT as timm does."""
  names = {"class_token": "cls_token", "final_norm": "norm", "head": "head"}
  names["positions"] = "pos_embed.token_projection"
  for index in range(model.stem_convolutions):
    ours = "stem" if index == 0 else f"stem{index + 1}"
    names[ours] = f"patch_embed.proj.{2 * index}.0"
    names[f"{ours}_bn"] = f"patch_embed.proj.{2 * index}.1"
  scales = {f"scale{n}": f"gamma{n}" for n in (1, 2, 3)}
  local = {name: f"local_mp.{name}" for name in ("conv1", "bn", "conv2")}
  parts = _MLP | _NORMS | scales | local
  parts |= {"norm3": "norm3", "qkv": "attn.qkv"}
  parts["temperature"] = "attn.temperature"
  names |= _blocks(model.num_blocks, "block", "blocks", parts)
  parts = _MLP | _NORMS | scales | {n: f"attn.{n}" for n in "qkv"}
  number = model.num_class_blocks
  return names | _blocks(number, "class_block", "cls_attn_blocks", parts)
