"""Steps that were not finite: what is written down, and what follows from it.

`nonfinite.jsonl` beside `metrics.jsonl` has a line for each: the step, the
names of what was not finite, what was done, and the examples of the batch,
which are a function of seed and step. A resumed run drops the lines of steps
that it will make again, except for those that it has to leave out.
"""

import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from atat_jax import state
from atat_jax.errors import TrainingDivergedError
from atat_jax.runs import files
from atat_jax.state import TrainState
from atat_jax.training import soundness
from atat_jax.untrusted import regular

_log = logging.getLogger(__name__)

FILE = "nonfinite.jsonl"
SKIPPED, ROLLED_BACK, STOPPED = "skipped", "rolled back", "stopped"

MOST_IN_A_ROW = 10
"""Number of consecutive steps left out after which a training stops."""

VALIDATION = "validation logits"


class RolledBack(Exception):
  """A step is to be left out; the training goes back to its last checkpoint."""


class Incidents:
  """Steps of a training that were not finite.

  Args:
    directory: Directory of the training's files.
    name: Name of the training, for messages.
    start: Number of steps made before: 0, or those of the last checkpoint.
    policy: One of `options.POLICIES`.
    batch: Number of a step, from 0, to the examples of its batch, as JSON.
    left_out: Numbers of steps, from 0, that this process has already decided
      to leave out.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    name: str,
    start: int,
    policy: str,
    batch: Callable[[int], dict[str, Any]],
    left_out: Sequence[int] = (),
  ):
    self.path = directory / FILE
    self._name, self._policy, self._batch = name, policy, batch
    # Without a checkpoint all is done again, perhaps with other numbers.
    self._lines = [
      line
      for line in _read(self.path)
      if line["step"] <= start
      or (
        line["action"] == ROLLED_BACK
        and (start or line["step"] - 1 in left_out)
      )
    ]
    if self.path.exists():
      self._write()

  @property
  def leaves_out(self) -> bool:
    """Whether the policy can leave steps out."""
    return self._policy != "stop"

  @property
  def left_out(self) -> list[int]:
    """Numbers of the steps, from 0, that the training leaves out."""
    return _left_out(self._lines, self._policy)

  def count(self, first: int, last: int) -> int:
    """Number of steps from `first` to `last`, from 1, that changed nothing."""
    return sum(
      first <= line["step"] <= last and line["action"] != STOPPED
      for line in self._lines
    )

  def _write(self) -> None:
    if jax.process_index() == 0:
      lines = [json.dumps(line, allow_nan=False) for line in self._lines]
      files.write_text(self.path, "".join(line + "\n" for line in lines))

  def add(self, step: int, terms: Sequence[str], action: str) -> None:
    """Writes a step down.

    Args:
      step: Number of the step, from 1.
      terms: Names of what was not finite.
      action: Name of the measure taken.
    """
    found = {"step": step, "terms": list(terms), "action": action}
    self._lines.append({**found, "batch": self._batch(step - 1)})
    self._lines.sort(key=lambda line: line["step"])
    self._write()
    _log.warning(
      "%s: step %d %s, not finite: %s; its batch is in %s",
      self._name,
      step,
      action,
      ", ".join(terms),
      self.path,
    )

  def examine(self, current: TrainState, kept: str) -> TrainState:
    """Looks for steps that were not finite, and does what the policy says.

    Args:
      current: State of the training.
      kept: Sentence part on the last good checkpoint, for a message.

    Returns:
      The state to go on from.

    Raises:
      TrainingDivergedError: The training stops.
      RolledBack: It goes back to its last checkpoint.
    """
    if self._policy == "skip":
      return self._note_skipped(current, kept)
    found = soundness.first_wrong(current)
    if found is None:
      return current
    step, terms = found
    if self._policy == "rollback" and len(self.left_out) < state.MOST_LEFT_OUT:
      self.add(step + 1, terms, ROLLED_BACK)
      self._check_row(kept)
      raise RolledBack
    self.add(step + 1, terms, STOPPED)
    raise self.diverged(step + 1, terms, kept)

  def _note_skipped(self, current: TrainState, kept: str) -> TrainState:
    found, count = soundness.skipped(current)
    if not count:
      return current
    for step, terms in found:
      self.add(step + 1, terms, SKIPPED)
    self._check_row(kept)
    if count > len(found):
      step, terms = found[-1]
      raise self.diverged(step + 1, terms, kept)
    guard = current.guard
    assert guard is not None  # noqa: S101 - narrows the type, cannot fail
    return current.replace(guard=guard.replace(count=0 * guard.count))

  def _check_row(self, kept: str) -> None:
    """Stops where too many steps in a row were left out."""
    row: list[dict[str, Any]] = []
    for line in self._lines:
      if line["action"] == STOPPED:
        continue
      if row and line["step"] != row[-1]["step"] + 1:
        row = []
      row.append(line)
      if len(row) == MOST_IN_A_ROW:
        raise self.diverged(row[0]["step"], row[0]["terms"], kept, len(row))

  def check_logits(self, wrong: int, images: int, step: int, kept: str) -> None:
    """Stops where validation logits are not finite.

    No single step can be left out for it, whatever the policy.

    Args:
      wrong: Number of images whose logits are not finite.
      images: Number of validation images.
      step: Number of steps made.
      kept: Sentence part on the last good checkpoint.

    Raises:
      TrainingDivergedError: `wrong` is not 0.
    """
    if wrong:
      self.add(step, [VALIDATION], STOPPED)
      raise self.diverged(
        step, [f"{VALIDATION} of {wrong} of {images} images"], kept
      )

  def diverged(
    self, step: int, terms: Sequence[str], kept: str, in_a_row: int = 1
  ) -> TrainingDivergedError:
    """Makes the error that ends a training.

    Args:
      step: Number of the step, from 1.
      terms: Names of what was not finite.
      kept: Sentence part on the last good checkpoint.
      in_a_row: Number of steps in a row that were left out.
    """
    later = {state.ATTACK, *state.LEFT_BEHIND}
    # Later results are only news where all before them was finite.
    shown = [term for term in terms if term not in later] or terms
    row = f", the first of {in_a_row} in a row" if in_a_row > 1 else ""
    return TrainingDivergedError(
      f"{self._name}: not finite at step {step}{row}: {', '.join(shown)};"
      f" training stopped, {kept}; the batch is in {self.path}; a lower"
      " learning_rate or smaller weights of the terms may help, and"
      f" --mode=replay --step={step} makes that step again"
    )


def _left_out(lines: Sequence[dict[str, Any]], policy: str) -> list[int]:
  if policy == "stop":
    return []
  return sorted(
    line["step"] - 1 for line in lines if line["action"] == ROLLED_BACK
  )


def read_left_out(directory: pathlib.Path, policy: str) -> list[int]:
  """Reads the numbers of the steps, from 0, that a training has left out.

  Args:
    directory: Directory of the training's files; nothing in it is changed.
    policy: One of `options.POLICIES`.
  """
  return _left_out(_read(directory / FILE), policy)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of the file; a line that a kill has cut off is dropped."""
  if not path.exists():
    return []
  found = []
  with files.local(path) as here:
    lines = regular.read_text(here).splitlines()
  for text in lines:
    try:
      line = json.loads(text)
      if isinstance(line["step"], int) and isinstance(line["action"], str):
        found.append(line)
    except (ValueError, KeyError, TypeError, RecursionError):
      continue
  return found
