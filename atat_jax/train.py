"""Training: the teacher, then the student, resumable at every step."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import (
  checkpoints,
  compilation,
  evaluation,
  metrics,
  models,
  sharding,
  state,
  steps,
)
from atat_jax.data import Dataset, Extra, Split
from atat_jax.data.prefetch import Prefetcher
from atat_jax.errors import TrainingDivergedError, UserError
from atat_jax.plan import Plan, StagePlan
from atat_jax.training import averaging
from atat_jax.training.bar import StepBar
from atat_jax.training.draws import BatchDraws
from atat_jax.training.interrupts import Interrupt, Interrupted
from atat_jax.training.profile import Trace
from atat_jax.training.writer import MetricsWriter
from atat_jax.typing import Variables

_log = logging.getLogger(__name__)

_NOMINAL = evaluation.parse("nominal", epsilon=0, step_size=0)


def check_sizes(
  plan: Plan, dataset: Dataset, extra: Extra | None = None
) -> None:
  """Checks the sizes of batches against the data, before anything is trained.

  Args:
    plan: Plan of the run.
    dataset: The data.
    extra: Extra training images, or None.

  Raises:
    UserError: A batch is larger than the training split, or its extra part than
      the extra images.
  """
  for stage in plan.stages:
    if stage.batch_size > len(dataset.train.labels):
      raise UserError(
        f"{stage.section}.batch_size: {stage.batch_size}; allowed: at most the"
        f" {len(dataset.train.labels)} training images"
      )
    if extra is not None and stage.num_extra > len(extra):
      raise UserError(
        f"data.extra_fraction: {stage.num_extra} images in a batch of"
        f" {stage.section}; allowed: at most the {len(extra)} in"
        f" {plan.data.extra}"
      )


def train(
  plan: Plan,
  workdir: pathlib.Path,
  dataset: Dataset,
  mesh: Mesh,
  extra: Extra | None = None,
) -> None:
  """Trains what is not trained yet.

  Args:
    plan: Plan of the run.
    workdir: Working directory of the run.
    dataset: The data.
    mesh: The devices.
    extra: Extra training images, or None.

  Raises:
    UserError: A teacher that does not fit, a loss that is not finite.
    Interrupted: Ctrl-C or SIGTERM; the state is saved.
  """
  for stage in plan.stages:
    teacher = None
    if stage.objective.needs_teacher and plan.teacher is not None:
      # Teacher and student have the same architecture (Section 3.2).
      _, teacher = checkpoints.restore_model(
        workdir / plan.teacher, expected=plan.model_spec
      )
    _train_stage(
      plan, stage, workdir / stage.directory, teacher, dataset, mesh, extra
    )


def dispatches(
  start: int,
  total: int,
  *,
  size: int,
  multiples: Sequence[int],
  others: Sequence[int] = (),
) -> Iterator[range]:
  """Groups the steps that one program runs together.

  Args:
    start: Number of steps made before.
    total: Number of steps of the run.
    size: Largest number of steps in a group.
    multiples: Intervals; a group ends at each of their multiples, for log lines
      and validations.
    others: Further ends.

  Yields:
    Numbers of the steps of a group, from 0.
  """
  while start < total:
    ends = [start + size, total]
    ends += [start - start % multiple + multiple for multiple in multiples]
    end = min(ends + [other for other in others if other > start])
    yield range(start, end)
    start = end


@dataclasses.dataclass(frozen=True)
class Calendar:
  """Steps at which a stage logs and validates.

  Attributes:
    per_epoch: Number of steps in an epoch.
    total: Number of steps of the stage.
    log_every: Number of steps between log lines.
    validate_every: Number of steps between validations.
  """

  per_epoch: int
  total: int
  log_every: int
  validate_every: int

  def logs(self, step: int) -> bool:
    """Whether there is a log line after a step, counted from 1."""
    return step % self.log_every == 0 or step == self.total

  def validates(self, step: int) -> bool:
    """Whether there is a validation after a step, counted from 1."""
    return step % self.validate_every == 0 or step == self.total


def make_calendar(stage: StagePlan, num_examples: int) -> Calendar:
  """Makes the calendar of a stage.

  Args:
    stage: The stage.
    num_examples: Number of training images.

  Returns:
    The calendar.
  """
  per_epoch = num_examples // stage.batch_size
  return Calendar(
    per_epoch=per_epoch,
    total=stage.num_epochs * per_epoch,
    log_every=stage.log_every_steps,
    validate_every=max(1, round(stage.validate_every_epochs * per_epoch)),
  )


class _Programs:
  """Compiled programs of a stage, and the arrays that they run on.

  Args:
    plan: Plan of the run.
    stage: The stage.
    teacher: Variables of the stage's teacher, or None.
    dataset: The data.
    mesh: The devices.
    extra: Extra training images, or None.
    total: Number of steps of the stage.
  """

  def __init__(
    self,
    plan: Plan,
    stage: StagePlan,
    teacher: Variables | None,
    dataset: Dataset,
    mesh: Mesh,
    extra: Extra | None,
    total: int,
  ):
    self._plan, self._stage, self._mesh = plan, stage, mesh
    self._options = stage.make_options(total)
    self._optimizer = stage.make_optimizer(total)
    self._initial = teacher if stage.objective.starts_from_teacher else None
    self._teacher = sharding.put_replicated(mesh, teacher)
    self._train_data = sharding.put_replicated(mesh, dataset.train)
    self._validation_data = sharding.put_replicated(mesh, dataset.validation)
    common: dict[str, Any] = {
      "mesh": mesh,
      "num_classes": plan.data.spec.num_classes,
      "padding": plan.data.padding,
      "flip": plan.data.flip,
      "options": self._options,
    }
    self._train_step = steps.make_train_step(
      plan.model, stage.objective, self._optimizer, **common
    )
    self._statistics_pass = averaging.make_statistics_pass(
      plan.model, stage.objective, **common
    )
    self._learning_rate = compilation.jit(stage.make_schedule(total), once=True)
    self.draws = BatchDraws(
      stage.seed,
      num_examples=len(dataset.train.labels),
      batch_size=stage.batch_size,
      num_extra=stage.num_extra,
      extra=extra,
      mesh=mesh,
    )

  def create_state(self) -> state.TrainState:
    """Creates the state before the first step, on all devices."""
    created = state.create(
      self._plan.model,
      self._optimizer,
      jax.random.key(self._stage.seed),
      jnp.zeros((1, *self._plan.data.spec.image_shape)),
      metric_names=steps.metric_names(self._stage.objective),
      term_names=steps.term_names(self._stage.objective),
      initial=self._initial,
      averages=self._options.averages,
    )
    return sharding.put_replicated(self._mesh, created)

  def take_steps(
    self, current: state.TrainState, numbers: range, extra: Split | None
  ) -> state.TrainState:
    """Takes the steps of one dispatch; donates the state."""
    size = self._stage.steps_per_dispatch
    return self._train_step(
      current,
      self._teacher,
      self._train_data,
      self.draws.indices(numbers, size),
      extra,
      None if size == 1 else np.int32(len(numbers)),
    )

  def reset_metrics(self, current: state.TrainState) -> state.TrainState:
    """Sets the accumulated metrics to zero."""
    zeros = metrics.zeros(tuple(current.sums))
    return current.replace(sums=sharding.put_replicated(self._mesh, zeros))

  def learning_rate(self, step: int) -> float:
    """Learning rate that a step was made with, counted from 1."""
    return float(self._learning_rate(step - 1))

  def estimate_statistics(self, current: state.TrainState) -> state.TrainState:
    """Estimates the BatchNorm statistics of averaged weights, if there are any."""
    return averaging.estimate_statistics(
      current,
      self._statistics_pass,
      self._teacher,
      self._train_data,
      lambda number: (
        self.draws.indices([number]),
        self.draws.images([number]),
      ),
      self._options,
    )

  def validate(self, current: state.TrainState) -> dict[str, float]:
    """Computes clean and, where the method attacks, robust accuracy.

    The last accuracy is the one that chooses checkpoints: a standardly trained
    teacher is chosen by its clean accuracy.
    """
    classifier = models.classifier(self._plan.model, state.evaluated(current))
    settings = self._plan.evaluation
    protocols = {"accuracy_clean": _NOMINAL}
    if self._stage.objective.attacks:
      protocols["accuracy_adversarial"] = settings.validation
    return {
      name: evaluation.accuracy(
        jax.random.key(settings.seed),
        classifier,
        self._validation_data,
        protocol=protocol,
        batch_size=settings.batch_size,
        mesh=self._mesh,
      )
      for name, protocol in protocols.items()
    }


@dataclasses.dataclass
class _Journal:
  """Everything that a stage writes: metrics, checkpoints, the terminal.

  Attributes:
    stage: The stage.
    directory: Directory of its files.
    calendar: Its steps.
    attack: Validation attack in words.
    checkpointer: Its checkpoints.
    writer: Its metrics.
    bar: Its progress bar.
    saved: Step of the last checkpoint, or None.
  """

  stage: StagePlan
  directory: pathlib.Path
  calendar: Calendar
  attack: str
  checkpointer: checkpoints.Checkpointer
  writer: MetricsWriter
  bar: StepBar
  saved: int | None

  def check_finite(self, current: state.TrainState) -> None:
    """Stops a training whose loss or gradient is no longer finite."""
    first = {name: int(step) for name, step in current.nonfinite.items()}
    step = min(first.values())
    if step == state.NEVER:
      return
    terms = ", ".join(name for name, when in first.items() if when == step)
    kept = f"step {self.saved} is kept" if self.saved else "there is none yet"
    raise TrainingDivergedError(
      f"{self.stage.name}: not finite at step {step + 1}: {terms}; training"
      f" stopped, the last good checkpoint ({kept}) is in"
      f" {self.directory / 'checkpoints'}; a lower learning_rate or smaller"
      " weights of the terms may help"
    )

  def log(
    self, current: state.TrainState, step: int, learning_rate: float
  ) -> None:
    """Writes the metrics since the last log line."""
    values = {
      "epoch": step / self.calendar.per_epoch,
      **metrics.compute(current.sums),
      "learning_rate": learning_rate,
      "images_per_second": self.bar.images_per_second(),
    }
    self.writer.write("train", step, values)
    self.bar.show_metrics(values)

  def save(
    self, current: state.TrainState, step: int, scores: dict[str, float]
  ) -> None:
    """Writes validation accuracies and saves a checkpoint with them."""
    values = {"epoch": step / self.calendar.per_epoch, **scores}
    self.writer.write("validation", step, {**values, "attack": self.attack})
    self.checkpointer.save(current, step, list(scores.values())[-1], scores)
    self.saved = step
    self.bar.print_scores(step, scores)

  def interrupted(self, step: int, signum: int) -> Interrupted:
    """The error that ends an interrupted stage."""
    return Interrupted(
      f"{self.stage.name}: stopped at step {step} of {self.calendar.total},"
      f" saved in {self.directory / 'checkpoints'}; the same command resumes"
      " there",
      signum,
    )


def _train_stage(
  plan: Plan,
  stage: StagePlan,
  directory: pathlib.Path,
  teacher: Variables | None,
  dataset: Dataset,
  mesh: Mesh,
  extra: Extra | None,
) -> None:
  """Trains one network from its last checkpoint to its last step."""
  calendar = make_calendar(stage, len(dataset.train.labels))
  with contextlib.ExitStack() as stack:
    checkpointer = stack.enter_context(
      checkpoints.Checkpointer(directory, plan.model_spec)
    )
    saved = checkpointer.latest_step()
    if saved is not None and saved >= calendar.total:
      _log.info(
        "%s: %s has all %d steps", stage.name, directory, calendar.total
      )
      return
    programs = _Programs(
      plan, stage, teacher, dataset, mesh, extra, calendar.total
    )
    current = programs.create_state()
    interrupt = stack.enter_context(Interrupt())
    if saved is not None:
      current = checkpointer.restore(current, saved)
      _log.info(
        "%s: resumed at step %d of %d", stage.name, saved, calendar.total
      )
    start = saved or 0
    bar = StepBar(
      stage.name,
      total=calendar.total,
      start=start,
      batch_size=stage.batch_size,
    )
    journal = _Journal(
      stage=stage,
      directory=directory,
      calendar=calendar,
      attack=plan.evaluation.validation.describe(),
      checkpointer=checkpointer,
      writer=stack.enter_context(MetricsWriter(directory, start)),
      bar=stack.enter_context(bar),
      saved=saved,
    )
    trace = stack.enter_context(
      Trace(directory / "profile", plan.profile_steps)
    )
    _loop(current, start, programs, journal, interrupt, trace)


def _loop(
  current: state.TrainState,
  start: int,
  programs: _Programs,
  journal: _Journal,
  interrupt: Interrupt,
  trace: Trace,
) -> None:
  """Takes the remaining steps of a stage; logs, validates and saves."""
  stage, calendar = journal.stage, journal.calendar
  groups = list(
    dispatches(
      start,
      calendar.total,
      size=stage.steps_per_dispatch,
      multiples=(calendar.log_every, calendar.validate_every),
      others=trace.edges,
    )
  )
  draw = functools.partial(programs.draws.images, size=stage.steps_per_dispatch)
  with Prefetcher(draw, groups) as extra:
    for numbers in groups:
      step = numbers.stop
      trace.before(numbers.start + 1, current)
      current = programs.take_steps(current, numbers, extra.get())
      trace.after(step, current)
      journal.bar.advance(len(numbers))
      if numbers.start == start:
        jax.block_until_ready(current)
        journal.bar.restart()  # the first step compiles
      log, validate = calendar.logs(step), calendar.validates(step)
      if log or validate:  # otherwise the host does not wait for the device
        journal.check_finite(current)
      if log:
        journal.log(current, step, programs.learning_rate(step))
        current = programs.reset_metrics(current)
      if validate:
        current = programs.estimate_statistics(current)
        journal.save(current, step, programs.validate(current))
      if journal.checkpointer.should_stop(step, interrupt.signum):
        journal.check_finite(current)
        if not validate:
          current = programs.estimate_statistics(current)
          journal.checkpointer.save(current, step, None)
        raise journal.interrupted(step, interrupt.signum)
      if log or validate:
        journal.bar.restart()
