"""Source text of a PyTorch module that computes what a network here computes.

The text of each kind of network is in `torch_code/`; the fields of the network
are written into it as constants.
"""

import json
import keyword
import pathlib
import re
import string
import sys
from typing import Any

from flax import linen as nn

from atat_jax.models.convnext import ConvNeXt
from atat_jax.models.densenet import DenseNet121
from atat_jax.models.preact_resnet import PreActResNet18
from atat_jax.models.resnet import ResNet18
from atat_jax.models.vgg import VGG16
from atat_jax.models.vit import ViT
from atat_jax.models.wide_resnet import WideResNet
from atat_jax.models.xcit import XCiT

_FOLDER = pathlib.Path(__file__).parent / "torch_code"
_CODE = {
  WideResNet: "wide_resnet",
  PreActResNet18: "preact_resnet",
  ResNet18: "resnet",
  VGG16: "vgg",
  DenseNet121: "densenet",
  ConvNeXt: "convnext",
  ViT: "vit",
  XCiT: "xcit",
}
_BUFFERS = """
        mean = torch.tensor({mean})
        std = torch.tensor({std})
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))
"""
_PLAIN = re.compile(r"[\w. ()+=,@-]+")
# A file of one of these names beside a script would be imported in its place.
_MODULES = {*sys.stdlib_module_names, "numpy", "safetensors", "torch"}
_MARK = b"\nWritten by atat_jax, "


def is_written_here(content: bytes) -> bool:
  """Returns whether `source` has written the text of a file.

  Args:
    content: The file's content.
  """
  return _MARK in content


def module_name(stem: str) -> str:
  """Returns the name that Python imports a file of weights' module by.

  Args:
    stem: Name of the file of weights, without its suffix.
  """
  name = re.sub(r"\W", "_", stem, flags=re.ASCII)
  taken = keyword.iskeyword(name) or name in _MODULES
  return f"_{name}" if not name or name[0].isdigit() or taken else name


def _text(name: str) -> str:
  return (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


def source(
  model: nn.Module, fields: dict[str, Any], num_channels: int, weights: str
) -> str:
  """Returns the text of a Python file with the module `Network`.

  Args:
    model: Network of a kind in `models.MODELS`.
    fields: Fields of the network that are to be constants of the module.
    num_channels: Number of channels of the images.
    weights: Name of the file of weights.
  """
  network: Any = model
  names = [name for kind, name in _CODE.items() if isinstance(model, kind)]
  constants = fields | {"num_channels": num_channels}
  # Submodules and buffers have these names.
  hidden = ("normalization", "mean", "std")
  buffers = ""
  if network.normalization == "dataset":
    mean, std = (tuple(map(float, x)) for x in (network.mean, network.std))
    buffers = _BUFFERS.format(mean=mean, std=std).strip("\n")
  code = string.Template(_text(names[0])).substitute(buffers=buffers)
  text = string.Template(_text("file")).substitute(
    title=f"{type(model).__name__} as a PyTorch module.",
    # Other characters could end the docstring.
    weights=weights if _PLAIN.fullmatch(weights) else "weights.safetensors",
    classes=network.num_classes,
    module=module_name(pathlib.PurePath(weights).stem),
    fields="\n".join(
      f"    {name} = {json.dumps(value) if type(value) is str else repr(value)}"
      for name, value in constants.items()
      if name not in hidden
    ),
    code=code.replace("__init__()\n\n", "__init__()\n"),
    normalize=_text(f"normalize_{network.normalization}"),
  )
  return f"{text}\n"
