"""Turns a configuration into a plan: the only reader of a configuration."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
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
from atat_jax import fields as typed
from atat_jax.errors import UserError, in_section
from atat_jax.objectives import Objective
from atat_jax.plan import DataPlan, EvaluationPlan, Plan, StagePlan, check_seed
from atat_jax.runs import locations, roles

Fields = dict[str, Any]

TEACHER_SEED = 1_000_003
"""Added to a run's seed for its teacher: a student must not repeat its draws."""

# Fields whose None reaches us as text: their type on the command line is str.
_NONE = (
  ("data", "dir"),
  ("data", "cache_dir"),
  ("data", "extra"),
  ("teacher_workdir",),
)
_TEXTS = ("method", "recipe")
_SECTIONS = (
  "data",
  "model",
  "objective",
  "train",
  "teacher",
  "evaluation",
  "figures",
)
_LEAF = bool | int | float | str | tuple[int, ...] | tuple[float, ...] | None
_EVALUATION: dict[str, Any] = {
  "validation_attack": str,
  "attacks": str,
  "norm": str,
  "epsilon": float,
  "step_size": float,
  "num_restarts": int,
  "batch_norm": tuple[str, ...],
  "batch_size": int,
  "batch_statistics_size": int,
  "num_examples": int,
  "seed": int,
  "teacher": bool,
  "corruptions": str,
}
# Numbers of attacks that have a field of their own.
_SHARED = ("epsilon", "step_size", "norm", "num_restarts")
_FIELDS = (
  *_SECTIONS,
  *_TEXTS,
  "seed",
  "profile_steps",
  "model_axis",
  "teacher_workdir",
)

MEANINGS = {
  "seed": "Seed of a run: initial weights, batches and attacks.",
  "method": "Training method, chosen behind the colon of --config.",
  "recipe": "Note of the recipe that was chosen behind the colon of --config.",
  "profile_steps": "First and last step of a profile; (): no profile.",
  "model_axis": "Number of devices that share the large arrays of a training"
  " state, for memory; 1: each has all.",
  "teacher_workdir": "Finished run to take the teacher from; None: train one.",
  "model.name": "Network, a name in `models.MODELS`.",
  "evaluation.validation_attack": "Attack that chooses checkpoints.",
  "evaluation.attacks": "Attacks of the table, names between commas.",
  "evaluation.norm": "Norm of the ball.",
  "evaluation.epsilon": "Radius of the attacks, pixels in [0, 1].",
  "evaluation.step_size": "Length of a step, in the same unit.",
  "evaluation.num_restarts": "Number of restarts of PGD.",
}
"""Fields that no dataclass of the plan describes."""

# Larger numbers would fill the memory, or draw pictures that no program opens.
_LARGEST = {
  ("evaluation", "batch_size"): 65_536,
  ("evaluation", "batch_statistics_size"): 65_536,
  ("figures", "num_images"): 200,
  ("figures", "num_followed"): 200,
  ("figures", "num_points"): 1001,
  ("figures", "num_steps"): 100_000,
  ("model", "depth"): 2000,
}


def make_plan(config: ConfigDict) -> Plan:
  """Turns a configuration into a plan and checks all that needs no data.

  Args:
    config: Configuration with the fields of `configs/default.py`.

  Returns:
    The plan.

  Raises:
    UserError: A field is missing or unknown, of another type, or out of range;
      the message names it.
  """
  fields = _read(config)
  check_seed("seed", fields["seed"])
  with in_section("data"):
    data_plan = typed.make(DataPlan, fields["data"])
  model, model_spec = _make_model(fields["model"], data_plan.spec)
  checks.choice("method", fields["method"], objectives.OBJECTIVES)
  with in_section("objective"):
    typed.check_names(
      fields["objective"],
      objectives.defaults(fields["method"]),
      required=objectives.defaults(fields["method"]),
    )
    objective = objectives.create(fields["method"], **fields["objective"])
  _check_groups(model, objective)
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
    model_axis=fields["model_axis"],
    record=_record(config),
  )


def _check_groups(model: nn.Module, objective: Objective) -> None:
  """Refuses groups of BatchNorm that would part clean from attacked images."""
  size = getattr(model, "batch_norm_group_size", 0)
  if size and getattr(objective, "student_batch_norm", "") == "mixture":
    raise UserError(
      f"model.batch_norm_group_size: {size}; allowed: 0 with"
      " objective.student_batch_norm='mixture', whose statistics are those of"
      " clean and attacked images together"
    )


def _read(config: ConfigDict) -> Fields:
  """Reads all fields; checks their names and the types that no class checks."""
  fields: Fields = {key: _plain(value) for key, value in config.items()}
  typed.check_names(fields, _FIELDS, required=_FIELDS)
  for section in _SECTIONS:
    if not isinstance(fields[section], dict):
      raise UserError(
        f"{section}: {typed.shown(fields[section])}; allowed: a section of fields"
      )
    for name, value in fields[section].items():
      _check_length(f"{section}.{name}", value)
  _check_length("seed", fields["seed"])
  _forget_none(fields)
  for name in _TEXTS:
    if not isinstance(fields[name], str):
      raise UserError(f"{name}: {typed.shown(fields[name])}; allowed: text")
  typed.check_value("seed", int, fields["seed"])
  typed.check_value("teacher_workdir", str | None, fields["teacher_workdir"])
  typed.check_value("profile_steps", tuple[int, ...], fields["profile_steps"])
  typed.check_value("model_axis", int, fields["model_axis"])
  for (section, name), largest in _LARGEST.items():
    value = fields[section].get(name)
    if isinstance(value, int) and value > largest:
      raise UserError(
        f"{section}.{name}: {typed.shown(value)}; allowed: at most {largest}"
      )
  return fields


def _check_length(name: str, value: Any) -> None:
  """Refuses an integer that Python would not even print in a message."""
  for one in value if isinstance(value, tuple) else (value,):
    if isinstance(one, int) and abs(one) >= 2**64:
      typed.check_value(name, int, one)


def _forget_none(tree: Fields) -> None:
  """Takes the text None, in the fields that may be None, for what it says."""
  for *sections, name in _NONE:
    fields = tree
    for section in sections:
      fields = fields[section]
    value = fields.get(name)
    if isinstance(value, str) and value.lower() in ("none", ""):
      fields[name] = None


def _record(config: ConfigDict) -> Fields:
  """The configuration as plain JSON."""
  record: Fields = json.loads(config.to_json())
  _forget_none(record)
  return record


def _plain(value: Any) -> Any:
  """A section as a dict, every sequence in it as a tuple."""
  if isinstance(value, ConfigDict | Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_plain(item) for item in value)
  return value


def _make_model(
  fields: Fields, spec: data.DatasetSpec
) -> tuple[nn.Module, dict[str, Any]]:
  """Makes the network for a data set, and its description as JSON."""
  with in_section("model"):
    typed.check_names(fields, _model_fields(), ("name", "dtype"))
    name = fields["name"]
    typed.check_value("name", str, name)
    checks.choice("name", name, models.MODELS)
    checks.choice("dtype", fields["dtype"], ("float32", "bfloat16"))
  if fields.get("normalization") == "dataset":
    fields = fields | {"mean": spec.mean, "std": spec.std}
  # Learnt positions are those of square images.
  fields = fields | {"image_size": spec.image_shape[0]}
  # A network ignores the fields that only others have.
  known = models.field_names(name)
  given = {key: value for key, value in fields.items() if key in known}
  with in_section("model"):
    for field in fields.keys() - given.keys() - {"mean", "std", "image_size"}:
      typed.check_value(field, _LEAF, fields[field])
    typed.check_values(models.MODELS[name], given, bits=False)
    model = models.create(name, num_classes=spec.num_classes, **given)
    typed.check_values(models.MODELS[name], given)
  return model, checkpoints.model_spec(name, model, spec.image_shape)


def _model_fields() -> set[str]:
  """Names of the fields that `config.model` may have."""
  derived = {"num_classes", "mean", "std", "image_size"}
  known = {
    field for name in models.MODELS for field in models.field_names(name)
  }
  return {"name", *known} - derived


def _teacher_directory(fields: Fields) -> pathlib.Path:
  if fields["teacher_workdir"]:
    path = locations.find("teacher_workdir", fields["teacher_workdir"])
    return path if locations.is_remote(path) else path.absolute()
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
    seed=fields["seed"] + TEACHER_SEED,
  )
  if objective.needs_teacher and not fields["teacher_workdir"]:
    return teacher, student
  return (student,)


def _make_stage(
  fields: Fields, section: str, data_plan: DataPlan, **identity: Any
) -> StagePlan:
  numbers = fields[section]
  with in_section(section):
    return typed.make(
      StagePlan,
      numbers,
      section=section,
      num_extra=data_plan.num_extra(numbers.get("batch_size", 1)),
      mix=data_plan.mix,
      mix_alpha=data_plan.mix_alpha,
      **identity,
    )


def _attack(fields: Fields) -> Fields:
  """The numbers that every attack of the evaluation shares."""
  return {name: fields[name] for name in ("epsilon", "step_size", "norm")}


def _make_evaluation(fields: Fields) -> EvaluationPlan:
  with in_section("evaluation"):
    _check_section(fields, _EVALUATION, bits=False)
    attack = _attack(fields)
    made = EvaluationPlan(
      validation=_parsed(
        "validation_attack", evaluation.parse, fields, **attack
      ),
      protocols=_parsed(
        "attacks",
        evaluation.parse_list,
        fields,
        num_restarts=fields["num_restarts"],
        **attack,
      ),
      batch_norm=fields["batch_norm"],
      batch_size=fields["batch_size"],
      batch_statistics_size=fields["batch_statistics_size"],
      num_examples=fields["num_examples"],
      seed=fields["seed"],
      teacher=fields["teacher"],
      corruptions=fields["corruptions"],
    )
    _check_section(fields, _EVALUATION, bits=True)
    return made


def _make_figures(fields: Fields, evaluated: Fields) -> analyses.FigureSettings:
  """Makes the settings of the analyses, with the attack of the evaluation."""
  attack = _attack(evaluated)
  shared = {**attack, "batch_size": 0, "seed": 0}
  kinds = {
    field.name: field.type
    for field in dataclasses.fields(analyses.FigureSettings)
    if field.name not in shared
  } | {"analyses": str, "attack": str}
  with in_section("figures"):
    _check_section(fields, kinds, bits=False)
    given = fields | {
      "analyses": analyses.parse(fields["analyses"]),
      "attack": _parsed("attack", evaluation.parse, fields, **attack),
    }
    made = analyses.FigureSettings(
      batch_size=evaluated["batch_size"],
      seed=evaluated["seed"],
      **attack,
      **given,
    )
    _check_section(fields, kinds, bits=True)
    return made


def _parsed(
  field: str, parse: Callable[..., Any], fields: Fields, **numbers: Any
) -> Any:
  """Parses the names of attacks in a field, which a message then names."""
  try:
    return parse(fields[field], **numbers)
  except UserError as error:
    named, _, rest = str(error).partition(": ")
    if named in (field, *_SHARED):
      raise
    text = rest if named == "attack" else str(error)
    raise UserError(f"{field}: {text}") from None


def _check_section(
  given: Fields, kinds: Mapping[str, Any], *, bits: bool
) -> None:
  """Checks a section whose fields are not those of one dataclass."""
  typed.check_names(given, kinds, required=kinds)
  for name, kind in kinds.items():
    typed.check_value(name, kind, given[name], bits=bits)
