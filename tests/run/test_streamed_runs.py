"""Runs whose pictures stay on the disk: training, resuming, evaluating."""

import json

import jax
import numpy as np
import picture_folders
import pytest
import tiny

from atat_jax import data, evaluation, pipeline, sharding, train
from atat_jax.config import make_plan
from atat_jax.data import Dataset
from atat_jax.errors import UserError
from atat_jax.evaluation import accuracies, measuring

pytest.importorskip("grain", reason="grain reads the pictures")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return picture_folders.write(
    tmp_path_factory.mktemp("set"), classes=3, train=14, test=5
  )


def configuration(root, method="at", **overrides):
  return tiny.config(
    method,
    **{
      "data__name": "folder",
      "data__dir": str(root),
      "data__stream": True,
      "data__size": 16,
      "data__padding": 0,
      "data__validation_size": 6,
      "data__shard_size": 8,
      "model__shortcut": "conv",
      "model__normalization": "dataset",
      "train__batch_size": 12,
      "train__log_every_steps": 2,
      "train__validate_every_epochs": 1.0,
      "evaluation__batch_norm": ("running",),
      "evaluation__batch_size": 4,
      "evaluation__num_examples": 0,
      **overrides,
    },
  )


def weights(workdir):
  from atat_jax import checkpoints

  variables = checkpoints.restore_model(workdir, which="last")[1]
  return jax.tree.leaves(variables)


def linear(images):
  """Classifies by the mean colour; attacks can change it."""
  return 8 * images.mean((1, 2))


def pending(table_rows, total, attacks="nominal,pgd3", size=4):
  protocols = evaluation.parse_list(
    attacks, epsilon=0.03, step_size=0.01, norm="linf", num_restarts=1
  )
  return [
    measuring.Pending(
      measuring.row_of(
        protocol,
        model="at",
        dataset="folder:set",
        num_examples=total,
        batch_norm="running",
        batch_size=size,
        seed=3,
        checkpoint_step=1,
      ),
      protocol,
      linear,
    )
    for protocol in protocols
  ]


def table(path):
  return measuring.ResultsTable(path, steps={"at": 1}, record={"config": {}})


def load(root):
  return data.load(
    "folder",
    data_dir=str(root),
    validation_size=3,
    size=12,
    streaming=data.Streaming(shard_size=8),
  )


RESULT = ("accuracy", "class_accuracy", "correct", "nonfinite")


def test_shards_give_the_rows_of_all_images_at_once(root, tmp_path):
  test = load(root).test
  mesh = sharding.make_mesh()
  rows = []
  for number, split in enumerate((test, test.decode())):
    (tmp_path / str(number)).mkdir()
    found = table(tmp_path / str(number) / "results.json")
    measuring.complete(
      found, pending(None, 15), split, num_classes=3, mesh=mesh
    )
    rows.append([{k: row[k] for k in RESULT} for row in found.content["rows"]])
  assert rows[0] == rows[1]
  assert len({row["accuracy"] for row in rows[0]}) > 1


def test_an_evaluation_that_was_stopped_measures_no_shard_twice(
  root, tmp_path, monkeypatch
):
  test, mesh = load(root).test, sharding.make_mesh()
  path = tmp_path / "results.json"
  rows = pending(None, 15, "pgd3")
  seen = []
  judge = accuracies.judge

  def stopping(*args, **fields):
    seen.append(fields["first_batch"])
    if len(seen) == 2:
      raise KeyboardInterrupt
    return judge(*args, **fields)

  monkeypatch.setattr(accuracies, "judge", stopping)
  with pytest.raises(KeyboardInterrupt):
    measuring.complete(table(path), rows, test, num_classes=3, mesh=mesh)
  assert not path.exists()
  (kept,) = (tmp_path / "shards").glob("*.json")
  assert len(json.loads(kept.read_text())["parts"]) == 1
  again = table(path)
  measuring.complete(again, rows, test, num_classes=3, mesh=mesh)
  assert seen == [0, 2, 2]
  fresh = table(None)
  measuring.complete(fresh, rows, test, num_classes=3, mesh=mesh)
  one, other = (found.content["rows"][0] for found in (again, fresh))
  assert {k: one[k] for k in RESULT} == {k: other[k] for k in RESULT}
  assert one["num_examples"] == 15
  # A part that was changed by hand is no result.
  path.unlink()
  kept.write_text(
    kept.read_text().replace('"nonfinite": 0', '"nonfinite": 7', 1)
  )
  with pytest.raises(UserError, match="checksum"):
    measuring.complete(table(path), rows, test, num_classes=3, mesh=mesh)


def test_fields_of_a_stream_are_checked_with_the_others(root):
  for field, value, message in (
    ("data__shard_size", 10, "data.shard_size: 10; allowed: multiples of 4"),
    ("data__size", 0, "data.size: 0 with stream=True"),
    ("data__extra", "x.npz", "data.extra: 'x.npz' with stream=True"),
    ("data__smallest_crop", 2.0, "data.smallest_crop: 2.0"),
  ):
    with pytest.raises(UserError) as error:
      make_plan(configuration(root, **{field: value}))
    assert str(error.value).startswith(message), str(error.value)


@pytest.mark.slow
def test_a_streamed_training_is_the_one_of_data_in_memory(root, tmp_path):
  config = configuration(root, data__smallest_crop=1.0)
  plan = make_plan(config)
  on_disk = plan.data.load()
  inside = Dataset(
    on_disk.spec,
    *(
      getattr(on_disk, split).decode()
      for split in ("train", "validation", "test")
    ),
  )
  mesh = sharding.make_mesh()
  found = []
  for name, dataset in (("disk", on_disk), ("memory", inside)):
    train.train(plan, tmp_path / name, dataset, mesh)
    found.append(weights(tmp_path / name))
  # Two programs round differently; another picture would show at once.
  for one, other in zip(*found, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_autoattack_counts_each_image_of_all_shards_once(root, tmp_path):
  test, mesh = load(root).test, sharding.make_mesh()
  found = table(tmp_path / "results.json")
  rows = pending(None, 15, "autoattack-fast")
  measuring.complete(found, rows, test, num_classes=3, mesh=mesh)
  row = found.content["rows"][0]
  whole = table(None)
  measuring.complete(whole, rows, test.decode(), num_classes=3, mesh=mesh)
  other = whole.content["rows"][0]
  # A linear classifier is attacked exactly, whatever the random numbers.
  assert row["correct"] == other["correct"]
  assert [one["attack"] for one in row["attacks"]] == [
    one["attack"] for one in other["attacks"]
  ]
  assert row["attacks"][-1]["accuracy"] == pytest.approx(row["accuracy"])
  assert len(list((tmp_path / "autoattack").glob("*.npz"))) == 2


@pytest.mark.slow
def test_twenty_classes_of_64_pixels_are_learnt_and_resumed_exactly(
  tmp_path, monkeypatch
):
  root = picture_folders.write(
    tmp_path / "set", classes=20, train=34, test=5, size=(80, 72)
  )

  def config():
    return configuration(
      root,
      data__size=64,
      data__smallest_crop=0.25,
      data__validation_size=40,
      data__shard_size=20,
      train__batch_size=16,
      train__num_epochs=1,
      train__validate_every_epochs=0.5,
      train__log_every_steps=8,
      evaluation__batch_size=20,
      evaluation__attacks="nominal,pgd2",
      evaluation__epsilon=4 / 255,
      objective__epsilon=4 / 255,
    )

  through, stopped = tmp_path / "through", tmp_path / "stopped"
  pipeline.run("run", config(), through)
  lines = [
    json.loads(line)
    for line in (through / "metrics.jsonl").read_text().splitlines()
  ]
  losses = [line["loss"] for line in lines if line["split"] == "train"]
  assert losses[-1] < losses[0] - 0.2, losses
  assert all(
    0 <= line["input_wait"] <= 1 for line in lines if line["split"] == "train"
  )

  seen = []
  follow = data.streamed.TrainingBatches.follow

  def failing(self, number):
    if number == 22:
      raise KeyboardInterrupt
    seen.append(number)
    return follow(self, number)

  with monkeypatch.context() as patch:
    patch.setattr(data.streamed.TrainingBatches, "follow", failing)
    with pytest.raises(KeyboardInterrupt):
      pipeline.run("train", config(), stopped)
  pipeline.run("train", config(), stopped)
  for one, other in zip(weights(through), weights(stopped), strict=True):
    np.testing.assert_array_equal(one, other)
  rows = json.loads((through / "results.json").read_text())["rows"]
  assert {row["num_examples"] for row in rows} == {100}
