"""From a configuration to objects: the only place that knows its fields.

Everything here is checked before data are loaded or anything is compiled.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from atat_jax import (
  analyses,
  attention,
  checkpoints,
  checks,
  data,
  evaluation,
  models,
  objectives,
  optim,
)
from atat_jax.data import mixing
from atat_jax.data.base import DatasetSpec
from atat_jax.errors import UserError
from atat_jax.evaluation import Protocol
from atat_jax.runs import training_fields
from atat_jax.training import writer
from atat_jax.training.options import Options


class Plan(NamedTuple):
  """A checked configuration.

  Attributes:
    config: The configuration itself.
    spec: Of the data set.
    model: The network.
    model_spec: The same as JSON.
    objective: What the student minimises.
    validation: What checkpoints are chosen by.
    protocols: What the test split is evaluated under.
    figures: What the analyses behind the pictures are computed with.
  """

  config: ConfigDict
  spec: DatasetSpec
  model: nn.Module
  model_spec: dict[str, Any]
  objective: objectives.Objective
  validation: Protocol
  protocols: tuple[Protocol, ...]
  figures: analyses.FigureSettings


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
  return {
    key: tuple(value) if isinstance(value, list | tuple) else value
    for key, value in fields.items()
  }


def make_plan(config: ConfigDict) -> Plan:
  """Checks every field that can be checked without data.

  Args:
    config: As `configs/default.py` makes it.

  Returns:
    The plan.

  Raises:
    UserError: A value out of range, named.
  """
  spec = data.spec(config.data.name)
  for field, seed in (
    ("seed", config.seed),
    ("evaluation.seed", config.evaluation.seed),
  ):
    if not 0 <= seed < 2**31:
      raise UserError(f"{field}: {seed}; allowed: 0 to {2**31 - 1}")
  fields = _tuples(config.model)
  name = fields.pop("name")
  if fields.get("normalization") == "dataset":
    fields |= {"mean": spec.mean, "std": spec.std}
  checks.choice("model.dtype", fields["dtype"], ("float32", "bfloat16"))
  # Fields that only another network has say nothing of this one.
  known = models.field_names(name)
  fields = {key: value for key, value in fields.items() if key in known}
  model = models.create(name, num_classes=spec.num_classes, **fields)
  checks.choice("method", config.method, objectives.OBJECTIVES)
  with in_section("objective"):
    objective = objectives.create(config.method, **_tuples(config.objective))
  _check_layers(config.objective.get("layers", ()), model, spec)
  checks.positive(
    "data.validation_size", config.data.validation_size, integer=True
  )
  if config.data.padding < 0:
    raise UserError(f"data.padding: {config.data.padding}; allowed: >= 0")
  with in_section("data"):
    mixing.check(config.data.mix, config.data.mix_alpha)
  if not 0 < config.data.extra_fraction < 1:
    raise UserError(
      f"data.extra_fraction: {config.data.extra_fraction}; allowed: between 0"
      " and 1"
    )
  for section in ("train", "teacher"):
    _check_training(config, section)
  steps = tuple(config.profile_steps)
  if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
    raise UserError(
      f"profile_steps: {steps}; allowed: (), or a first and a last step, from 1"
    )
  settings = config.evaluation
  for field in ("batch_size", "batch_statistics_size"):
    checks.positive(f"evaluation.{field}", settings[field], integer=True)
  if settings.num_examples < 0:
    raise UserError(
      f"evaluation.num_examples: {settings.num_examples}; allowed: >= 0"
    )
  if not settings.batch_norm:
    raise UserError("evaluation.batch_norm: (); allowed: running, batch")
  for mode in settings.batch_norm:
    checks.choice("evaluation.batch_norm", mode, ("running", "batch"))
  numbers = {
    "epsilon": settings.epsilon,
    "step_size": settings.step_size,
    "norm": settings.norm,
  }
  with in_section("evaluation"):
    validation = evaluation.parse(settings.validation_attack, **numbers)
    protocols = evaluation.parse_list(
      settings.attacks, num_restarts=settings.num_restarts, **numbers
    )
  with in_section("figures"):
    figures = _tuples(config.figures)
    figures |= {
      "analyses": analyses.parse(figures["analyses"]),
      "attack": evaluation.parse(figures["attack"], **numbers),
    }
    made = analyses.FigureSettings(
      batch_size=settings.batch_size, seed=settings.seed, **numbers, **figures
    )
  return Plan(
    config=config,
    spec=spec,
    model=model,
    model_spec=checkpoints.model_spec(name, model, spec.image_shape),
    objective=objective,
    validation=validation,
    protocols=protocols,
    figures=made,
  )


def _check_layers(
  layers: Sequence[str], model: nn.Module, spec: DatasetSpec
) -> None:
  if not layers:
    return
  images = jnp.zeros((1, *spec.image_shape))
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  names = attention.layer_names(model, variables, images)
  with in_section("objective"):
    attention.check_layers(layers, names)


@contextlib.contextmanager
def in_section(name: str) -> Iterator[None]:
  """Puts the section before the field that an error names."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{name}.{error}") from None


def _check_training(config: ConfigDict, section: str) -> None:
  settings = config[section]
  for field in (
    "num_epochs",
    "batch_size",
    "log_every_steps",
    "steps_per_dispatch",
  ):
    checks.positive(f"{section}.{field}", settings[field], integer=True)
  checks.positive(
    f"{section}.validate_every_epochs", settings.validate_every_epochs
  )
  with in_section(section):
    make_optimizer(settings, total_steps=1000)
    make_options(config, section, total_steps=1000)
    num_extra(config, section)
    if settings.batch_size % settings.accumulate_steps:
      raise UserError(
        f"accumulate_steps: {settings.accumulate_steps}; allowed: what divides"
        f" batch_size, {settings.batch_size}"
      )


def make_options(config: ConfigDict, section: str, total_steps: int) -> Options:
  """The options of `config.train` or `config.teacher`, times in steps."""
  settings = config[section]

  def steps(field: str) -> int:
    share = settings[field]
    if not 0 <= share < 1:
      raise UserError(f"{field}: {share}; allowed: a share of the run, [0, 1)")
    # At least one, as 0 steps mean that there is no such thing.
    return max(1, round(share * total_steps)) if share else 0

  return Options(
    awp_gamma=settings.awp_gamma,
    awp_start=steps("awp_start"),
    ema_decay=settings.ema_decay,
    swa_start=steps("swa_start"),
    statistics_batches=settings.statistics_batches,
    label_smoothing=settings.label_smoothing,
    epsilon_warmup=steps("epsilon_warmup"),
    accumulate_steps=settings.accumulate_steps,
    remat=settings.remat,
    mix=config.data.mix,
    mix_alpha=config.data.mix_alpha,
  )


def num_extra(config: ConfigDict, section: str) -> int:
  """Extra images in a batch of `config.train` or `config.teacher`."""
  if not config.data.extra:
    return 0
  size = config[section].batch_size
  number = round(config.data.extra_fraction * size)
  if not 0 < number < size:
    raise UserError(
      f"batch_size: {size}; allowed: with data.extra_fraction ="
      f" {config.data.extra_fraction} what leaves room for both kinds of images"
    )
  return number


def make_optimizer(
  settings: ConfigDict, total_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """The schedule and the optimizer of `config.train` or `config.teacher`."""
  if not all(
    isinstance(share, int | float) and 0 < share < 1
    for share in settings.boundaries
  ):
    raise UserError(
      f"boundaries: {tuple(settings.boundaries)}; allowed: shares of the run"
      " between 0 and 1"
    )
  schedule = optim.make_schedule(
    settings.schedule,
    learning_rate=settings.learning_rate,
    total_steps=total_steps,
    boundaries=sorted(
      {max(1, round(share * total_steps)) for share in settings.boundaries}
    ),
    factor=settings.factor,
    warmup_fraction=settings.warmup_fraction,
  )
  return schedule, optim.make_optimizer(
    schedule,
    momentum=settings.momentum,
    nesterov=settings.nesterov,
    weight_decay=settings.weight_decay,
    clip_norm=settings.clip_norm,
  )


def as_json(config: ConfigDict) -> dict[str, Any]:
  """Plain JSON values: tuples become lists."""
  return json.loads(json.dumps(config.to_dict()))


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks that a run in `workdir` is of the same training. Writes nothing.

  Args:
    config: The configuration.
    workdir: The run's directory.

  Raises:
    UserError: The directory holds a run with another training.
  """
  path = workdir / "config.json"
  if not path.exists():
    return
  try:
    found = training_fields.of(json.loads(path.read_text(encoding="utf-8")))
  except json.JSONDecodeError as error:
    raise UserError(f"{path}: not JSON ({error})") from None
  for field, value in training_fields.of(as_json(config)).items():
    if found.get(field) != value:
      raise UserError(
        f"config.{field}: {value!r}, but {workdir} holds a run with"
        f" {found.get(field)!r}; use that or another --workdir"
      )


def write_config(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Writes `config.json`.

  Raises:
    UserError: The directory cannot be written.
  """
  try:
    writer.write_json(workdir / "config.json", as_json(config))
  except OSError as error:
    raise UserError(f"workdir: {workdir}: {error.strerror}") from None
