"""Runs and data on an object store."""

import json

import fsspec
import jax
import numpy as np
import object_store
import picture_folders
import pytest
import tiny

from atat_jax import checkpoints, data, pipeline
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, inventory, locations, lock


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """Folder of the bucket gs://bucket, and what was written to it."""
  root = tmp_path / "store"
  (root / "bucket").mkdir(parents=True)
  written = object_store.install(monkeypatch, root)
  yield root / "bucket", written
  object_store.remove()


def test_what_is_written_is_read_again(bucket):
  folder, written = bucket
  run = locations.find("workdir", "gs://bucket/run/")
  files.write_json(run / "a.json", {"x": 1}, sealed=True)
  files.write_arrays(run / "a.npz", {"y": np.arange(3)})
  assert files.read_json(run / "a.json") == {"x": 1}
  assert files.read_json("gs://bucket/run/a.json") == {"x": 1}
  assert files.read_arrays(run / "a.npz")["y"].tolist() == [0, 1, 2]
  # Each in one piece, and nothing beside it.
  assert written == ["bucket/run/a.json", "bucket/run/a.npz"]
  assert files.read_json(run / "b.json") is None
  assert files.read_arrays(run / "b.npz") is None
  (folder / "run" / "a.json").write_text('{"x": 2}')
  assert files.read_json(run / "a.json") == {"x": 2}
  with pytest.raises(UserError, match=r"a\.json: 8 bytes; allowed: at most 3"):
    files.read_bytes(run / "a.json", 3)
  with pytest.raises(RuntimeError), files.replacing(run / "a.npz") as path:
    path.write_bytes(b"half")
    raise RuntimeError
  assert files.read_arrays(run / "a.npz")["y"].tolist() == [0, 1, 2]
  moved = files.set_aside(run / "a.npz", run)
  assert str(moved) == "gs://bucket/run/damaged/a.npz"
  assert files.read_arrays(run / "a.npz") is None
  assert files.read_arrays(moved)["y"].tolist() == [0, 1, 2]


def test_lines_are_sent_when_they_must_be_safe(bucket, monkeypatch):
  folder, _ = bucket
  path = locations.find("workdir", "gs://bucket/run") / "m.jsonl"
  lines = [b'{"split": "train", "step": %d}\n' % step for step in range(5)]
  one = files.Appender(path)
  one.write(lines[0], sync=False)
  assert not (folder / "run" / "m.jsonl").exists()
  one.write(lines[1], sync=True)
  assert len(files.read_metrics(path)["train"]) == 2
  monkeypatch.setattr(files, "SEND_EVERY", -1.0)
  one.write(lines[2], sync=False)
  assert len(files.read_metrics(path)["train"]) == 3
  monkeypatch.undo()
  two = files.Appender(path)
  two.write(lines[3], sync=False)
  two.close()
  assert (folder / "run" / "m.jsonl").read_bytes() == b"".join(lines[:4])


def test_a_folder_keeps_its_inventory_and_says_that_it_has_no_lock(
  bucket, caplog
):
  folder, _ = bucket
  run = locations.find("workdir", "gs://bucket/run")
  files.write_bytes(run / "part" / "a", b"one")
  files.write_bytes(run / "part" / "b" / "c", b"two")
  inventory.write(run, {"step": 1})
  inventory.check(run, {"step": 1})
  (folder / "run" / "part" / "b" / "c").write_bytes(b"TWO")
  with pytest.raises(DamagedFileError, match="part/b/c: not what was written"):
    inventory.check(run, {"step": 1})
  with lock.directory("workdir", run) as held:
    held.check()
  assert "object stores have no locks" in caplog.text


def test_data_are_read_from_a_bucket(bucket, tmp_path):
  folder, _ = bucket
  picture_folders.write(folder / "set", classes=2, train=4, test=2)
  there, here = (
    data.load(
      "folder",
      data_dir=place,
      cache_dir=str(tmp_path / "cache"),
      validation_size=2,
      size=8,
    )
    for place in ("s3://bucket/set", str(folder / "set"))
  )
  assert there.spec == here.spec
  for split in ("train", "validation", "test"):
    for one, other in zip(
      getattr(there, split), getattr(here, split), strict=True
    ):
      assert np.array_equal(one, other)
  streamed = data.Streaming()
  pytest.importorskip("grain", reason="grain reads the pictures")
  found = [
    data.load(
      "folder",
      data_dir=place,
      validation_size=2,
      size=8,
      streaming=streamed,
    ).test.decode()
    for place in ("gs://bucket/set", str(folder / "set"))
  ]
  assert np.array_equal(found[0].images, found[1].images)
  with pytest.raises(UserError, match="without gs://"):
    data.load("cifar10", data_dir="gs://bucket/set")


def test_what_cannot_be_reached_is_one_line_with_a_remedy(bucket, monkeypatch):
  find = locations.find
  for address, message in (
    ("gs://other/run", "'gs://other/run' cannot be reached"),
    ("gs://", "allowed: a path on this machine, or gs://<bucket>/<folder>"),
    ("gs:/bucket/run", "allowed: a path on this machine"),
    ("ftp://bucket/run", "allowed: a path on this machine"),
  ):
    with pytest.raises(UserError) as error:
      find("workdir", address)
    assert message in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(UserError, match=r"or gs://<bucket>/<folder>$"):
    checkpoints.find("s3://bucket/run")

  def missing(name):
    raise ImportError(name)

  locations._reach.cache_clear()
  monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
  with pytest.raises(UserError, match="the Python package gcsfs: pip install"):
    find("workdir", "gs://bucket/run")
  with pytest.raises(UserError, match="the Python package s3fs: pip install"):
    find("workdir", "s3://bucket/run")


def _weights(workdir):
  return jax.tree.leaves(
    checkpoints.restore_model(workdir, which="last")[1]["params"]
  )


@pytest.mark.slow
def test_a_run_on_a_bucket_is_the_run_on_a_disk(bucket, tmp_path, monkeypatch):
  folder, written = bucket
  config = tiny.config("at", evaluation__batch_norm=("running",))
  run = locations.find("workdir", "gs://bucket/run")
  monkeypatch.chdir(tmp_path)
  save = checkpoints.Checkpointer.save
  steps = []

  def failing(self, state, step, *rest):
    if step == 15 and 15 not in steps:
      steps.append(step)
      raise KeyboardInterrupt
    save(self, state, step, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Checkpointer, "save", failing)
    with pytest.raises(KeyboardInterrupt):
      pipeline.run("train", config, run)
  # A save that a kill has cut off has no mark.
  (folder / "run" / "checkpoints" / "17" / "params").mkdir(parents=True)
  (folder / "run" / "checkpoints" / "17" / "params" / "x").write_text("x")
  assert checkpoints.find(run).step in (5, 10)
  pipeline.run("run", config, run)
  pipeline.run("run", config, tmp_path / "disk")
  for one, other in zip(
    _weights(run), _weights(tmp_path / "disk"), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  there, here = (
    json.loads((place / "results.json").read_text())["rows"]
    for place in (folder / "run", tmp_path / "disk")
  )
  assert [row["correct"] for row in there if "correct" in row] == [
    row["correct"] for row in here if "correct" in row
  ]
  for name in ("config.json", "metrics.jsonl", "report.html"):
    assert (folder / "run" / name).stat().st_size
  lines, others = (
    [
      json.loads(x)
      for x in (place / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    for place in (folder / "run", tmp_path / "disk")
  )
  assert [line["step"] for line in lines] == [line["step"] for line in others]
  assert list((folder / "run" / "tensorboard").iterdir())
  assert not (tmp_path / "gs:").exists()
  before = len(written)
  pipeline.run("run", config, run)
  assert not [x for x in written[before:] if "checkpoints" in x]
