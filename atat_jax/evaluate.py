"""Evaluation: teacher and student under every protocol, into `results.json`."""

import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import (
  analyses,
  attacks,
  checkpoints,
  config,
  evaluation,
  models,
  sharding,
)
from atat_jax.config import Plan, as_json
from atat_jax.data.base import Dataset, Split
from atat_jax.errors import UserError
from atat_jax.evaluation import Protocol
from atat_jax.runs import provenance
from atat_jax.train import teacher_directory
from atat_jax.training import writer

_log = logging.getLogger(__name__)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def _run_record(plan: Plan, steps: dict[str, int]) -> dict[str, Any]:
  return {
    "config": as_json(plan.config),
    "command": " ".join(["python", *sys.argv]),
    "commit": provenance.commit(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "devices": [device.device_kind for device in jax.devices()],
    "cpus": os.cpu_count(),
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "checkpoints": {
      name: {"step": step, "which": "best"} for name, step in steps.items()
    },
  }


def _row(
  plan: Plan, model: str, step: int, num_examples: int, mode: str, p: Protocol
) -> dict[str, Any]:
  """A row of the table, all but its result."""
  settings = plan.config.evaluation
  row = {
    "model": model,
    "dataset": plan.spec.name,
    "split": "test",
    "num_examples": num_examples,
    "attack": p.name,
    "norm": p.norm,
    "epsilon": p.epsilon,
    "step_size": p.step_size,
    "num_steps": p.num_steps,
    "num_restarts": p.num_restarts,
    "loss": p.loss,
    "batch_norm": mode,
    "batch_size": (
      settings.batch_statistics_size if mode == "batch" else settings.batch_size
    ),
    "seed": settings.seed,
    "checkpoint_step": step,
  }
  if p.options:
    row["options"] = dict(p.options)
  return row


def _identity(row: dict[str, Any]) -> str:
  """What makes two rows the same measurement."""
  # With running statistics the batch size changes nothing but the speed.
  free = {"accuracy", "seconds", "attacks", "diagnostics"}
  if row["batch_norm"] == "running":
    free.add("batch_size")
  return json.dumps(
    {k: v for k, v in row.items() if k not in free}, sort_keys=True
  )


def find_checkpoints(
  plan: Plan, workdir: pathlib.Path
) -> dict[str, tuple[pathlib.Path, int]]:
  """The best checkpoint of each network of a run, as (directory, step).

  Raises:
    UserError: One is missing.
  """
  if plan.objective.needs_teacher:
    teacher = teacher_directory(plan.config, workdir)
    directories = {"teacher": teacher, "student": workdir}
  else:
    directories = {plan.config.method: workdir}
  return {
    name: (directory, checkpoints.checkpoint_step(directory))
    for name, directory in directories.items()
  }


def evaluate(
  plan: Plan, workdir: pathlib.Path, dataset: Dataset, mesh: Mesh
) -> dict[str, Any]:
  """Computes the rows that `results.json` lacks, and the analyses.

  Args:
    plan: The checked configuration.
    workdir: The run's directory.
    dataset: The data; the test split is used.
    mesh: The devices.

  Returns:
    The content of `results.json`.

  Raises:
    UserError: A checkpoint is missing or of another network; the test split
      has no image that an analysis is to show.
  """
  settings = plan.config.evaluation
  with config.in_section("figures"):
    plan.figures.check_images(len(dataset.test.labels))
  networks, steps = {}, {}
  for name, (directory, step) in find_checkpoints(plan, workdir).items():
    steps[name] = step
    model, variables = checkpoints.restore_model(
      directory, step=step, expected=plan.model_spec
    )
    networks[name] = (model, sharding.put_replicated(mesh, variables))

  count = settings.num_examples or len(dataset.test.labels)
  test = Split(*(array[:count] for array in dataset.test))
  path = workdir / "results.json"
  results = _read(path)
  # Rows of other protocols stay, those of other checkpoints go.
  rows = {
    _identity(row): row
    for row in results["rows"]
    if steps.get(row["model"]) == row["checkpoint_step"]
  }
  todo = [
    (name, mode, protocol)
    for name in networks
    for mode in settings.batch_norm
    for protocol in plan.protocols
  ]
  data = sharding.put_replicated(mesh, test)
  images, done = len(test.labels), True
  with tqdm(
    total=len(todo) * images,
    unit="img",
    desc="evaluate",
    dynamic_ncols=True,
    disable=jax.process_index() != 0,
  ) as bar:
    for name, mode, protocol in todo:
      row = _row(plan, name, steps[name], images, mode, protocol)
      if _identity(row) in rows:
        bar.update(images)
        continue
      done = False
      bar.set_postfix_str(f"{name} {mode} {protocol.name}")
      began = time.perf_counter()
      row |= _measure(
        plan,
        workdir,
        models.classifier(*networks[name], batch_norm=mode),
        data,
        row,
        protocol,
        mesh,
        bar.update,
      )
      row["seconds"] = round(time.perf_counter() - began, 3)
      rows[_identity(row)] = row
      results = _results(plan, steps, list(rows.values()))
      writer.write_json(path, results)
  if done:
    _log.info("evaluate: %s has all %d rows", path, len(todo))
  analyses.write(
    workdir,
    networks,
    dataset.test.images,
    dataset.test.labels,
    settings=plan.figures,
    class_names=plan.spec.class_names,
    mesh=mesh,
  )
  return results


def _state_path(workdir: pathlib.Path, row: dict[str, Any]) -> pathlib.Path:
  """Of a row's AutoAttack: a kill loses a minute of hours of work.

  Another checkpoint, seed or epsilon makes another row, so another file.
  """
  mark = zlib.crc32(_identity(row).encode())
  name = f"{row['model']}-{row['batch_norm']}-{row['attack']}-{mark:08x}.npz"
  return workdir / "autoattack" / re.sub(r"[^\w=.-]", "_", name)


def _measure(
  plan: Plan,
  workdir: pathlib.Path,
  classifier: jax.tree_util.Partial,
  data: Split,
  row: dict[str, Any],
  protocol: Protocol,
  mesh: Mesh,
  on_batch: Callable[[int], object],
) -> dict[str, Any]:
  """What is measured for a row."""
  key = jax.random.key(plan.config.evaluation.seed)
  if protocol.attack != "autoattack":
    accuracy = evaluation.accuracy(
      key,
      classifier,
      data,
      protocol=protocol,
      batch_size=row["batch_size"],
      mesh=mesh,
      on_batch=on_batch,
    )
    return {"accuracy": accuracy}
  result = attacks.autoattack(
    key,
    classifier,
    sharding.to_host(mesh, data.images).astype(np.float32) / 255.0,
    sharding.to_host(mesh, data.labels),
    batch_size=row["batch_size"],
    mesh=mesh,
    state_path=_state_path(workdir, row),
    **protocol.arguments(),
  )
  on_batch(len(data.labels))
  return {
    "accuracy": result.accuracy,
    "attacks": [
      {
        "attack": attack,
        "numbers": result.protocol["attacks"].get(attack, ""),
        "accuracy": accuracy,
        "seconds": result.seconds.get(attack, 0.0),
      }
      for attack, accuracy in result.robust_accuracy.items()
    ],
    "diagnostics": result.diagnostics,
  }


def _read(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {"rows": []}
  try:
    results = json.loads(path.read_text(encoding="utf-8"))
    for row in results["rows"]:
      _identity(row)
    return results
  except (json.JSONDecodeError, KeyError, TypeError):
    raise UserError(
      f"{path}: not a results file; move it away to evaluate again"
    ) from None


def _results(
  plan: Plan, steps: dict[str, int], rows: list[dict[str, Any]]
) -> dict[str, Any]:
  return {
    "format": 1,
    "run": _run_record(plan, steps),
    "rows": rows,
    "diagnostics": {
      f"{model}_{rule}": found
      for model in steps
      for rule, found in evaluation.diagnose(rows, model).items()
    },
  }
