"""Process of a command: how it begins, what it prints, how it ends.

Whatever goes wrong outside the program ends in one line on stderr: bad input, a
disk that is full, memory that runs out, a stop on request. An internal error
keeps its traceback.
"""

import contextlib
import errno
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from atat_jax.errors import UserError, one_line
from atat_jax.process import stops

# Texts of the system in errors that other libraries raise of their own types.
_SYSTEM_ERRORS = re.compile(
  "|".join(
    re.escape(os.strerror(number))
    for number in (
      errno.EACCES,
      errno.EDQUOT,
      errno.EFBIG,
      errno.EIO,
      errno.EMFILE,
      errno.ENAMETOOLONG,
      errno.ENFILE,
      errno.ENOSPC,
      errno.EPERM,
      errno.EROFS,
      errno.ESTALE,
    )
  )
)
# Errors of a write whose data are lost.
_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory")
# Temporary files beside those that they replace (`runs.files.replacing`).
_TEMPORARY = re.compile(r"\.([^/]+)\.[0-9a-f]{32}\.tmp((?:\.[^/.]*)?)$")
_QUOTED_PATH = re.compile(r'"(/[^"]+)"')


class _Output:
  """Stream of text that nothing breaks: a reader may go, a disk be full.

  Args:
    stream: `sys.stdout` or `sys.stderr`.
    name: Its name, for the message.
  """

  def __init__(self, stream: Any, name: str):
    self._stream, self._name = stream, name
    self.failure: str | None = None

  def write(self, text: str) -> int:
    """Writes a text, at once where it ends a line."""
    try:
      self._stream.write(text)
      if text.endswith("\n"):
        self._stream.flush()
    except OSError as error:
      self._discard(error)
    return len(text)

  def flush(self) -> None:
    """Writes what is left."""
    try:
      self._stream.flush()
    except OSError as error:
      self._discard(error)

  def _discard(self, error: OSError) -> None:
    # Work whose results are files goes on when its reader has gone (`| head`).
    if error.errno != errno.EPIPE:
      self.failure = f"error: {self._name}: {error.strerror}"
    with contextlib.suppress(OSError, ValueError):
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self._stream.fileno())
      os.close(null)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def is_running(module: str) -> bool:
  """Returns whether this process is `python -m module`, whose parent asks.

  Python imports the packages around a module before it.

  Args:
    module: Full name of the module, or of the package with a `__main__`.
  """
  words = sys.orig_argv
  at = words.index("-m") + 1 if "-m" in words else len(words)
  return sys.argv[:1] == ["-m"] and words[at : at + 1] == [module]


def begin(message: str) -> None:
  """Begins the process of a command, before the imports that take seconds.

  Args:
    message: Line of a process that was asked to stop.
  """
  stops.watch(message)
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name) or open(os.devnull, "w")
    with contextlib.suppress(AttributeError):
      # Whatever the locale can write, a name or a dash must not end the run.
      stream.reconfigure(errors="backslashreplace")
    setattr(sys, name, _Output(stream, name))
  logging.raiseExceptions = False  # a traceback where a log cannot be written
  threading.excepthook = _on_thread_error
  sys.unraisablehook = _on_unraisable
  _calm_warnings()


def _calm_warnings() -> None:
  """Keeps warnings of other packages from ending a run (`python -W error`)."""
  if any(option.startswith("error") for option in sys.warnoptions):
    others = r"(?!atat_jax)"
    warnings.filterwarnings("default", module=others)
    for kind in (DeprecationWarning, ImportWarning, ResourceWarning):
      warnings.filterwarnings("ignore", category=kind, module=others)
  # One for each program; a cache that cannot be used is told once.
  warnings.filterwarnings("ignore", message=".*persistent compilation cache")


def system_reason(text: str) -> str | None:
  """Finds what the system said in an error of another library.

  Args:
    text: Message of the error, of any length.

  Returns:
    Text such as "No space left on device"; None: there is none.
  """
  found = _SYSTEM_ERRORS.search(text)
  return found[0] if found else None


def describe(error: BaseException, place: object = None) -> str | None:
  """Describes an error that comes from outside the program.

  Args:
    error: The error.
    place: Folder of the files, for an error that does not name its own.

  Returns:
    One line; None for an internal error.
  """
  if isinstance(error, UserError):
    return str(error)
  text = str(error)
  if isinstance(error, OSError):
    path = error.filename if error.filename is not None else place
    if isinstance(path, bytes):
      path = os.fsdecode(path)
    reason = error.strerror or text or type(error).__name__
    if path is None:
      return one_line(reason)
    named = _TEMPORARY.sub(r"\1\2", str(path))
    return one_line(f"{named}: {reason}")
  if isinstance(error, MemoryError):
    return _memory(text)
  said = system_reason(text)
  if said and isinstance(error, ValueError | RuntimeError):
    where = place
    if where is None and (path_found := _QUOTED_PATH.search(text)):
      where = path_found[1]
    return one_line(f"{where}: {said}" if where else said)
  if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text):
    return _memory(text)
  if error.__cause__ is not None:
    return describe(error.__cause__, place)
  return None


def _memory(text: str) -> str:
  amount = re.search(r"allocat\w+ ([\d.]+ ?\w*(?:bytes|[KMGT]i?B)?)", text)
  wanted = f" ({amount[1]} more were needed)" if amount else ""
  return (
    f"out of memory{wanted}; a smaller batch_size (config.train,"
    " config.teacher, config.evaluation; --batch-size) needs less"
  )


def _on_thread_error(args: threading.ExceptHookArgs) -> None:
  """Ends the process when a thread can no longer do its work."""
  line = describe(args.exc_value) if args.exc_value is not None else None
  if line is None:
    threading.__excepthook__(args)
  else:
    stops.fail(f"error: {line}")


def _on_unraisable(args: "sys.UnraisableHookArgs") -> None:
  """Ends the process when a file cannot be closed where nobody can catch it."""
  error = args.exc_value
  if isinstance(error, RuntimeError) and "loop is closed" in str(error):
    return  # a callback of a checkpoint whose writing has failed, and been told
  if isinstance(error, OSError) and error.errno in _LOST:
    stops.fail(f"error: {describe(error)}")
  else:
    sys.__unraisablehook__(args)


@contextlib.contextmanager
def plain_exits(
  place: pathlib.Path | None = None, kept: str = ""
) -> Iterator[None]:
  """Ends the process with one line on an error from outside, or on a signal.

  Args:
    place: Folder of the files, for an error that does not name its own.
    kept: Remark on what such an error leaves in place.

  Raises:
    SystemExit: The end, status 1, or 128 and the number of the signal.
  """
  try:
    yield
  except KeyboardInterrupt as error:
    signum = getattr(error, "signum", 0) or stops.requested() or signal.SIGTERM
    _leave(
      f"\n{one_line(str(error)) or 'stopped'}\n",
      128 + signum,
      early=not getattr(error, "agreed", False),
    )
  except Exception as error:
    if excuse := stops.excuse():
      _leave(f"\n{excuse[0]}\n", excuse[1])
    line = describe(error, place)
    if line is None:
      raise
    if kept and not isinstance(error, UserError):
      line += f"; {kept}"
    _leave(f"error: {line}\n", 1)
  failure = stops.failure() or getattr(sys.stdout, "failure", None)
  if failure:
    _leave(f"{failure}\n", 1)
  stops.finish(0)


def say_next(text: str) -> None:
  """Ends the output of a command: where to look next.

  Args:
    text: A file to open, or a command that goes on from here.
  """
  sys.stdout.write(f"next: {one_line(text)}\n")


def _leave(line: str, status: int, *, early: bool = True) -> None:
  sys.stdout.flush()
  if not stops.watching() and status == 1:
    sys.exit(line.strip())
  stops.say(line)
  stops.finish(status, early=early)
  sys.exit(status)
