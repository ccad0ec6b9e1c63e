"""A small training and evaluation, alone or as one process of a job.

As a program it joins its job as the environment says, and writes what it found
to the folder that it is given: process 0 all numbers, the others nothing. With
the address of a folder on an object store, its checkpoints go there and its
state is split; the store is a local folder, or a server that the environment
names.
"""

import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import object_store
import optax
import pytest
import quick
from flax import linen as nn

from atat_jax import (
  checkpoints,
  compilation,
  evaluation,
  models,
  objectives,
  runtime,
  sharding,
  state,
  steps,
)
from atat_jax.data.base import Split
from atat_jax.training import draws
from atat_jax.training.writer import MetricsWriter

NUM_STEPS, BATCH, IMAGES = 3, 8, 19


class Net(nn.Module):
  """One convolution with BatchNorm."""

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    x = nn.Conv(4, (3, 3), 2, name="conv")(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
    return nn.Dense(3, name="head")(nn.tanh(x).mean((1, 2)))


def data() -> Split:
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (IMAGES, 6, 6, 1), dtype=np.uint8)
  return Split(images, generator.integers(0, 3, IMAGES).astype(np.int32))


def work(
  mesh: jax.sharding.Mesh, folder: pathlib.Path, saved_to: str | None = None
) -> dict[str, Any]:
  """Trains, saves, restores and evaluates; returns all numbers.

  Args:
    mesh: The devices.
    folder: Folder for its files.
    saved_to: Working directory of its checkpoints; None: `folder`.
  """
  options = compilation.compiler_options() | quick.OPTIONS
  compilation.compiler_options = lambda **_: options
  model, held = Net(), data()
  objective = objectives.create("at", epsilon=0.1, step_size=0.05, num_steps=2)
  optimizer = optax.sgd(0.1, momentum=0.9)
  fresh = state.create(
    model,
    optimizer,
    jax.random.key(1),
    jnp.zeros((1, 6, 6, 1)),
    metric_names=steps.metric_names(objective),
    term_names=steps.term_names(objective),
  )
  current = sharding.put_state(mesh, fresh)
  images = sharding.put_replicated(mesh, held)
  step = steps.make_train_step(
    model, objective, optimizer, mesh=mesh, num_classes=3
  )
  drawn = draws.BatchDraws(
    0,
    num_examples=IMAGES,
    batch_size=BATCH,
    num_extra=0,
    extra=None,
    mesh=mesh,
  )
  with MetricsWriter(folder, 0) as metrics:
    for number in range(NUM_STEPS):
      current = step(current, None, images, drawn.indices([number]))
    found = jax.tree.map(np.asarray, sharding.to_host(mesh, current.sums))
    metrics.write("train", NUM_STEPS, {"loss": float(found["loss"][0])})
  split = [
    not leaf.sharding.is_fully_replicated
    for leaf in jax.tree.leaves((current.params, current.opt_state))
  ]
  saved = sharding.to_host(mesh, state.variables(current))
  current = _saved_and_restored(current, saved_to or folder)
  variables = sharding.to_host(mesh, state.variables(current))
  for one, other in zip(*map(jax.tree.leaves, (saved, variables)), strict=True):
    np.testing.assert_array_equal(one, other)
  judged, counted = _judge(mesh, model, state.variables(current), images)
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  return {
    **{jax.tree_util.keystr(path): leaf for path, leaf in leaves},
    **{f"sum of {name}": np.asarray(x) for name, x in found.items()},
    "correct": judged.correct,
    "counted": np.array(counted),
    "split": np.array(sum(split)),
  }


def _saved_and_restored(current: Any, place: pathlib.Path | str) -> Any:
  spec = {"name": "net", "fields": {}, "image_shape": [6, 6, 1]}
  with checkpoints.Checkpointer(place, spec) as checkpointer:
    checkpointer.save(current, NUM_STEPS, 0.5)
  with checkpoints.Checkpointer(place, spec) as checkpointer:
    return checkpointer.restore(current, checkpointer.latest_step())


def _judge(
  mesh: jax.sharding.Mesh, model: nn.Module, variables: Any, images: Split
) -> tuple[Any, list[int]]:
  counted: list[int] = []
  judged = evaluation.judge(
    jax.random.key(2),
    models.classifier(model, variables),
    images,
    protocol=evaluation.parse("pgd2", epsilon=0.1, step_size=0.05),
    batch_size=BATCH,
    mesh=mesh,
    on_batch=counted.append,
  )
  return judged, counted


def main(folder: pathlib.Path, saved_to: str | None = None) -> None:
  if saved_to and "AWS_ENDPOINT_URL" not in os.environ:
    object_store.install(pytest.MonkeyPatch(), folder.parent / "store")
  with runtime.plain_exits(folder):
    runtime.set_up(distributed=True, wait_seconds=300)
    mesh = sharding.make_mesh()
    if saved_to:
      sharding._SMALLEST = 12
      mesh = sharding.split_mesh(mesh, mesh.size)
    found = work(mesh, folder, saved_to)
    if jax.process_index() == 0:
      np.savez(folder / "found.npz", **found)


if __name__ == "__main__":
  from atat_jax.process import commands

  commands.begin("stopped")
  main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
