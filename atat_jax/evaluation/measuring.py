"""Rows of `results.json`: measured one after another, kept, and completed.

A row is the accuracy of one classifier under one protocol. A row that is there
already is not measured again, so that an interrupted evaluation goes on.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import attacks, rng, sharding
from atat_jax.attacks import diagnostics, nonfinite
from atat_jax.attacks.diagnostics import Diagnostic
from atat_jax.data.base import Split, as_floats, count, first_images
from atat_jax.data.streamed import Pictures
from atat_jax.evaluation import accuracies, certifying, parts, rules
from atat_jax.evaluation.protocols import Protocol
from atat_jax.process import stops
from atat_jax.runs import files, spreadsheet, tables, worst_case
from atat_jax.typing import Array, Classifier

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


def identity(row: Row) -> str:
  """Writes a row without its result: rows that share it are one measurement.

  Args:
    row: Row of `results.json`.

  Returns:
    JSON.
  """
  free = set(_MEASURED)
  if row["batch_norm"] == "running":
    free.add("batch_size")  # it changes nothing but the speed
  return json.dumps(
    {k: v for k, v in row.items() if k not in free}, sort_keys=True
  )


def row_of(
  protocol: Protocol,
  *,
  model: str,
  dataset: str,
  num_examples: int,
  batch_norm: str,
  batch_size: int,
  seed: int,
  split: str = "test",
  **more: Any,
) -> Row:
  """Makes a row without its result.

  Args:
    protocol: Attack, whose numbers become fields.
    model: Name of the network.
    dataset: Name of the data.
    num_examples: Number of images.
    batch_norm: BatchNorm mode, "running" or "batch".
    batch_size: Images at a time.
    seed: Seed of the attack.
    split: Part of the data.
    **more: Further fields that tell the row from others.
  """
  row = {
    "model": model,
    "dataset": dataset,
    "split": split,
    "num_examples": num_examples,
    "attack": protocol.name,
    "norm": protocol.norm,
    "epsilon": protocol.epsilon,
    "step_size": protocol.step_size,
    "num_steps": protocol.num_steps,
    "num_restarts": protocol.num_restarts,
    "loss": protocol.loss,
    "batch_norm": batch_norm,
    "batch_size": batch_size,
    "seed": seed,
    **more,
  }
  if protocol.options:
    row["options"] = dict(protocol.options)
  return row


class ResultsTable:
  """`results.json` while its rows are completed.

  Rows of other protocols stay, rows of other checkpoints go. Worst cases are
  derived from the rows each time and are none of them. Rows of corrupted images,
  which have a field "corruption", are a list of their own.

  Args:
    path: The file; None: nothing is read or written.
    steps: Name of each network to the step of its checkpoint, None where there
      is none.
    record: Record of the run.

  Attributes:
    content: Content of the file.
  """

  def __init__(
    self,
    path: pathlib.Path | None,
    *,
    steps: Mapping[str, int | None],
    record: dict[str, Any],
  ):
    self.path, self.steps = path, steps
    self._record = record
    found = files.read_results(path.parent) if path else None
    self.content = found or {"rows": []}
    stored = worst_case.measured(self.content["rows"])
    self._rows = {identity(row): row for row in stored if self._is_current(row)}
    self._corrupted = {
      identity(row): row
      for row in self.content.get("corruptions", [])
      if self._is_current(row)
    }
    self._order: dict[str, int] = {}
    self._certificates = [
      one
      for one in self.content.get("certificates", [])
      if self._is_current(one)
    ]
    if path is not None and jax.process_index() == 0:
      self._keep_rows_of_damaged(path, stored)

  def _is_current(self, row: Row) -> bool:
    """Whether a row is about the checkpoint that is evaluated."""
    model = row["model"]
    return model in self.steps and self.steps[model] == row.get(
      "checkpoint_step"
    )

  def _keep_rows_of_damaged(
    self, path: pathlib.Path, stored: Sequence[Row]
  ) -> None:
    """Copies the file where rows go because their checkpoint is damaged."""
    damaged = {
      role
      for role, chosen in self._record.get("checkpoints", {}).items()
      if "intact" in chosen["which"]
    }
    if any(
      row["model"] in damaged and identity(row) not in self._rows
      for row in stored
    ):
      copy = files.set_aside(path, path.parent, copy=True)
      _log.warning("rows of a damaged checkpoint are kept in %s", copy)

  def __contains__(self, row: Row) -> bool:
    """Whether a row has been measured."""
    return identity(row) in (
      self._corrupted if "corruption" in row else self._rows
    )

  def expect(self, rows: Sequence[Row]) -> None:
    """Sets the order of rows in the file, whichever is measured first.

    Args:
      rows: Rows without their results; others come before them.
    """
    self._order = {identity(row): place for place, row in enumerate(rows)}

  def add(self, row: Row) -> None:
    """Adds a row, attacked or corrupted, and writes the file."""
    kept = self._corrupted if "corruption" in row else self._rows
    kept[identity(row)] = row
    self._write()

  def has_certificate(self, wanted: certifying.Certificate) -> bool:
    """Whether images have been certified."""
    return any(certifying.is_same(wanted, one) for one in self._certificates)

  def certify(self, certificate: certifying.Certificate) -> None:
    """Adds a certificate and writes the file."""
    self._certificates.append(certificate)
    self._write()

  def _diagnostics(self, rows: Sequence[Row]) -> dict[str, Diagnostic]:
    found = {
      f"{model}_{rule}": one
      for model in self.steps
      for rule, one in rules.diagnose(rows, model).items()
    }
    for one in self._certificates:
      check = certifying.check(one, rows)
      name = f"{one['model']}_certified"
      # Among several radii a contradiction counts, otherwise the last.
      if check and not (name in found and found[name]["flag"]):
        found[name] = check
    return found

  def _write(self) -> None:
    rows = [
      self._rows[name]
      for name in sorted(self._rows, key=lambda x: self._order.get(x, -1))
    ]
    self.content = {
      "format": 1,
      "run": self._record,
      "rows": worst_case.complete(rows),
      "diagnostics": self._diagnostics(rows),
    }
    if self._corrupted:
      self.content["corruptions"] = list(self._corrupted.values())
    if self._certificates:
      self.content["certificates"] = self._certificates
    if self.path is not None and jax.process_index() == 0:
      spreadsheet.write_results(self.path, self.content)


@dataclasses.dataclass(frozen=True)
class Pending:
  """Row that a table may lack.

  Attributes:
    row: The row without its result.
    protocol: Attack that it is measured with.
    classifier: Network that it is measured of.
  """

  row: Row
  protocol: Protocol
  classifier: Classifier


def complete(
  table: ResultsTable,
  pending: Sequence[Pending],
  test: Split | Pictures,
  *,
  num_classes: int,
  mesh: Mesh,
) -> None:
  """Measures the rows that a table lacks, in their order.

  Args:
    table: The table.
    pending: All rows that it is to have.
    test: Images, uint8 or float32 in [0, 1], and labels, on the host; or
      pictures on the disk, which are measured shard by shard.
    num_classes: Number of classes, K.
    mesh: The devices.
  """
  images = count(test)
  shards = _Shards(test, mesh)
  blindness = _LossChecks(test)
  if all(one.row in table for one in pending):
    _log.info("evaluate: %s has all %d rows", table.path, len(pending))
  with tqdm(
    total=len(pending) * images,
    # Rows that are there say nothing of the speed.
    initial=sum(one.row in table for one in pending) * images,
    unit="img",
    desc="evaluate",
    dynamic_ncols=True,
    disable=jax.process_index() != 0,
  ) as bar:
    for one in pending:
      row = one.row
      stops.check()
      if row in table:
        continue
      bar.set_postfix_str(f"{row['model']} {row['batch_norm']} {row['attack']}")
      began = time.perf_counter()
      measured = shards.measure(
        one,
        table.path,
        num_classes=num_classes,
        on_batch=bar.update,
      )
      spent = measured.pop("seconds", 0.0)  # by an evaluation that was stopped
      seconds = round(time.perf_counter() - began + spent, 3)
      checked = blindness.check(one)
      table.add({**row, **measured, **checked, "seconds": seconds})


class _Shards:
  """Test images, all on the devices, or one shard of them after the other.

  Args:
    test: Images on the host, or pictures on the disk.
    mesh: The devices.
  """

  def __init__(self, test: Split | Pictures, mesh: Mesh):
    self._mesh = mesh
    self._resident: Split | None = None
    self._pictures: Pictures | None = None
    if isinstance(test, Split):
      self._resident = sharding.put_replicated(mesh, test)
    else:
      self._pictures = test

  def measure(
    self,
    one: Pending,
    results: pathlib.Path | None,
    *,
    num_classes: int,
    on_batch: Callable[[int], object],
  ) -> Row:
    """Measures a row: what `_measure` returns, for all images.

    Of pictures on the disk, each shard is kept when it is done, in a file that
    a later evaluation goes on from; "seconds" are those spent by earlier ones.
    """
    row = one.row
    measure = functools.partial(
      _measure,
      one.classifier,
      protocol=one.protocol,
      batch_size=row["batch_size"],
      num_classes=num_classes,
      mesh=self._mesh,
      on_batch=on_batch,
    )
    key = jax.random.key(row["seed"])
    state = functools.partial(_state_path, results, row)
    if self._resident is not None:
      return measure(self._resident, key=key, state_path=state())
    assert self._pictures is not None  # noqa: S101 - narrows the type
    size = self._pictures.options.shard_size
    kept = parts.Parts(
      _path(results, "shards", row, "json"), identity(row), size
    )
    on_batch(kept.num_images)
    for first in range(kept.num_images, len(self._pictures), size):
      began = time.perf_counter()
      shard = self._pictures.select(slice(first, first + size)).decode()
      number = first // size
      found = measure(
        sharding.put_replicated(self._mesh, shard),
        # The batches of other attacks are numbered through.
        key=rng.stream(key, "shard", number)
        if one.protocol.attack == "autoattack" and number
        else key,
        first_batch=first // row["batch_size"],
        state_path=state(number),
      )
      kept.add(found, shard.labels, time.perf_counter() - began)
    return kept.finish(num_classes)


class _LossChecks:
  """Checks whether the losses that attacks increase are blind, each once.

  Args:
    test: Images, on the host or on the disk.
  """

  def __init__(self, test: Split | Pictures):
    self._test = test
    self._read = test if isinstance(test, Split) else None
    self._found: dict[tuple[Any, ...], Diagnostic] = {}

  def check(self, one: Pending) -> Row:
    """Returns the diagnostic of a row's loss as a field; none without a loss.

    On the first batch, at random starts, with running statistics; AutoAttack
    checks the losses of its own attacks.
    """
    row, protocol = one.row, one.protocol
    loss, model = protocol.loss, row["model"]
    if loss is None or row["batch_norm"] != "running":
      return {}
    radius = 8 / 255  # as AutoAttack looks
    if protocol.norm == "linf" and protocol.epsilon is not None:
      radius = protocol.epsilon
    key = model, loss, radius
    if key not in self._found:
      images, labels = self._first(row["batch_size"])
      found = diagnostics.blind_loss(
        rng.stream(jax.random.key(row["seed"]), "blind"),
        one.classifier,
        as_floats(images),
        labels,
        loss=loss,
        radius=radius,
      )
      self._found[key] = rules.storable(found)
    return {"diagnostics": {"blind_loss": self._found[key]}}

  def _first(self, number: int) -> Split:
    """Returns the first test images."""
    enough = min(number, count(self._test))
    if self._read is None or len(self._read.labels) < enough:
      self._read = first_images(self._test, number)
    return self._read.first(number)


def _path(
  results: pathlib.Path | None, folder: str, row: Row, suffix: str
) -> pathlib.Path | None:
  """File of a row's progress, which goes on there after a kill.

  Another checkpoint, seed or epsilon makes another row, so another file.
  """
  if results is None:
    return None
  mark = zlib.crc32(identity(row).encode())
  name = f"{row['model']}-{row['batch_norm']}-{row['attack']}"
  name = re.sub(r"[^\w=.-]", "_", name)[:150]
  return results.parent / folder / f"{name}-{mark:08x}.{suffix}"


def _state_path(
  results: pathlib.Path | None, row: Row, shard: int | None = None
) -> pathlib.Path | None:
  """File of a row's AutoAttack, or of one shard of it."""
  suffix = "npz" if shard is None else f"{shard}.npz"
  return _path(results, "autoattack", row, suffix)


def _measure(
  classifier: Classifier,
  data: Split,
  *,
  protocol: Protocol,
  key: Array,
  batch_size: int,
  num_classes: int,
  state_path: pathlib.Path | None,
  mesh: Mesh,
  on_batch: Callable[[int], object],
  first_batch: int = 0,
) -> Row:
  """Measures the accuracy of a row, as a whole and class by class."""
  labels = sharding.to_host(mesh, data.labels)
  if protocol.attack == "autoattack":
    clean = accuracies.judge(
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
      as_floats(sharding.to_host(mesh, data.images)),
      labels,
      clean,
      protocol=protocol,
      batch_size=batch_size,
      num_classes=num_classes,
      state_path=state_path,
      mesh=mesh,
      on_batch=on_batch,
    )
  judged = accuracies.judge(
    key,
    classifier,
    data,
    protocol=protocol,
    batch_size=batch_size,
    mesh=mesh,
    on_batch=on_batch,
    first_batch=first_batch,
  )
  return {
    "accuracy": judged.accuracy,
    "class_accuracy": accuracies.by_class(judged.correct, labels, num_classes),
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
  clean: accuracies.Judged,
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
    "class_accuracy": accuracies.by_class(robust, labels, num_classes),
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
