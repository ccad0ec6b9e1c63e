"""Evaluation: each network under every protocol, into `results.json`."""

import json
import logging
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import (
  analyses,
  attacks,
  checkpoints,
  evaluation,
  models,
  rng,
  sharding,
)
from atat_jax.attacks import diagnostics, nonfinite
from atat_jax.attacks.diagnostics import Diagnostic
from atat_jax.data import Dataset, Split
from atat_jax.errors import in_section
from atat_jax.evaluation import Protocol, rules
from atat_jax.plan import Plan
from atat_jax.process import stops
from atat_jax.runs import files, provenance, tables, wording, worst_case
from atat_jax.typing import Array, BatchNormMode, Classifier

_log = logging.getLogger(__name__)

Row = dict[str, Any]

_NOMINAL = Protocol("nominal", "nominal")

# Fields of a row that are its result.
_MEASURED = {
  "accuracy",
  "class_accuracy",
  "correct",
  *tables.NONFINITE,
  "seconds",
  "attacks",
  "diagnostics",
}


def find_checkpoints(
  plan: Plan, workdir: pathlib.Path
) -> dict[str, tuple[pathlib.Path, checkpoints.Chosen]]:
  """Finds the best checkpoint of each network of a run.

  Args:
    plan: Plan of the run.
    workdir: Working directory of the run.

  Returns:
    Role of the network to (directory, checkpoint).

  Raises:
    UserError: A network has no checkpoint.
  """
  return {
    role: (workdir / place, checkpoints.find(workdir / place))
    for role, place in plan.networks.items()
  }


def evaluate(
  plan: Plan, workdir: pathlib.Path, dataset: Dataset, mesh: Mesh
) -> dict[str, Any]:
  """Computes the rows that `results.json` lacks, and the analyses.

  Args:
    plan: Plan of the run.
    workdir: Working directory of the run.
    dataset: The data; the test split is used.
    mesh: The devices.

  Returns:
    The content of `results.json`.

  Raises:
    UserError: A checkpoint is missing or of another network; the test split
      lacks an image that an analysis is to show.
  """
  found = find_checkpoints(plan, workdir)
  with in_section("figures"):
    analyses.check_images(plan.figures, len(dataset.test.labels))
  networks = {}
  for role in plan.evaluated:
    directory, chosen = found[role]
    model, variables = checkpoints.restore_model(
      directory, step=chosen.step, expected=plan.model_spec
    )
    networks[role] = (model, sharding.put_replicated(mesh, variables))
  steps = {role: chosen.step for role, (_, chosen) in found.items()}
  record = provenance.record(
    [device.device_kind for device in jax.devices()],
    config=plan.record,
    class_names=list(plan.data.spec.class_names),
    checkpoints={role: chosen._asdict() for role, (_, chosen) in found.items()},
    num_parameters={
      role: sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      for role, (_, variables) in networks.items()
    },
  )
  classifiers = {
    (role, mode): models.classifier(*network, batch_norm=mode)
    for role, network in networks.items()
    for mode in plan.evaluation.batch_norm
  }
  _tell_left_out(plan)
  table = _Table(workdir / files.RESULTS, steps=steps, record=record)
  _complete(table, plan, classifiers, dataset.test, mesh)
  analyses.write(
    workdir,
    networks,
    dataset.test.images,
    dataset.test.labels,
    settings=plan.figures,
    class_names=plan.data.spec.class_names,
    mesh=mesh,
  )
  return table.content


def _tell_left_out(plan: Plan) -> None:
  """Says once which attacks batch statistics are not evaluated with."""
  settings = plan.evaluation
  left_out = [
    one.name for one in settings.protocols if not one.measures("batch")
  ]
  if left_out and "batch" in settings.batch_norm:
    _log.info(
      "evaluate: %s with running statistics only", wording.listed(left_out)
    )


class _Table:
  """`results.json` while its rows are completed.

  Rows of other protocols stay, rows of other checkpoints go. Worst cases are
  derived from the rows each time and are none of them.

  Args:
    path: The file.
    steps: Role of each network to the step of its checkpoint.
    record: Record of the run.
  """

  def __init__(
    self, path: pathlib.Path, *, steps: dict[str, int], record: dict[str, Any]
  ):
    self.path, self.steps = path, steps
    self._record = record
    self.content = files.read_results(path.parent) or {"rows": []}
    stored = worst_case.measured(self.content["rows"])
    self._rows = {
      _identity(row): row
      for row in stored
      if steps.get(row["model"]) == row.get("checkpoint_step")
    }
    if jax.process_index() == 0:
      self._keep_rows_of_damaged(stored)

  def _keep_rows_of_damaged(self, stored: list[Row]) -> None:
    """Copies the file where rows go because their checkpoint is damaged."""
    damaged = {
      role
      for role, chosen in self._record["checkpoints"].items()
      if "intact" in chosen["which"]
    }
    if any(
      row["model"] in damaged and _identity(row) not in self._rows
      for row in stored
    ):
      copy = files.set_aside(self.path, self.path.parent, copy=True)
      _log.warning("rows of a damaged checkpoint are kept in %s", copy)

  def __contains__(self, row: Row) -> bool:
    """Whether a row has been measured."""
    return _identity(row) in self._rows

  def add(self, row: Row) -> None:
    """Adds a row and writes the file."""
    self._rows[_identity(row)] = row
    rows = list(self._rows.values())
    self.content = {
      "format": 1,
      "run": self._record,
      "rows": worst_case.complete(rows),
      "diagnostics": {
        f"{model}_{rule}": found
        for model in self.steps
        for rule, found in evaluation.diagnose(rows, model).items()
      },
    }
    if jax.process_index() == 0:
      files.write_json(self.path, self.content, sealed=True)


def _identity(row: Row) -> str:
  """Text that two rows share if they are the same measurement."""
  free = set(_MEASURED)
  if row["batch_norm"] == "running":
    free.add("batch_size")  # it changes nothing but the speed
  return json.dumps(
    {k: v for k, v in row.items() if k not in free}, sort_keys=True
  )


def _complete(
  table: _Table,
  plan: Plan,
  classifiers: Mapping[tuple[str, BatchNormMode], Classifier],
  test: Split,
  mesh: Mesh,
) -> None:
  """Measures the rows that a table lacks."""
  settings = plan.evaluation
  count = settings.num_examples or len(test.labels)
  test = Split(*(array[:count] for array in test))
  data, images = sharding.put_replicated(mesh, test), len(test.labels)
  rows = [
    (_make_row(plan, role, table.steps[role], images, mode, protocol), protocol)
    for role, mode in classifiers
    for protocol in settings.protocols_of(mode)
  ]
  blindness = _LossChecks(classifiers, test)
  if all(row in table for row, _ in rows):
    _log.info("evaluate: %s has all %d rows", table.path, len(rows))
  with tqdm(
    total=len(rows) * images,
    unit="img",
    desc="evaluate",
    dynamic_ncols=True,
    disable=jax.process_index() != 0,
  ) as bar:
    for row, protocol in rows:
      stops.check()
      if row in table:
        bar.update(images)
        continue
      bar.set_postfix_str(f"{row['model']} {row['batch_norm']} {row['attack']}")
      began = time.perf_counter()
      measured = _measure(
        classifiers[row["model"], row["batch_norm"]],
        data,
        protocol=protocol,
        seed=settings.seed,
        batch_size=row["batch_size"],
        num_classes=plan.data.spec.num_classes,
        state_path=_state_path(table.path.parent, row),
        mesh=mesh,
        on_batch=bar.update,
      )
      seconds = round(time.perf_counter() - began, 3)
      checked = blindness.check(row, protocol)
      table.add({**row, **measured, **checked, "seconds": seconds})


class _LossChecks:
  """Checks whether the losses that attacks increase are blind, each once.

  Args:
    classifiers: (Role, BatchNorm mode) to classifier.
    test: Images, on the host.
  """

  def __init__(
    self,
    classifiers: Mapping[tuple[str, BatchNormMode], Classifier],
    test: Split,
  ):
    self._classifiers, self._test = classifiers, test
    self._found: dict[tuple[Any, ...], Diagnostic] = {}

  def check(self, row: Row, protocol: Protocol) -> Row:
    """Returns the diagnostic of a row's loss as a field; none without a loss.

    On the first batch, at random starts, with running statistics; AutoAttack
    checks the losses of its own attacks.
    """
    loss, model = protocol.loss, row["model"]
    if loss is None or row["batch_norm"] != "running":
      return {}
    radius = 8 / 255  # as AutoAttack looks
    if protocol.norm == "linf" and protocol.epsilon is not None:
      radius = protocol.epsilon
    identity = model, loss, radius
    if identity not in self._found:
      part = slice(row["batch_size"])
      found = diagnostics.blind_loss(
        rng.stream(jax.random.key(row["seed"]), "blind"),
        self._classifiers[model, "running"],
        self._test.images[part].astype(np.float32) / np.float32(255),
        self._test.labels[part],
        loss=loss,
        radius=radius,
      )
      self._found[identity] = rules.storable(found)
    return {"diagnostics": {"blind_loss": self._found[identity]}}


def _make_row(
  plan: Plan,
  model: str,
  step: int,
  num_examples: int,
  mode: str,
  protocol: Protocol,
) -> Row:
  """A row of the table without its result."""
  row = {
    "model": model,
    "dataset": plan.data.spec.name,
    "split": "test",
    "num_examples": num_examples,
    "attack": protocol.name,
    "norm": protocol.norm,
    "epsilon": protocol.epsilon,
    "step_size": protocol.step_size,
    "num_steps": protocol.num_steps,
    "num_restarts": protocol.num_restarts,
    "loss": protocol.loss,
    "batch_norm": mode,
    "batch_size": plan.evaluation.size_of_batch(mode),
    "seed": plan.evaluation.seed,
    "checkpoint_step": step,
  }
  if protocol.options:
    row["options"] = dict(protocol.options)
  return row


def _state_path(workdir: pathlib.Path, row: Row) -> pathlib.Path:
  """File of a row's AutoAttack, which goes on there after a kill.

  Another checkpoint, seed or epsilon makes another row, so another file.
  """
  mark = zlib.crc32(_identity(row).encode())
  name = f"{row['model']}-{row['batch_norm']}-{row['attack']}"
  name = re.sub(r"[^\w=.-]", "_", name)[:150]
  return workdir / "autoattack" / f"{name}-{mark:08x}.npz"


def _measure(
  classifier: Classifier,
  data: Split,
  *,
  protocol: Protocol,
  seed: int,
  batch_size: int,
  num_classes: int,
  state_path: pathlib.Path,
  mesh: Mesh,
  on_batch: Callable[[int], object],
) -> Row:
  """Measures the accuracy of a row, as a whole and class by class."""
  key = jax.random.key(seed)
  labels = sharding.to_host(mesh, data.labels)
  if protocol.attack == "autoattack":
    clean = evaluation.judge(
      key,
      classifier,
      data,
      protocol=_NOMINAL,
      batch_size=batch_size,
      mesh=mesh,
    )
    return _autoattack(
      key,
      classifier,
      sharding.to_host(mesh, data.images).astype(np.float32) / 255.0,
      labels,
      clean,
      protocol=protocol,
      batch_size=batch_size,
      num_classes=num_classes,
      state_path=state_path,
      mesh=mesh,
      on_batch=on_batch,
    )
  judged = evaluation.judge(
    key,
    classifier,
    data,
    protocol=protocol,
    batch_size=batch_size,
    mesh=mesh,
    on_batch=on_batch,
  )
  return {
    "accuracy": judged.accuracy,
    "class_accuracy": _by_class(judged.correct, labels, num_classes),
    "correct": worst_case.pack(judged.correct),
    "nonfinite": judged.nonfinite,
    "nonfinite_points": judged.points,
    "nonfinite_gradients": judged.gradients,
  }


def _autoattack(
  key: Array,
  classifier: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  clean: evaluation.Judged,
  *,
  protocol: Protocol,
  num_classes: int,
  on_batch: Callable[[int], object],
  **options: Any,
) -> Row:
  """Measures a row of AutoAttack."""
  with nonfinite.collect() as counts:
    result = attacks.autoattack(
      key, classifier, images, labels, **options, **protocol.arguments()
    )
  on_batch(len(labels))
  robust = np.asarray(result.robust)
  return {
    "accuracy": result.accuracy,
    "class_accuracy": _by_class(robust, labels, num_classes),
    "correct": worst_case.pack(robust),
    "nonfinite": clean.nonfinite,
    # The ensemble counts clean images, too.
    "nonfinite_points": max(0, counts.points - clean.nonfinite),
    "nonfinite_gradients": counts.gradients,
    "attacks": _ensemble(result),
    "diagnostics": {
      name: rules.storable(check) for name, check in result.diagnostics.items()
    },
  }


def _ensemble(result: attacks.AutoAttackResult) -> list[dict[str, Any]]:
  """Returns each attack of an ensemble, with the accuracy after it.

  All are named, also those that did not run as no robust image was left.
  """
  numbers = result.protocol["attacks"]
  return [
    {
      "attack": attack,
      "numbers": numbers.get(attack, ""),
      "accuracy": result.robust_accuracy.get(attack, result.accuracy),
      "seconds": result.seconds.get(attack, 0.0),
    }
    for attack in dict.fromkeys([*result.robust_accuracy, *numbers])
  ]


def _by_class(
  correct: np.ndarray, labels: np.ndarray, num_classes: int
) -> list[float | None]:
  """Accuracy of each class; None where a class has no image."""
  counts = evaluation.count_classes(correct, labels, num_classes)
  return [
    float(right / all_) if all_ else None
    for right, all_ in zip(*counts, strict=True)
  ]
