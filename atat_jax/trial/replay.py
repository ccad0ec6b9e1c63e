"""Replay of one step of a training, with everything that was not finite.

The state is that of the last checkpoint before the step; the steps in between
are taken by the programs of the training, so that on a CPU the step is the same
to the last bit. Nothing in the working directory is changed but
`replay-<step>.json`.
"""

import logging
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import checkpoints, fields, metrics, train
from atat_jax.data import Dataset, Extra
from atat_jax.errors import UserError
from atat_jax.objectives import Batch, Outcome
from atat_jax.plan import Plan, StagePlan
from atat_jax.runs import files
from atat_jax.state import TrainState
from atat_jax.training import incidents
from atat_jax.training.outline import Outline
from atat_jax.typing import Array, PyTree

_log = logging.getLogger(__name__)

_MOST_SHOWN = 20


def replay(
  plan: Plan,
  workdir: pathlib.Path,
  dataset: Dataset,
  mesh: Mesh,
  extra: Extra | None,
  *,
  step: int,
) -> pathlib.Path:
  """Makes one step of a training again and writes what was computed in it.

  The training is the teacher's as long as it is not finished, then the run's
  own.

  Args:
    plan: Plan of the run.
    workdir: Working directory of the run.
    dataset: The data.
    mesh: The devices.
    extra: Extra training images, or None.
    step: Number of the step, from 1, as in messages and in `metrics.jsonl`.

  Returns:
    Path of the file.

  Raises:
    UserError: There is no such step; the teacher is missing.
  """
  stage, outline = _choose(plan, workdir, dataset)
  _check_step(step, outline)
  teacher = train.restore_teacher(plan, stage, workdir)
  prepared = train.prepare(plan, stage, teacher, dataset, mesh, extra, outline)
  left_out = incidents.read_left_out(outline.directory, stage.nonfinite)
  current, saved = checkpoints.restore_before(
    outline.directory,
    prepared.start([number for number in left_out if number != step - 1]),
    step,
  )
  _log.info("%s: replays step %d from step %d", stage.name, step, saved)
  before, after = _take(current, prepared, outline, saved, step)
  number = range(step - 1, step)
  computed = prepared.differentiate(
    before, number, prepared.draws.images(number)
  )
  means = metrics.compute(after.sums)
  content = {
    "format": 1,
    "training": stage.name,
    "step": step,
    "from_checkpoint": saved or None,
    "batch": prepared.draws.describe(step - 1),
    "metrics": {name: _number(mean) for name, mean in means.items()},
    "equals_checkpoint": _equals_checkpoint(after, outline, step),
    **_report(before, *computed, after),
  }
  path = outline.directory / f"replay-{step}.json"
  if jax.process_index() == 0:
    files.write_json(path, content)
  return path


def _check_step(step: int, outline: Outline) -> None:
  fields.check_value("step", int, step)
  if not 1 <= step <= outline.total:
    raise UserError(
      f"step: {step}; allowed: 1 to {outline.total}, the steps of"
      f" {outline.name}"
    )


def _take(
  current: TrainState,
  prepared: train.Prepared,
  outline: Outline,
  saved: int,
  step: int,
) -> tuple[TrainState, TrainState]:
  """Takes the steps up to one; the states before and after that one."""
  programs = prepared.programs
  draw = programs.draw_extra or (lambda numbers: None)
  for numbers in outline.groups(saved, (step - 1,)):
    if numbers.start >= step - 1:
      break
    current = programs.take_steps(current, numbers, draw(numbers))
  # Each program donates its state.
  before: TrainState = jax.tree.map(jnp.copy, programs.reset_metrics(current))
  number = range(step - 1, step)
  given = jax.tree.map(jnp.copy, before)
  return before, programs.take_steps(given, number, draw(number))


def _equals_checkpoint(
  after: TrainState, outline: Outline, step: int
) -> bool | None:
  """Whether a checkpoint of this very step is the same; None: there is none."""
  stored, saved = checkpoints.restore_before(outline.directory, after, step + 1)
  if saved != step:
    return None
  pairs = (
    jax.tree.leaves((one.params, one.batch_stats, one.opt_state))
    for one in jax.device_get((after, stored))
  )
  return all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True))


def _choose(
  plan: Plan, workdir: pathlib.Path, dataset: Dataset
) -> tuple[StagePlan, Outline]:
  """Chooses the first training that is not finished, or the last one."""
  for stage in plan.stages:
    outline = train.make_outline(plan, stage, workdir, dataset.num_train)
    last = outline.directory / files.CHECKPOINTS / str(outline.total)
    if not last.is_dir():
      break
  return stage, outline


def _report(
  before: TrainState,
  batch: Batch,
  gradient: PyTree,
  outcome: Outcome,
  after: TrainState,
) -> dict[str, Any]:
  """Numbers that a step computed, in the order in which it computed them."""
  values = {**outcome.terms, "loss": outcome.total}
  stages: dict[str, PyTree] = {
    "parameters before": before.params,
    "statistics before": before.batch_stats,
    "images": batch.images,
    "clean logits": outcome.logits_clean,
    "adversarial logits": outcome.logits_adversarial,
    **{f"term {name}": value for name, value in values.items()},
    "gradient": gradient,
    "updated parameters": after.params,
    "statistics": after.batch_stats,
    "optimizer state": after.opt_state,
    "averages": after.ema,
  }
  host = jax.device_get(stages)
  # A pytree sorts its names.
  wrong = {name: list(_wrong_leaves(host[name])) for name in stages}
  wrong = {name: leaves for name, leaves in wrong.items() if leaves}
  losses = {name: np.asarray(host[f"term {name}"]) for name in values}
  bad = ~np.isfinite(np.stack([*losses.values()])).all(0)
  attacked = np.asarray(True)
  if outcome.attack_finite is not None:
    attacked = np.asarray(jax.device_get(outcome.attack_finite))
  first = next(iter(wrong), None)
  return {
    "terms": {name: _number(value.mean()) for name, value in losses.items()},
    "gradient_norm": _number(_norm(host["gradient"])),
    "first_nonfinite": first
    and {"what": first, "where": wrong[first][0]["path"]},
    "nonfinite": wrong,
    "examples": np.flatnonzero(bad).tolist(),
    "attack_nonfinite": np.flatnonzero(~attacked).tolist(),
    "losses": {
      name: [_number(x) for x in value] for name, value in losses.items()
    },
  }


def _wrong_leaves(tree: PyTree) -> Iterator[dict[str, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    if not np.issubdtype(array.dtype, np.inexact):
      continue
    count = int((~np.isfinite(array)).sum())
    if count:
      yield {
        "path": jax.tree_util.keystr(path),
        "nonfinite": count,
        "size": array.size,
      }


def _norm(tree: PyTree) -> float:
  leaves = (np.asarray(x, np.float64) for x in jax.tree.leaves(tree))
  return math.sqrt(sum(float(np.square(leaf).sum()) for leaf in leaves))


def _number(value: Array | np.ndarray | float) -> float | str:
  """A number as strict JSON has it: "nan", "inf" and "-inf" are texts."""
  number = float(value)
  return number if math.isfinite(number) else str(number)


def describe(path: pathlib.Path) -> str:
  """Describes a replay in lines for the terminal.

  Args:
    path: File that `replay` has written.
  """
  content = files.read_json(path) or {}
  lines = [f"{content['training']}, step {content['step']}:"]
  for name, value in content["terms"].items():
    lines.append(f"  {name}: {value}")
  lines.append(f"  gradient_norm: {content['gradient_norm']}")
  first = content["first_nonfinite"]
  if first is None:
    lines.append("  everything is finite")
  else:
    lines.append(f"  first not finite: {first['what']} {first['where']}")
    for name, leaves in content["nonfinite"].items():
      one = leaves[0]
      more = f", and {len(leaves) - 1} more" if len(leaves) > 1 else ""
      lines.append(
        f"    {name} {one['path']}: {one['nonfinite']} of {one['size']}{more}"
      )
    indices = content["batch"]["indices"]
    rows = content["examples"]
    shown = [indices[i] for i in rows[:_MOST_SHOWN] if i < len(indices)]
    lines.append(f"  examples of the training split: {shown} ({len(rows)})")
  return "\n".join([*lines, f"replay: {path}"])
