"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
  """A run stopped on request, its state saved.

  Attributes:
    signum: The signal that asked.
  """

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.signum = signum


class Interrupt:
  """Within the context the first signal sets `signum`, a second one kills.

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

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    self.signum = signum
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __enter__(self) -> "Interrupt":
    """Installs the handlers (in the main thread only, as Python demands)."""
    self._previous = {n: signal.getsignal(n) for n in SIGNALS}
    for number in SIGNALS:
      signal.signal(number, self._handle)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    """Puts the former handlers back."""
    self._restore()
