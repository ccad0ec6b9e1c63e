"""One call from a network here to weights and a module for PyTorch."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError, printable
from atat_jax.interop import (
  description,
  layouts,
  recognition,
  safetensors_file,
  torch_module,
  torch_weights,
)
from atat_jax.runs import files, locations
from atat_jax.typing import Variables

_SUFFIX = ".safetensors"


class Saved(NamedTuple):
  """Files of a network for PyTorch.

  Attributes:
    weights: The `.safetensors` file.
    module: The Python file with the `torch.nn.Module` of these weights.
  """

  weights: pathlib.Path
  module: pathlib.Path


def _tensors(
  variables: Variables, names: Mapping[str, str]
) -> dict[str, np.ndarray]:
  """Returns the arrays by PyTorch's names, in PyTorch's layout."""
  found = {}
  for where, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
    _, layer, kind = (key.key for key in where)
    array = np.asarray(leaf)
    if array.dtype != np.float32:
      raise UserError(
        f"variables: {layer}/{kind} has dtype {array.dtype}; allowed: float32"
      )
    if not np.isfinite(array).all():
      raise UserError(
        f"variables: {layer}/{kind} has values that are not finite; allowed:"
        " finite ones"
      )
    name = torch_weights.tensor_name(names[layer], kind)
    found[name] = np.ascontiguousarray(torch_weights.to_torch(array, kind))
  return found


def _normalization(fields: Mapping[str, object]) -> dict[str, np.ndarray]:
  """Returns mean and deviation as the module's buffers."""
  if fields["normalization"] != "dataset":
    return {}
  return {
    name: np.asarray(fields[name], np.float32).reshape(1, -1, 1, 1)
    for name in ("mean", "std")
  }


def _is_written_here(path: pathlib.Path) -> bool:
  """Whether a file of weights is one that `save` has written."""
  try:
    with files.local(path) as here:
      return description.TEXT in safetensors_file.texts(here)
  # A file of any other kind can raise anything in the reader of headers.
  except Exception:
    return False


def _paths(path: pathlib.Path | str) -> Saved:
  """Returns the paths of both files, neither of which is somebody else's."""
  path = locations.expand("path", path)
  if path.suffix != _SUFFIX:
    raise UserError(f"path: {path}; allowed: a name that ends in {_SUFFIX}")
  if path.exists() and not _is_written_here(path):
    raise UserError(
      f"path: {path} would be overwritten, and is no file of atat_jax; allowed:"
      " another name"
    )
  module = path.with_name(f"{torch_module.module_name(path.stem)}.py")
  content = files.read_bytes(module)
  if content is not None and not torch_module.is_written_here(content):
    raise UserError(
      f"path: {module} would be overwritten, and is no file of atat_jax;"
      " allowed: another name"
    )
  for other in sorted(path.parent.glob(f"*{_SUFFIX}")):
    taken = torch_module.module_name(other.stem) == module.stem
    if taken and other.name != path.name:
      raise UserError(
        f"path: {module} is the module of {printable(other.name)}, too; allowed:"
        " a name that differs in letters and digits"
      )
  return Saved(path, module)


def _num_channels(layout: layouts.Layout, variables: Variables) -> int:
  """Returns the number of channels of the images, by the first layer."""
  try:
    return int(variables["params"][layout.first]["kernel"].shape[2])
  except (LookupError, TypeError, AttributeError):
    return 3  # other variables, which the check refuses


def save(
  path: pathlib.Path | str, model: nn.Module, variables: Variables
) -> Saved:
  """Writes a network as weights and as a module for PyTorch.

  `load` reads the weights back, bit by bit, into a network with the same
  fields. The module computes in float32, whatever the network's dtype, and has
  the running statistics of BatchNorm.

  Args:
    path: The file of weights, which ends in `.safetensors`. The module is a
      Python file beside it, of the same name: a single `torch.nn.Module`
      called `Network` that takes images [B, C, H, W] in [0, 1] and returns
      logits [B, K]. It imports PyTorch only.
    model: A network of `models.MODELS`.
    variables: {"params": ..., "batch_stats": ...}, float32, as
      `checkpoints.restore_model` and `load` return them.

  Returns:
    The paths of both files.

  Raises:
    UserError: A network of another class, variables of another network or
      dtype, or not finite, a path of another suffix, a file of somebody else's
      in the place of either, or other weights with a module of this name.
  """
  checks.module(model)
  described = description.describe(model)
  layout = layouts.saved(model)
  stages = len(described.fields.get("stage_sizes", ()))
  if stages > layouts.MOST_STAGES:
    raise UserError(
      f"model: {stages} stages; allowed: at most {layouts.MOST_STAGES}, as load"
      " reads them"
    )
  paths = _paths(path)
  channels = _num_channels(layout, variables)
  side = torch_weights.example_side(model)
  checks.variables(model, variables, (side, side, channels))
  known = {k: variables[k] for k in ("params", "batch_stats") if k in variables}
  tensors = _tensors(known, layout.names(model))
  tensors |= _normalization(described.fields)
  try:
    recognition.described(described, tensors, {})
  except UserError as error:
    raise UserError(f"model: it could not be read back, {error}") from None
  text = torch_module.source(
    model, described.fields, channels, paths.weights.name
  )
  texts = {"format": "pt", description.TEXT: description.encode(described)}
  with files.replacing(paths.weights) as temporary:
    safetensors.numpy.save_file(tensors, temporary, texts)
    files.write_text(paths.module, text)
  return paths
