"""Conversion of PyTorch state dicts to the variables of the networks here."""

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.interop import (
  description,
  entry_names,
  layouts,
  safetensors_file,
  torch_file,
  wrappers,
)
from atat_jax.runs import locations
from atat_jax.typing import Variables

_MOST_CHANNELS = 1 << 16

_LEAVES = {
  "kernel": ".weight",
  "scale": ".weight",
  "bias": ".bias",
  "mean": ".running_mean",
  "var": ".running_var",
  "value": "",
}

# TRADES builds a second first block and never calls it.
_UNUSED = re.compile(r"(.*\.)?num_batches_tracked|sub_block1\..*")

_OLD_NAMES = (
  # torchvision up to 0.4 wrote norm.1 for norm1 of a dense layer.
  (re.compile(r"(denselayer\d+\.\w+)\.(?=[12]\.)"), r"\1"),
  (re.compile(r"\bpos_embeder\b"), "pos_embed"),  # timm's XCiT before 0.9
)


def read(path: pathlib.Path | str, entry: str | None) -> torch_file.StateDict:
  """Reads the tensors of a file under the names of today.

  Args:
    path: File of weights, see `read_state_dict`.
    entry: Entry of the checkpoint to take; None: `entry_names.choose` does.

  Returns:
    Arrays by name, and which entry they are.

  Raises:
    UserError: See `read_state_dict`.
  """
  path = locations.expand("path", path)
  if entry is not None:
    checks.instance("entry", entry, str, "the name of an entry of the file")
  try:
    if path.suffix == ".safetensors":
      if entry is not None:
        raise UserError(
          f"entry: {entry!r}; allowed: none, a safetensors file has no entries"
        )
      stored, texts = safetensors_file.read(path)
      text = texts.get(description.TEXT, "")
      found = torch_file.StateDict(stored, "", text)
    else:
      found = torch_file.read(path, entry)
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}") from None
  tensors = found.tensors
  for old, new in _OLD_NAMES:
    tensors = {old.sub(new, name): x for name, x in tensors.items()}
  return found._replace(tensors=tensors)


def read_state_dict(
  path: pathlib.Path | str, *, entry: str | None = None
) -> dict[str, np.ndarray]:
  """Reads a PyTorch state dict; no code in the file is run.

  It is what a network of your own needs to take the weights of a checkpoint.

  Args:
    path: A `.safetensors` file, or one written by `torch.save`: the state dict,
      or a checkpoint that has it as `state_dict`, `model_state_dict`, `model`,
      `net`, `ema` or `model_ema`, averaged weights first.
    entry: Entry to take instead, as "model"; None: as described.

  Returns:
    Arrays by name in their stored dtype and PyTorch's layout (kernels [F, C, k,
    k], dense weights [F, C]), without prefixes that all names have from
    wrappers (`module.`, `model.`, `_orig_mod.`, `1.`).

  Raises:
    UserError: No such file, a damaged one, another format, several state dicts
      of equal right, or a pickle that asks for more than tensors in dicts.
  """
  return wrappers.without_wrappers(read(path, entry).tensors)


def _to_flax(x: np.ndarray, leaf: str) -> np.ndarray:
  """Transposes kernels: [F, C, k, k] to [k, k, C, F], [F, C] to [C, F]."""
  if leaf == "kernel" and x.ndim in (2, 4):
    return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0)
  return x


def to_torch(x: np.ndarray, leaf: str) -> np.ndarray:
  """Transposes kernels as PyTorch has them.

  Args:
    x: Array of a layer.
    leaf: Name of the array in the layer.

  Returns:
    Kernels [F, C, k, k] or [F, C]; any other array as it is.
  """
  if leaf == "kernel" and x.ndim in (2, 4):
    return x.T if x.ndim == 2 else x.transpose(3, 2, 0, 1)
  return x


def tensor_name(layer: str, leaf: str) -> str:
  """Returns PyTorch's name of an array.

  Args:
    layer: PyTorch's name of the layer.
    leaf: Name of the array in the layer here.
  """
  return f"{layer}{_LEAVES[leaf]}"


def example_side(model: nn.Module) -> int:
  """Returns the side of images that a network takes, in pixels.

  Args:
    model: The network.
  """
  fields: Any = model
  if hasattr(model, "image_size"):
    return int(fields.image_size)
  if hasattr(model, "patch_size"):
    return max(64, int(fields.patch_size))
  if getattr(model, "shortcut", "") == "pad":  # strides divide the side
    return 8 * math.prod(fields.strides)
  return 512  # halved by as many stages as are read


def _check_channels(number: int) -> None:
  checks.positive("num_channels", number, integer=True)
  if number > _MOST_CHANNELS:
    raise UserError(
      f"num_channels: {number}; allowed: at most {_MOST_CHANNELS}"
    )


def _place(x: np.ndarray) -> tuple[object, ...]:
  """Returns where numbers lie: a tensor can be saved under two names."""
  return x.__array_interface__["data"], x.shape, x.strides, x.dtype.str


@dataclasses.dataclass
class Fit:
  """Network's variables from a file, and what does not fit.

  Attributes:
    variables: The collections; shapes instead of arrays where tensors lack.
    missing: Names of tensors that the file lacks.
    left: Names of tensors that the network does not have.
    misshapen: Names and shapes, as flax has them, of the others that do not
      fit.
  """

  variables: Any
  missing: list[str]
  left: list[str]
  misshapen: list[str]

  def __len__(self) -> int:
    return len(self.missing) + len(self.left) + len(self.misshapen)

  def words(self) -> str:
    """Says what does not fit, with a few names of each kind."""
    lists = {
      "missing": self.missing,
      "not of this network": self.left,
      "of another shape (as flax has it)": self.misshapen,
    }
    return "; ".join(
      f"{what}: {entry_names.listed(found)}"
      for what, found in lists.items()
      if found
    )


def fit(
  tensors: Mapping[str, np.ndarray],
  model: nn.Module,
  layout: layouts.Layout,
  num_channels: int,
) -> Fit:
  """Puts tensors where a network has them.

  Args:
    tensors: Arrays by PyTorch's name, without wrappers.
    model: The network.
    layout: Layout of these names.
    num_channels: Number of channels of the images.

  Returns:
    Variables in float32, and what does not fit.
  """
  names = layout.names(model)
  left = dict(tensors)
  missing, misshapen = [], []
  shape = (1, *[example_side(model)] * 2, num_channels)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  expected = jax.eval_shape(model.init, jax.random.key(0), images)

  def take(where: Any, leaf: jax.ShapeDtypeStruct) -> Any:
    _, layer, kind = (key.key for key in where)
    name = tensor_name(names[layer], kind)
    if name not in left:
      missing.append(name)
      return leaf
    x = _to_flax(left.pop(name), kind)
    if x.shape != leaf.shape:
      misshapen.append(f"{name} {x.shape}, not {leaf.shape}")
      return leaf
    return jnp.asarray(x, jnp.float32)

  variables = jax.tree_util.tree_map_with_path(take, expected)
  used = {_place(x) for name, x in tensors.items() if name not in left}
  unknown = [
    name
    for name, x in left.items()
    if not _UNUSED.fullmatch(name) and _place(x) not in used
  ]
  return Fit(variables, missing, unknown, misshapen)


def _check_fields(model: nn.Module, layout: layouts.Layout) -> None:
  """Checks what names cannot show: the fields that the layout's code fixes."""
  fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
  wrong = {}
  for name, value in layout.preset(fields).items():
    if name == "normalization":
      # Data sets differ in mean and deviation, images one by one do not.
      ok = fields[name] in ("none", "dataset")
    else:
      ok = name in ("mean", "std", "num_heads", "patch_size", "tokens_norm")
      ok = ok or fields[name] == value
    if not ok:
      wrong[name] = value
  if wrong:
    theirs = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
    ours = ", ".join(f"{name}={fields[name]!r}" for name in wrong)
    raise UserError(
      f"model: {ours}; allowed for {layout.title}: {theirs}, as"
      " interop.load(path) sets them, or check_fields=False"
    )


def _check_described(model: nn.Module, text: str) -> None:
  """Checks that a network computes what the file's description says."""
  theirs = description.decode(text).fields
  ours = description.fields_of(model)
  wrong = [name for name, value in ours.items() if theirs.get(name) != value]
  if wrong:
    listed = ", ".join(f"{x}={ours[x]!r}, not {theirs.get(x)!r}" for x in wrong)
    raise UserError(
      f"model: {listed}; allowed: the fields that the file describes, as"
      " interop.load(path) sets them, or check_fields=False"
    )


def _check_normalization(model: nn.Module, found: wrappers.Unwrapped) -> None:
  """Checks that a network normalises its images as the file does."""
  if found.mean is None or found.std is None:
    return
  fields: Any = model
  same = fields.normalization == "dataset" and all(
    np.allclose(own, values)
    for own, values in (
      (fields.mean, found.mean),
      (fields.std, found.std),
    )
  )
  if not same:
    raise UserError(
      f"normalization: {fields.normalization!r}; allowed: the file's,"
      f" normalization='dataset', mean={found.mean}, std={found.std}, as"
      " interop.load(path) sets them"
    )


def _overlap(found: wrappers.Unwrapped, names: Mapping[str, str]) -> int:
  """Returns how many tensors are of layers that a network has."""
  layers = set(names.values())
  return sum(
    name in layers or name.rpartition(".")[0] in layers
    for name in found.tensors
  )


def load_torch(
  path: pathlib.Path | str,
  model: nn.Module,
  *,
  num_channels: int = 3,
  entry: str | None = None,
  check_fields: bool = True,
) -> Variables:
  """Loads PyTorch weights into one of the networks here.

  `load` recognises the network itself, and sets all its fields. This function
  is for a network with fields of your own choice.

  Args:
    path: File of weights, see `read_state_dict`. No code in it is run.
    model: Network of one of the classes in `models`, with the fields (also
      num_classes) of the network that was saved.
    num_channels: Number of channels of the images.
    entry: Entry of the checkpoint to take; None: see `read_state_dict`.
    check_fields: Whether fields that names and shapes do not show (activation,
      padding, epsilon, per-image normalisation) must be those of the published
      code with these names.

  Returns:
    {"params": ..., "batch_stats": ...}, float32; the latter only where the
    network has BatchNorm.

  Raises:
    UserError: See `read_state_dict`. Tensors that are missing, left over or of
      another shape; fields that the names' own code does not have.
  """
  _check_channels(num_channels)
  checks.module(model)
  checks.boolean("check_fields", check_fields)
  state = read(path, entry)
  described = state.description
  known = [layouts.saved(model)] if described else layouts.of(model)
  found, layout = max(
    itertools.product(wrappers.unwrapped(state.tensors), known),
    key=lambda pair: _overlap(pair[0], pair[1].names(model)),
  )
  fitted = fit(found.tensors, model, layout, num_channels)
  if len(fitted):
    raise UserError(
      f"{path}: does not fit {type(model).__name__} with the names of"
      f" {layout.title}; {fitted.words()}"
    )
  try:
    if described and check_fields:
      _check_described(model, described)
    elif not described:
      _check_normalization(model, found)
      if check_fields:
        _check_fields(model, layout)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  return fitted.variables
