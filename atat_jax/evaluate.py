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
  evaluation,
  models,
  sharding,
)
from atat_jax.data import Dataset, Pictures, Split
from atat_jax.data.base import count, first_images
from atat_jax.errors import UserError, in_section
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


def open_corrupted(
  plan: Plan, test: Split | Pictures
) -> corrupted.Corrupted | None:
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
  if not isinstance(test, Split):
    raise UserError(
      f"evaluation.corruptions: {settings.corruptions!r} with data.stream=True;"
      " allowed: none, as they are made of images in memory"
    )
  source = plan.open_corruptions()
  name = plan.data.spec.name
  if source is not None:
    with in_section("evaluation"):
      source.check_labels(test.labels, name)
  first = test.first(settings.num_examples or len(test.labels))
  return corrupted.Corrupted(first, name, settings.seed, source)


def _evaluated(plan: Plan, test: Split | Pictures) -> Split | Pictures:
  """Returns the images of a test split that are evaluated."""
  number = plan.evaluation.num_examples or count(test)
  if isinstance(test, Split):
    return test.first(number)
  return test.select(slice(number))


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
    figures = analyses.for_images(plan.figures, dataset.num_test)
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
  needed = analyses.num_images(figures, dataset.num_test)
  analyses.write(
    workdir,
    networks,
    *first_images(dataset.test, needed),
    settings=figures,
    class_names=plan.data.spec.class_names,
    mesh=mesh,
  )
  return table.content


def _sharding(
  test: Split | Pictures, protocol: evaluation.Protocol
) -> dict[str, int]:
  """Field of a row whose random numbers depend on the shards."""
  if isinstance(test, Split) or protocol.attack != "autoattack":
    return {}
  return {"shard_size": test.options.shard_size}


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
  test: Split | Pictures,
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
        num_examples=count(test),
        batch_norm=mode,
        batch_size=settings.size_of_batch(mode),
        seed=settings.seed,
        checkpoint_step=table.steps[role],
        **_sharding(test, protocol),
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
