"""A profile of chosen steps, for TensorBoard or Perfetto."""

import contextlib
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

_log = logging.getLogger(__name__)


class Trace(contextlib.AbstractContextManager[Any]):
  """Records the host and the devices between two steps.

  Args:
    directory: Directory for `plugins/profile/<time>/`, which holds a trace for
      TensorBoard and `perfetto_trace.json.gz` for ui.perfetto.dev.
    steps: First and last step of the record, from 1; (): nothing is recorded.
  """

  def __init__(self, directory: pathlib.Path, steps: Sequence[int] = ()):
    self._directory = directory
    self.first, self.last = steps or (0, 0)
    self._on = False

  @property
  def edges(self) -> tuple[int, int]:
    """Steps after which the recording begins and ends."""
    return self.first - 1, self.last

  def before(self, step: int, waiting_for: Any) -> None:
    """Begins the record before its first step, once `waiting_for` is computed."""
    if step == self.first:
      jax.block_until_ready(waiting_for)
      jax.profiler.start_trace(
        str(self._directory), create_perfetto_trace=jax.process_index() == 0
      )
      self._on = True

  def after(self, step: int, waiting_for: Any) -> None:
    """Ends the record after its last step, once `waiting_for` is computed."""
    if self._on and step >= self.last:
      jax.block_until_ready(waiting_for)
      self._stop()
      _log.info("profile: %s", self._directory)

  def _stop(self) -> None:
    self._on = False
    jax.profiler.stop_trace()

  def __exit__(self, *error: object) -> None:
    """Ends a recording that an exception has interrupted."""
    if self._on:
      self._stop()
