"""Results of several runs as one: runs that differ in the seed alone are one.

Numbers are merged only where both the training (all fields of the
configuration but the seed) and the protocol of the evaluation are the same.
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.report import published
from atat_jax.runs import configuration, files, tables

METHODS = (
  "standard",
  "at",
  "alp",
  "tla",
  "trades",
  "mart",
  "atat",
  "atat_released",
)
"""The order of the rows: the paper's, its peers in between, others after."""

# The time of a step is told relative to this method's.
_REFERENCE = "at"

# Runs of one method may differ in these and are still merged. The teacher is
# that of the seed.
_SEEDS = ("seed", "teacher_workdir")

# With running statistics the size of a batch changes nothing.
FIELDS = (*tables.COLUMN_FIELDS, "batch_size")


@dataclasses.dataclass(frozen=True)
class Run:
  """What one working directory holds.

  Attributes:
    workdir: As it was given.
    method: Its objective.
    seed: Of its training.
    network: Name of the network that it trained, in `rows`.
    training: Every other field that the training depends on.
    record: `run` of `results.json`.
    rows: Of `network` alone.
    seconds_per_step: Median over its training; None if it was not measured.
  """

  workdir: str
  method: str
  seed: int
  network: str
  training: dict[str, Any]
  record: dict[str, Any]
  rows: list[tables.Row]
  seconds_per_step: float | None


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one method with one training.

  Attributes:
    label: The method, and what tells it from its namesakes if any.
    method: The method.
    runs: By seed.
  """

  label: str
  method: str
  runs: list[Run]


def compare(workdirs: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
  """Merges finished runs.

  The network that a run has trained counts; a teacher is another run's.

  Args:
    workdirs: Directories with `results.json`; `metrics.jsonl` is read if it is
      there.

  Returns:
    What `comparison.json` holds: "format" 1; "source" of the published
    figures; "runs", a fact sheet each; "rows" as in `results.json`, with the
    mean as "accuracy", "standard_error" (None for one run), "num_runs",
    "accuracies" by seed, "published", and with batch statistics "difference" to
    running statistics; "missing", a sentence for each run and column without a
    number; "training", the fields in which the methods differ; "costs".

  Raises:
    UserError: A directory without results, a run that is given twice.
  """
  if not workdirs:
    raise UserError("workdirs: none; allowed: directories of finished runs")
  groups = _group([_read(pathlib.Path(workdir)) for workdir in workdirs])
  rows = [row for group in groups for row in _merge(group)]
  _add_differences(rows)
  _complete_attacks(rows)
  return {
    "format": 1,
    "source": published.SOURCE,
    "runs": [_facts(group, run) for group in groups for run in group.runs],
    "rows": rows,
    "missing": _missing(groups, rows),
    "training": _differing_fields(groups),
    "costs": _costs(groups),
  }


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
  """Mean and its standard error, the latter None for a single value."""
  numbers = list(values)
  mean = statistics.fmean(numbers)
  if len(numbers) < 2:
    return mean, None
  return mean, statistics.stdev(numbers) / math.sqrt(len(numbers))


def _read(workdir: pathlib.Path) -> Run:
  results = files.read_results(workdir)
  if results is None:
    raise UserError(
      f"workdir: {workdir} has no results.json; allowed: finished runs, made by"
      f" `python main.py --config=... --workdir={workdir}`"
    )
  record = results.get("run", {})
  config = configuration.parse(
    record.get("config") or files.read_json(workdir / "config.json") or {},
    workdir,
  )
  names = {row["model"] for row in results["rows"]}
  network = "student" if "student" in names else config.method
  rows = [row for row in results["rows"] if row["model"] == network]
  if not rows:
    raise UserError(
      f"workdir: {workdir} has no results of {network!r}, which it trains;"
      " evaluate first, with `python main.py --mode=evaluate --config=..."
      f" --workdir={workdir}`"
    )
  return Run(
    workdir=str(workdir),
    method=config.method,
    seed=config.seed,
    network=network,
    training={k: v for k, v in config.training.items() if k not in _SEEDS},
    record=record,
    rows=rows,
    seconds_per_step=_seconds_per_step(workdir, config.batch_size),
  )


def _seconds_per_step(
  workdir: pathlib.Path, batch_size: int | None
) -> float | None:
  lines = files.read_metrics(workdir / "metrics.jsonl").get("train", [])
  rates = [
    line["images_per_second"] for line in lines if line.get("images_per_second")
  ]
  if not rates or not batch_size:
    return None
  return batch_size / statistics.median(rates)


def _group(runs: list[Run]) -> list[Group]:
  """Groups of equal training, in the order of the table."""
  kinds: dict[tuple[str, str], list[Run]] = {}
  for run in runs:
    kind = (run.method, json.dumps(run.training, sort_keys=True))
    kinds.setdefault(kind, []).append(run)
  for same in kinds.values():
    seeds: dict[int, Run] = {}
    for run in same:
      other = seeds.setdefault(run.seed, run)
      if other is not run:
        raise UserError(
          f"workdir: {run.workdir} is the same training as {other.workdir},"
          f" seed {run.seed} included; allowed: each run once, other seeds"
        )
  known = {name: place for place, name in enumerate(METHODS)}
  return [
    Group(
      label=_label(same[0], [other[0] for other in kinds.values()]),
      method=method,
      runs=sorted(same, key=lambda run: run.seed),
    )
    for (method, _), same in sorted(
      kinds.items(), key=lambda item: known.get(item[0][0], len(known))
    )
  ]


def _label(run: Run, firsts: list[Run]) -> str:
  namesakes = [other for other in firsts if other.method == run.method]
  marks = [
    f"{field.removeprefix('objective.')}={_text(run.training.get(field))}"
    for field in _differing(namesakes)
  ]
  return f"{run.method} ({', '.join(marks)})" if marks else run.method


def _differing(runs: list[Run]) -> list[str]:
  """Fields in which trainings differ, a field that one lacks included."""
  fields = dict.fromkeys(field for run in runs for field in run.training)
  return [
    field
    for field in fields
    if len({_text(run.training.get(field)) for run in runs}) > 1
  ]


def _text(value: object) -> str:
  return "none" if value is None else str(value)


def _identity(row: tables.Row) -> tuple[Any, ...]:
  """What rows agree on that may be merged."""
  kind = [row.get(field) for field in tables.COLUMN_FIELDS]
  kind.append(json.dumps(row.get("options", {}), sort_keys=True))
  batch_size = row.get("batch_size") if row["batch_norm"] == "batch" else None
  return (*kind, row["batch_norm"], batch_size)


def _merge(group: Group) -> list[tables.Row]:
  """A row for each protocol under which any run of the group was evaluated."""
  cells: dict[tuple[Any, ...], dict[int, tables.Row]] = {}
  for run in group.runs:
    for row in run.rows:
      cells.setdefault(_identity(row), {})[run.seed] = row
  return [_merged(group, by_seed) for by_seed in cells.values()]


def _merged(group: Group, by_seed: dict[int, tables.Row]) -> tables.Row:
  first = next(iter(by_seed.values()))
  mean, error = mean_and_error(row["accuracy"] for row in by_seed.values())
  merged = {
    "model": group.label,
    "method": group.method,
    **{field: first.get(field) for field in tables.COLUMN_FIELDS},
    "batch_norm": first["batch_norm"],
    "batch_size": (
      first.get("batch_size") if first["batch_norm"] == "batch" else None
    ),
    "accuracy": mean,
    "standard_error": error,
    "num_runs": len(by_seed),
    "accuracies": {str(seed): r["accuracy"] for seed, r in by_seed.items()},
    "published": published.accuracy(group.method, first),
  }
  if first.get("options"):
    merged["options"] = first["options"]
  if first.get("attacks"):  # of AutoAttack; their numbers, for the protocol
    merged["attacks"] = max(
      (
        [
          {key: attack[key] for key in ("attack", "numbers")}
          for attack in row["attacks"]
        ]
        for row in by_seed.values()
      ),
      key=len,
    )
  return merged


def _add_differences(rows: list[tables.Row]) -> None:
  """To rows with batch statistics: by how much they differ, seed by seed."""

  def partners(row: tables.Row) -> tuple[Any, ...]:
    return (row["model"], *(row.get(field) for field in tables.COLUMN_FIELDS))

  running = {
    partners(row): row["accuracies"]
    for row in rows
    if row["batch_norm"] == "running"
  }
  for row in rows:
    if row["batch_norm"] != "batch":
      continue
    fixed = running.get(partners(row), {})
    gaps = [
      accuracy - fixed[seed]
      for seed, accuracy in row["accuracies"].items()
      if seed in fixed
    ]
    if gaps:
      mean, error = mean_and_error(gaps)
      row["difference"] = {
        "accuracy": mean,
        "standard_error": error,
        "num_runs": len(gaps),
      }


def _complete_attacks(rows: list[tables.Row]) -> None:
  """Where AutoAttack ended early, with nobody left, its later attacks too."""
  longest: dict[tuple[Any, ...], list[Any]] = {}
  for row in rows:
    if len(row.get("attacks", ())) > len(longest.get(_identity(row), ())):
      longest[_identity(row)] = row["attacks"]
  for row in rows:
    if _identity(row) in longest:
      row["attacks"] = longest[_identity(row)]


def _missing(groups: list[Group], rows: list[tables.Row]) -> list[str]:
  """Who lacks which column of its data set."""
  sentences = []
  for group in groups:
    for run in group.runs:
      own = {_identity(row) for row in run.rows}
      datasets = {row["dataset"] for row in run.rows}
      for mode in tables.BATCH_NORMS:
        shown = [
          row
          for row in rows
          if row["batch_norm"] == mode and row["dataset"] in datasets
        ]
        lacking = [
          column.label
          for column in tables.in_paper_order(tables.columns(shown, FIELDS))
          if not own & {_identity(row) for row in column.rows.values()}
        ]
        if lacking:
          sentences.append(
            f"{run.workdir} ({group.label}, seed {run.seed}) has no"
            f" {', '.join(lacking)} with {tables.BATCH_NORM_NAMES[mode]}."
          )
  return sentences


def _facts(group: Group, run: Run) -> dict[str, Any]:
  network = {
    field.removeprefix("model."): value
    for field, value in run.training.items()
    if field.startswith("model.")
  }
  size = "-".join(str(network[k]) for k in ("depth", "width") if k in network)
  point = run.record.get("checkpoints", {}).get(run.network, {})
  return {
    "label": group.label,
    "seed": run.seed,
    "workdir": run.workdir,
    "network": f"{network.get('name', 'unknown')} {size}".rstrip(),
    "checkpoint_step": point.get("step"),
    "commit": run.record.get("commit"),
    "date": run.record.get("date"),
    "devices": run.record.get("devices", []),
    "versions": run.record.get("versions", {}),
  }


def _differing_fields(groups: list[Group]) -> dict[str, dict[str, str]]:
  """{field: {label: value}} of what is not the same for all; "–": not there."""
  firsts = [group.runs[0] for group in groups]
  return {
    field: {
      group.label: _text(group.runs[0].training.get(field, "–"))
      for group in groups
    }
    for field in sorted(_differing(firsts))
    if field != "method"
  }


def _costs(groups: list[Group]) -> list[dict[str, Any]]:
  """Time of a training step; relative only on the same devices and network."""
  costs: list[dict[str, Any]] = []
  for group in groups:
    times = [r.seconds_per_step for r in group.runs if r.seconds_per_step]
    if not times:
      continue
    mean, error = mean_and_error(times)
    costs.append(
      {
        "label": group.label,
        "method": group.method,
        "num_runs": len(times),
        "seconds_per_step": mean,
        "standard_error": error,
        "circumstances": _circumstances(group),
      }
    )
  references = [cost for cost in costs if cost["method"] == _REFERENCE]
  for cost in costs:
    same = [
      other["seconds_per_step"]
      for other in references
      if other["circumstances"] == cost["circumstances"]
    ]
    # With several there is no telling which.
    cost["relative_to_at"] = (
      cost["seconds_per_step"] / same[0] if len(same) == 1 else None
    )
  return costs


def _circumstances(group: Group) -> dict[str, Any]:
  """What must be the same for times to be compared."""
  first = group.runs[0]
  devices = sorted(
    {d for run in group.runs for d in run.record.get("devices", [])}
  )
  return {
    "devices": devices,
    "dataset": first.training.get("data.name"),
    "batch_size": first.training.get("train.batch_size"),
    **{k: v for k, v in first.training.items() if k.startswith("model.")},
  }
