"""Reader of files that `torch.save` has written; runs no code in them.

A checkpoint is a pickle, a program that may call any function of the machine it
is read on. Here it can name only what a state dict needs: ordered dicts, and
tensors and their storages, which become plain descriptions. Anything else is
refused before it is called. The numbers are read afterwards.

Both containers are supported: the zip archive of PyTorch 1.6 and later, and the
older sequence of pickles followed by the storages, which some of torchvision's
weights still have.
"""

import collections
import io
import math
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from atat_jax.errors import UserError

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


class _Dtype(NamedTuple):
  """Stand-in for a class of storages."""

  name: str


class _Storage(NamedTuple):
  """Contiguous numbers: their dtype, the storage's key and how many there are."""

  dtype: str
  key: str
  size: int


class _Tensor(NamedTuple):
  """View of a storage: the arguments of `torch._utils._rebuild_tensor`."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


# Instances without attributes stand for functions, since a pickle may set
# attributes of anything that it can name.
class _RebuildTensor:
  __slots__ = ()

  def __call__(
    self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
  ) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
  __slots__ = ()

  def __call__(self, tensor: Any, *_: Any) -> Any:
    return tensor


_GLOBALS: dict[str, Any] = {
  "collections.OrderedDict": collections.OrderedDict,
  "torch._utils._rebuild_tensor": _RebuildTensor(),
  "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
  "torch._utils._rebuild_parameter": _RebuildParameter(),
  **{f"torch.{name}": _Dtype(name) for name in _DTYPES},
}


class _TensorUnpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    full = f"{module}.{name}"
    if full not in _GLOBALS:
      raise UserError(
        f"the pickle asks for {full}; allowed: tensors in dicts only, as in"
        " torch.save(model.state_dict(), path)"
      )
    return _GLOBALS[full]

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, size = pid[:5]
    if kind != "storage":
      raise ValueError(f"persistent id {kind!r}")
    return _Storage(dtype.name, key, size)


def _array(
  tensor: _Tensor, read: Callable[[_Storage], np.ndarray]
) -> np.ndarray:
  storage = read(tensor.storage)
  numbers = (tensor.offset, *tensor.shape, *tensor.strides)
  if not all(isinstance(n, int) and n >= 0 for n in numbers):
    raise ValueError(f"a tensor of {numbers}")
  steps = zip(tensor.shape, tensor.strides, strict=True)
  last = tensor.offset + sum((n - 1) * stride for n, stride in steps)
  if math.prod(tensor.shape) and last >= storage.size:
    raise ValueError(f"element {last} of {storage.size}")
  # A copy could exhaust memory: strides of 0 make any size from one number.
  return np.lib.stride_tricks.as_strided(
    storage[tensor.offset :],
    tensor.shape,
    [stride * storage.itemsize for stride in tensor.strides],
    writeable=False,
  )


def _arrays(tree: Any, read: Callable[[_Storage], np.ndarray]) -> Any:
  """Replaces the descriptions of tensors in a tree by arrays."""
  if isinstance(tree, _Tensor):
    return _array(tree, read)
  if isinstance(tree, Mapping):
    return {key: _arrays(value, read) for key, value in tree.items()}
  return tree


def _numbers(data: bytes, storage: _Storage, order: str) -> np.ndarray:
  kind = np.dtype(_DTYPES[storage.dtype])
  if len(data) != storage.size * kind.itemsize:
    raise ValueError(f"{len(data)} bytes for {storage}")
  array = np.frombuffer(data, kind)
  return array if order == sys.byteorder else array.byteswap()


def _read_zip(path: pathlib.Path) -> Any:
  with zipfile.ZipFile(path) as archive:
    # All entries lie in one folder, named like the file when it was saved.
    names = archive.namelist()
    (program,) = (name for name in names if name.endswith("/data.pkl"))
    folder = program.removesuffix("data.pkl")
    order = "little"
    if f"{folder}byteorder" in names:
      order = archive.read(f"{folder}byteorder").decode()
    tree = _TensorUnpickler(
      io.BytesIO(archive.read(program)), encoding="utf-8"
    ).load()

    def read(storage: _Storage) -> np.ndarray:
      data = archive.read(f"{folder}data/{storage.key}")
      return _numbers(data, storage, order)

    return _arrays(tree, read)


def _read_legacy(path: pathlib.Path) -> Any:
  with path.open("rb") as file:

    def load() -> Any:
      return _TensorUnpickler(file, encoding="utf-8").load()

    if load() != _LEGACY_MAGIC:
      raise ValueError("no magic number")
    load()  # the protocol's version
    order = "little" if load()["little_endian"] else "big"
    tree = load()
    storages: dict[str, bytes] = {}
    sizes = {s.key: s for s in _storages(tree)}
    for key in load():
      itemsize = np.dtype(_DTYPES[sizes[key].dtype]).itemsize
      number = int.from_bytes(file.read(8), order)  # type: ignore[arg-type]
      storages[key] = file.read(number * itemsize)
    return _arrays(tree, lambda s: _numbers(storages[s.key], s, order))


def _storages(tree: Any) -> list[_Storage]:
  if isinstance(tree, _Tensor):
    return [tree.storage]
  if isinstance(tree, Mapping):
    return [s for value in tree.values() for s in _storages(value)]
  return []


def read(path: pathlib.Path) -> Any:
  """Reads what was saved, with numpy arrays for tensors.

  Args:
    path: File written by `torch.save`.

  Returns:
    The saved dict of arrays, possibly nested.

  Raises:
    UserError: The file is damaged or of another format, or its pickle asks for
      anything but tensors in dicts.
  """
  try:
    return (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except OSError:
    raise
  except Exception as error:  # a pickle can raise anything
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(f"{path}: no PyTorch checkpoint ({reason})") from None
