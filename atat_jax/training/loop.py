"""The training loop of one network: takes steps, logs, validates, saves."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from atat_jax import checkpoints
from atat_jax.data import Split
from atat_jax.data.prefetch import Prefetcher
from atat_jax.state import TrainState
from atat_jax.training.incidents import Incidents
from atat_jax.training.interrupts import Interrupt
from atat_jax.training.outline import Outline
from atat_jax.training.profile import Trace
from atat_jax.training.writer import Journal


class Validation(NamedTuple):
  """Result of a validation.

  Attributes:
    scores: Accuracies by name; the last one chooses the checkpoint.
    nonfinite: Number of clean images whose logits are not finite.
    num_images: Number of images.
    gradient_ratios: Term of the loss to the norm of its gradient relative to
      the cross-entropy's (`gradients.term_ratios`).
  """

  scores: dict[str, float]
  nonfinite: int
  num_images: int
  gradient_ratios: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
  """Programs of a training, with all arguments bound but those named here.

  Attributes:
    draw_extra: Numbers of the steps of a group, from 0, to their extra images;
      None: there are none.
    take_steps: (state, numbers, extra images) to the state after these steps;
      the state passed in is donated.
    learning_rate: Number of a step, from 0, to its learning rate.
    reset_metrics: State to the state with empty metrics.
    estimate_statistics: State to the state with the BatchNorm statistics that
      belong to its averaged weights, if there are any.
    validate: State to its validation.
    before_saving: Called before a checkpoint is written.
    input_advice: Advice for a run whose devices wait for their images; None:
      they are on the devices, or nothing can be done.
  """

  draw_extra: Callable[[range], Split | None] | None
  take_steps: Callable[[TrainState, range, Split | None], TrainState]
  learning_rate: Callable[[int], jax.Array]
  reset_metrics: Callable[[TrainState], TrainState]
  estimate_statistics: Callable[[TrainState], TrainState]
  validate: Callable[[TrainState], Validation]
  before_saving: Callable[[], None]
  input_advice: str | None = None


def run(
  current: TrainState,
  programs: Programs,
  outline: Outline,
  checkpointer: checkpoints.Checkpointer,
  saved: int | None,
  incidents: Incidents,
) -> None:
  """Takes the remaining steps of a training; logs, validates and saves.

  Args:
    current: State to go on from; it is donated.
    programs: Programs of the training.
    outline: Its name, files and steps.
    checkpointer: Its checkpoints.
    saved: Step of the last checkpoint, which is that of the state; None: there
      is none yet.
    incidents: Steps that were not finite.

  Raises:
    TrainingDivergedError: A step was not finite, and the training stops.
    RolledBack: A step was not finite, and is to be left out.
    Interrupted: Ctrl-C or SIGTERM; the state is saved.
  """
  with (
    Interrupt() as interrupt,
    Journal(outline, checkpointer, saved, incidents) as journal,
    Trace(outline.directory / "profile", outline.profile_steps) as trace,
  ):
    start = saved or 0
    # Lazily: a run may have more steps than fit into memory.
    groups, drawn = (outline.groups(start, trace.edges) for _ in range(2))
    with (
      Prefetcher(programs.draw_extra, drawn)
      if programs.draw_extra
      else contextlib.nullcontext()
    ) as extra:
      for numbers in groups:
        step = numbers.stop
        trace.before(numbers.start + 1, current)
        images = None
        if extra:
          done: Any = current.step
          images = extra.get(done.is_ready, journal.bar.wait)
        current = programs.take_steps(current, numbers, images)
        trace.after(step, current)
        journal.bar.advance(len(numbers))
        if numbers.start == start:
          jax.block_until_ready(current)
          interrupt.hold()
          journal.bar.restart()  # the first step compiles
        due = outline.logs(step) or outline.validates(step)
        if due:  # otherwise the host does not wait for the device
          current = _look(current, programs, outline, journal, step)
        if checkpointer.should_stop(step, interrupt.signum):
          if not outline.validates(step):
            _save(current, programs, checkpointer, journal, step)
          raise journal.interrupted(step, interrupt.signum)
        if due:
          journal.bar.restart()


def _save(
  current: TrainState,
  programs: Programs,
  checkpointer: checkpoints.Checkpointer,
  journal: Journal,
  step: int,
) -> None:
  """Saves the state of a training that is asked to stop."""
  current = journal.check_finite(current)
  current = programs.estimate_statistics(current)
  programs.before_saving()
  checkpointer.save(current, step, None)


def _look(
  current: TrainState,
  programs: Programs,
  outline: Outline,
  journal: Journal,
  step: int,
) -> TrainState:
  """Looks at the state after a step: logs, validates and saves what is due."""
  current = journal.check_finite(current)
  if outline.logs(step):
    rate = programs.learning_rate(journal.updates(step) - 1)
    journal.log(current, step, float(rate), programs.input_advice)
    current = programs.reset_metrics(current)
  if outline.validates(step):
    current = programs.estimate_statistics(current)
    with journal.bar.validating():
      found = programs.validate(current)
    journal.check_logits(found.nonfinite, found.num_images, step)
    programs.before_saving()
    journal.save(current, step, found.scores, found.gradient_ratios)
  return current
