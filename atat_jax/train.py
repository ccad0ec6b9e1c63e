"""Training: the teacher, then the student, resumable at every step."""

import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from atat_jax.compilation.ahead import Ahead, placed
from atat_jax.data import Dataset, Extra, Pictures, Split
from atat_jax.data.base import in_memory
from atat_jax.data.streamed import TrainingBatches
from atat_jax.errors import UserError, in_section
from atat_jax.objectives import Batch, Outcome
from atat_jax.plan import Plan, StagePlan
from atat_jax.runs import configuration, files, overfitting
from atat_jax.state import TrainState
from atat_jax.training import averaging, gradients, loop, soundness
from atat_jax.training.draws import BatchDraws
from atat_jax.training.incidents import Incidents, RolledBack
from atat_jax.training.options import Options
from atat_jax.training.outline import Outline
from atat_jax.typing import PyTree, Variables

_log = logging.getLogger(__name__)

_NOMINAL = evaluation.parse("nominal", epsilon=0, step_size=0)


def check_sizes(
  plan: Plan,
  dataset: Dataset,
  extra: Extra | None = None,
  mesh: Mesh | None = None,
) -> None:
  """Checks the sizes of batches, before anything is trained.

  Args:
    plan: Plan of the run.
    dataset: The data.
    extra: Extra training images, or None.
    mesh: The devices; None: any number of them.

  Raises:
    UserError: A batch does not divide by the number of devices, is larger than
      the training split, or its extra part than the extra images; or the
      schedule has no place in so few or many steps.
  """
  for stage in plan.stages:
    if mesh is not None:
      with in_section(stage.section):
        sharding.check_divides(
          mesh, stage.batch_size, parts=stage.accumulate_steps
        )
    if stage.batch_size > dataset.num_train:
      raise UserError(
        f"{stage.section}.batch_size: {stage.batch_size}; allowed: at most the"
        f" {dataset.num_train} training images"
      )
    per_epoch = dataset.num_train // stage.batch_size
    if stage.num_epochs * per_epoch >= 2**31:
      raise UserError(
        f"{stage.section}.num_epochs: {stage.num_epochs}; allowed: at most"
        f" {(2**31 - 1) // per_epoch}, as steps are counted in 32 bits"
      )
    with in_section(stage.section):
      stage.make_optimizer(stage.num_epochs * per_epoch)
    if extra is not None and stage.num_extra > len(extra):
      raise UserError(
        f"data.extra_fraction: {stage.num_extra} images in a batch of"
        f" {stage.section}; allowed: at most the {len(extra)} in"
        f" {plan.data.extra}"
      )


class _Made(NamedTuple):
  """Functions of a stage that need no data."""

  options: Options
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  bound: dict[str, Any]
  step: steps.TrainStep


class StepPrograms:
  """Train steps of a run, compiled in threads before they are needed.

  Args:
    plan: Plan of the run.
    mesh: The devices.
  """

  def __init__(self, plan: Plan, mesh: Mesh):
    self._plan, self._mesh = plan, mesh
    # Several processes might compile in different orders, and wait for another.
    self._ahead = Ahead(enabled=jax.process_count() == 1)
    self._made: dict[tuple[str, int], _Made] = {}

  def __enter__(self) -> "StepPrograms":
    """Returns itself."""
    return self

  def __exit__(self, *error: Any) -> None:
    """Drops what no thread has begun; waits for nothing."""
    self._ahead.close()

  def make(self, stage: StagePlan, total: int) -> _Made:
    """Makes the functions of a stage of so many steps, once."""
    if (stage.name, total) not in self._made:
      options = stage.make_options(total)
      schedule, optimizer = stage.make_optimizer(total)
      bound = bind(self._plan, stage, options, self._mesh)
      step = steps.make_train_step(optimizer=optimizer, **bound)
      made = _Made(options, schedule, optimizer, bound, step)
      self._made[stage.name, total] = made
    return self._made[stage.name, total]

  def compile(self, workdir: pathlib.Path, dataset: Dataset) -> None:
    """Begins to compile the steps of what is not trained yet.

    Args:
      workdir: Working directory of the run.
      dataset: The data; used for their shapes.
    """
    for stage in self._plan.stages:
      outline = make_outline(self._plan, stage, workdir, dataset.num_train)
      last = outline.directory / files.CHECKPOINTS / str(outline.total)
      if not last.is_dir():
        lower = functools.partial(self._lower, stage, outline, dataset)
        self._ahead.add(stage.name, lower)

  def wait(self, stage: StagePlan) -> None:
    """Waits for a stage's step, if a thread compiles it."""
    self._ahead.wait(stage.name)

  def _lower(
    self, stage: StagePlan, outline: Outline, dataset: Dataset
  ) -> Callable[[], object]:
    """Traces a stage's step with the shapes of its arguments."""
    made, objective = self.make(stage, outline.total), stage.objective
    image = jax.ShapeDtypeStruct(
      (1, *self._plan.data.spec.image_shape), jnp.float32
    )
    teacher = None
    if self._plan.teacher is not None and objective.needs_teacher:
      teacher = dict(
        jax.eval_shape(self._plan.model.init, jax.random.key(0), image)
      )
    fresh = jax.eval_shape(
      functools.partial(
        state.build,
        model=self._plan.model,
        optimizer=made.optimizer,
        metric_names=steps.metric_names(objective),
        term_names=steps.term_names(objective),
        averages=made.options.averages,
        guarded=made.options.guards,
      ),
      jax.random.key(0),
      image,
      teacher if objective.starts_from_teacher else None,
    )
    current = jax.tree.map(
      placed, fresh, sharding.state_shardings(self._mesh, fresh)
    )
    teacher, images = jax.tree.map(
      lambda x: placed(x, sharding.replicated(self._mesh)),
      (teacher, resident(dataset)),
    )
    size, axis = outline.per_dispatch, int(outline.per_dispatch > 1)
    lead = (size,) if axis else ()

    def rows(like: Any, number: int) -> jax.ShapeDtypeStruct:
      split = sharding.batch_sharding(self._mesh, number, axis=axis)
      shape = (*lead, number, *like.shape[1:])
      return jax.ShapeDtypeStruct(shape, like.dtype, sharding=split)

    indices = rows(np.zeros(1, np.int32), stage.batch_size - stage.num_extra)
    extra = None
    if number := num_drawn(stage, dataset):
      extra = jax.tree.map(lambda x: rows(x, number), example(self._plan))
    count = np.int32(size) if axis else None
    return made.step.ahead(  # type: ignore[attr-defined]
      current, teacher, images, indices, extra, count
    )


def train(
  plan: Plan,
  workdir: pathlib.Path,
  dataset: Dataset,
  mesh: Mesh,
  extra: Extra | None = None,
  step_programs: StepPrograms | None = None,
) -> None:
  """Trains what is not trained yet.

  Args:
    plan: Plan of the run.
    workdir: Working directory of the run.
    dataset: The data.
    mesh: The devices.
    extra: Extra training images, or None.
    step_programs: Train steps that are being compiled; None: none are.

  Raises:
    UserError: The teacher is missing or of another network.
    TrainingDivergedError: Numbers of a step are not finite, and the policy or a
      limit of it stops the training.
    Interrupted: Ctrl-C or SIGTERM; the state is saved.
  """
  made = StepPrograms(plan, mesh) if step_programs is None else step_programs
  for stage in plan.stages:
    _train_stage(plan, stage, workdir, dataset, mesh, extra, made)


def _train_stage(
  plan: Plan,
  stage: StagePlan,
  workdir: pathlib.Path,
  dataset: Dataset,
  mesh: Mesh,
  extra: Extra | None,
  step_programs: StepPrograms,
) -> None:
  """Trains one network from its last checkpoint to its last step."""
  teacher = restore_teacher(plan, stage, workdir)
  outline = make_outline(plan, stage, workdir, dataset.num_train)
  name, total = outline.name, outline.total
  prepared: Prepared | None = None
  left_out: list[int] = []
  while True:
    with checkpoints.Checkpointer(
      outline.directory, plan.model_spec
    ) as checkpointer:
      saved = checkpointer.latest_step()
      if saved is not None and saved >= total:
        _log.info("%s: %s has all %d steps", name, outline.directory, total)
        return
      if prepared is None:
        prepared = prepare(
          plan, stage, teacher, dataset, mesh, extra, outline, step_programs
        )
      incidents = Incidents(
        outline.directory,
        name=name,
        start=saved or 0,
        policy=stage.nonfinite,
        batch=prepared.draws.describe,
        left_out=left_out,
      )
      current = prepared.start(incidents.left_out)
      if saved is not None:
        current = checkpointer.restore(current, saved)
        _log.info("%s: resumed at step %d of %d", name, saved, total)
      programs = dataclasses.replace(
        prepared.programs,
        before_saving=functools.partial(_claim, plan, workdir),
      )
      try:
        loop.run(current, programs, outline, checkpointer, saved, incidents)
        return
      except RolledBack:
        left_out = incidents.left_out
      finally:
        prepared.draws.close()


def make_outline(
  plan: Plan, stage: StagePlan, workdir: pathlib.Path, num_examples: int
) -> Outline:
  """Makes the outline of a stage.

  Args:
    plan: Plan of the run.
    stage: The stage.
    workdir: Working directory of the run.
    num_examples: Number of training images.
  """
  per_epoch = num_examples // stage.batch_size
  total = stage.num_epochs * per_epoch
  validate_every = max(1, round(stage.validate_every_epochs * per_epoch))
  return Outline(
    name=stage.name,
    directory=workdir / stage.directory,
    batch_size=stage.batch_size,
    attack=plan.evaluation.validation.describe(),
    profile_steps=plan.profile_steps,
    total=total,
    per_epoch=per_epoch,
    # No group of steps is longer, and none needs memory for more.
    per_dispatch=min(
      stage.steps_per_dispatch, stage.log_every_steps, validate_every, total
    ),
    log_every=stage.log_every_steps,
    validate_every=validate_every,
  )


def _claim(plan: Plan, workdir: pathlib.Path) -> None:
  """Makes a working directory that of the plan, now that it holds a state."""
  if jax.process_index() == 0:
    configuration.write(plan.record, workdir)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A stage that is ready to be trained.

  Attributes:
    start: Numbers of steps to leave out to the state before the first step.
    programs: Programs of the training.
    draws: Its batches.
    differentiate: (state, numbers of one step, extra images) to the batch, the
      gradient and the loss of that step; the state stays.
  """

  start: Callable[[Sequence[int]], TrainState]
  programs: loop.Programs
  draws: BatchDraws
  differentiate: Callable[..., tuple[Batch, PyTree, Outcome]]


def prepare(
  plan: Plan,
  stage: StagePlan,
  teacher: Variables | None,
  dataset: Dataset,
  mesh: Mesh,
  extra: Extra | None,
  outline: Outline,
  step_programs: StepPrograms | None = None,
) -> Prepared:
  """Makes the state before the first step and the programs of a stage.

  Args:
    plan: Plan of the run.
    stage: The stage.
    teacher: The teacher's variables, or None.
    dataset: The data.
    mesh: The devices.
    extra: Extra training images, or None.
    outline: Outline of the stage.
    step_programs: Train steps that are being compiled; None: none are.
  """
  made = StepPrograms(plan, mesh) if step_programs is None else step_programs
  functions = made.make(stage, outline.total)
  options, schedule, optimizer, bound, train_step = functions
  initial = teacher if stage.objective.starts_from_teacher else None
  passes = averaging.make_statistics_pass(**bound)
  teacher, images, held_out = sharding.put_replicated(
    mesh, (teacher, resident(dataset), in_memory(dataset.validation))
  )
  draws = _make_draws(stage, dataset, extra, mesh, outline.total)
  take = functools.partial(
    _take_steps,
    functools.partial(made.wait, stage),
    train_step,
    teacher,
    images,
    draws,
    outline.per_dispatch,
  )
  follow = functools.partial(draws.follow, size=outline.per_dispatch)
  compare = _make_comparison(stage, bound, teacher, images, draws)
  programs = loop.Programs(
    draw_extra=follow if num_drawn(stage, dataset) else None,
    take_steps=take,
    learning_rate=compilation.jit(schedule, once=True),
    reset_metrics=functools.partial(_reset_metrics, mesh),
    estimate_statistics=functools.partial(
      _estimate_statistics, passes, teacher, images, draws, options
    ),
    validate=functools.partial(_validate, plan, stage, held_out, mesh, compare),
    before_saving=lambda: None,
    input_advice=_input_advice(dataset),
  )
  start = functools.partial(
    _start, plan, stage, optimizer, options, initial, mesh
  )
  gradient = _make_differentiation(bound, teacher, images, draws)
  return Prepared(start, programs, draws, gradient)


def _make_differentiation(
  bound: dict[str, Any],
  teacher: Variables | None,
  images: Split | None,
  draws: BatchDraws,
) -> Callable[..., tuple[Batch, PyTree, Outcome]]:
  """Makes what differentiates the loss of one step, for its replay."""
  gradient_fn = compilation.jit(
    functools.partial(gradients.differentiate, **bound), once=True
  )
  return functools.partial(_differentiate, gradient_fn, teacher, images, draws)


def resident(dataset: Dataset) -> Split | None:
  """Returns the training split that the devices hold; None: it is streamed."""
  return dataset.train if isinstance(dataset.train, Split) else None


def num_drawn(stage: StagePlan, dataset: Dataset) -> int:
  """Returns how many images of a batch the host sends: extra, or streamed."""
  streams = resident(dataset) is None
  return stage.batch_size if streams else stage.num_extra


def _input_advice(dataset: Dataset) -> str | None:
  """Says what makes streamed pictures come faster; None: nothing is streamed."""
  if not isinstance(dataset.train, Pictures):
    return None
  workers, cores = dataset.train.options.workers, os.cpu_count() or 1
  if workers < cores - 1 > 1:
    now = workers or "0, threads of one process"
    return f"data.workers={cores - 1} uses all {cores} cores (now {now})"
  return f"all {cores} cores read; smaller pictures or more cores would help"


def example(plan: Plan) -> Split:
  """Returns a split of one image, for the shapes."""
  image = np.zeros((1, *plan.data.spec.image_shape), np.uint8)
  return Split(image, np.zeros(1, np.int32))


def _make_draws(
  stage: StagePlan,
  dataset: Dataset,
  extra: Extra | None,
  mesh: Mesh,
  num_steps: int,
) -> BatchDraws:
  streamed = None
  if isinstance(dataset.train, Pictures):
    streamed = TrainingBatches(
      dataset.train,
      seed=stage.seed,
      batch_size=stage.batch_size,
      rows=sharding.local_rows(mesh, stage.batch_size),
      num_steps=num_steps,
    )
  return BatchDraws(
    stage.seed,
    num_examples=dataset.num_train,
    batch_size=stage.batch_size,
    num_extra=stage.num_extra,
    extra=extra,
    mesh=mesh,
    streamed=streamed,
  )


def bind(
  plan: Plan, stage: StagePlan, options: Options, mesh: Mesh
) -> dict[str, Any]:
  """Collects the arguments that all programs of a stage have in common.

  Args:
    plan: Plan of the run.
    stage: The stage.
    options: Options of its train step.
    mesh: The devices.

  Returns:
    Names of arguments to their values.
  """
  return {
    "model": plan.model,
    "objective": stage.objective,
    "mesh": mesh,
    "num_classes": plan.data.spec.num_classes,
    "padding": plan.data.padding,
    "flip": plan.data.flip,
    "options": options,
  }


def _start(
  plan: Plan,
  stage: StagePlan,
  optimizer: optax.GradientTransformation,
  options: Options,
  initial: Variables | None,
  mesh: Mesh,
  left_out: Sequence[int],
) -> TrainState:
  """Makes the state before the first step, with steps to leave out."""
  fresh = state.create(
    plan.model,
    optimizer,
    jax.random.key(stage.seed),
    jnp.zeros((1, *plan.data.spec.image_shape)),
    metric_names=steps.metric_names(stage.objective),
    term_names=steps.term_names(stage.objective),
    initial=initial,
    averages=options.averages,
    guarded=options.guards,
  )
  if options.guards:
    fresh = fresh.replace(guard=soundness.fresh_guard(left_out))
  placed: TrainState = sharding.put_state(mesh, fresh)
  return placed


def _differentiate(
  gradient_fn: Callable[..., tuple[Batch, PyTree, Outcome]],
  teacher: Variables | None,
  images: Split | None,
  draws: BatchDraws,
  current: TrainState,
  numbers: range,
  extra: Split | None,
) -> tuple[Batch, PyTree, Outcome]:
  """Makes the batch of one step and differentiates its loss."""
  return gradient_fn(current, teacher, images, draws.indices(numbers), extra)


def restore_teacher(
  plan: Plan, stage: StagePlan, workdir: pathlib.Path
) -> Variables | None:
  """Restores the variables of a stage's teacher, if it has one.

  Args:
    plan: Plan of the run.
    stage: The stage.
    workdir: Working directory of the run.

  Raises:
    UserError: The teacher is missing or of another network.
  """
  if plan.teacher is None or not stage.objective.needs_teacher:
    return None
  # Teacher and student have the same architecture (Section 3.2).
  _, teacher = checkpoints.restore_model(
    workdir / plan.teacher, expected=plan.model_spec
  )
  return teacher


def _take_steps(
  wait: Callable[[], None],
  train_step: steps.TrainStep,
  teacher: Variables | None,
  images: Split | None,
  draws: BatchDraws,
  size: int,
  current: TrainState,
  numbers: range,
  extra: Split | None,
) -> TrainState:
  """Takes the steps of one dispatch, at most `size`; donates the state."""
  indices = draws.indices(numbers, size)
  count = None if size == 1 else np.int32(len(numbers))
  wait()
  return train_step(current, teacher, images, indices, extra, count)


def _reset_metrics(mesh: Mesh, current: TrainState) -> TrainState:
  zeros = metrics.zeros(tuple(current.sums))
  return current.replace(sums=sharding.put_replicated(mesh, zeros))


def _estimate_statistics(
  statistics_pass: averaging.StatisticsPass,
  teacher: Variables | None,
  images: Split | None,
  draws: BatchDraws,
  options: Options,
  current: TrainState,
) -> TrainState:
  """Estimates the statistics of averaged weights with the first batches."""
  return averaging.estimate_statistics(
    current,
    statistics_pass,
    teacher,
    images,
    lambda number: (draws.indices([number]), draws.images([number])),
    options,
  )


def _make_comparison(
  stage: StagePlan,
  bound: dict[str, Any],
  teacher: Variables | None,
  images: Split | None,
  draws: BatchDraws,
) -> Callable[[TrainState], dict[str, float]]:
  """Makes what compares the terms' gradients in the step after a state."""
  if not stage.compares_terms:
    return lambda current: {}
  ratios_fn = gradients.make_term_ratios(**bound)

  def compare(current: TrainState) -> dict[str, float]:
    number = [int(current.step)]
    found = ratios_fn(
      current, teacher, images, draws.indices(number), draws.images(number)
    )
    ratios = {name: float(x) for name, x in jax.device_get(found).items()}
    # A cross-entropy without a gradient has no ratios.
    return {name: x for name, x in ratios.items() if math.isfinite(x)}

  return compare


def _validate(
  plan: Plan,
  stage: StagePlan,
  images: Split,
  mesh: Mesh,
  compare_terms: Callable[[TrainState], dict[str, float]],
  current: TrainState,
) -> loop.Validation:
  """Computes clean and, where the method attacks, robust accuracy.

  A standardly trained teacher is chosen by its clean accuracy.
  """
  classifier = models.classifier(plan.model, state.evaluated(current))
  protocols = {"accuracy_clean": _NOMINAL}
  if stage.objective.attacks:
    single_step = plan.evaluation.single_step
    if stage.overfitting_alarm and single_step is not None:
      protocols[overfitting.SINGLE_STEP] = single_step
    # The last one chooses the checkpoint.
    protocols[overfitting.ROBUST] = plan.evaluation.validation
  judged = {
    name: evaluation.judge(
      jax.random.key(plan.evaluation.seed),
      classifier,
      images,
      protocol=protocol,
      batch_size=plan.evaluation.batch_size,
      mesh=mesh,
    )
    for name, protocol in protocols.items()
  }
  return loop.Validation(
    {name: found.accuracy for name, found in judged.items()},
    judged["accuracy_clean"].nonfinite,
    len(images.labels),
    compare_terms(current),
  )
