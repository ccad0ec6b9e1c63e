"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

from atat_jax.process import stops
from atat_jax.process.stops import SIGNALS, Interrupted

__all__ = ["SIGNALS", "Interrupt", "Interrupted"]


class Interrupt(contextlib.AbstractContextManager[Any]):
  """Context in which the first signal sets `signum`; the second one kills.

  ```python
  with Interrupt() as interrupt:
    for step in steps:
      ...
      interrupt.hold()
      if interrupt.signum:
        save()
        break
  ```
  """

  def __init__(self) -> None:
    self.signum = 0
    self._previous: dict[signal.Signals, Any] = {}
    self._hold = contextlib.ExitStack()
    self._holds = False

  def hold(self) -> None:
    """Keeps the process alive from now on until the state is saved.

    Before, there is nothing to save, and a first step may compile for minutes.

    Raises:
      Interrupted: A stop was requested before.
    """
    if not self._holds:
      stops.check()
      self._hold.enter_context(stops.hold())
      self._holds = True

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    self.signum = signum
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __enter__(self) -> "Interrupt":
    """Installs the handlers, in the main thread: Python allows no other."""
    if threading.current_thread() is threading.main_thread():
      for number in stops.catchable():
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *error: object) -> None:
    """Puts the former handlers back."""
    self._restore()
    self._hold.close()
