"""Zip archives read in memory, with a limit on what they unpack to."""

import contextlib
import pathlib
import zipfile
from collections.abc import Iterator
from typing import IO

from atat_jax.untrusted import regular

RATIO, ALLOWANCE = 20, 1 << 24
"""All members together have at most 20 bytes for each byte of the file, and
16 MiB more: weights and pictures hardly shrink, a bomb shrinks a thousandfold."""

_DIRECTORY = 1 << 22  # 4 MiB: some 40,000 members
_LOCAL_HEADER = 30  # bytes of the fixed part


class _Capped:
  """File that refuses to read much at once, for the zip module to open."""

  def __init__(self, file: IO[bytes]) -> None:
    self._file = file
    self.limit: int | None = _DIRECTORY
    self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

  def read(self, number: int = -1) -> bytes:
    if self.limit is not None and not 0 <= number <= self.limit:
      here = self._file.tell()
      if regular.size(self._file) - here > self.limit:
        raise ValueError(f"a zip directory of more than {self.limit} bytes")
    return self._file.read(number)


class Zip:
  """Members of an open zip archive.

  Attributes:
    members: Members by name; neither links nor folders have a meaning here.
  """

  def __init__(self, archive: zipfile.ZipFile, file_size: int) -> None:
    self._archive = archive
    infos = archive.infolist()
    self.members = {info.filename: info for info in infos}
    if len(self.members) < len(infos):
      raise ValueError("two members of one name")
    self._check(infos, file_size)

  def _check(self, infos: list[zipfile.ZipInfo], file_size: int) -> None:
    total, end = 0, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
      if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename}: compressed by another method")
      if info.flag_bits & 1:
        raise ValueError(f"{info.filename}: encrypted")
      if info.header_offset < end:
        raise ValueError(f"{info.filename}: overlaps the member before it")
      end = info.header_offset + _LOCAL_HEADER + info.compress_size
      stored = info.compress_type == zipfile.ZIP_STORED
      if end > file_size or (stored and info.file_size != info.compress_size):
        raise ValueError(f"{info.filename}: has fewer bytes than it claims")
      total += info.file_size
    if total > ALLOWANCE + RATIO * file_size:
      raise ValueError(
        f"unpacks to {total} bytes; allowed: {RATIO} times the"
        f" {file_size} of the file and {ALLOWANCE} more"
      )

  def open(self, name: str) -> IO[bytes]:
    """Opens a member; its checksum is compared at its end.

    Only a `read` of a given number of bytes is bounded.
    """
    return self._archive.open(self.members[name])

  def read(self, name: str, limit: int | None = None) -> bytes:
    """Reads a member and compares its checksum.

    Args:
      name: Name of the member.
      limit: Largest number of bytes; None: those of the whole archive.

    Returns:
      Content of the member.

    Raises:
      ValueError: The member is larger, or has fewer bytes than it claims.
      KeyError: There is no such member.
    """
    number = self.members[name].file_size
    if limit is not None and number > limit:
      raise ValueError(f"{name}: {number} bytes; allowed: at most {limit}")
    with self.open(name) as member:
      # A read without a number would unpack everything at once.
      content = member.read(number)
    if len(content) < number:
      raise ValueError(f"{name}: {len(content)} bytes of {number}")
    return content


@contextlib.contextmanager
def open_zip(path: pathlib.Path | str) -> Iterator[Zip]:
  """Opens a zip archive.

  Args:
    path: Path of a regular file.

  Yields:
    Its members.

  Raises:
    UserError: A pipe, socket or device.
    OSError: The file cannot be read.
    ValueError: Members of one name, overlapping, encrypted, or too large.
    Exception: A damaged file raises anything, mostly `zipfile.BadZipFile`.
  """
  with regular.open_regular(path) as file:
    capped = _Capped(file)
    with zipfile.ZipFile(capped) as archive:
      capped.limit = None
      yield Zip(archive, regular.size(file))
