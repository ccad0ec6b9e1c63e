"""Turns a configuration into a plan: the only reader of a configuration."""

import json
import pathlib
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from atat_jax import (
  analyses,
  checkpoints,
  checks,
  data,
  evaluation,
  models,
  objectives,
)
from atat_jax.errors import in_section
from atat_jax.objectives import Objective
from atat_jax.plan import DataPlan, EvaluationPlan, Plan, StagePlan, check_seed
from atat_jax.runs import roles

Fields = dict[str, Any]

# The student must not repeat the teacher's batches.
_TEACHER_SEED = 1_000_003


def make_plan(config: ConfigDict) -> Plan:
  """Turns a configuration into a plan and checks all that needs no data.

  Args:
    config: Configuration with the fields of `configs/default.py`.

  Returns:
    The plan.

  Raises:
    UserError: A value is out of range; the message names its field.
  """
  fields: Fields = {key: _plain(value) for key, value in config.items()}
  check_seed("seed", fields["seed"])
  with in_section("data"):
    data_plan = DataPlan(**fields["data"])
  model, model_spec = _make_model(fields["model"], data_plan.spec)
  checks.choice("method", fields["method"], objectives.OBJECTIVES)
  with in_section("objective"):
    objective = objectives.create(fields["method"], **fields["objective"])
  teacher = _teacher_directory(fields) if objective.needs_teacher else None
  return Plan(
    data=data_plan,
    model=model,
    model_spec=model_spec,
    stages=_make_stages(fields, data_plan, objective),
    teacher=teacher,
    evaluation=_make_evaluation(fields["evaluation"]),
    figures=_make_figures(fields["figures"], fields["evaluation"]),
    profile_steps=fields["profile_steps"],
    record=json.loads(config.to_json()),
  )


def _plain(value: Any) -> Any:
  """A section as a dict, every sequence in it as a tuple."""
  if isinstance(value, ConfigDict):
    return {key: _plain(item) for key, item in value.items()}
  return tuple(value) if isinstance(value, list | tuple) else value


def _make_model(
  fields: Fields, spec: data.DatasetSpec
) -> tuple[nn.Module, dict[str, Any]]:
  """Makes the network for a data set, and its description as JSON."""
  name = fields["name"]
  checks.choice("model.dtype", fields["dtype"], ("float32", "bfloat16"))
  if fields["normalization"] == "dataset":
    fields = fields | {"mean": spec.mean, "std": spec.std}
  # A network ignores the fields that only others have.
  known = models.field_names(name)
  given = {key: value for key, value in fields.items() if key in known}
  model = models.create(name, num_classes=spec.num_classes, **given)
  return model, checkpoints.model_spec(name, model, spec.image_shape)


def _teacher_directory(fields: Fields) -> pathlib.Path:
  if fields["teacher_workdir"]:
    return pathlib.Path(fields["teacher_workdir"]).absolute()
  return pathlib.Path(roles.TEACHER)


def _make_stages(
  fields: Fields, data_plan: DataPlan, objective: Objective
) -> tuple[StagePlan, ...]:
  """Makes the stages; the teacher's numbers are checked in any case."""
  student = _make_stage(
    fields,
    "train",
    data_plan,
    name=roles.STUDENT if objective.needs_teacher else fields["method"],
    directory=pathlib.Path(),
    objective=objective,
    seed=fields["seed"],
  )
  teacher = _make_stage(
    fields,
    "teacher",
    data_plan,
    name=roles.TEACHER,
    directory=pathlib.Path(roles.TEACHER),
    objective=objectives.create("standard"),
    seed=fields["seed"] + _TEACHER_SEED,
  )
  if objective.needs_teacher and not fields["teacher_workdir"]:
    return teacher, student
  return (student,)


def _make_stage(
  fields: Fields, section: str, data_plan: DataPlan, **identity: Any
) -> StagePlan:
  numbers = fields[section]
  with in_section(section):
    return StagePlan(
      section=section,
      num_extra=data_plan.num_extra(numbers["batch_size"]),
      mix=data_plan.mix,
      mix_alpha=data_plan.mix_alpha,
      **numbers,
      **identity,
    )


def _attack(fields: Fields) -> Fields:
  """The numbers that every attack of the evaluation shares."""
  return {name: fields[name] for name in ("epsilon", "step_size", "norm")}


def _make_evaluation(fields: Fields) -> EvaluationPlan:
  attack = _attack(fields)
  with in_section("evaluation"):
    return EvaluationPlan(
      validation=evaluation.parse(fields["validation_attack"], **attack),
      protocols=evaluation.parse_list(
        fields["attacks"], num_restarts=fields["num_restarts"], **attack
      ),
      batch_norm=fields["batch_norm"],
      batch_size=fields["batch_size"],
      batch_statistics_size=fields["batch_statistics_size"],
      num_examples=fields["num_examples"],
      seed=fields["seed"],
    )


def _make_figures(fields: Fields, evaluated: Fields) -> analyses.FigureSettings:
  """Makes the settings of the analyses, with the attack of the evaluation."""
  attack = _attack(evaluated)
  with in_section("figures"):
    given = fields | {
      "analyses": analyses.parse(fields["analyses"]),
      "attack": evaluation.parse(fields["attack"], **attack),
    }
    return analyses.FigureSettings(
      batch_size=evaluated["batch_size"],
      seed=evaluated["seed"],
      **attack,
      **given,
    )
