"""Runs and data on an object store."""

import os
import signal
import subprocess
import sys

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import object_store
import picture_folders
import pytest
import tiny
from fsspec.implementations.dirfs import DirFileSystem

from atat_jax import checkpoints, data, pipeline, state
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
    (
      "gs://",
      "allowed: a path on this machine, or gs://<bucket>/<folder> or"
      " s3://<bucket>/<folder>",
    ),
    ("gs:/bucket/run", "allowed: a path on this machine"),
    ("ftp://bucket/run", "allowed: a path on this machine"),
  ):
    with pytest.raises(UserError) as error:
      find("workdir", address)
    assert message in str(error.value) and "\n" not in str(error.value)

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


def _state(step):
  return state.TrainState(
    step=jnp.int32(step),
    params={"w": jnp.full((4, 3), step, jnp.float32)},
    batch_stats={},
    opt_state=(jnp.float32(step),),
    rng=jax.random.key(step),
    ema=None,
    sums={"loss": (jnp.float32(0), jnp.float32(0))},
    nonfinite={"loss": jnp.int32(-1)},
  )


def _numbers(found):
  leaves = jax.tree.leaves(found.replace(rng=jax.random.key_data(found.rng)))
  return [np.asarray(leaf).tolist() for leaf in leaves]


SPEC = {"name": "net", "fields": {}, "image_shape": [4, 4, 1]}


def test_copied_checkpoints_are_those_that_a_disk_keeps(bucket, tmp_path):
  folder, written = bucket
  for place in ("s3://bucket/run", tmp_path / "disk"):
    with checkpoints.Checkpointer(place, SPEC) as checkpointer:
      for step, accuracy in ((2, 0.5), (4, 0.75), (6, None), (8, 0.5)):
        checkpointer.save(_state(step), step, accuracy, {"nominal": 1.0})
    with checkpoints.Checkpointer(place, SPEC) as checkpointer:
      checkpointer.save(_state(10), 10, 0.75)
      checkpointer.save(_state(12), 12, 0.0)
      assert checkpointer.latest_step() == 12
      found = checkpointer.restore(_state(0), 12)
    assert _numbers(found) == _numbers(_state(12))
    assert checkpoints.find(place) == (10, "best")
  there, here = (
    sorted(
      path.name for path in (place / "checkpoints").iterdir() if path.is_dir()
    )
    for place in (folder / "run", tmp_path / "disk")
  )
  assert [name for name in here if name.isdigit()] == there == ["10", "12"]
  assert written[-1] == "bucket/run/checkpoints/12/commit_success.txt"


@pytest.mark.parametrize("last", ["first", "checksums.json", "success.txt"])
def test_a_checkpoint_that_was_sent_in_part_never_counts(
  bucket, monkeypatch, last
):
  folder, _ = bucket
  place = "s3://bucket/run"
  opened = DirFileSystem.open

  def killing(self, path, mode="rb", **fields):
    if mode == "wb" and (last == "first" or path.endswith(last)):
      raise KeyboardInterrupt
    return opened(self, path, mode=mode, **fields)

  with checkpoints.Checkpointer(place, SPEC) as checkpointer:
    checkpointer.save(_state(1), 1, 0.5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(DirFileSystem, "open", killing)
      checkpointer.save(_state(2), 2, 0.9)
  half = folder / "run" / "checkpoints" / "2"
  assert half.exists() == (last != "first")
  assert checkpoints.find(place) == (1, "best")
  with checkpoints.Checkpointer(place, SPEC) as checkpointer:
    assert checkpointer.latest_step() == 1 and not half.exists()
    checkpointer.save(_state(2), 2, 0.9)
  assert checkpoints.find(place) == (2, "best")


def test_a_checkpoint_that_was_removed_in_part_never_counts(
  bucket, monkeypatch
):
  folder, _ = bucket
  place = "s3://bucket/run"

  def killed(self, *args, **fields):
    raise KeyboardInterrupt

  with checkpoints.Checkpointer(place, SPEC) as checkpointer:
    for step in (1, 2):
      checkpointer.save(_state(step), step, 0.1 * step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(type(checkpointer.directory), "rmtree", killed)
      patch.setattr(checkpoints.copies, "send", lambda *_: None)
      checkpointer.save(_state(3), 3, 0.9)
  assert (folder / "run" / "checkpoints" / "1" / "params").is_dir()
  with pytest.raises(UserError, match="allowed: 2"):
    checkpoints.find(place, step=1)


@pytest.fixture
def server(monkeypatch):
  """Bucket of a server that speaks S3's protocol, reached by s3fs."""
  pytest.importorskip("s3fs", reason="pip install s3fs 'moto[server]'")
  servers = pytest.importorskip(
    "moto.server", reason="pip install moto[server]"
  )
  running = servers.ThreadedMotoServer(port=0, verbose=False)
  running.start()
  host, port = running.get_host_and_port()
  for name, value in (
    ("ENDPOINT_URL", f"http://{host}:{port}"),
    ("ACCESS_KEY_ID", "x"),
    ("SECRET_ACCESS_KEY", "x"),
    ("DEFAULT_REGION", "us-east-1"),
  ):
    monkeypatch.setenv(f"AWS_{name}", value)
  object_store.remove()
  fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
  yield
  object_store.remove()
  running.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("store", "scheme"), [("bucket", "gs"), ("bucket", "s3"), ("server", "s3")]
)
def test_a_run_on_a_bucket_is_the_run_on_a_disk(
  store, scheme, request, tmp_path, monkeypatch
):
  request.getfixturevalue(store)
  config = tiny.config("at", evaluation__batch_norm=("running",))
  run = locations.find("workdir", f"{scheme}://bucket/run")
  disk = tmp_path / "disk"
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
  (run / "checkpoints" / "17" / "params").mkdir(parents=True)
  (run / "checkpoints" / "17" / "params" / "x").write_text("x")
  assert checkpoints.find(run).step in (5, 10)
  pipeline.run("run", config, run)
  assert not (run / "checkpoints" / "17").exists()
  pipeline.run("run", config, disk)
  for one, other in zip(_weights(run), _weights(disk), strict=True):
    np.testing.assert_array_equal(one, other)
  there, here = (
    [
      row["correct"]
      for row in files.read_results(place)["rows"]
      if "correct" in row
    ]
    for place in (run, disk)
  )
  assert there == here
  for name in ("config.json", "metrics.jsonl", "report.html"):
    assert files.stamp(run / name)[1]
  lines, others = (
    files.read_metrics(place / "metrics.jsonl") for place in (run, disk)
  )
  for split in ("train", "validation"):
    assert [x["step"] for x in lines[split]] == [
      x["step"] for x in others[split]
    ]
  assert list((run / "tensorboard").iterdir())
  assert not (tmp_path / f"{scheme}:").exists()
  before = _stamps(run)
  pipeline.run("run", config, run)
  assert _stamps(run) == before


def _stamps(run):
  """Time and size of everything in the folder of checkpoints."""
  return {
    str(place / name): files.stamp(place / name)
    for place, names in locations.walk(run / "checkpoints")
    for name in names
  }


def _sent(store):
  """Steps of which objects are on the server, and those that are complete."""
  place = "bucket/run/checkpoints"
  parts = [path.split("/") for path in store.find(place) if path.count("/") > 3]
  ends = {part[3] for part in parts if part[4:] == ["commit_success.txt"]}
  return {part[3] for part in parts}, ends


@pytest.mark.slow
def test_a_run_killed_while_it_sends_goes_on_from_what_is_complete(
  server, tmp_path
):
  """SIGKILL, when a part of the second checkpoint is there."""

  def started(workdir):
    words = tiny.flags(tmp_path, "--mode=train", method="at")
    words = [word.replace(str(tmp_path), workdir) for word in words]
    return subprocess.Popen(
      [sys.executable, "main.py", *words],
      cwd=tiny.ROOT,
      env={**os.environ, **tiny.QUICK, "JAX_PLATFORMS": "cpu"},
      stderr=subprocess.DEVNULL,
    )

  store = fsspec.filesystem("s3", use_listings_cache=False)
  first, sent, complete = started("s3://bucket/run"), set(), set()
  while not (complete and len(sent) > len(complete)):
    assert first.poll() is None
    sent, complete = _sent(store)
  first.kill()
  assert first.wait() == -signal.SIGKILL
  run, disk = "s3://bucket/run", str(tmp_path / "disk")
  assert str(checkpoints.find(run).step) in complete
  for workdir in (run, disk):
    assert started(workdir).wait() == 0
  for one, other in zip(_weights(run), _weights(disk), strict=True):
    np.testing.assert_array_equal(one, other)
  assert checkpoints.find(run) == checkpoints.find(disk)
