"""Training states split over the axis `model`: the numbers of whole ones."""

import json

import jax
import numpy as np
import pytest
import tiny
import two_processes

from atat_jax import checkpoints, compilation, sharding
from atat_jax.errors import UserError
from atat_jax.state import TrainState

pytest_plugins = ("tiny",)


def test_a_mesh_is_split_as_often_as_it_divides(eight_devices):
  mesh = sharding.make_mesh(eight_devices)
  assert sharding.split_mesh(mesh, 1) is mesh
  split = sharding.split_mesh(mesh, 4)
  assert split.shape == {"data": 2, "model": 4} and split.size == 8
  assert split.devices.ravel().tolist() == eight_devices
  with pytest.raises(
    UserError, match=r"^model_axis: 3 on 8 devices; allowed: 1, 2, 4, 8$"
  ):
    sharding.split_mesh(mesh, 3)


def test_a_batch_is_split_over_both_axes(eight_devices):
  mesh = sharding.split_mesh(sharding.make_mesh(eight_devices), 2)
  rows = np.arange(16)
  found = sharding.put_batch(mesh, rows)
  parts = sorted(
    (part.data.tolist() for part in found.addressable_shards),
    key=lambda p: p[0],
  )
  assert parts == rows.reshape(8, 2).tolist()


def test_large_arrays_are_split_along_their_longest_side(eight_devices):
  mesh = sharding.split_mesh(sharding.make_mesh(eight_devices), 4)
  large, odd, small = np.zeros((3, 64, 128)), np.zeros((99, 99)), np.zeros(64)
  state = TrainState(
    step=small,
    params={"large": large, "odd": odd, "small": small},
    batch_stats={"large": large},
    opt_state=({"large": large},),
    rng=small,
    sums={},
    nonfinite={},
    ema={"params": {"large": large}},
  )
  put = sharding.put_state(mesh, state)

  def part(array):
    return array.addressable_shards[0].data.shape

  split = [put.params, put.opt_state[0], put.ema["params"]]
  assert [part(tree["large"]) for tree in split] == [(3, 64, 32)] * 3
  assert part(put.params["odd"]) == (99, 99)
  assert part(put.params["small"]) == (64,)
  assert part(put.batch_stats["large"]) == (3, 64, 128)


def test_a_training_whose_state_is_split_is_that_of_a_whole_one(
  eight_devices, tmp_path, monkeypatch
):
  """Steps, checkpoint, restored state and evaluation, of a small network."""
  monkeypatch.setattr(compilation, "compiler_options", dict)  # put back
  monkeypatch.setattr(sharding, "_SMALLEST", 12)
  whole = sharding.make_mesh(eight_devices)
  one, other = (
    two_processes.work(mesh, tmp_path / name)
    for name, mesh in (
      ("whole", whole),
      ("split", sharding.split_mesh(whole, 4)),
    )
  )
  # Both kernels, and their momentum.
  assert (int(one.pop("split")), int(other.pop("split"))) == (0, 4)
  for name, array in one.items():
    if array.dtype.kind == "f":
      np.testing.assert_allclose(other[name], array, 1e-4, 1e-5, name)
    else:
      np.testing.assert_array_equal(other[name], array, name)


@pytest.mark.slow
def test_a_run_whose_state_is_split_is_that_of_a_whole_one(
  eight_devices, tmp_path
):
  """Training, checkpoints, resume and evaluation; and split again."""
  more = {
    "model__activation": "silu",  # no kinks, no signs: see test_hosts.py
    "objective__norm": "l2",
    "objective__epsilon": 1.0,
    "objective__step_size": 0.5,
    "train__learning_rate": 0.01,
    "train__ema_decay": 0.9,
    "evaluation__attacks": "nominal,pgd2",
    "evaluation__batch_norm": ("running",),
    "figures__analyses": "",
  }
  for name, axis in (("whole", 1), ("split", 4)):
    made = tiny.config("at", **more, model_axis=axis)
    tiny.run(tmp_path / name, "run", made, num_devices=8)
  one, other = (
    checkpoints.restore_model(tmp_path / name, step=20)[1]
    for name in ("whole", "split")
  )
  for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()
  first, second = (
    json.loads((tmp_path / name / "results.json").read_text())["rows"]
    for name in ("whole", "split")
  )
  for a, b in zip(first, second, strict=True):
    assert abs(a["accuracy"] - b["accuracy"]) <= 1 / tiny.NUM_TEST
