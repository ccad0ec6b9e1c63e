"""Headers of array_record files, read before their library unpacks anything.

Such a file is one of Riegeli's: chunks one after the other, each with a header
that says how many bytes it unpacks to, and in between a header at every multiple
of the size of a block. The library believes the former and allocates as much.

Google, "Riegeli/records file format", 2018.
"""

import io
import pathlib
import struct

from atat_jax.untrusted import regular, zips

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_USABLE = _BLOCK - _BLOCK_HEADER
# Hash, size and hash of the data; kind and number of records; unpacked size.
_HEADER = struct.Struct("<8xQ8xQQ")
# Signature, records one by one, padding, metadata. Transposed records, which
# tensorflow-datasets does not write, take more memory than their header says.
_KINDS = b"srpm"
_LARGEST_CHUNK = 1 << 26


def _read(file: io.BufferedReader, start: int, number: int) -> bytes:
  """Reads bytes of a chunk, without the headers of blocks."""
  content = b""
  while len(content) < number:
    if start % _BLOCK == 0:
      start += _BLOCK_HEADER
    file.seek(start)
    wanted = min(number - len(content), _BLOCK - start % _BLOCK)
    part = file.read(wanted)
    if len(part) < wanted:
      raise ValueError("the file ends inside a header")
    content, start = content + part, start + wanted
  return content


def _end(start: int, size: int, records: int) -> int:
  """Returns the place after a chunk."""
  blocks = (size + (start + _USABLE - 1) % _BLOCK) // _USABLE
  # A chunk with many small records takes a byte for each at least.
  least = start + records
  least += max(-least % _BLOCK - (_USABLE - 1), 0)
  return max(start + size + blocks * _BLOCK_HEADER, least)


def check(path: pathlib.Path) -> int:
  """Checks what a file unpacks to.

  Args:
    path: An array_record file.

  Returns:
    Number of bytes of all records together, unpacked.

  Raises:
    ValueError: Not such a file; or it unpacks to more than `zips.RATIO` times
      its size and `zips.ALLOWANCE`, or a chunk to more than 64 MiB.
    UserError: A pipe, socket or device.
    OSError: The file cannot be read.
  """
  total = start = 0
  with regular.open_regular(path) as file:
    size = regular.size(file)
    while start < size:
      header = _read(file, start, _HEADER.size)
      data, kind_and_records, unpacked = _HEADER.unpack(header)
      kind, records = kind_and_records & 0xFF, kind_and_records >> 8
      total += unpacked
      if kind not in _KINDS:
        raise ValueError(f"a chunk of kind {kind} at {start}")
      if (
        unpacked > _LARGEST_CHUNK or total > zips.ALLOWANCE + zips.RATIO * size
      ):
        raise ValueError(f"unpacks to {total} bytes or more from {size}")
      start = _end(start, _HEADER.size + data, records)
  return total
