"""PyTorch's names of the layers of the networks in `models`.

They are torchvision's for VGG, ResNet and DenseNet; those of Rice et al. (2020)
for the PreActResNet; those of TRADES, which RobustBench shares, for the Wide
ResNet with `shortcut="conv"`.
"""

from collections.abc import Iterable, Sequence

from flax import linen as nn

from atat_jax.errors import UserError
from atat_jax.models.densenet import DenseNet121
from atat_jax.models.preact_resnet import PreActResNet18
from atat_jax.models.resnet import ResNet18
from atat_jax.models.vgg import VGG16
from atat_jax.models.wide_resnet import WideResNet

_SAME = {name: name for name in ("conv1", "bn1", "conv2", "bn2")}


def _units(
  stage_sizes: Iterable[int], prefix: str, parts: dict[str, str]
) -> dict[str, str]:
  """Returns the names of layers inside residual or dense units.

  Args:
    stage_sizes: Number of units in each stage.
    prefix: PyTorch's name of a unit with {stage} (from 1) and {unit} (from 0)
      or {number} (from 1) in it.
    parts: Our name to PyTorch's name of each layer inside a unit.
  """
  return {
    f"stage{stage}_unit{unit + 1}_{ours}": (
      f"{prefix.format(stage=stage, unit=unit, number=unit + 1)}.{theirs}"
    )
    for stage, size in enumerate(stage_sizes, start=1)
    for unit in range(size)
    for ours, theirs in parts.items()
  }


def _vgg(stage_sizes: Sequence[int], step: int) -> dict[str, str]:
  """Returns VGG's names, numbered in one sequence, `step` for a convolution."""
  names = {
    "hidden1": "classifier.0",
    "hidden2": "classifier.3",
    "head": "classifier.6",
  }
  index = 0
  for stage, size in enumerate(stage_sizes, start=1):
    for layer in range(1, size + 1):
      names[f"stage{stage}_conv{layer}"] = f"features.{index}"
      names[f"stage{stage}_bn{layer}"] = f"features.{index + 1}"
      index += step
    index += 1  # the pool
  return names


def _densenet(stage_sizes: Sequence[int]) -> dict[str, str]:
  names = {
    "stem": "features.conv0",
    "stem_bn": "features.norm0",
    "final_bn": "features.norm5",
    "head": "classifier",
  }
  for stage in range(1, len(stage_sizes)):
    ours, theirs = f"stage{stage}_transition", f"features.transition{stage}"
    names |= {f"{ours}_bn": f"{theirs}.norm", f"{ours}_conv": f"{theirs}.conv"}
  prefix = "features.denseblock{stage}.denselayer{number}"
  parts = _SAME | {"bn1": "norm1", "bn2": "norm2"}
  return names | _units(stage_sizes, prefix, parts)


def layer_names(model: nn.Module) -> dict[str, str]:
  """Returns PyTorch's names of the layers of a network.

  Args:
    model: Network of one of the classes in `models`.

  Returns:
    Our names to PyTorch's, {"stage1_unit1_conv1": "layer1.0.conv1", ...},
    possibly of more layers than the network has.

  Raises:
    UserError: There is no PyTorch network like it.
  """
  match model:
    case VGG16():
      # An activation follows each convolution, with BatchNorm between if any.
      return _vgg(model.stage_sizes, 3 if model.use_batch_norm else 2)
    case ResNet18():
      parts = _SAME | {"conv3": "conv3", "bn3": "bn3"}
      parts |= {"shortcut": "downsample.0", "shortcut_bn": "downsample.1"}
      names = {"stem": "conv1", "stem_bn": "bn1", "head": "fc"}
      prefix = "layer{stage}.{unit}"
      return names | _units(model.stage_sizes, prefix, parts)
    case DenseNet121():
      return _densenet(model.stage_sizes)
    case PreActResNet18():
      parts = _SAME | {"shortcut": "shortcut.0"}
      names = {"stem": "conv1", "final_bn": "bn", "head": "linear"}
      prefix = "layer{stage}.{unit}"
      return names | _units(model.stage_sizes, prefix, parts)
    case WideResNet(shortcut="conv"):
      parts = _SAME | {"shortcut": "convShortcut"}
      names = {"stem": "conv1", "final_bn": "bn1", "head": "fc"}
      sizes = [(model.depth - 2) // 6] * 3
      return names | _units(sizes, "block{stage}.layer.{unit}", parts)
  raise UserError(
    f"model: {type(model).__name__}; allowed: the networks of models.MODELS,"
    " wide_resnet with shortcut='conv' only"
  )
