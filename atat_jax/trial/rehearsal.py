"""Rehearsal of a run: every program that its plan names is traced, none compiled.

What a configuration can get wrong is found before the teacher is trained, and
not in the evaluation of a student that took days.
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import (
  analyses,
  attention,
  compilation,
  models,
  state,
  steps,
  train,
)
from atat_jax.attacks.autoattack import versions
from atat_jax.data import Dataset
from atat_jax.errors import UserError, in_section, shown
from atat_jax.evaluation import Protocol
from atat_jax.plan import Plan, StagePlan
from atat_jax.runs import files
from atat_jax.training import averaging, gradients
from atat_jax.typing import BatchNormMode, PyTree, Variables


def rehearse(
  plan: Plan, workdir: pathlib.Path, dataset: Dataset, mesh: Mesh
) -> None:
  """Traces the programs of a run, unless all of its networks are trained.

  Args:
    plan: Plan of the run.
    workdir: Working directory of the run.
    dataset: The data.
    mesh: The devices.

  Raises:
    UserError: A program cannot be built; the message names the field.
  """
  outlines = [
    train.make_outline(plan, stage, workdir, dataset.num_train)
    for stage in plan.stages
  ]
  if all(
    (outline.directory / files.CHECKPOINTS / str(outline.total)).is_dir()
    for outline in outlines
  ):
    return
  variables = jax.eval_shape(
    plan.model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, *plan.data.spec.image_shape), jnp.float32),
  )
  for stage, outline in zip(plan.stages, outlines, strict=True):
    with _named(stage.section):
      _trace_stage(plan, stage, outline.total, dataset, mesh, variables)
  _trace_evaluation(plan, variables)
  _trace_figures(plan, dataset, variables)


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
  """Turns whatever a trace raises into one line that names a field."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{field}: {error}") from None
  except Exception as error:  # whatever a library says of impossible numbers
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise UserError(
      f"{field}: cannot be computed ({reason}); allowed: what can be traced"
    ) from None


def _trace_stage(
  plan: Plan,
  stage: StagePlan,
  total: int,
  dataset: Dataset,
  mesh: Mesh,
  variables: Variables,
) -> None:
  """Traces the state, the step and what validations compute with batches."""
  schedule, optimizer = stage.make_optimizer(total)
  _check_rates(schedule, total)
  options = stage.make_options(total)
  fresh = jax.eval_shape(
    functools.partial(
      state.build,
      model=plan.model,
      optimizer=optimizer,
      metric_names=steps.metric_names(stage.objective),
      term_names=steps.term_names(stage.objective),
      averages=options.averages,
      guarded=options.guards,
    ),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, *plan.data.spec.image_shape), jnp.float32),
    None,
  )
  bound = train.bind(plan, stage, options, mesh)
  teacher = variables if stage.objective.needs_teacher else None
  data = jax.tree.map(_shape, train.resident(dataset))
  count = stage.batch_size - stage.num_extra
  indices = jax.ShapeDtypeStruct((count,), jnp.int32)
  extra = None
  if number := train.num_drawn(stage, dataset):
    extra = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype),
      train.example(plan),
    )
  batch = (teacher, data, indices, extra)
  after = jax.eval_shape(
    functools.partial(steps.train_step, optimizer=optimizer, **bound),
    fresh,
    *batch,
  )
  if stage.compares_terms:
    jax.eval_shape(
      functools.partial(gradients.term_ratios, **bound), after, *batch
    )
  if options.estimates:
    jax.eval_shape(
      functools.partial(averaging.move_statistics, **bound),
      after,
      *batch,
      after.batch_stats,
      after.batch_stats,
      jax.ShapeDtypeStruct((), jnp.int32),
    )


def _shape(array: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _check_rates(schedule: Any, total: int) -> None:
  """Checks that the learning rate is a number all along the run."""
  some = np.unique(np.linspace(0, total - 1, 257).astype(np.int32))
  # One program: compiled one operation at a time, a schedule takes a second.
  found = compilation.jit(
    jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32)), once=True
  )(some)
  rates = np.asarray(found, np.float64)
  wrong = ~np.isfinite(rates) | (rates < 0)
  if wrong.any():
    raise UserError(
      f"schedule: a rate of {rates[wrong][0]:g} at step {some[wrong][0] + 1} of"
      f" {total}; allowed: finite rates >= 0 (another warmup_fraction, more"
      " epochs)"
    )


def _trace_evaluation(plan: Plan, variables: Variables) -> None:
  settings = plan.evaluation
  with _named("evaluation.validation_attack"):
    _trace_protocol(plan, settings.validation, "running", variables)
  for mode in settings.batch_norm:
    for protocol in settings.protocols_of(mode):
      with _named(f"evaluation.attacks: {shown(protocol.name)}"):
        _trace_protocol(plan, protocol, mode, variables)


def _trace_protocol(
  plan: Plan, protocol: Protocol, mode: BatchNormMode, variables: Variables
) -> None:
  """Traces an attack on the network and the logits of its images."""
  spec = plan.data.spec
  size = plan.evaluation.size_of_batch(mode)
  if protocol.attack == "autoattack":
    # Its loop is the host's: the numbers are checked, its attacks are fixed.
    arguments = protocol.arguments()
    versions.make(
      arguments["version"],
      norm=arguments["norm"],
      num_classes=spec.num_classes,
      targeting=arguments.get("targeting"),
    )
    return

  def run(variables: PyTree, key: Any, images: Any, labels: Any) -> Any:
    classifier = models.classifier(plan.model, variables, batch_norm=mode)
    return classifier(protocol.run(key, classifier, images, labels))

  jax.eval_shape(
    run,
    variables,
    jax.random.key(0),
    jax.ShapeDtypeStruct((size, *spec.image_shape), jnp.float32),
    jax.ShapeDtypeStruct((size,), jnp.int32),
  )


def _trace_figures(plan: Plan, dataset: Dataset, variables: Variables) -> None:
  with in_section("figures"):
    settings = analyses.for_images(plan.figures, dataset.num_test)
  shape = plan.data.spec.image_shape
  with _named("figures.attack"):
    _trace_protocol(plan, settings.attack, "running", variables)
  with _named("figures"):
    for name in settings.analyses:
      analyses.ANALYSES[name].arguments(settings, shape)
    attention.layer_names(plan.model, variables, jnp.zeros((1, *shape)))
