"""Training: the teacher, then the student, resumable at every step."""

import contextlib
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from atat_jax import (
  checkpoints,
  compilation,
  evaluation,
  metrics,
  models,
  objectives,
  sharding,
  state,
  steps,
)
from atat_jax.config import Plan, make_optimizer, make_options, num_extra
from atat_jax.data import Extra, batches
from atat_jax.data.base import Dataset, Split
from atat_jax.data.prefetch import Prefetcher
from atat_jax.errors import TrainingDivergedError, UserError
from atat_jax.training import averaging
from atat_jax.training.interrupts import Interrupt, Interrupted
from atat_jax.training.profile import Trace
from atat_jax.training.writer import MetricsWriter
from atat_jax.typing import Variables

_log = logging.getLogger(__name__)


class Stage(NamedTuple):
  """One network to train.

  Attributes:
    name: "teacher" or "student".
    section: "teacher" or "train": whose settings these are.
    directory: Where its files go.
    settings: `config.train` or `config.teacher`.
    objective: What it minimises.
    teacher: Variables of its teacher, or None.
    seed: Of its random draws.
  """

  name: str
  section: str
  directory: pathlib.Path
  settings: ConfigDict
  objective: objectives.Objective
  teacher: Variables | None
  seed: int


def teacher_directory(
  config: ConfigDict, workdir: pathlib.Path
) -> pathlib.Path:
  """Where the teacher's checkpoints are or will be."""
  if config.teacher_workdir:
    return pathlib.Path(config.teacher_workdir)
  return workdir / "teacher"


def check_sizes(
  plan: Plan, dataset: Dataset, extra: Extra | None = None
) -> None:
  """Checks what only the data can tell, before anything is trained.

  Raises:
    UserError: A batch is larger than the training split, or its extra part than
      the extra images.
  """
  for section in ("train", "teacher"):
    batch_size = plan.config[section].batch_size
    if batch_size > len(dataset.train.labels):
      raise UserError(
        f"{section}.batch_size: {batch_size}; allowed: at most the"
        f" {len(dataset.train.labels)} training images"
      )
    number = num_extra(plan.config, section)
    if extra is not None and number > len(extra):
      raise UserError(
        f"data.extra_fraction: {number} images in a batch of {section}; allowed:"
        f" at most the {len(extra)} in {plan.config.data.extra}"
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
    plan: The checked configuration.
    workdir: The run's directory.
    dataset: The data.
    mesh: The devices.
    extra: Images beyond the training split.

  Raises:
    UserError: A teacher that does not fit, a loss that is not finite.
    Interrupted: Ctrl-C or SIGTERM; the state is saved.
  """
  config = plan.config
  teacher = None
  if plan.objective.needs_teacher:
    directory = teacher_directory(config, workdir)
    if not config.teacher_workdir:
      _run(
        plan,
        Stage(
          name="teacher",
          section="teacher",
          directory=directory,
          settings=config.teacher,
          objective=objectives.create("standard"),
          teacher=None,
          # Its own stream: the student must not repeat the teacher's batches.
          seed=config.seed + 1_000_003,
        ),
        dataset,
        mesh,
        extra,
      )
    # Teacher and student have the same architecture (Section 3.2).
    _, teacher = checkpoints.restore_model(directory, expected=plan.model_spec)
  _run(
    plan,
    Stage(
      name="student" if teacher else plan.config.method,
      section="train",
      directory=workdir,
      settings=config.train,
      objective=plan.objective,
      teacher=teacher,
      seed=config.seed,
    ),
    dataset,
    mesh,
    extra,
  )


def _check_finite(
  nonfinite: dict[str, jax.Array], stage: Stage, saved: int | None
) -> None:
  first = {name: int(step) for name, step in nonfinite.items()}
  step = min(first.values())
  if step == state.NEVER:
    return
  terms = ", ".join(name for name, when in first.items() if when == step)
  kept = f"step {saved} is kept" if saved else "there is none yet"
  raise TrainingDivergedError(
    f"{stage.name}: not finite at step {step + 1}: {terms}; training stopped, the"
    f" last good checkpoint ({kept}) is in {stage.directory / 'checkpoints'};"
    " a lower learning_rate or smaller weights of the terms may help"
  )


class _Progress(contextlib.AbstractContextManager[Any]):
  """The bar on the terminal and the clock behind images per second."""

  def __init__(self, stage: Stage, total: int, start: int):
    self.bar = tqdm(
      total=total,
      initial=start,
      desc=stage.name,
      unit="step",
      disable=jax.process_index() != 0,
      dynamic_ncols=True,
    )
    self._images = stage.settings.batch_size
    self.restart()

  def __exit__(self, *error: object) -> None:
    self.bar.close()

  def restart(self) -> None:
    """Leaves out what was not training: compiling, validating, saving."""
    self._since, self._steps = time.perf_counter(), 0

  def advance(self, count: int) -> None:
    self._steps += count
    self.bar.update(count)

  def images_per_second(self) -> float:
    seconds = time.perf_counter() - self._since
    return self._images * self._steps / max(seconds, 1e-9)

  def show(self, values: dict[str, float]) -> None:
    short = {
      "loss": "loss",
      "attention": "att",
      "logit_pairing": "pair",
      "accuracy_clean": "clean",
      "accuracy_adversarial": "adv",
    }
    shown = {s: f"{values[n]:.3f}" for n, s in short.items() if n in values}
    rate = values["images_per_second"]
    self.bar.set_postfix({"img/s": f"{rate:.0f}", **shown})

  def say(self, step: int, scores: dict[str, float]) -> None:
    """A line of validation accuracies that stays above the bar."""
    if not self.bar.disable:
      self.bar.write(
        f"{self.bar.desc} step {step}/{self.bar.total} validation: "
        + ", ".join(f"{name} {100 * v:.1f} %" for name, v in scores.items())
      )


class _Draw:
  """The batches of a stage, as pure functions of their number, from 0.

  With extra images fewer of a batch are from the training split, which then
  takes more steps to be gone through; an epoch remains as many steps as
  without.
  """

  def __init__(
    self,
    plan: Plan,
    stage: Stage,
    num_examples: int,
    mesh: Mesh,
    extra: Extra | None,
  ):
    self._stage, self._mesh, self._extra = stage, mesh, extra
    self._num_examples = num_examples
    self._num_extra = num_extra(plan.config, stage.section)

  def _indices(self, number: int) -> np.ndarray:
    """Of the training split."""
    return batches.train_indices(
      self._stage.seed,
      number,
      num_examples=self._num_examples,
      batch_size=self._stage.settings.batch_size - self._num_extra,
    )

  def _images(self, number: int) -> Split | None:
    """The extra images, gone through in epochs of their own."""
    if self._extra is None:
      return None
    rows = batches.train_indices(
      self._stage.seed + (1 << 32),  # seeds are below 2**32
      number,
      num_examples=len(self._extra),
      batch_size=self._num_extra,
    )
    return self._extra.take(rows)

  def _put(
    self, of: Callable[[int], Any], numbers: Sequence[int], size: int
  ) -> Any:
    """Of each batch, on the devices: [B, ...], or [size, B, ...]."""
    found = [of(number) for number in numbers]
    if size == 1:
      axis, (rows,) = 0, found
    else:  # filled up by the last one, which nobody looks at
      found += found[-1:] * (size - len(found))
      axis, rows = 1, jax.tree.map(lambda *arrays: np.stack(arrays), *found)
    return jax.tree.map(
      lambda array: sharding.put_batch(self._mesh, array, axis=axis), rows
    )

  def indices(self, numbers: Sequence[int], size: int = 1) -> jax.Array:
    """int32 [M], or [size, M] for the steps of a dispatch."""
    return self._put(self._indices, numbers, size)

  def images(self, numbers: Sequence[int], size: int = 1) -> Split | None:
    """Extra images uint8 [E, H, W, C], or [size, E, H, W, C], or None."""
    return self._put(self._images, numbers, size)


def dispatches(
  start: int,
  total: int,
  *,
  size: int,
  multiples: Sequence[int],
  others: Sequence[int] = (),
) -> Iterator[range]:
  """Which steps are run by one program each.

  Args:
    start: Steps that have been made.
    total: Steps of the run.
    size: At most so many at a time.
    multiples: Their multiples are ends, for log lines and validations.
    others: Further ends.

  Yields:
    The steps' numbers, from 0.
  """
  while start < total:
    ends = [start + size, total]
    ends += [start - start % multiple + multiple for multiple in multiples]
    end = min(ends + [other for other in others if other > start])
    yield range(start, end)
    start = end


def _run(
  plan: Plan,
  stage: Stage,
  dataset: Dataset,
  mesh: Mesh,
  extra: Extra | None,
) -> None:
  """Trains one network from where it stands to its last step."""
  settings, num_examples = stage.settings, len(dataset.train.labels)
  per_epoch = num_examples // settings.batch_size
  total = settings.num_epochs * per_epoch
  every = max(1, round(settings.validate_every_epochs * per_epoch))
  with contextlib.ExitStack() as stack:
    checkpointer = stack.enter_context(
      checkpoints.Checkpointer(stage.directory, plan.model_spec)
    )
    start = saved = checkpointer.latest_step()
    if start is not None and start >= total:
      _log.info("%s: %s has all %d steps", stage.name, stage.directory, total)
      return
    schedule, optimizer = make_optimizer(settings, total)
    options = make_options(plan.config, stage.section, total)
    common: dict[str, Any] = {
      "mesh": mesh,
      "num_classes": plan.spec.num_classes,
      "padding": plan.config.data.padding,
      "flip": plan.config.data.flip,
      "options": options,
    }
    current = sharding.put_replicated(
      mesh,
      state.create(
        plan.model,
        optimizer,
        jax.random.key(stage.seed),
        jnp.zeros((1, *plan.spec.image_shape)),
        metric_names=steps.metric_names(stage.objective),
        term_names=steps.term_names(stage.objective),
        initial=stage.teacher if stage.objective.starts_from_teacher else None,
        averages=options.averages,
      ),
    )
    teacher = sharding.put_replicated(mesh, stage.teacher)
    step_fn = steps.make_train_step(
      plan.model, stage.objective, optimizer, **common
    )
    statistics_pass = averaging.make_statistics_pass(
      plan.model, stage.objective, **common
    )
    draw = _Draw(plan, stage, num_examples, mesh, extra)
    train_data = sharding.put_replicated(mesh, dataset.train)
    validation_data = sharding.put_replicated(mesh, dataset.validation)
    interrupt = stack.enter_context(Interrupt())
    if start is not None:
      current = checkpointer.restore(current, start)
      _log.info("%s: resumed at step %d of %d", stage.name, start, total)
    start = start or 0
    writer = stack.enter_context(MetricsWriter(stage.directory, start))
    progress = stack.enter_context(_Progress(stage, total, start))
    trace = stack.enter_context(
      Trace(stage.directory / "profile", plan.config.profile_steps)
    )
    size = settings.steps_per_dispatch

    steps_together = list(
      dispatches(
        start,
        total,
        size=size,
        multiples=(settings.log_every_steps, every),
        others=trace.edges,
      )
    )
    # Indices are made in no time, extra images are read.
    ahead = None
    if extra is not None:
      ahead = stack.enter_context(
        Prefetcher(functools.partial(draw.images, size=size), steps_together)
      )
    learning_rate = compilation.jit(schedule, once=True)

    def settle(current: state.TrainState) -> state.TrainState:
      """With the statistics that belong to the averaged weights."""
      return averaging.estimate_statistics(
        current,
        statistics_pass,
        teacher,
        train_data,
        lambda number: (draw.indices([number]), draw.images([number])),
        options,
      )

    for numbers in steps_together:
      step = numbers.stop
      trace.before(numbers.start + 1, current)
      current = step_fn(
        current,
        teacher,
        train_data,
        draw.indices(numbers, size),
        ahead.get() if ahead else None,
        None if size == 1 else np.int32(len(numbers)),
      )
      trace.after(step, current)
      progress.advance(len(numbers))
      if numbers.start == start:
        jax.block_until_ready(current)
        progress.restart()  # the first step compiles
      log = step % settings.log_every_steps == 0 or step == total
      validate = step % every == 0 or step == total
      if log or validate:  # else nothing here waits for the device
        _check_finite(current.nonfinite, stage, saved)
      if log:
        values = {
          "epoch": step / per_epoch,
          **metrics.compute(current.sums),
          "learning_rate": float(learning_rate(step - 1)),
          "images_per_second": progress.images_per_second(),
        }
        zeros = metrics.zeros(tuple(current.sums))
        current = current.replace(sums=sharding.put_replicated(mesh, zeros))
        writer.write("train", step, values)
        progress.show(values)
      if validate:
        current = settle(current)
        scores = _validate(plan, stage, current, validation_data, mesh)
        details = {"epoch": step / per_epoch, **scores}
        attack = plan.validation.describe()
        writer.write("validation", step, {**details, "attack": attack})
        # The standardly trained teacher is chosen by its clean accuracy.
        chosen_by = list(scores)[-1]
        checkpointer.save(current, step, scores[chosen_by], scores)
        saved = step
        progress.say(step, scores)
      if checkpointer.should_stop(step, interrupt.signum):
        _check_finite(current.nonfinite, stage, saved)
        if not validate:
          checkpointer.save(settle(current), step, None)
        raise Interrupted(
          f"{stage.name}: stopped at step {step} of {total}, saved in"
          f" {stage.directory / 'checkpoints'}; the same command resumes there",
          interrupt.signum,
        )
      if log or validate:
        progress.restart()


def _validate(
  plan: Plan,
  stage: Stage,
  current: state.TrainState,
  data: Split,
  mesh: Mesh,
) -> dict[str, float]:
  """Clean and, where the method attacks, robust validation accuracy."""
  classifier = models.classifier(plan.model, state.evaluated(current))
  protocols = {
    "accuracy_clean": evaluation.parse("nominal", epsilon=0, step_size=0)
  }
  if stage.objective.attacks:
    protocols["accuracy_adversarial"] = plan.validation
  return {
    name: evaluation.accuracy(
      jax.random.key(plan.config.evaluation.seed),
      classifier,
      data,
      protocol=protocol,
      batch_size=plan.config.evaluation.batch_size,
      mesh=mesh,
    )
    for name, protocol in protocols.items()
  }
