"""Conversion of PyTorch state dicts to the variables of the networks here."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.interop import safetensors_file, torch_file, torch_names
from atat_jax.runs import locations
from atat_jax.typing import Variables

_MOST_CHANNELS = 1 << 16

_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}

# TRADES builds a second first block and never calls it.
_UNUSED = re.compile(r"(.*\.)?num_batches_tracked|sub_block1\..*")


def read_state_dict(path: pathlib.Path | str) -> dict[str, np.ndarray]:
  """Reads a PyTorch state dict; no code in the file is run.

  Args:
    path: A `.safetensors` file, or one written by `torch.save`: the state dict,
      or a checkpoint that has it as `state_dict`, `model_state_dict` or
      `model`.

  Returns:
    Arrays by name in their stored dtype, without the prefix `module.` of a
    `DataParallel` network.

  Raises:
    UserError: No such file, a damaged one, another format, or a pickle that
      asks for more than tensors in dicts.
  """
  path = locations.expand("path", path)
  is_safetensors = path.suffix == ".safetensors"
  reader = safetensors_file if is_safetensors else torch_file
  try:
    tree = reader.read(path)
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from None
  if all(name.startswith("module.") for name in tree):
    tree = {name.removeprefix("module."): x for name, x in tree.items()}
  # torchvision up to 0.4 wrote norm.1 for norm1 of a dense layer.
  return {
    re.sub(r"(denselayer\d+\.\w+)\.(?=[12]\.)", r"\1", name): x
    for name, x in tree.items()
  }


def _to_flax(x: np.ndarray, leaf: str) -> np.ndarray:
  """Transposes kernels: [F, C, k, k] to [k, k, C, F], [F, C] to [C, F]."""
  if leaf == "kernel" and x.ndim in (2, 4):
    return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0)
  return x


def _check_channels(number: int) -> None:
  checks.positive("num_channels", number, integer=True)
  if number > _MOST_CHANNELS:
    raise UserError(
      f"num_channels: {number}; allowed: at most {_MOST_CHANNELS}"
    )


def load_torch(
  path: pathlib.Path | str, model: nn.Module, *, num_channels: int = 3
) -> Variables:
  """Loads PyTorch weights into one of the networks here.

  Supported are torchvision's VGG-16 (with and without BatchNorm), ResNet-18,
  -50 and DenseNet-121, the PreActResNet-18 of Rice et al. (2020), and Wide
  ResNets with the names of TRADES. The latter are networks like
  `create("wide_resnet", depth=34, width=10, shortcut="conv", padding="symmetric",
  activation="relu", normalization="none", batch_norm_epsilon=1e-5)`.

  Args:
    path: File of weights, see `read_state_dict`. No code in it is run.
    model: Network of one of the classes in `models`, with the fields (also
      num_classes) of the network that was saved.
    num_channels: Number of channels of the images.

  Returns:
    {"params": ..., "batch_stats": ...}, float32; the latter only where the
    network has BatchNorm.

  Raises:
    UserError: See `read_state_dict`. Tensors that are missing, left over or of
      another shape are all named.
  """
  _check_channels(num_channels)
  names = torch_names.layer_names(model)
  tensors = read_state_dict(path)
  expected = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 64, 64, num_channels), jnp.float32),
  )
  missing, misshapen = [], []

  def take(where: Any, leaf: jax.ShapeDtypeStruct) -> Any:
    _, layer, kind = (key.key for key in where)
    name = f"{names[layer]}.{_LEAVES[kind]}"
    if name not in tensors:
      missing.append(name)
      return leaf
    x = _to_flax(tensors.pop(name), kind)
    if x.shape != leaf.shape:
      misshapen.append(f"{name} {x.shape}, not {leaf.shape}")
      return leaf
    return jnp.asarray(x, jnp.float32)

  variables = jax.tree_util.tree_map_with_path(take, expected)
  left = [name for name in tensors if not _UNUSED.fullmatch(name)]
  lists = {
    "missing:": missing,
    "not of this network:": left,
    "of another shape (as flax has it):": misshapen,
  }
  problems = [f"{what} {', '.join(x)}" for what, x in lists.items() if x]
  if problems:
    raise UserError(
      f"{path}: does not fit {type(model).__name__}; {'; '.join(problems)}"
    )
  return variables
