"""Page of one run: what its network is worth, and how that is known."""

import json
import math
import os
import pathlib
from typing import Any

from atat_jax import figures
from atat_jax.errors import UserError
from atat_jax.report import corruptions, page, results, summary
from atat_jax.runs import (
  comparable,
  files,
  locations,
  overfitting,
  provenance,
  roles,
  tables,
  wording,
)


def write_report(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Draws the figures of a run and writes its page.

  The page is one file: pictures and style are inside it, it runs no script and
  requests nothing from any network. Parts whose inputs are missing are left
  out.

  Args:
    workdir: Directory of a run. Read: `results.json`, and if they exist
      `config.json`, `metrics.jsonl`, `teacher/metrics.jsonl` and the files of
      the analyses.

  Returns:
    Path of `report.html`; the figures are in `workdir/figures`.

  Raises:
    UserError: There is no `results.json`, or an input cannot be read.
  """
  from atat_jax import analyses  # it imports JAX, which takes long

  workdir = locations.find("workdir", workdir)
  found = files.read_results(workdir, tables.SHOWN)
  if found is None:
    raise UserError(
      f"{workdir / files.RESULTS} does not exist: evaluate first, with "
      f"`atat-jax evaluate --config=... --workdir={workdir}`"
    )
  run = found.get("run", {})
  config = run.get("config") or files.read_json(workdir / files.CONFIG) or {}
  rows, corrupted = found["rows"], found.get("corruptions", [])
  text = page.render(
    "run.html.j2",
    title=_title(config, rows),
    date=run.get("date"),
    headline=summary.headline(found),
    verdict=[*summary.sentences(found), *_overfitting(workdir, run)],
    images=results.images(rows),
    models=results.models(rows),
    blocks=results.blocks(rows),
    comparable=comparable.note(tables.columns(rows)),
    bars=figures.draw_results(workdir),
    by_class=results.by_class(rows, run.get("class_names")),
    corruptions=corruptions.sections(rows, corrupted),
    diagnostics=_flags_first(
      results.titled(found.get("diagnostics", {}), rows)
    ),
    curves=figures.draw_curves(workdir),
    sections=analyses.sections(workdir, workdir / files.FIGURES),
    facts={"Training": _training(config), **_facts(run, [*rows, *corrupted])},
    commit=run.get("commit"),
    command=run.get("command"),
    config=json.dumps(config, indent=2) if config else "",
  )
  return files.write_text(workdir / files.REPORT, text)


def is_old(workdir: pathlib.Path) -> bool:
  """Checks whether a page is missing, or older than something that it shows."""
  workdir = locations.find("workdir", workdir)
  report = workdir / files.REPORT
  shown = [
    workdir / files.RESULTS,
    workdir / files.METRICS,
    workdir / roles.TEACHER / files.METRICS,
    *workdir.glob("*.npz"),
  ]
  return not report.exists() or any(
    files.stamp(path)[0] > files.stamp(report)[0]
    for path in shown
    if path.exists()
  )


def _overfitting(workdir: pathlib.Path, run: dict[str, Any]) -> list[str]:
  """Says where the training overfitted, and which checkpoint this page is of."""
  lines = files.read_metrics(workdir / files.METRICS).get("validation", [])
  found = overfitting.find(lines)
  if not found:
    return []
  first = found[0]
  steps = [
    f"{point['step']:,}"
    for model, point in run.get("checkpoints", {}).items()
    if model != roles.TEACHER
  ]
  which = f" This page is of step {wording.listed(steps)}." if steps else ""
  return [
    f"{len(found)} of {wording.plural(len(lines), 'validation')} of the training"
    f" showed catastrophic overfitting, the first at step {first.step:,}:"
    " accuracy under the validation attack went from"
    f" {wording.percent(first.robust[0])} to {wording.percent(first.robust[1])},"
    f" under a single step from {wording.percent(first.single_step[0])} to"
    f" {wording.percent(first.single_step[1])}.{which}"
  ]


def _title(config: dict[str, Any], rows: list[tables.Row]) -> str:
  """Method, data set and network, as far as they are known."""
  title = str(config.get("method", "")).upper() or "Robustness"
  datasets = dict.fromkeys(str(row["dataset"]) for row in rows)
  if datasets:
    title += f" on {', '.join(datasets)}"
  model = config.get("model")
  if isinstance(model, dict) and "name" in model:
    size = "-".join(str(model[k]) for k in ("depth", "width") if k in model)
    title += f", {model['name']} {size}".rstrip()
  return title


def _flags_first(
  found: list[tuple[str, dict[str, Any]]],
) -> list[tuple[str, dict[str, Any]]]:
  """Puts the diagnostics that raise a flag first, and each only once.

  AutoAttack and the rows beside it may ask the same and find the same.
  """
  once = {
    (
      title,
      *(check[field] for field in ("rule", "value", "flag", "message")),
    ): (
      title,
      check,
    )
    for title, check in found
  }
  return sorted(once.values(), key=lambda pair: not pair[1]["flag"])


def _training(config: dict[str, Any]) -> str:
  """Puts the training into words, as far as the configuration says it."""
  train, objective = config.get("train"), config.get("objective")
  parts = []
  if isinstance(train, dict) and {"num_epochs", "batch_size"} <= {*train}:
    parts.append(
      f"{train['num_epochs']} epochs in batches of {train['batch_size']}"
    )
  if isinstance(objective, dict) and {"epsilon", "num_steps"} <= {*objective}:
    attack = objective.get("attack_method", "pgd")
    numbers = (
      f"{objective['num_steps']} steps of {_pixels(objective.get('step_size'))}"
      if attack == "pgd"
      else "one step"
    )
    norm = objective.get("norm", "linf")
    parts.append(
      f"attacked by {attack}: {norm}, epsilon {_pixels(objective['epsilon'])},"
      f" {numbers}"
    )
  if parts and "seed" in config:
    parts.append(f"seed {config['seed']}")
  return "; ".join(parts)


def _pixels(value: object) -> str:
  """Writes a distance, or whatever a file of others has in its place."""
  is_distance = isinstance(value, float) and math.isfinite(value)
  return wording.pixels(value) if is_distance else str(value)  # type: ignore[arg-type]


def _facts(run: dict[str, Any], rows: list[tables.Row]) -> dict[str, str]:
  """Facts of the run by name; "" for one that is not known."""
  return {
    "Parameters": "; ".join(
      f"{model}: {number:,}"
      for model, number in run.get("num_parameters", {}).items()
    ),
    "Checkpoints": "; ".join(
      f"{model}: {point['which']}, step {point['step']:,}"
      for model, point in run.get("checkpoints", {}).items()
    ),
    "Time of the evaluation": results.total_time(rows),
    **provenance.facts(run),
  }
