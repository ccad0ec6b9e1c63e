"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
  """A run stopped on request, its state saved.

  Attributes:
    signum: Signal that asked for it.
  """

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.signum = signum


def raise_interrupted(signum: int, frame: FrameType | None) -> None:
  """Signal handler for work that is safe to stop anywhere."""
  del frame
  raise Interrupted("stopped; the same command goes on from here", signum)


class Interrupt(contextlib.AbstractContextManager[Any]):
  """Context in which the first signal sets `signum`; the second one kills.

  ```python
  with Interrupt() as interrupt:
    for step in steps:
      ...
      if interrupt.signum:
        save()
        break
  ```
  """

  def __init__(self) -> None:
    self.signum = 0
    self._previous: dict[signal.Signals, Any] = {}

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    self.signum = signum
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __enter__(self) -> "Interrupt":
    """Installs the handlers, in the main thread: Python allows no other."""
    if threading.current_thread() is threading.main_thread():
      for number in SIGNALS:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *error: object) -> None:
    """Puts the former handlers back."""
    self._restore()
