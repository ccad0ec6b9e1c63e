"""The training loop of one network: takes steps, logs, validates, saves."""

import contextlib
import dataclasses
from collections.abc import Callable

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
    validate: State to validation accuracies by name; the last one chooses the
      checkpoint.
    wrong_logits: State to the number of validation images whose logits are not
      finite, and the number of all.
    before_saving: Called before a checkpoint is written.
  """

  draw_extra: Callable[[range], Split | None] | None
  take_steps: Callable[[TrainState, range, Split | None], TrainState]
  learning_rate: Callable[[int], jax.Array]
  reset_metrics: Callable[[TrainState], TrainState]
  estimate_statistics: Callable[[TrainState], TrainState]
  validate: Callable[[TrainState], dict[str, float]]
  wrong_logits: Callable[[TrainState], tuple[int, int]]
  before_saving: Callable[[], None]


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
        current = programs.take_steps(
          current, numbers, extra.get() if extra else None
        )
        trace.after(step, current)
        journal.bar.advance(len(numbers))
        if numbers.start == start:
          jax.block_until_ready(current)
          interrupt.hold()
          journal.bar.restart()  # the first step compiles
        log, validate = outline.logs(step), outline.validates(step)
        if log or validate:  # otherwise the host does not wait for the device
          current = journal.check_finite(current)
        if log:
          updates = step - incidents.count(1, step)
          rate = programs.learning_rate(max(0, updates - 1))
          journal.log(current, step, float(rate))
          current = programs.reset_metrics(current)
        if validate:
          current = programs.estimate_statistics(current)
          journal.check_logits(*programs.wrong_logits(current), step)
          programs.before_saving()
          journal.save(current, step, programs.validate(current))
        if checkpointer.should_stop(step, interrupt.signum):
          if not validate:
            current = journal.check_finite(current)
            current = programs.estimate_statistics(current)
            programs.before_saving()
            checkpointer.save(current, step, None)
          raise journal.interrupted(step, interrupt.signum)
        if log or validate:
          journal.bar.restart()
