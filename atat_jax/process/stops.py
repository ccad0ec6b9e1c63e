"""Requests to stop a process, met at a safe point or soon after.

An exception that a signal handler raises is lost where Python runs a finalizer
or JAX a callback, and no handler runs while a program compiles. So the handlers
do nothing: the kernel's note of a signal wakes a thread, which sets a flag. Work
asks for the flag where it is safe to stop (`check`). If it does not within a few
seconds, and holds nothing that is not on disk (`hold`), the thread ends the
process itself. A second signal ends it at once.

Until `watch` is called, all of this does nothing.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = tuple(
  number
  for number in signal.Signals
  if number.name in ("SIGINT", "SIGTERM", "SIGHUP")
)
"""Ctrl-C, the request of a scheduler, a closed terminal."""

GRACE_SECONDS = 5.0
"""Time to reach a safe point."""

# Wrappers such as `timeout` and `srun` may deliver one request twice.
_SAME_REQUEST_SECONDS = 0.3
_POLL_SECONDS = 0.05
# Bit of a note that another process of the job got the signal.
_OF_ANOTHER = 0x80


class Interrupted(KeyboardInterrupt):
  """A run stopped on request, its state saved.

  Attributes:
    signum: Signal that asked for it.
    agreed: Whether all processes of a job stop with this one.
  """

  def __init__(self, message: str, signum: int, *, agreed: bool = False):
    super().__init__(message)
    self.signum, self.agreed = signum, agreed


class _Watch:
  """The requests of this process, and the thread that sees to them."""

  def __init__(self, message: str):
    self.message = message
    self.signum = 0
    self.failure: str | None = None
    self.holds = 0
    self.grace = 0.0
    self.status: int | None = None
    self.early = True
    self.abandoned = False
    self.forward: Callable[[int], object] | None = None
    self._said = False
    self._lock = threading.Lock()
    self._notes, self._write_end = os.pipe()
    os.set_blocking(self._write_end, False)

  def start(self) -> None:
    signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
    for number in catchable():
      signal.signal(number, _note)
    atexit.register(_ignore)
    threading.Thread(target=self._run, name="stops", daemon=True).start()

  def _run(self) -> None:
    """Waits for requests; ends the process if nobody else does."""
    first: float | None = None
    own: float | None = None
    deadline = 0.0
    while True:
      asked = first is not None or self.failure is not None
      wait = _POLL_SECONDS if asked else None
      ready, _, _ = select.select([self._notes], [], [], wait)
      now = time.monotonic()
      for note in os.read(self._notes, 64) if ready else b"":
        number = note & ~_OF_ANOTHER
        if number not in SIGNALS:
          continue  # a thread failed
        self.signum = self.signum or number
        if first is None:
          first, deadline = now, now + self.grace
        if note & _OF_ANOTHER:
          continue  # its second request is not one to this process
        if own is not None and now - own > _SAME_REQUEST_SECONDS:
          self.end()
        if self.status is not None:
          self.end()
        if own is None:
          own = now
          if self.forward is not None:
            self.forward(number)
      if self.failure is not None and not asked:
        deadline = now + max(self.grace, GRACE_SECONDS)
      if self.holds and self.failure is None and not self.abandoned:
        deadline = now + self.grace
      elif (first is not None or self.failure) and now >= deadline:
        self.end()

  def fail(self, line: str) -> None:
    self.failure = self.failure or line
    os.write(self._write_end, b"\0")

  def request(self, signum: int) -> None:
    os.write(self._write_end, bytes([signum | _OF_ANOTHER]))

  def say(self, line: str) -> None:
    """Writes the last line of the process, once."""
    with self._lock:
      if not self._said:
        self._said = True
        # Not by sys.stderr, which the main thread may hold.
        with contextlib.suppress(OSError):
          os.write(2, line.encode(errors="backslashreplace"))

  def end(self) -> None:
    """Ends the process, with its last line."""
    if self.status is not None:
      os._exit(self.status)
    if self.failure is not None:
      self.say(f"\n{self.failure}\n")
      os._exit(1)
    self.say(f"\n{self.message}\n")
    os._exit(128 + self.signum)


_watch: _Watch | None = None


def _note(signum: int, frame: FrameType | None) -> None:
  """Signal handler; the work is done by the thread that the kernel wakes."""
  del frame
  if _watch is not None:
    _watch.signum = _watch.signum or signum


def _ignore() -> None:
  """Lets nothing change the status of a process that is ending.

  The interpreter would put the default handlers back, which kill.
  """
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)


def catchable() -> list[signal.Signals]:
  """Returns the signals that ask for a stop; `nohup` takes SIGHUP off them."""
  return [
    number
    for number in SIGNALS
    if number in (signal.SIGINT, signal.SIGTERM)
    or signal.getsignal(number) is not signal.SIG_IGN
  ]


def watch(message: str) -> None:
  """Watches for requests to stop; each ends the process with one line.

  It is called before the imports that take seconds. Until `started` nothing can
  be lost, so that the process ends at once.

  Args:
    message: The line, e.g. "stopped; the same command goes on from here".
  """
  global _watch
  for number in range(3):  # a file that took its number would be written into
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)
  _watch = _Watch(message)
  _watch.start()


def watching() -> bool:
  """Returns whether this process is that of a command, see `watch`."""
  return _watch is not None


def share_by(forward: Callable[[int], object]) -> None:
  """Has the first request told to the other processes of a job.

  Args:
    forward: Function of the signal that tells it; called in another thread.
  """
  if _watch is not None:
    _watch.forward = forward
    for number in catchable():  # whoever tells them has taken a signal, too
      signal.signal(number, _note)


def request(signum: int) -> None:
  """Notes a request that another process of the job got.

  Args:
    signum: The signal.
  """
  if _watch is not None:
    _watch.request(signum)


def lost(line: str, *, at_once: bool = False) -> None:
  """Notes that another process of the job has ended before its time.

  Without it nothing can be finished. Whoever was asked to stop anyway ends as
  asked, others with the line and status 1.

  Args:
    line: The last line of the process.
    at_once: Whether this process ends now: it is process 0 that has, without
      which JAX aborts the others.
  """
  if _watch is None:
    return
  if _watch.signum:
    _watch.abandoned = True
  else:
    _watch.fail(line)
  if at_once:
    _watch.end()


def excuse(seconds: float = 2.0) -> tuple[str, int] | None:
  """Finds what is behind an error in a job: another process, or a request.

  A collective fails sooner than the word of why arrives.

  Args:
    seconds: Longest time to wait for it.

  Returns:
    The last line of the process and its status; None: the error is its own.
  """
  if _watch is None or _watch.forward is None:
    return None
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if _watch.failure is not None:
      return _watch.failure, 1
    if _watch.signum:
      return _watch.message, 128 + _watch.signum
    time.sleep(_POLL_SECONDS)
  return None


def started(more: float = 0.0) -> None:
  """Grants requests from now on some time to reach a safe point.

  Args:
    more: Seconds more than `GRACE_SECONDS`.
  """
  if _watch is not None:
    _watch.grace = GRACE_SECONDS + more


def finish(status: int, *, early: bool = False) -> None:
  """Notes that the work is over; a request from now on ends the process at once.

  Args:
    status: Exit status of the process.
    early: Whether other processes of the job still count on this one.
  """
  if _watch is not None:
    _watch.status, _watch.early = status, early


def ends_early() -> bool:
  """Returns whether other processes of the job still count on this one."""
  return _watch is None or _watch.early


def failure() -> str | None:
  """Returns the line of a thread that failed; None if there is none."""
  return _watch.failure if _watch is not None else None


def requested() -> int:
  """Returns the signal that asked for a stop, 0 if there was none."""
  return _watch.signum if _watch is not None else 0


def check() -> None:
  """Ends work that was asked to stop; called where that is safe.

  Within `hold` it does nothing: the holder decides.

  Raises:
    Interrupted: A stop was requested.
  """
  if _watch is None or _watch.holds:
    return
  if threading.current_thread() is not threading.main_thread():
    return
  if _watch.signum:
    raise Interrupted(_watch.message, _watch.signum)


@contextlib.contextmanager
def hold() -> Iterator[None]:
  """Keeps the process alive after a first request, to save what it holds."""
  held = _watch
  if held is None:
    yield
    return
  held.holds += 1
  try:
    yield
  finally:
    held.holds -= 1


def fail(line: str) -> None:
  """Asks for the end of the process, with status 1, after a thread failed.

  Args:
    line: The last line of the process.
  """
  if _watch is not None:
    _watch.fail(line)


def say(line: str) -> None:
  """Writes the last line of the process to stderr, unless there was one.

  Args:
    line: The line, with line breaks.
  """
  if _watch is not None:
    _watch.say(line)
  elif sys.stderr is not None:
    sys.stderr.write(line)
