"""Evaluation: each network under every protocol, into `results.json`."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from atat_jax import (
  analyses,
  checkpoints,
  models,
  sharding,
)
from atat_jax.data import Dataset, Split
from atat_jax.errors import in_section
from atat_jax.evaluation import corrupted, measuring
from atat_jax.plan import Plan
from atat_jax.runs import files, provenance, wording
from atat_jax.typing import BatchNormMode, Classifier, Variables

_log = logging.getLogger(__name__)


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


def open_corrupted(plan: Plan, test: Split) -> corrupted.Corrupted | None:
  """Opens the corrupted images of a plan and compares them with the clean ones.

  Args:
    plan: Plan of the run.
    test: The test split.

  Returns:
    The images of the evaluation; None where the plan has none.

  Raises:
    UserError: They are missing, damaged, or made of other images.
  """
  settings = plan.evaluation
  if not settings.corruptions:
    return None
  source = plan.open_corruptions()
  name = plan.data.spec.name
  if source is not None:
    with in_section("evaluation"):
      source.check_labels(test.labels, name)
  first = _evaluated(plan, test)
  return corrupted.Corrupted(first, name, settings.seed, source)


def _evaluated(plan: Plan, test: Split) -> Split:
  """Returns the images of a test split that are evaluated."""
  count = plan.evaluation.num_examples or len(test.labels)
  return Split(*(array[:count] for array in test))


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
    UserError: A checkpoint is missing or of another network; corrupted images
      cannot be used; the test split lacks an image that an analysis is to
      show.
  """
  settings = plan.evaluation
  found = find_checkpoints(plan, workdir)
  corrupted_images = open_corrupted(plan, dataset.test)
  with in_section("figures"):
    figures = analyses.for_images(plan.figures, len(dataset.test.labels))
  networks = {}
  for role in plan.evaluated:
    directory, chosen = found[role]
    model, variables = checkpoints.restore_model(
      directory, step=chosen.step, expected=plan.model_spec
    )
    networks[role] = (model, sharding.put_replicated(mesh, variables))
  steps = {role: chosen.step for role, (_, chosen) in found.items()}
  classifiers = {
    (role, mode): models.classifier(*network, batch_norm=mode)
    for role, network in networks.items()
    for mode in settings.batch_norm
  }
  _tell_left_out(plan)
  table = measuring.ResultsTable(
    workdir / files.RESULTS, steps=steps, record=_record(plan, found, networks)
  )
  _complete(table, plan, classifiers, dataset.test, mesh)
  if corrupted_images is not None:
    sizes = {mode: settings.size_of_batch(mode) for mode in settings.batch_norm}
    corrupted.complete(
      table, classifiers, corrupted_images, batch_sizes=sizes, mesh=mesh
    )
  analyses.write(
    workdir,
    networks,
    dataset.test.images,
    dataset.test.labels,
    settings=figures,
    class_names=plan.data.spec.class_names,
    mesh=mesh,
  )
  return table.content


def _record(
  plan: Plan,
  found: Mapping[str, tuple[pathlib.Path, checkpoints.Chosen]],
  networks: Mapping[str, tuple[Any, Variables]],
) -> dict[str, Any]:
  """Returns the record of a run: what it was made of, where and when."""
  return provenance.record(
    [device.device_kind for device in jax.devices()],
    config=plan.record,
    class_names=list(plan.data.spec.class_names),
    checkpoints={role: chosen._asdict() for role, (_, chosen) in found.items()},
    num_parameters={
      role: sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      for role, (_, variables) in networks.items()
    },
  )


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


def _complete(
  table: measuring.ResultsTable,
  plan: Plan,
  classifiers: Mapping[tuple[str, BatchNormMode], Classifier],
  test: Split,
  mesh: Mesh,
) -> None:
  """Measures the rows that a table lacks."""
  settings = plan.evaluation
  test = _evaluated(plan, test)
  pending = [
    measuring.Pending(
      measuring.row_of(
        protocol,
        model=role,
        dataset=plan.data.spec.name,
        split="test",
        num_examples=len(test.labels),
        batch_norm=mode,
        batch_size=settings.size_of_batch(mode),
        seed=settings.seed,
        checkpoint_step=table.steps[role],
      ),
      protocol,
      classifier,
    )
    for (role, mode), classifier in classifiers.items()
    for protocol in settings.protocols_of(mode)
  ]
  table.expect([one.row for one in pending])
  _tell_order(plan)
  asked = plan.evaluated[-1]
  measuring.complete(
    table,
    # The network that was trained, as it is deployed, before all others.
    sorted(pending, key=lambda one: not _is_asked(one.row, asked)),
    test,
    num_classes=plan.data.spec.num_classes,
    mesh=mesh,
  )


def _is_asked(row: measuring.Row, model: str) -> bool:
  return (row["model"], row["batch_norm"]) == (model, "running")


def _tell_order(plan: Plan) -> None:
  """Says what is measured first, what else, and how to leave that out."""
  *others, asked = plan.evaluated
  more = {}
  if "batch" in plan.evaluation.batch_norm:
    more["batch statistics"] = "--config.evaluation.batch_norm=running"
  if others:
    more[f"the {wording.listed(others)}"] = "--config.evaluation.teacher=false"
  if more and "running" in plan.evaluation.batch_norm:
    _log.info(
      "evaluate: %s with running statistics first; then %s; without: %s",
      asked,
      wording.listed(list(more)),
      wording.listed(list(more.values())),
    )
