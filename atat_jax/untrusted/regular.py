"""Regular files: opened without waiting, read up to a limit."""

import errno
import io
import os
import pathlib
import stat
from typing import IO

from atat_jax.errors import UserError


def require_regular(path: pathlib.Path | str) -> os.stat_result:
  """Checks that a path leads to a regular file, without opening it.

  Args:
    path: Path of the file; links are followed.

  Returns:
    Its size, kind and times.

  Raises:
    UserError: A pipe, socket or device, or no path at all.
    OSError: No such file, a folder, a loop of links, no permission.
  """
  if "\0" in str(path):
    raise UserError(f"{path}: a path with a zero byte; allowed: a file")
  found = os.stat(path)
  if stat.S_ISDIR(found.st_mode):
    number = errno.EISDIR
    raise IsADirectoryError(number, os.strerror(number), str(path))
  if not stat.S_ISREG(found.st_mode):
    raise UserError(f"{path}: a pipe, socket or device; allowed: a file")
  return found


def open_regular(path: pathlib.Path | str) -> io.BufferedReader:
  """Opens a regular file for reading.

  Opening a pipe would wait for a writer, reading some devices never ends.

  Args:
    path: Path of the file.

  Returns:
    The open file, a context manager.

  Raises:
    UserError: A pipe, socket or device.
    OSError: The file cannot be opened.
  """
  require_regular(path)
  # The path may have got another meaning since.
  flags = (
    os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
  )
  descriptor = os.open(path, flags)
  try:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
      raise UserError(f"{path}: not a regular file; allowed: a file")
    return os.fdopen(descriptor, "rb")
  except BaseException:
    os.close(descriptor)
    raise


def size(file: IO[bytes]) -> int:
  """Returns the number of bytes of an open regular file."""
  return os.fstat(file.fileno()).st_size


def read_bytes(path: pathlib.Path | str, limit: int) -> bytes:
  """Reads a whole file.

  Args:
    path: Path of a regular file.
    limit: Largest number of bytes.

  Returns:
    Content of the file.

  Raises:
    UserError: A pipe, socket or device, or a larger file.
    OSError: The file cannot be read.
  """
  with open_regular(path) as file:
    # A file may claim any size (its holes take no room) or grow meanwhile.
    found = size(file)
    content = file.read(limit + 1) if found <= limit else b""
  if found > limit or len(content) > limit:
    raise UserError(
      f"{path}: {max(found, len(content))} bytes; allowed: at most {limit}"
    )
  return content


def read_text(path: pathlib.Path | str, limit: int = 1 << 26) -> str:
  """Reads a whole UTF-8 file, also as Windows writes it.

  Args:
    path: Path of a regular file.
    limit: Largest number of bytes, 64 MiB unless given.

  Returns:
    Content of the file, without a mark at its start, with plain line ends.

  Raises:
    UserError: No regular file, a larger one, or no UTF-8.
    OSError: The file cannot be read.
  """
  try:
    text = read_bytes(path, limit).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
  return text.replace("\r\n", "\n")
