"""Reader of files that `torch.save` has written; runs no code in them.

A checkpoint is a pickle, a program that may call any function of the machine it
is read on. Here it can name only what a state dict needs: ordered dicts, and
tensors and their storages, which become plain descriptions. Anything else is
refused. The numbers are read afterwards, those of the state dict only, and each
storage once.

Both containers are supported: the zip archive of PyTorch 1.6 and later, and the
older sequence of pickles followed by the storages, which some of torchvision's
weights still have.
"""

import io
import pathlib
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from atat_jax.errors import UserError
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
_NAMES = frozenset((_DICT, _PARAMETER, *_TENSORS, *_STORAGES))

# Keys under which training scripts save the state dict beside other things.
_ENTRIES = ("state_dict", "model_state_dict", "model")


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


def _state_dict(tree: Any) -> dict[str, pickles.Call]:
  """Finds the tensors of the state dict by name."""
  top = _as_dict(tree) or {}
  inside = (_as_dict(top[name]) for name in _ENTRIES if name in top)
  for candidate in (top, next(inside, None)):
    tensors = {name: _as_tensor(x) for name, x in (candidate or {}).items()}
    found = {
      name: x
      for name, x in tensors.items()
      if type(name) is str and x is not None
    }
    if found and len(found) == len(tensors):
      return found
  raise UserError(
    "no state dict; allowed: tensors by name, or a dict that has them as"
    f" {', '.join(_ENTRIES)}"
  )


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


def _read_zip(path: pathlib.Path) -> dict[str, np.ndarray]:
  with zips.open_zip(path) as archive:
    # All entries lie in one folder, named like the file when it was saved.
    (program,) = (x for x in archive.members if x.endswith("/data.pkl"))
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

    return _arrays(_state_dict(tree), read, order)


def _read_legacy(path: pathlib.Path) -> dict[str, np.ndarray]:
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

    return _arrays(_state_dict(tree), read, order)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a state dict.

  Args:
    path: File written by `torch.save`: a state dict, or a checkpoint that has
      it as `state_dict`, `model_state_dict` or `model`.

  Returns:
    Arrays by name, read-only, in memory once for each storage.

  Raises:
    UserError: The file is damaged or of another format, has no state dict, or
      its pickle asks for anything but tensors in dicts.
    OSError: The file cannot be read.
  """
  regular.require_regular(path)
  try:
    with regular.open_regular(path) as file:
      is_zip = zipfile.is_zipfile(file)
    return (_read_zip if is_zip else _read_legacy)(path)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except OSError:
    raise
  except Exception as error:  # a damaged file can raise anything
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(f"{path}: no PyTorch checkpoint ({reason})") from None
