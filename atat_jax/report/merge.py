"""Comparison of runs: numbers of equal training and protocol, merged."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from atat_jax.errors import UserError, shown
from atat_jax.report import published
from atat_jax.report.groups import (
  Group,
  Run,
  by_training,
  differing_fields,
  read,
  shared_fields,
)
from atat_jax.runs import locations, tables

# The time of a step is given relative to this method's.
_REFERENCE = "at"

FIELDS = (*tables.COLUMN_FIELDS, "batch_size")
"""Fields on which the rows of a merged column agree.

The size of a batch is None with running statistics, where it changes nothing.
"""


def compare(workdirs: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
  """Merges finished runs.

  The network that a run has trained counts; a teacher is another run's.

  Args:
    workdirs: Directories with `results.json`; `metrics.jsonl` is read if it is
      there.

  Returns:
    Content of `comparison.json`: "format" 1; "source" of the published
    figures; "runs", a fact sheet each; "rows" as in `results.json`, with the
    mean as "accuracy", "standard_error" (None for one run, or runs that agree),
    "num_runs", "accuracies" by seed, "published", and with batch statistics
    "difference" from running statistics; "missing", a sentence for each run and
    column without a number; "training", the fields in which the methods differ;
    "recipe", those in which they agree; "costs", the time of a training step and
    the number of steps; "shifts", the attention shift of each method. Rows that met numbers that are not
    finite have the counts of the seed with the most (`tables.NONFINITE`).

  Raises:
    UserError: A directory has no results, or a run is given twice.
  """
  if isinstance(workdirs, str | bytes | os.PathLike):
    raise UserError(
      f"workdirs: {workdirs!r}; allowed: a list of directories, also of one"
    )
  if not isinstance(workdirs, Sequence) or not workdirs:
    raise UserError(
      f"workdirs: {shown(workdirs)}; allowed: directories of finished runs"
    )
  groups = by_training(
    [read(locations.find("workdirs", workdir)) for workdir in workdirs]
  )
  rows = [row for group in groups for row in _merge(group)]
  _add_differences(rows)
  _complete_attacks(rows)
  return {
    "format": 1,
    "source": published.SOURCE,
    "runs": [_facts(group, run) for group in groups for run in group.runs],
    "rows": rows,
    "missing": _missing(groups, rows),
    "training": differing_fields(groups),
    "recipe": shared_fields(groups),
    "costs": _costs(groups),
    "shifts": _shifts(groups),
  }


def mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
  """Returns a mean and its standard error.

  The error is None for a single value, and for values that are all equal: a few
  that agree do not show that there is no spread.
  """
  numbers = list(values)
  mean = statistics.fmean(numbers)
  if len(numbers) < 2 or max(numbers) - min(numbers) < 1e-12:
    return mean, None
  return mean, statistics.stdev(numbers) / math.sqrt(len(numbers))


def paired_difference(
  first: tables.Row, second: tables.Row
) -> dict[str, Any] | None:
  """Compares two merged rows seed by seed, so that what seeds share cancels.

  Args:
    first: Row of `compare`, with "accuracies" by seed.
    second: Row that is subtracted.

  Returns:
    Mean difference as "accuracy", its "standard_error" (None for one seed,
    or seeds that agree) and "num_runs", the number of seeds that both have;
    None if that is 0.
  """
  gaps = [
    accuracy - second["accuracies"][seed]
    for seed, accuracy in first["accuracies"].items()
    if seed in second["accuracies"]
  ]
  if not gaps:
    return None
  mean, error = mean_and_error(gaps)
  return {"accuracy": mean, "standard_error": error, "num_runs": len(gaps)}


def _identity(row: tables.Row) -> tuple[Any, ...]:
  """Returns the protocol of a row; rows that agree on it may be merged."""
  options = json.dumps(row.get("options", {}), sort_keys=True)
  batch_size = row.get("batch_size") if row["batch_norm"] == "batch" else None
  return (*tables.identity(row), options, row["batch_norm"], batch_size)


def _merge(group: Group) -> list[tables.Row]:
  """Makes a row for each protocol with which a run was evaluated."""
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
    "published": published.accuracy(group.setting, first),
    **_nonfinite(by_seed.values()),
  }
  for field in ("options", "members"):
    if first.get(field):
      merged[field] = first[field]
  if first.get(
    "attacks"
  ):  # AutoAttack's; their numbers are part of the protocol
    merged["attacks"] = max(
      (
        [
          {key: attack[key] for key in ("attack", "numbers")}
          for attack in row.get("attacks", ())
        ]
        for row in by_seed.values()
      ),
      key=len,
    )
  return merged


def _nonfinite(rows: Iterable[tables.Row]) -> dict[str, int]:
  """Returns the counts of the seed that has the most, where any has some."""
  counted = [
    {field: row.get(field) or 0 for field in tables.NONFINITE} for row in rows
  ]
  most = max(counted, key=lambda counts: tuple(counts.values()))
  return most if any(most.values()) else {}


def _add_differences(rows: list[tables.Row]) -> None:
  """Adds the mean difference of seeds to rows with batch statistics."""

  def partners(row: tables.Row) -> tuple[Any, ...]:
    return row["model"], tables.identity(row)

  running = {
    partners(row): row for row in rows if row["batch_norm"] == "running"
  }
  for row in rows:
    fixed = running.get(partners(row))
    if row["batch_norm"] != "batch" or fixed is None:
      continue
    found = paired_difference(row, fixed)
    if found is not None:
      row["difference"] = found


def _complete_attacks(rows: list[tables.Row]) -> None:
  """Completes the protocol of an AutoAttack that ran out of robust images."""
  longest: dict[tuple[Any, ...], list[Any]] = {}
  for row in rows:
    if len(row.get("attacks", ())) > len(longest.get(_identity(row), ())):
      longest[_identity(row)] = row["attacks"]
  for row in rows:
    if _identity(row) in longest:
      row["attacks"] = longest[_identity(row)]


def _missing(groups: list[Group], rows: list[tables.Row]) -> list[str]:
  """Names the columns that a run lacks, a sentence for each run."""
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
          # A worst case lacks an attack, which is named itself.
          if not column.derived
          and not own & {_identity(row) for row in column.rows.values()}
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
    "num_parameters": run.record.get("num_parameters", {}).get(run.network),
    "checkpoint_step": point.get("step"),
    "commit": run.record.get("commit"),
    "date": run.record.get("date"),
    "devices": run.record.get("devices", []),
    "versions": run.record.get("versions", {}),
  }


def _costs(groups: list[Group]) -> list[dict[str, Any]]:
  """Merges the times of a step; relative on equal devices and networks only."""
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
        "num_steps": group.runs[0].num_steps,
        "circumstances": _circumstances(group),
      }
    )
  references = [cost for cost in costs if cost["method"] == _REFERENCE]
  for cost in costs:
    found = [
      other["seconds_per_step"]
      for other in references
      if other["circumstances"] == cost["circumstances"]
    ]
    # With several references, none is the right one.
    cost["relative_to_at"] = (
      cost["seconds_per_step"] / found[0] if len(found) == 1 else None
    )
  return costs


def _shifts(groups: list[Group]) -> list[dict[str, Any]]:
  """Merges attention shifts of equal images, attack and layer."""
  found: dict[tuple[Any, ...], list[float]] = {}
  fields = ("num_steps", "num_examples", "protocol", "layer")
  for group in groups:
    for run in filter(lambda run: run.shift, group.runs):
      dataset, shift = run.rows[0]["dataset"], run.shift or {}
      own = (group.label, dataset, *(shift[field] for field in fields))
      found.setdefault(own, []).append(shift["mean"])
  merged = []
  for own, values in found.items():
    mean, error = mean_and_error(values)
    merged.append(
      {
        **dict(zip(("label", "dataset", *fields), own, strict=True)),
        "mean": mean,
        "standard_error": error,
        "num_runs": len(values),
      }
    )
  return merged


def _circumstances(group: Group) -> dict[str, Any]:
  """Returns what must be the same for times to be compared."""
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
