"""Finished runs, grouped by training: runs that differ in the seed alone.

Numbers are merged only where all fields of the configuration but the seed are
the same.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from typing import Any

import numpy as np

from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import configuration, files, roles, tables

# Runs of one method may differ in these and are still merged. The teacher is
# that of the seed.
_SEEDS = ("seed", "teacher_workdir")
_SHIFT = "attention_shift.npz"


@dataclasses.dataclass(frozen=True)
class Run:
  """Results of one working directory.

  Attributes:
    workdir: Path of the directory, as it was given.
    method: Name of the objective.
    seed: Seed of the training.
    network: Name of the network that the run trained, in `rows`.
    training: Every other field on which the training depends.
    record: "run" of `results.json`.
    rows: Rows of `network`.
    seconds_per_step: Median over the training; None if it was not measured.
    num_steps: Number of steps of the training; None if it was not recorded.
    shift: Attention shift, see `read_shift`; None if it was not measured.
  """

  workdir: str
  method: str
  seed: int
  network: str
  training: dict[str, Any]
  record: dict[str, Any]
  rows: list[tables.Row]
  seconds_per_step: float | None
  num_steps: int | None
  shift: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one method with one training.

  Attributes:
    label: The method or its named setting, with the fields that tell it from
      its namesakes.
    method: Name of the objective.
    setting: Name in `objectives.SETTINGS`, or the method.
    runs: Runs in order of seed.
  """

  label: str
  method: str
  setting: str
  runs: list[Run]


def read(workdir: pathlib.Path) -> Run:
  """Reads a finished run.

  The network that the run has trained counts; a teacher is another run's.

  Args:
    workdir: Directory with `results.json`; `metrics.jsonl` is read if it is
      there.

  Returns:
    The run.

  Raises:
    UserError: The directory has no results of the network that it trains.
  """
  results = files.read_results(workdir, tables.SHOWN)
  if results is None:
    raise UserError(
      f"workdir: {workdir} has no results.json; allowed: finished runs, made by"
      f" `atat-jax run --config=... --workdir={workdir}`, or main.py"
    )
  record = results.get("run", {})
  config = configuration.parse(
    record.get("config") or files.read_json(workdir / files.CONFIG) or {},
    workdir,
  )
  names = {row["model"] for row in results["rows"]}
  network = roles.STUDENT if roles.STUDENT in names else config.method
  rows = [row for row in results["rows"] if row["model"] == network]
  if not rows:
    raise UserError(
      f"workdir: {workdir} has no results of {network!r}, which it trains;"
      " evaluate first, with `atat-jax evaluate --config=..."
      f" --workdir={workdir}`"
    )
  lines = files.read_metrics(workdir / files.METRICS).get("train", [])
  return Run(
    workdir=str(workdir),
    method=config.method,
    seed=config.seed,
    network=network,
    training={k: v for k, v in config.training.items() if k not in _SEEDS},
    record=record,
    rows=rows,
    seconds_per_step=_seconds_per_step(lines, config.batch_size),
    num_steps=max((line["step"] for line in lines), default=None),
    shift=read_shift(workdir, network),
  )


def read_shift(workdir: pathlib.Path, network: str) -> dict[str, Any] | None:
  """Reads how far the longest attack has moved a network's attention.

  Args:
    workdir: Directory that may have the analysis `shift`.
    network: Name of the network in it.

  Returns:
    "mean": cosine distance of the true class's maps of clean and attacked
    images, mean over "num_examples" images; "num_steps" of the attack,
    "protocol" and "layer" in words. None where there is no such file, or not of
    this network.

  Raises:
    UserError: The file is damaged.
  """
  path = workdir / _SHIFT
  arrays = files.read_arrays(path)
  if arrays is None or network not in arrays["networks"].tolist():
    return None
  rounds, means = arrays["rounds"], arrays[f"{network}_cosine_mean"]
  if (
    rounds.dtype.kind not in "iu"
    or means.dtype.kind != "f"
    or rounds.ndim != 1
    or rounds.shape != means.shape
    or not np.isfinite(means).all()
    or not len(rounds)
  ):
    raise DamagedFileError(
      f"{path}: rounds {list(rounds.shape)}, means {list(means.shape)}; allowed:"
      " a finite mean for each number of steps; delete it and evaluate again"
    )
  last = int(rounds.argmax())
  return {
    "mean": float(means[last]),
    "num_steps": int(rounds[last]),
    "num_examples": int(arrays["labels"].size),
    "protocol": str(arrays["protocol"]),
    "layer": str(arrays["layer"]),
  }


def _seconds_per_step(
  lines: list[dict[str, Any]], batch_size: int | None
) -> float | None:
  found = [line.get("images_per_second") for line in lines]
  rates = [
    rate
    for rate in found
    if isinstance(rate, int | float) and 0 < rate < math.inf
  ]
  if not rates or type(batch_size) is not int:
    return None
  return batch_size / statistics.median(rates)


def by_training(runs: list[Run]) -> list[Group]:
  """Groups runs of equal training, in the order of methods and settings.

  Args:
    runs: Finished runs in any order.

  Returns:
    Groups; methods that are not registered come last.

  Raises:
    UserError: A run is given twice.
  """
  kinds: dict[tuple[str, str], list[Run]] = {}
  for run in runs:
    kind = (run.method, json.dumps(run.training, sort_keys=True))
    kinds.setdefault(kind, []).append(run)
  for same in kinds.values():
    _check_seeds(same)
  firsts = [same[0] for same in kinds.values()]
  settings = {id(run): _setting(run) for run in firsts}
  return [
    Group(
      label=_label(
        name := settings[id(same[0])],
        same[0],
        [other for other in firsts if settings[id(other)] == name],
      ),
      method=same[0].method,
      setting=name,
      runs=sorted(same, key=lambda run: run.seed),
    )
    for same in sorted(
      kinds.values(), key=lambda same: _place(same[0], settings[id(same[0])])
    )
  ]


def _setting(run: Run) -> str:
  """Names the method of a run, or its setting; not registered ones stay."""
  from atat_jax import objectives  # slow: it imports JAX

  if run.method not in objectives.OBJECTIVES:
    return run.method
  prefix = "objective."
  fields = {
    field.removeprefix(prefix): value
    for field, value in run.training.items()
    if field.startswith(prefix)
  }
  return objectives.setting_name(run.method, fields)


def _place(run: Run, setting: str) -> tuple[int, int]:
  """Place of a run in the tables: methods, and settings of each, in order."""
  from atat_jax import objectives

  methods, settings = [*objectives.OBJECTIVES], [*objectives.SETTINGS]
  return (
    methods.index(run.method) if run.method in methods else len(methods),
    settings.index(setting) if setting in settings else -1,
  )


def _check_seeds(same: list[Run]) -> None:
  """Checks that runs of one training have different seeds."""
  seeds: dict[int, Run] = {}
  for run in same:
    other = seeds.setdefault(run.seed, run)
    if other is not run:
      raise UserError(
        f"workdir: {run.workdir} is the same training as {other.workdir},"
        f" seed {run.seed} included; allowed: each run once, other seeds"
      )


def _label(name: str, run: Run, namesakes: list[Run]) -> str:
  marks = [
    f"{field.removeprefix('objective.')}={_text(run.training.get(field))}"
    for field in _differing(namesakes)
  ]
  return f"{name} ({', '.join(marks)})" if marks else name


def _differing(runs: list[Run]) -> list[str]:
  """Fields in which trainings differ; a field that one lacks is one of them."""
  fields = dict.fromkeys(field for run in runs for field in run.training)
  return [
    field
    for field in fields
    if len({_text(run.training.get(field)) for run in runs}) > 1
  ]


def differing_fields(groups: list[Group]) -> dict[str, dict[str, str]]:
  """Returns {field: {label: value}} of fields that differ; "–": not there."""
  firsts = [group.runs[0] for group in groups]
  return {
    field: {
      group.label: _text(group.runs[0].training.get(field, "–"))
      for group in groups
    }
    for field in sorted(_differing(firsts))
    if field != "method"
  }


def shared_fields(groups: list[Group]) -> dict[str, str]:
  """Returns {field: value} of the fields that all trainings share."""
  firsts = [group.runs[0] for group in groups]
  other = _differing(firsts)
  return {
    field: _text(value)
    for field, value in sorted(firsts[0].training.items())
    if field not in other and field != "method"
  }


def _text(value: object) -> str:
  return "none" if value is None else str(value)
