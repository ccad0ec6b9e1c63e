"""Layouts of PyTorch weights: how names and shapes of a file show a network.

A layout belongs to published code. It says what the names and shapes show
(depth, width, classes), what they do not show and the code fixes (activation,
padding, epsilon), and what different code of the same names fixes differently.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flax import linen as nn

from atat_jax.errors import UserError
from atat_jax.interop import torch_names
from atat_jax.models import base
from atat_jax.models.convnext import ConvNeXt
from atat_jax.models.densenet import DenseNet121
from atat_jax.models.preact_resnet import PreActResNet18
from atat_jax.models.resnet import ResNet18
from atat_jax.models.vgg import VGG16
from atat_jax.models.vit import ViT
from atat_jax.models.wide_resnet import WideResNet
from atat_jax.models.xcit import XCiT

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""PyTorch's name of each tensor to its shape."""
Fields: TypeAlias = dict[str, Any]

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR10_OTHER_STD = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
MOST_STAGES = 8
"""Largest number of stages of a network that is read."""
_MOST_UNITS = 300  # more are not traced
IMAGENET = (base.IMAGENET_MEAN, base.IMAGENET_STD)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of a kind of network in PyTorch, and the code that they belong to.

  Attributes:
    title: The network and whose names it has, in words.
    infer: Function from names and shapes to the name in `models.MODELS` and
      the fields that they show; raises LookupError or ValueError for files of
      other layouts.
    names: Function from the network to PyTorch's names of its layers.
    preset: Function from these fields to those that the code fixes and the
      names do not show.
    open: Fields that code of the same names fixes differently: the values.
    first: Layer that the images enter.
  """

  title: str
  infer: Callable[[Shapes], tuple[str, Fields]]
  names: Callable[[Any], dict[str, str]]
  preset: Callable[[Fields], Fields]
  open: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  first: str = "stem"


def normalized(values: tuple[tuple[float, ...], ...] | None) -> Fields:
  """Returns the fields of a normalisation by mean and deviation; None: none."""
  if values is None:
    return {"normalization": "none"}
  mean, std = values
  return {"normalization": "dataset", "mean": mean, "std": std}


def _of_cifar(fields: Fields) -> Fields:
  """Returns the normalisation of CIFAR-100 for 100 classes, or CIFAR-10's."""
  return normalized(CIFAR100 if fields["num_classes"] == 100 else CIFAR10)


def _count(shapes: Shapes, prefix: str, start: int = 0) -> int:
  """Returns how many of the numbers from `start` on follow a prefix."""
  numbers = {
    int(match[1])
    for match in (re.match(rf"{re.escape(prefix)}(\d+)\.", x) for x in shapes)
    if match and len(match[1]) < 6
  }
  count = 0
  while start + count in numbers:
    count += 1
  if not count:
    raise LookupError(f"{prefix}{start}")
  if count > _MOST_UNITS:
    raise ValueError(f"{count} of {prefix}")
  return count


def _counts(shapes: Shapes, prefix: str, start: int, inside: str) -> tuple:
  """Returns the number of units of each stage: layer1.0, layer1.1, ..."""
  number = _count(shapes, prefix, start)
  if number > MOST_STAGES:
    raise ValueError(f"{number} stages")
  stages = range(start, start + number)
  return tuple(_count(shapes, f"{prefix}{s}.{inside}") for s in stages)


def _quotient(above: int, below: int) -> int:
  if below < 1 or above % below or above < below:
    raise ValueError(f"{above} channels are no multiple of {below}")
  return above // below


# --- For CIFAR ---------------------------------------------------------------


def _wide(
  shapes: Shapes, stem: str, unit: str, first: str, head: str
) -> tuple[str, Fields]:
  channels = shapes[f"{stem}.weight"][0]
  units = _count(shapes, unit)
  return "wide_resnet", {
    "depth": 6 * units + 4,
    "width": _quotient(shapes[f"{unit}0.{first}.weight"][0], channels),
    "stem_channels": channels,
    "num_classes": shapes[f"{head}.weight"][0],
  }


def trades(shapes: Shapes) -> tuple[str, Fields]:
  """Infers a Wide ResNet from the names of TRADES; see `Layout.infer`.

  Args:
    shapes: Shapes of the tensors by name.
  """
  return _wide(shapes, "conv1", "block1.layer.", "conv1", "fc")


def _deepmind_wide(shapes: Shapes) -> tuple[str, Fields]:
  return _wide(shapes, "init_conv", "layer.0.block.", "conv_0", "logits")


def _usual_wide(_: Fields) -> Fields:
  return {
    "shortcut": "conv",
    "activation": "relu",
    "padding": "symmetric",
    "batch_norm_epsilon": 1e-5,
    "normalization": "none",
  }


def _swish_wide(fields: Fields) -> Fields:
  return (
    _usual_wide(fields)
    | {"activation": "silu", "padding": "same"}
    | _of_cifar(fields)
  )


def _deepmind_preact(shapes: Shapes) -> tuple[str, Fields]:
  return "preact_resnet18", {
    "stage_sizes": _counts(shapes, "layer_", 0, ""),
    "base_channels": shapes["conv_2d.weight"][0],
    "num_classes": shapes["logits.weight"][0],
  }


def _swish_preact(fields: Fields) -> Fields:
  fixed = {"family": "deepmind", "activated_shortcut": False}
  fixed |= {"final_batch_norm": True, "batch_norm_epsilon": 1e-5}
  return fixed | _of_cifar(fields)


def _preact(shapes: Shapes) -> tuple[str, Fields]:
  if "bn1.weight" in shapes or "layer1.0.conv3.weight" in shapes:
    raise LookupError("bn")
  return "preact_resnet18", {
    "stage_sizes": _counts(shapes, "layer", 1, ""),
    "base_channels": shapes["conv1.weight"][0],
    "num_classes": shapes["linear.weight"][0],
    "final_batch_norm": "bn.weight" in shapes,
  }


def _usual_preact(fields: Fields) -> Fields:
  fixed = {"family": "pytorch", "batch_norm_epsilon": 1e-5}
  return fixed | _of_cifar(fields)


def _residual(shapes: Shapes, head: str, shortcut: str) -> tuple[str, Fields]:
  bottleneck = "layer1.0.conv3.weight" in shapes
  channels, _, size, _ = shapes["conv1.weight"]
  inner = shapes["layer1.0.conv1.weight"][0]
  if size not in (3, 7):
    raise ValueError(f"a first convolution of {size}x{size}")
  if channels != shapes["bn1.weight"][0]:
    raise ValueError("bn1")
  return ("resnet50" if bottleneck else "resnet18"), {
    "stage_sizes": _counts(shapes, "layer", 1, ""),
    "base_channels": channels,
    "num_classes": shapes[f"{head}.weight"][0],
    "bottleneck": bottleneck,
    "inner_width": _quotient(inner, channels) if bottleneck else 1,
    "small_images": size == 3,
    "padded_shortcut": not any(f".{shortcut}." in name for name in shapes),
  }


def _cifar_resnet(shapes: Shapes) -> tuple[str, Fields]:
  return _residual(shapes, "linear", "shortcut")


def _resnet(shapes: Shapes) -> tuple[str, Fields]:
  return _residual(shapes, "fc", "downsample")


def _of_cifar_resnet(fields: Fields) -> Fields:
  # Idelbayev's ResNet-20 to -110 take ImageNet's numbers on CIFAR-10, too;
  # RobustBench's ResNet-18s take pixels as they are.
  three = len(fields["stage_sizes"]) == 3
  fixed = {"batch_norm_epsilon": 1e-5}
  return fixed | normalized(IMAGENET if three else None)


def _of_resnet(fields: Fields) -> Fields:
  fixed = {"batch_norm_epsilon": 1e-5}
  if not fields["small_images"]:
    return fixed | normalized(IMAGENET)
  hundred = fields["num_classes"] == 100
  return fixed | normalized(CIFAR100 if hundred else CIFAR10_OTHER_STD)


# --- For ImageNet ------------------------------------------------------------


def _vgg(shapes: Shapes) -> tuple[str, Fields]:
  convs = {}
  for name, shape in shapes.items():
    match = re.fullmatch(r"features\.(\d{1,4})\.weight", name)
    if match and len(shape) == 4:
      convs[int(match[1])] = shape[0]
  numbers = sorted(convs)
  if not 0 < len(numbers) <= _MOST_UNITS:
    raise ValueError(f"{len(numbers)} convolutions")
  normed = "features.1.running_mean" in shapes
  step = 3 if normed else 2
  sizes, channels = [1], [convs[numbers[0]]]
  for before, number in itertools.pairwise(numbers):
    if number == before + step:
      sizes[-1] += 1
    else:
      sizes.append(1)
      channels.append(convs[number])
  return ("vgg16_bn" if normed else "vgg16"), {
    "stage_sizes": tuple(sizes),
    "stage_channels": tuple(channels),
    "hidden": shapes["classifier.0.weight"][0],
    "num_classes": shapes["classifier.6.weight"][0],
    "use_batch_norm": normed,
  }


def _densenet(shapes: Shapes) -> tuple[str, Fields]:
  block = "features.denseblock"
  numbers = range(1, 1 + min(_count(shapes, block, 1), MOST_STAGES))
  growth = shapes[f"{block}1.denselayer1.conv2.weight"][0]
  return "densenet121", {
    "stage_sizes": tuple(
      _count(shapes, f"{block}{n}.denselayer", 1) for n in numbers
    ),
    "growth": growth,
    "bottleneck": _quotient(
      shapes[f"{block}1.denselayer1.conv1.weight"][0], growth
    ),
    "base_channels": shapes["features.conv0.weight"][0],
    "num_classes": shapes["classifier.weight"][0],
  }


def _imagenet(_: Fields) -> Fields:
  return {"batch_norm_epsilon": 1e-5} | normalized(IMAGENET)


def _stem_channels(shapes: Shapes, prefix: str) -> tuple[int, ...]:
  """Returns the channels of the 3x3 convolutions of a ConvStem; (): none."""
  found: list[int] = []
  index = 0
  while (shape := shapes.get(f"{prefix}.stem.{index}.weight")) is not None:
    if len(shape) != 4 or shape[2] != 3 or len(found) > MOST_STAGES:
      break
    found.append(shape[0])
    index += 3
  return tuple(found)


def _convnext(shapes: Shapes) -> tuple[str, Fields]:
  sizes = _counts(shapes, "stages.", 0, "blocks.")
  return "convnext", {
    "stage_sizes": sizes,
    "stage_channels": tuple(
      shapes[f"stages.{stage}.blocks.0.conv_dw.weight"][0]
      for stage in range(len(sizes))
    ),
    "conv_stem": _stem_channels(shapes, "stem"),
    "num_classes": shapes["head.fc.weight"][0],
  }


def _convnext_facebook(shapes: Shapes) -> tuple[str, Fields]:
  sizes = _counts(shapes, "stages.", 0, "")
  return "convnext", {
    "stage_sizes": sizes,
    "stage_channels": tuple(
      shapes[f"stages.{stage}.0.dwconv.weight"][0]
      for stage in range(len(sizes))
    ),
    "num_classes": shapes["head.weight"][0],
  }


def _of_convnext(fields: Fields) -> Fields:
  # RobustBench gives pixels as they are to networks with a ConvStem.
  return normalized(None if fields.get("conv_stem") else IMAGENET)


def _vit(shapes: Shapes) -> tuple[str, Fields]:
  _, tokens, channels = shapes["pos_embed"]
  stem = _stem_channels(shapes, "patch_embed.proj")
  if stem:
    patch = 2 ** len(stem)
  else:
    patch = shapes["patch_embed.proj.weight"][2]
  side = math.isqrt(tokens - 1)
  if side**2 != tokens - 1:
    raise ValueError(f"{tokens} positions")
  return "vit", {
    "image_size": side * patch,
    "patch_size": patch,
    "channels": channels,
    "num_blocks": _count(shapes, "blocks."),
    "hidden": shapes["blocks.0.mlp.fc1.weight"][0],
    "conv_stem": stem,
    "num_classes": shapes["head.weight"][0],
  }


def _of_vit(fields: Fields) -> Fields:
  # All published sizes have heads of 64 channels. Of RobustBench's two with a
  # ConvStem the small one is normalised.
  plain = fields["conv_stem"] and fields["channels"] != 384
  heads = max(fields["channels"] // 64, 1)
  return {"num_heads": heads} | normalized(None if plain else IMAGENET)


def _xcit(shapes: Shapes) -> tuple[str, Fields]:
  blocks = "cls_attn_blocks."
  return "xcit", {
    "stem_convolutions": sum(
      f"patch_embed.proj.{2 * n}.0.weight" in shapes for n in range(8)
    ),
    "channels": shapes["cls_token"][2],
    "num_blocks": _count(shapes, "blocks."),
    "num_class_blocks": _count(shapes, blocks),
    "num_heads": shapes["blocks.0.attn.temperature"][0],
    "hidden": shapes["blocks.0.mlp.fc1.weight"][0],
    "num_classes": shapes["head.weight"][0],
  }


def _of_xcit(fields: Fields) -> Fields:
  # Debenedetti et al. fine-tune the network for ImageNet with strides for
  # patches of 4 pixels; the smallest networks normalise the class token only.
  largest = 2 ** fields["stem_convolutions"]
  fixed = {"batch_norm_epsilon": 1e-5, "tokens_norm": fields["channels"] > 128}
  if fields["num_classes"] in (10, 100):
    return fixed | {"patch_size": min(4, largest)} | _of_cifar(fields)
  return fixed | {"patch_size": largest} | normalized(IMAGENET)


_SHORTCUTS = {"activated_shortcut": (True, False)}

LAYOUTS = (
  Layout("Wide ResNet of TRADES", trades, torch_names.trades, _usual_wide),
  Layout(
    "DeepMind's Wide ResNet",
    _deepmind_wide,
    torch_names.deepmind_wide,
    _swish_wide,
  ),
  Layout(
    "DeepMind's PreActResNet",
    _deepmind_preact,
    torch_names.deepmind_preact,
    _swish_preact,
  ),
  Layout(
    "PreActResNet of Rice et al. or Wong et al.",
    _preact,
    torch_names.preact,
    _usual_preact,
    _SHORTCUTS,
  ),
  Layout(
    "ResNet for CIFAR",
    _cifar_resnet,
    torch_names.cifar_resnet,
    _of_cifar_resnet,
  ),
  Layout("torchvision's ResNet", _resnet, torch_names.resnet, _of_resnet),
  Layout(
    "torchvision's VGG",
    _vgg,
    torch_names.vgg,
    _imagenet,
    first="stage1_conv1",
  ),
  Layout("torchvision's DenseNet", _densenet, torch_names.densenet, _imagenet),
  Layout("timm's ConvNeXt", _convnext, torch_names.convnext, _of_convnext),
  Layout(
    "the authors' ConvNeXt",
    _convnext_facebook,
    torch_names.convnext_facebook,
    _of_convnext,
  ),
  Layout("timm's ViT", _vit, torch_names.vit, _of_vit),
  Layout("timm's XCiT", _xcit, torch_names.xcit, _of_xcit),
)

# The first of several are the names that `interop.save` gives.
_NETWORKS = {
  WideResNet: (torch_names.trades, torch_names.deepmind_wide),
  PreActResNet18: (torch_names.preact, torch_names.deepmind_preact),
  ResNet18: (torch_names.resnet, torch_names.cifar_resnet),
  VGG16: (torch_names.vgg,),
  DenseNet121: (torch_names.densenet,),
  ConvNeXt: (torch_names.convnext, torch_names.convnext_facebook),
  ViT: (torch_names.vit,),
  XCiT: (torch_names.xcit,),
}


def of(model: nn.Module) -> list[Layout]:
  """Returns the layouts of a network's class.

  Args:
    model: The network.

  Raises:
    UserError: There is no PyTorch network like it.
  """
  for kind, names in _NETWORKS.items():
    if isinstance(model, kind):
      if getattr(model, "shortcut", "conv") != "conv":
        break
      return [layout for layout in LAYOUTS if layout.names in names]
  raise UserError(
    f"model: {type(model).__name__}; allowed: the networks of models.MODELS,"
    " wide_resnet with shortcut='conv' only"
  )


def saved(model: nn.Module) -> Layout:
  """Returns the layout that `interop.save` gives to a network's weights.

  Args:
    model: Network of a class in `models.MODELS`.

  Raises:
    UserError: There is no PyTorch network like it.
  """
  for kind, names in _NETWORKS.items():
    if isinstance(model, kind):
      return next(x for x in LAYOUTS if x.names is names[0])
  raise UserError(
    f"model: {type(model).__name__}; allowed:"
    f" {', '.join(kind.__name__ for kind in _NETWORKS)}"
  )
