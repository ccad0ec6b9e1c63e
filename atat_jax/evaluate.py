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
from atat_jax.errors import in_section
from atat_jax.evaluation import measuring
from atat_jax.plan import Plan
from atat_jax.runs import files, provenance, wording
from atat_jax.typing import BatchNormMode, Classifier

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
    figures = analyses.for_images(plan.figures, dataset.num_test)
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
  table = measuring.ResultsTable(
    workdir / files.RESULTS, steps=steps, record=record
  )
  _complete(table, plan, classifiers, dataset.test, mesh)
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
  number = settings.num_examples or count(test)
  test = (
    Split(*(array[:number] for array in test))
    if isinstance(test, Split)
    else test.select(slice(number))
  )
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
  num_classes = plan.data.spec.num_classes
  measuring.complete(table, pending, test, num_classes=num_classes, mesh=mesh)
