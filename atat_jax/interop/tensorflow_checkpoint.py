"""TensorFlow 1 checkpoints of the Wide ResNet that the paper's code trains.

The paper's released code has the network of the CIFAR-10 challenge of Madry et
al., whose checkpoints have the same names. TensorFlow is needed to read the
files, and for nothing else.
"""

import pathlib
import re
from collections.abc import Callable, Iterable

import numpy as np

from atat_jax.errors import UserError, printable, shown
from atat_jax.interop import entry_names, layouts, torch_names, torch_weights
from atat_jax.interop.torch_file import StateDict
from atat_jax.runs import files
from atat_jax.untrusted import regular

_STATE = "checkpoint"  # text beside the checkpoints that names the newest
_INDEX = ".index"
_MOST_TEXT = 1 << 20
_STEM = "input/init_conv/DW"
_ENDING = re.compile(r"\.(?:index|meta|data-\d{5}-of-\d{5})")
_NEWEST = re.compile(r'^model_checkpoint_path: "(.*)"$', re.MULTILINE)
_NORM = {
  "gamma": "weight",
  "beta": "bias",
  "moving_mean": "running_mean",
  "moving_variance": "running_var",
}
_FIRST_NORM = r"(?:shared|residual_only)_activation/BatchNorm"
# Variable to the name that TRADES gives to it: <1> is a part of the match.
_NAMES = (
  (re.compile(r"input/init_conv/DW"), "conv1.weight"),
  (re.compile(r"unit_last/BatchNorm/(\w+)"), "bn1.<n>"),
  (re.compile(r"logit/DW"), "fc.weight"),
  (re.compile(r"logit/biases"), "fc.bias"),
  (
    re.compile(rf"unit_(\d)_(\d+)/{_FIRST_NORM}/(\w+)"),
    "block<1>.layer.<2>.bn1.<n>",
  ),
  (
    re.compile(r"unit_(\d)_(\d+)/sub1/conv1/DW"),
    "block<1>.layer.<2>.conv1.weight",
  ),
  (
    re.compile(r"unit_(\d)_(\d+)/sub2/BatchNorm/(\w+)"),
    "block<1>.layer.<2>.bn2.<n>",
  ),
  (
    re.compile(r"unit_(\d)_(\d+)/sub2/conv2/DW"),
    "block<1>.layer.<2>.conv2.weight",
  ),
)
_OF_NETWORK = re.compile(r"(input|unit_\w+|logit)/.*")
# Optimizers and averages keep these beside a variable.
_SLOT = re.compile(
  r".*/(Momentum|Adam|Adam_1|RMSProp|RMSProp_1|Adagrad|Ftrl|Ftrl_1"
  r"|ExponentialMovingAverage)"
)


def _infer(shapes: layouts.Shapes) -> tuple[str, layouts.Fields]:
  name, fields = layouts.trades(shapes)
  return name, fields | {"depth": fields["depth"] - 2}  # as 6n + 2


def _preset(_: layouts.Fields) -> layouts.Fields:
  return {
    "shortcut": "pad",
    "activation": "leaky_relu",
    "negative_slope": 0.1,
    "padding": "same",
    "batch_norm_epsilon": 1e-3,
    "normalization": "per_image",
  }


LAYOUT = layouts.Layout(
  "Wide ResNet of the paper's code and of Madry et al. in TensorFlow",
  _infer,
  torch_names.trades,
  _preset,
)


# --- Files -------------------------------------------------------------------


def _has_index(prefix: pathlib.Path) -> bool:
  try:
    return prefix.with_name(f"{prefix.name}{_INDEX}").exists()
  except OSError:  # too long a name
    return False


def _newest(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns the prefix of the newest checkpoint of a folder; None: it has none.

  Raises:
    UserError: It has several, and does not say which is the newest.
  """
  found = sorted(x.name.removesuffix(_INDEX) for x in folder.glob(f"*{_INDEX}"))
  if not found:
    return None
  content = files.read_bytes(folder / _STATE, _MOST_TEXT) or b""
  match = _NEWEST.search(content.decode(errors="replace"))
  # Folders move: what comes before the name is that of another machine.
  name = re.split(r"[/\\]", match[1])[-1] if match else ""
  if name in found:
    return folder / name
  if len(found) > 1:
    raise UserError(
      f"several TensorFlow checkpoints, {entry_names.listed(found)}; allowed:"
      f" one of them, as {folder / printable(found[-1])}"
    )
  return folder / found[0]


def find(path: pathlib.Path) -> pathlib.Path | None:
  """Finds a TensorFlow checkpoint.

  Args:
    path: Folder of checkpoints, of which the newest counts; prefix that the
      files of a checkpoint share; or one of these files.

  Returns:
    The prefix; None: the path leads to something else.

  Raises:
    UserError: A folder of several checkpoints that does not say which is the
      newest.
  """
  if path.is_dir():
    return _newest(path)
  match = re.fullmatch(f"(.+){_ENDING.pattern}", path.name)
  prefixes = [path] if match is None else [path.with_name(match[1]), path]
  for prefix in prefixes:
    if prefix.name and _has_index(prefix) and not prefix.is_file():
      return prefix
  return None


def _open(
  prefix: pathlib.Path,
) -> tuple[list[str], Callable[[str], np.ndarray]]:
  """Opens a checkpoint: the names of its variables, and their reader."""
  with files.plain_errors(prefix):
    for file in prefix.parent.iterdir():
      if file.name.startswith(prefix.name):
        if _ENDING.fullmatch(file.name.removeprefix(prefix.name)):
          regular.require_regular(file)
  try:
    import tensorflow
  except ImportError as error:
    raise UserError(
      f"a TensorFlow checkpoint, for which TensorFlow is missing ({error});"
      " allowed: with it, pip install 'atat_jax[tensorflow]'"
    ) from None
  try:
    reader = tensorflow.train.load_checkpoint(str(prefix))
    names = sorted(reader.get_variable_to_shape_map())
  except Exception as error:
    raise _damaged(error) from None

  def get(name: str) -> np.ndarray:
    try:
      return np.asarray(reader.get_tensor(name))
    except Exception as error:
      raise _damaged(error) from None

  return names, get


def _damaged(error: Exception) -> UserError:
  reason = " ".join(str(error).split())
  return UserError(f"no TensorFlow checkpoint ({printable(reason)[:200]})")


# --- Variables ---------------------------------------------------------------


def _scope(names: Iterable[str], entry: str | None) -> tuple[str, str]:
  """Returns the scope of the network to take, and words if there are others."""
  found = [
    scope
    for scope in (x.removesuffix(_STEM) for x in names if x.endswith(_STEM))
    if scope == "" or scope.endswith("/")
  ]
  plain = [scope.removesuffix("/") for scope in found]
  if entry is not None:
    if entry.removesuffix("/") not in plain:
      listed = entry_names.listed([x for x in plain if x], 9)
      raise UserError(f"entry: {shown(entry)}; allowed: {listed or 'none'}")
    return found[plain.index(entry.removesuffix("/"))], ""
  if len(found) > 1:
    raise UserError(
      f"entry: several networks, {entry_names.listed(plain)}; allowed: entry="
      " one of them"
    )
  if not found:
    raise UserError(
      f"no known network: no variable {_STEM}, but"
      f" {entry_names.listed(list(names))}; allowed: checkpoints of {LAYOUT.title}"
    )
  scope = plain[0]
  return found[0], f"variables of {printable(scope)}" if scope else ""


def _renamed(name: str) -> str:
  """Returns the name that TRADES gives to a variable, or its own."""
  for pattern, new in _NAMES:
    if match := pattern.fullmatch(name):
      parts = match.groups()
      if new.endswith("<n>"):
        if parts[-1] not in _NORM:
          return name
        new = new.replace("<n>", _NORM[parts[-1]])
      for index, part in enumerate(parts, start=1):
        new = new.replace(f"<{index}>", part)
      return new
  return name


def read(prefix: pathlib.Path, entry: str | None) -> StateDict:
  """Reads the network of a checkpoint.

  Args:
    prefix: Prefix of its files, see `find`.
    entry: Scope of the network's variables, where there are several.

  Returns:
    Arrays by the names of TRADES, in PyTorch's layout, without what an
    optimizer keeps.

  Raises:
    UserError: TensorFlow is missing; a damaged checkpoint; one of another
      network, or of several.
  """
  names, get = _open(prefix)
  scope, words = _scope(names, entry)
  tensors: dict[str, np.ndarray] = {}
  for name in names:
    short = name.removeprefix(scope)
    if not name.startswith(scope) or not _OF_NETWORK.fullmatch(short):
      continue
    if _SLOT.fullmatch(short):
      continue
    new = _renamed(short)
    if new in tensors:
      raise UserError(
        f"{shown(name)}: a second variable for {new}; allowed: one, as in"
        f" checkpoints of {LAYOUT.title}"
      )
    tensors[new] = torch_weights.to_torch(get(name), "kernel")
  return StateDict(tensors, words)
