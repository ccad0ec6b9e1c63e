"""Programs that are compiled in threads, while the caller goes on.

XLA releases Python's lock while it compiles, so that several programs compile
side by side, and beside whatever the caller computes. Tracing stays with the
caller. What is compiled here is found by the call that needs it; a program that
could not be compiled is left to that call, which raises what it always raises.
"""

import atexit
import contextlib
import os
import queue
import threading
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax

_MOST_THREADS = 8

_threads: set[threading.Thread] = set()
_open: "weakref.WeakSet[Ahead]" = weakref.WeakSet()


@atexit.register
def _finish() -> None:
  """Waits for what is being compiled: XLA's own end must not overtake it."""
  for ahead in list(_open):  # in a thread that is not heard any more
    ahead.close()
  for thread in list(_threads):
    thread.join()


class Ahead:
  """Compiles programs in threads until its `with` block is left.

  Leaving the block waits for nothing: programs that nobody has asked for are
  not compiled any more, and the one that a thread is at ends on its own.

  Args:
    enabled: Whether there are threads; without them nothing is done ahead.
  """

  def __init__(self, *, enabled: bool = True):
    self._enabled = enabled
    self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
    self._tasks: dict[Hashable, _Task] = {}
    self._num_threads = 0
    _open.add(self)

  def __enter__(self) -> "Ahead":
    """Returns itself."""
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    """Closes it."""
    self.close()

  def close(self) -> None:
    """Drops what no thread has begun; waits for nothing."""
    for task in list(self._tasks.values()):
      task.leave()
    for _ in range(self._num_threads):
      self._queue.put(None)
    self._num_threads, self._enabled = 0, False

  def add(
    self, name: Hashable, lower: Callable[[], Callable[[], object]]
  ) -> None:
    """Has a program compiled, unless one of this name was added before.

    Args:
      name: Name of the program, for `wait`.
      lower: Function that traces the program, now and here, and returns what
        compiles it, as `.ahead` of a `compilation.jit` does. Its errors are
        left to the call that needs the program.
    """
    if not self._enabled or name in self._tasks:
      return
    try:
      compile_program = lower()
    except Exception:  # whatever a classifier raises while it is traced
      return
    task = self._tasks[name] = _Task(compile_program)
    self._queue.put(task)
    if self._num_threads < min(_MOST_THREADS, os.cpu_count() or 1):
      self._num_threads += 1
      thread = threading.Thread(
        target=_work, args=(self._queue,), name="compile", daemon=True
      )
      _threads.add(thread)
      thread.start()

  def wait(self, name: Hashable) -> None:
    """Waits for a program that is being compiled.

    One that no thread has begun is left to the caller, as is one that was never
    added, or that failed.
    """
    task = self._tasks.get(name)
    if task is not None:
      task.leave()
      task.done.wait()


def placed(array: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  """Describes an array as it will lie on the devices.

  Args:
    array: An array, or its shape.
    where: Its sharding.

  Returns:
    Its shape, dtype and sharding.
  """
  weak = bool(getattr(array, "weak_type", False))
  return jax.ShapeDtypeStruct(
    array.shape, array.dtype, sharding=where, weak_type=weak
  )


class _Task:
  """A program to compile, once: by a thread, or by whoever needs it.

  Attributes:
    done: Set when no thread compiles it, or will.
  """

  def __init__(self, compile_program: Callable[[], object]):
    self._compile = compile_program
    self._taken = threading.Lock()
    self.done = threading.Event()

  @property
  def begun(self) -> bool:
    """Whether somebody has taken it."""
    return self._taken.locked()

  def leave(self) -> None:
    """Leaves it to the caller, unless a thread has taken it."""
    if self._taken.acquire(blocking=False):
      self._end()

  def run(self) -> None:
    """Compiles it, unless it was left to another."""
    if not self._taken.acquire(blocking=False):
      return
    try:
      with contextlib.suppress(Exception):  # the call that needs it raises
        self._compile()
    finally:
      self._end()

  def _end(self) -> None:
    del self._compile  # it holds the program's arguments
    self.done.set()


def _work(tasks: "queue.SimpleQueue[_Task | None]") -> None:
  """Compiles what is queued, until there is nothing more to come."""
  while (task := tasks.get()) is not None:
    task.run()
  _threads.discard(threading.current_thread())
