"""Locks, so that no two processes write the same files.

The kernel holds a lock for as long as its process lives: a killed one leaves
none behind. Readers need no lock, because every file is replaced as a whole.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import pathlib
import socket
import stat
from collections.abc import Iterator

from atat_jax.errors import UserError
from atat_jax.runs import locations

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None  # type: ignore[assignment]

_NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NOT_A_LINK = getattr(os, "O_NOFOLLOW", 0)

_log = logging.getLogger(__name__)


class Lock:
  """Lock that this process holds.

  Attributes:
    path: File that carries it.
  """

  def __init__(self, path: pathlib.Path, descriptor: int | None):
    self.path, self._descriptor = path, descriptor

  def check(self) -> None:
    """Checks that the folder is still the one that was locked.

    Raises:
      UserError: It has been removed or replaced.
    """
    if self._descriptor is None:
      return
    if not _is_at(self._descriptor, self.path):
      raise UserError(
        f"{self.path.parent}: was removed or replaced during the run; what it"
        " held is gone, run the same command again"
      )


@contextlib.contextmanager
def directory(field: str, path: pathlib.Path) -> Iterator[Lock]:
  """Locks a directory against other writers; it is made if needed.

  Args:
    field: Name of the argument, for the message.
    path: The directory. One that was made here and is empty at the end is
      removed.

  Yields:
    The lock.

  Raises:
    UserError: Another process holds it, or it cannot be made.
  """
  if locations.is_remote(path):
    yield _unlocked(path)
    return
  made = [folder for folder in (path, *path.parents) if not folder.exists()]
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{field}: {path}: {error.strerror}") from None
  try:
    with file(field, path / _NAME, path) as held:
      yield held
  finally:
    for folder in made:
      with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def file(field: str, path: pathlib.Path, what: pathlib.Path) -> Iterator[Lock]:
  """Locks by means of a file, which exists as long as the lock.

  Args:
    field: Name of the argument, for the message.
    path: The file; its folder exists.
    what: Thing that it locks, for the message.

  Yields:
    The lock.

  Raises:
    UserError: Another process holds it, or the file cannot be made.
  """
  if locations.is_remote(path):
    yield _unlocked(path)
    return
  try:
    descriptor = _take(field, path, what)
  except OSError as error:
    raise UserError(f"{field}: {what}: {error.strerror}") from None
  try:
    yield Lock(path, descriptor)
  finally:
    # Removed before it is released: whoever waits sees that it is another's.
    if _is_at(descriptor, path):
      path.unlink(missing_ok=True)
    os.close(descriptor)


def _unlocked(path: pathlib.Path) -> Lock:
  """Returns what stands for a lock where there are none, and says so."""
  _log.warning(
    "%s: object stores have no locks; start no second run there", path
  )
  return Lock(path, None)


def _take(field: str, path: pathlib.Path, what: pathlib.Path) -> int:
  """Opens and locks the file; returns its descriptor."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NOT_A_LINK, 0o666)
    try:
      # Somebody else's folder may lead to a file that is not for us to write.
      found = os.fstat(descriptor)
      if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise UserError(f"{field}: {path} is no lock; remove it")
      if not _try_lock(descriptor, path):
        holder = _read_holder(descriptor)
        raise UserError(
          f"{field}: {what} is in use by {holder}; wait until that has ended,"
          f" stop it, or choose another {field}"
        )
      if _is_at(descriptor, path):
        _write_holder(descriptor)
        return descriptor
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)  # its holder has just removed it


def _try_lock(descriptor: int, path: pathlib.Path) -> bool:
  """Returns whether the lock is ours."""
  try:
    if fcntl is None:
      raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in _UNSUPPORTED:
      raise
    _log.warning(
      "%s: this file system has no locks (%s); start no second process on it",
      path.parent,
      error.strerror,
    )
  return True


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
  """Returns whether an open file is the one at a path."""
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except OSError:
    return False


def _write_holder(descriptor: int) -> None:
  """Notes this process in the file; without room for it, it goes unnamed."""
  holder = {
    "pid": os.getpid(),
    "host": socket.gethostname(),
    "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
  with contextlib.suppress(OSError):
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read_holder(descriptor: int) -> str:
  """Puts the holder of a lock into words."""
  try:
    found = json.loads(os.pread(descriptor, 1 << 16, 0))
    return (
      f"process {int(found['pid'])} on {found['host']} since {found['since']}"
    )
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return "another process"
