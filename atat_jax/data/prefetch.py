"""Reading the next batches while the device computes."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

A = TypeVar("A")
T = TypeVar("T")

_POLL = 0.001
"""Seconds after which a consumer that waits is asked again whether it is idle."""


class Prefetcher(contextlib.AbstractContextManager[Any], Generic[A, T]):
  """Calls a function on a thread, a few calls ahead of the consumer.

  Args:
    function: Function of one argument.
    arguments: Arguments of the calls, in order.
    depth: Largest number of results computed ahead.
  """

  def __init__(
    self,
    function: Callable[[A], T],
    arguments: Iterable[A],
    *,
    depth: int = 3,
  ):
    self._function = function
    self._arguments = iter(arguments)
    self._pool = ThreadPoolExecutor(1, "prefetch")
    self._waiting: collections.deque[Future[T]] = collections.deque()
    for _ in range(depth):
      self._submit()

  def _submit(self) -> None:
    for argument in self._arguments:
      self._waiting.append(self._pool.submit(self._function, argument))
      return

  def get(
    self,
    idle: Callable[[], bool] | None = None,
    on_idle: Callable[[float], None] = lambda seconds: None,
  ) -> T:
    """Returns the next result, or raises the exception of its call.

    Args:
      idle: Answers whether the consumer has nothing else to do, asked while the
        result is not there; None: it always has.
      on_idle: Called with the seconds for which it had not.
    """
    future = self._waiting.popleft()
    while idle is not None and not future.done():
      began, idles = time.perf_counter(), idle()
      wait([future], _POLL)
      if idles:
        on_idle(time.perf_counter() - began)
    result = future.result()
    self._submit()
    return result

  def __exit__(self, *error: object) -> None:
    """Stops the thread and drops calls that have not begun."""
    self._pool.shutdown(cancel_futures=True)
