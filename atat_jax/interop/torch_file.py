"""Reader of files that `torch.save` has written; runs no code in them.

A checkpoint is a pickle, a program that may call any function of the machine it
is read on. Here it can name only what a state dict needs: ordered dicts, and
tensors and their storages, which become plain descriptions, and a few kinds of
values that training scripts save beside them and that are left out. Anything
else is refused. The numbers are read afterwards, those of the state dict only,
and each storage once.

Both containers are supported: the zip archive of PyTorch 1.6 and later, and the
older sequence of pickles followed by the storages, which some of torchvision's
weights still have.
"""

import io
import pathlib
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from atat_jax.errors import UserError, shown
from atat_jax.interop import entry_names
from atat_jax.untrusted import pickles, regular, zips

_DTYPES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": jnp.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_AXES = 32

_DICT = "collections.OrderedDict"
_PARAMETER = "torch._utils._rebuild_parameter"
_TENSORS = (
  "torch._utils._rebuild_tensor",
  "torch._utils._rebuild_tensor_v2",
)
_STORAGES = {f"torch.{name}": np.dtype(x) for name, x in _DTYPES.items()}
# Values beside the weights, such as an accuracy or the command's arguments.
_BESIDE = frozenset(
  "torch.Size torch.device torch.float16 torch.bfloat16 torch.float32"
  " torch.float64 torch.int64 numpy.dtype numpy.ndarray"
  " numpy.core.multiarray.scalar numpy._core.multiarray.scalar"
  " numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct"
  " _codecs.encode argparse.Namespace types.SimpleNamespace"
  " collections.defaultdict collections.Counter pathlib.PosixPath"
  " builtins.dict builtins.list builtins.set builtins.int builtins.float"
  " builtins.str builtins.bool __builtin__.dict __builtin__.list"
  " __builtin__.set __builtin__.int __builtin__.float".split()
)
_NAMES = frozenset((_DICT, _PARAMETER, *_TENSORS, *_STORAGES)) | _BESIDE
_DEEPEST = 2

Tensors: TypeAlias = dict[str, pickles.Call]


class StateDict(NamedTuple):
  """Tensors of a file and where in it they were.

  Attributes:
    tensors: Arrays by name.
    entry: Which of the file's entries they are, in words; "": there was no
      choice.
    description: Text that `interop.save` wrote beside them; "": none.
  """

  tensors: dict[str, np.ndarray]
  entry: str
  description: str = ""


class _Storage(NamedTuple):
  """Contiguous numbers: their dtype, the storage's key and how many there are."""

  dtype: np.dtype
  key: str
  size: int

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize


def _check_name(name: str) -> None:
  if name not in _NAMES:
    raise UserError(
      f"the pickle asks for {name}; allowed: tensors in dicts only, as in"
      " torch.save(model.state_dict(), path)"
    )


def _storage(found: Any) -> _Storage:
  """Reads the identity of a storage."""
  kind, dtype, key, _, size, *view = found.key
  if kind != "storage" or any(view):
    raise ValueError(f"persistent id {kind!r}")
  if type(key) is not str or type(size) is not int or size < 0:
    raise ValueError("a storage without key and size")
  return _Storage(_STORAGES[dtype.name], key, size)


def _as_dict(found: Any) -> dict[Any, Any] | None:
  """Returns a saved dict; None for anything else."""
  if isinstance(found, pickles.Call) and found.name == _DICT:
    # Python 2 passed the entries to the class.
    pairs = found.args[0] if found.args else ()
    return {key: value for key, value in pairs} | found.entries
  return found if isinstance(found, dict) else None


def _as_tensor(found: Any) -> pickles.Call | None:
  """Returns the call that makes a tensor; None for anything else."""
  if isinstance(found, pickles.Call) and found.name == _PARAMETER:
    found = found.args[0]
  if isinstance(found, pickles.Call) and found.name in _TENSORS:
    return found
  return None


def _candidates(tree: Any) -> dict[str, Tensors]:
  """Finds tensors by name, for each entry of a checkpoint that has any.

  Args:
    tree: The whole file: tensors by name (the entry ""), or dicts of them, and
      these in turn in dicts of one of the usual names.
  """
  found: dict[str, Tensors] = {}
  seen: set[int] = set()  # one dict can be an entry of many
  queue = [("", tree, 0)]
  for path, value, depth in queue:
    entries = None if id(value) in seen else _as_dict(value)
    if entries is None:
      continue
    seen.add(id(value))
    tensors = {name: _as_tensor(x) for name, x in entries.items()}
    own = {
      name: x
      for name, x in tensors.items()
      if type(name) is str and x is not None
    }
    if own:
      found[path] = own
    for name, x in entries.items():
      usual = depth == 0 or name in entry_names.USUAL
      if type(name) is str and usual and depth < _DEEPEST:
        queue.append((f"{path}.{name}" if path else name, x, depth + 1))
  return found


def _state_dict(tree: Any, entry: str | None) -> tuple[Tensors, str]:
  """Returns the tensors of the state dict by name, and its entry in words."""
  found = _candidates(tree)
  chosen, words = entry_names.choose(found, entry)
  return found[chosen], words


def _array(
  tensor: pickles.Call, read: Callable[[_Storage], np.ndarray]
) -> np.ndarray:
  stored, offset, shape, strides, *_ = tensor.args
  storage = _storage(stored)
  numbers = (offset, *shape[:_MOST_AXES], *strides[:_MOST_AXES])
  if not all(type(n) is int and n >= 0 for n in numbers):
    raise ValueError(f"a tensor of {numbers}")
  if len(shape) > _MOST_AXES:
    raise ValueError(f"a tensor of {len(shape)} axes")
  last = offset + sum(
    (n - 1) * stride for n, stride in zip(shape, strides, strict=True)
  )
  if 0 not in shape and last >= storage.size:
    raise ValueError(f"element {last} of {storage.size}")
  # A copy could exhaust memory: strides of 0 make any size from one number.
  return np.lib.stride_tricks.as_strided(
    read(storage)[offset:],
    shape,
    [stride * storage.dtype.itemsize for stride in strides],
    writeable=False,
  )


def _arrays(
  tensors: Mapping[str, pickles.Call],
  read: Callable[[_Storage], bytes],
  order: str,
) -> dict[str, np.ndarray]:
  """Reads tensors, and a storage that several of them view once."""
  if order not in ("little", "big"):
    raise ValueError(f"byte order {order!r}")
  known: dict[str, tuple[_Storage, np.ndarray]] = {}

  def numbers(storage: _Storage) -> np.ndarray:
    if storage.key not in known:
      data = read(storage)
      if len(data) != storage.nbytes:
        raise ValueError(f"{len(data)} bytes for {storage}")
      if storage.dtype == np.bool_ and data.translate(None, b"\0\1"):
        raise ValueError("a Boolean that is neither 0 nor 1")
      array = np.frombuffer(data, storage.dtype)
      if order != sys.byteorder:
        array = array.byteswap()
      known[storage.key] = storage, array
    same, array = known[storage.key]
    if same != storage:
      raise ValueError(f"{storage} and {same}")
    return array

  return {name: _array(tensor, numbers) for name, tensor in tensors.items()}


def _read_zip(path: pathlib.Path, entry: str | None) -> StateDict:
  with zips.open_zip(path) as archive:
    # All entries lie in one folder, named like the file when it was saved.
    programs = [x for x in archive.members if x.endswith("/data.pkl")]
    if len(programs) != 1:
      raise ValueError("it has no data.pkl")
    (program,) = programs
    folder = program.removesuffix("data.pkl")
    order = "little"
    if f"{folder}byteorder" in archive.members:
      order = archive.read(f"{folder}byteorder", 9).decode()
    content = archive.read(program, pickles.LIMIT)
    tree = pickles.load(
      pickles.Program(io.BytesIO(content), len(content)), _check_name, text=True
    )

    def read(storage: _Storage) -> bytes:
      return archive.read(f"{folder}data/{storage.key}", storage.nbytes)

    tensors, words = _state_dict(tree, entry)
    return StateDict(_arrays(tensors, read, order), words)


def _read_legacy(path: pathlib.Path, entry: str | None) -> StateDict:
  with regular.open_regular(path) as file:
    end = regular.size(file)
    stored: list[pickles.Stored] = []

    def load() -> Any:
      program = pickles.Program(file, end - file.tell())
      return pickles.load(program, _check_name, text=True, stored=stored)

    if load() != _LEGACY_MAGIC:
      raise ValueError("no magic number")
    load()  # the protocol's version
    order = "little" if load()["little_endian"] else "big"
    tree, keys = load(), load()
    storages = {x.key: x for x in map(_storage, stored)}
    places = {}
    for key in keys:
      header = file.read(8)
      number = int.from_bytes(header, order)  # type: ignore[arg-type]
      places[key] = file.tell()
      file.seek(number * storages[key].dtype.itemsize, io.SEEK_CUR)
      if len(header) < 8 or file.tell() > end or number != storages[key].size:
        raise ValueError(f"{number} elements for {storages[key]}")

    def read(storage: _Storage) -> bytes:
      file.seek(places[storage.key])
      return file.read(storage.nbytes)

    tensors, words = _state_dict(tree, entry)
    return StateDict(_arrays(tensors, read, order), words)


# How files of other formats begin, and what they are.
_FOREIGN = {
  b"\x89HDF": "an HDF5 file, as of Keras",
  b"GGUF": "a GGUF file",
  b"\x93NUMPY": "a NumPy array",
}
_REMEDY = "allowed: a state dict that torch.save or safetensors has written"


def _check_format(path: pathlib.Path) -> None:
  """Checks that a file is not of another known format of weights."""
  with regular.open_regular(path) as file:
    start = file.read(256)
  kinds = [kind for magic, kind in _FOREIGN.items() if start.startswith(magic)]
  # ONNX begins with the field ir_version, then the producer's name.
  if path.suffix == ".onnx" or (start[:1] == b"\x08" and start[2:3] == b"\x12"):
    kinds.append("an ONNX file")
  if kinds:
    raise UserError(
      f"{kinds[0]}; {_REMEDY}: save it in PyTorch as"
      " torch.save(model.state_dict(), path)"
    )


def _explain(error: Exception) -> str:
  """Returns why a file is no checkpoint, in words."""
  if isinstance(error, KeyError):
    return f"it lacks {shown(error.args[0])}"
  words = " ".join(str(error).split())
  return f"{type(error).__name__}: {words}"


def read(path: pathlib.Path, entry: str | None = None) -> StateDict:
  """Reads a state dict.

  Args:
    path: File written by `torch.save`: a state dict, or a checkpoint that has
      one or several as entries.
    entry: Entry to take, as "model_ema"; None: see `entry_names.choose`.

  Returns:
    Arrays by name, read-only, in memory once for each storage.

  Raises:
    UserError: The file is damaged or of another format, has no state dict or
      not this one, or its pickle asks for anything but tensors in dicts.
    OSError: The file cannot be read.
  """
  regular.require_regular(path)
  try:
    _check_format(path)
    with regular.open_regular(path) as file:
      is_zip = zipfile.is_zipfile(file)
    return (_read_zip if is_zip else _read_legacy)(path, entry)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except OSError:
    raise
  except Exception as error:  # a damaged file can raise anything
    reason = _explain(error)
    raise UserError(f"{path}: no PyTorch checkpoint ({reason})") from None
