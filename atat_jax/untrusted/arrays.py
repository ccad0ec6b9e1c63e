"""NumPy's files: headers that are compared with what is there, no objects."""

import math
import pathlib
from collections.abc import Collection
from typing import IO, NamedTuple

import numpy as np

from atat_jax.untrusted import regular, zips

_CHUNK = 1 << 20
_MOST_AXES = 32
_LARGEST_CODE_POINT = 0x10FFFF


class Header(NamedTuple):
  """Header of an array in NumPy's format.

  Attributes:
    shape: Shape of the array.
    dtype: Its dtype, numbers, Booleans, text or plain bytes.
    order: "C" or "F".
    offset: Number of bytes before the first element.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  order: str
  offset: int

  @property
  def nbytes(self) -> int:
    """Number of bytes of all elements."""
    return math.prod(self.shape) * self.dtype.itemsize


def _parse_header(
  file: IO[bytes],
) -> tuple[tuple[int, ...], bool, np.dtype]:
  version = np.lib.format.read_magic(file)
  try:
    if version == (1, 0):
      return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
      return np.lib.format.read_array_header_2_0(file)
  # The header is a Python literal, of any depth.
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    raise ValueError("the header of an array cannot be parsed") from None
  raise ValueError(f"version {version} of the format; allowed: 1.0, 2.0")


def read_header(file: IO[bytes], size: int) -> Header:
  """Reads the header of an array and compares it with the size of the file.

  Args:
    file: File at the start of an `.npy`.
    size: Number of bytes of the `.npy`, header included.

  Returns:
    The header; `file` stands at the first element.

  Raises:
    ValueError: No such header, an array of objects or records, or of another
      size than the file's.
  """
  start = file.tell()
  shape, fortran, dtype = _parse_header(file)
  if dtype.hasobject or dtype.kind not in "biufcSUV" or dtype.fields:
    raise ValueError(f"an array of {dtype}; allowed: numbers and text")
  if len(shape) > _MOST_AXES:
    raise ValueError(f"an array of {len(shape)} axes")
  if not dtype.itemsize or any(n < 0 for n in shape):
    raise ValueError(f"an array of {dtype} {shape}")
  order = "F" if fortran else "C"
  header = Header(shape, dtype, order, file.tell() - start)
  if header.offset + header.nbytes != size:
    raise ValueError(
      f"the header claims {dtype} {list(shape)}, {header.nbytes} bytes; there"
      f" are {size - header.offset}"
    )
  return header


def _check_values(array: np.ndarray) -> None:
  """Checks bytes that no array in memory may have."""
  if not array.size:
    return
  if array.dtype.kind == "b" and array.view(np.uint8).max() > 1:
    raise ValueError("a Boolean that is neither 0 nor 1")
  if array.dtype.kind == "U":
    points = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    if points.max() > _LARGEST_CODE_POINT:
      raise ValueError("text with a character that does not exist")


def read_array(file: IO[bytes], size: int) -> np.ndarray:
  """Reads an array in NumPy's format into memory.

  Args:
    file: File at the start of an `.npy`.
    size: Number of bytes of the `.npy`, header included.

  Returns:
    The array, in the byte order of this machine.

  Raises:
    ValueError: See `read_header`; or the file ends early.
  """
  header = read_header(file, size)
  array = np.empty(header.shape, header.dtype, header.order)  # type: ignore[call-overload]
  flat = array.reshape(-1, order=header.order)
  memory = memoryview(flat.view(np.uint8)) if array.size else memoryview(b"")
  done = 0
  while done < header.nbytes:
    block = file.read(min(_CHUNK, header.nbytes - done))
    if not block:
      raise ValueError(f"{done} bytes of {header.nbytes}")
    memory[done : done + len(block)] = block
    done += len(block)
  array = array.astype(header.dtype.newbyteorder("="), copy=False)
  _check_values(array)
  return array


def map_elements(
  path: pathlib.Path, file: IO[bytes], header: Header
) -> np.ndarray:
  """Maps the elements of an array into memory, read-only.

  Args:
    path: The file.
    file: The same file, open at the first element.
    header: Header of the array.

  Returns:
    The array, whose elements stay on the disk until they are asked for.
  """
  if not header.nbytes:
    return np.empty(header.shape, header.dtype)
  return np.memmap(  # type: ignore[call-overload]
    path,
    header.dtype,
    mode="r",
    offset=file.tell(),
    shape=header.shape,
    order=header.order,
  )


def map_array(path: pathlib.Path) -> np.ndarray:
  """Maps the array of an `.npy` into memory, read-only.

  Args:
    path: The file.

  Returns:
    The array, whose elements stay on the disk until they are asked for.

  Raises:
    UserError: A pipe, socket or device.
    ValueError: See `read_header`.
    OSError: The file cannot be opened.
  """
  with regular.open_regular(path) as file:
    header = read_header(file, regular.size(file))
    return map_elements(path, file, header)


def read_members(
  archive: zips.Zip, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
  """Reads arrays of an `.npz`; checksums are compared.

  Args:
    archive: The open archive.
    names: Names of the arrays to be read, of which missing ones are left out;
      None: all.

  Returns:
    Arrays by name.

  Raises:
    Exception: A damaged file raises anything, mostly `ValueError` and
      `zipfile.BadZipFile`.
  """
  found = {}
  for member, info in archive.members.items():
    name = member.removesuffix(".npy")
    if names is None or name in names:
      if name == member:
        raise ValueError(f"{member}: not an array")
      with archive.open(member) as file:
        found[name] = read_array(file, info.file_size)
        if file.read(1):  # reading up to the end compares the checksum
          raise ValueError(f"{member}: more bytes than it claims")
  return found
