"""Conversion of PyTorch state dicts to the variables of the networks here."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from atat_jax.errors import UserError
from atat_jax.interop import torch_file, torch_names
from atat_jax.runs import locations
from atat_jax.typing import Variables

# Keys under which training scripts save the state dict beside other things.
_ENTRIES = ("state_dict", "model_state_dict", "model")

_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}

# TRADES builds a second first block and never calls it.
_UNUSED = re.compile(r"(.*\.)?num_batches_tracked|sub_block1\..*")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  # safetensors reports any file that it cannot open as missing; Python's own
  # error tells a directory or a lack of permission.
  with path.open("rb"):
    pass
  try:
    # NumPy knows the dtype bfloat16 once JAX has been imported.
    with safetensors.safe_open(path, framework="numpy") as file:
      return {name: file.get_tensor(name) for name in file.keys()}
  except Exception as error:  # also dtypes that NumPy lacks, e.g. 8-bit floats
    reason = " ".join(str(error).split())
    raise UserError(f"{path}: no safetensors file ({reason})") from None


def _is_state_dict(tree: Any) -> bool:
  return (
    isinstance(tree, Mapping)
    and bool(tree)
    and all(isinstance(value, np.ndarray) for value in tree.values())
  )


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
  path = locations.expand("weights", path)
  is_safetensors = path.suffix == ".safetensors"
  read = _read_safetensors if is_safetensors else torch_file.read
  try:
    tree = read(path)
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from None
  if isinstance(tree, Mapping) and not _is_state_dict(tree):
    tree = next((tree[name] for name in _ENTRIES if name in tree), tree)
  if not _is_state_dict(tree):
    raise UserError(
      f"{path}: no state dict; allowed: tensors by name, or a dict that has"
      f" them as {', '.join(_ENTRIES)}"
    )
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
  names = torch_names.layer_names(model)
  tensors = read_state_dict(path)
  expected = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 64, 64, num_channels))
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
  problems = [
    f"{problem} {', '.join(tensor_names)}"
    for problem, tensor_names in (
      ("missing:", missing),
      ("not of this network:", left),
      ("of another shape (as flax has it):", misshapen),
    )
    if tensor_names
  ]
  if problems:
    raise UserError(
      f"{path}: does not fit {type(model).__name__}; {'; '.join(problems)}"
    )
  return variables
