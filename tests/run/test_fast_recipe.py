"""The recipe `fast` of every method: its programs are traced, and it trains."""

import pathlib

import jax
import minimal
import numpy as np
import pytest
import tiny

from atat_jax import checkpoints, config, objectives, sharding, train
from atat_jax.data import Dataset, Split
from atat_jax.data.cifar import CIFAR10
from atat_jax.trial import rehearsal

NARROW = {"model.base_channels": 2, "train.batch_size": 64}


def load(method, **fields):
  made = tiny.load_config("cifar10", f"{method},fast")
  made.update_from_flattened_dict(fields)
  return made


def test_fast_trains_in_groups_of_steps_and_averages(monkeypatch, tmp_path):
  minimal.register_data_set(monkeypatch)
  minimal.register_network(monkeypatch)
  made = load(
    "at",
    **{
      "data.name": "minimal",
      "data.validation_size": 144,
      "model.name": "minimal",
      "train.batch_size": 64,
      "train.num_epochs": 5,
      "evaluation.attacks": "nominal",
    },
  )
  made.evaluation.batch_norm = ("running",)
  tiny.run(tmp_path, "train", made)
  steps = 5 * (256 // 64)  # fewer than an interval of the recipe: one of each
  lines = {
    line["split"]: line for line in tiny.metrics(tmp_path / "metrics.jsonl")
  }
  assert {name: line["step"] for name, line in lines.items()} == {
    "train": steps,
    "validation": steps,
  }
  assert "accuracy_fgsm" in lines["validation"]  # the alarm is on
  _, averaged = checkpoints.restore_model(tmp_path, which="last")
  _, trained = checkpoints.restore_model(tmp_path, which="last", averaged=False)
  distances = jax.tree.map(lambda a, b: np.abs(a - b).max(), averaged, trained)
  assert max(jax.tree.leaves(distances)) > 0


@pytest.fixture(scope="module")
def images():
  generator = np.random.default_rng(0)
  shape = (600, *CIFAR10.image_shape)
  pixels = generator.integers(0, 256, shape).astype(np.uint8)
  split = Split(pixels, generator.integers(0, 10, 600).astype(np.int32))
  return Dataset(CIFAR10, split, split, split)


@pytest.mark.slow
@pytest.mark.parametrize("method", objectives.OBJECTIVES)
def test_every_program_of_fast_can_be_traced(method, images):
  plan = config.make_plan(load(method))
  train.check_sizes(plan, images)
  mesh = sharding.make_mesh(jax.devices()[:1])
  rehearsal.rehearse(plan, pathlib.Path("nowhere"), images, mesh)


@pytest.mark.slow
def test_two_steps_of_the_network_of_fast_learn(images, tmp_path):
  made = load("trades", **NARROW)
  (stage,) = config.make_plan(made).stages
  plan = config.make_plan(made)
  mesh = sharding.make_mesh(jax.devices()[:1])
  outline = train.make_outline(plan, stage, tmp_path, 2 * stage.batch_size)
  with tiny.quick_programs():
    prepared = train.prepare(plan, stage, None, images, mesh, None, outline)
    current = prepared.start([])
    before = jax.tree.map(np.asarray, current.params)
    current = prepared.programs.take_steps(current, range(2), None)
  assert int(current.step) == 2
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, current.params)
  assert all(one < 1 for one in jax.tree.leaves(moved))  # and none is NaN
  for layer in ("stem", "stage1_unit1_conv1", "stage4_unit2_conv2", "head"):
    assert moved[layer]["kernel"] > 0, layer
