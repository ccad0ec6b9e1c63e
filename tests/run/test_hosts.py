"""Several processes: the numbers of one, and every image once.

The slow tests run whole jobs of main.py in every layout of `LAYOUTS` by
launch/local_cluster.py, with gloo between the processes. The layouts differ by
the order in which numbers are added. Networks here are smooth and training attacks
in the l2 ball: where a sign of a gradient that is nearly 0, or the side of a kink,
turns at rounding, the same runs agree to 1e-7 for some steps, and to 1e-2 after 20.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import cluster
import jax
import numpy as np
import picture_folders
import pytest
import streamed_process
import tiny
import two_processes

from atat_jax import checkpoints, compilation, sharding
from atat_jax.runs import files, worst_case

pytest_plugins = ("tiny",)

LAYOUTS = ((1, 1), (1, 8), (2, 4), (4, 2))
"""Processes, and devices of each."""

METHODS = ("at", "atat")
STEPS = 20
NUM_STREAMED = 9
"""Steps of a streamed run, 3 an epoch."""
FLAGS = (
  "--config.data.validation_size=128",
  "--config.model.activation=silu",
  "--config.objective.norm=l2",
  "--config.objective.epsilon=1.0",
  "--config.objective.step_size=0.5",
  "--config.train.learning_rate=0.01",
  "--config.teacher.learning_rate=0.01",
  "--config.train.log_every_steps=1",
  "--config.evaluation.attacks=nominal,pgd2,autoattack-fast",
  "--config.evaluation.num_examples=40",
  "--config.evaluation.batch_norm=('running',)",
  "--config.figures.analyses=landscape,curvature",
  "--config.figures.indices=(0,1)",
  "--config.figures.num_points=9",
  "--config.figures.num_examples=20",
)


def start(number, size, port, *words, **environment):
  """Starts a process of a job of plain hosts."""
  return subprocess.Popen(
    [sys.executable, *map(str, words)],
    cwd=tiny.ROOT,
    env={
      **os.environ,
      **tiny.QUICK,
      "PYTHONPATH": os.pathsep.join(["tests/support", str(tiny.ROOT)]),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "1",
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": str(size),
      "JAX_PROCESS_ID": str(number),
      **environment,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def free_port():
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def test_two_processes_make_the_run_of_one(tmp_path, monkeypatch):
  """Training, metrics, checkpoint and evaluation; process 0 alone writes."""
  port = free_port()
  program = tiny.ROOT / "tests" / "support" / "two_processes.py"
  two = [start(n, 2, port, program, tmp_path / "two") for n in range(2)]
  monkeypatch.setattr(compilation, "compiler_options", dict)  # put back
  one = two_processes.work(
    sharding.make_mesh(jax.devices()[:1]), tmp_path / "one"
  )
  said = [process.communicate(timeout=300) for process in two]
  assert [process.returncode for process in two] == [0, 0], said
  found = np.load(tmp_path / "two" / "found.npz")
  assert set(found.files) == one.keys()
  for name in found.files:
    if one[name].dtype.kind == "f":
      np.testing.assert_allclose(found[name], one[name], 1e-4, 1e-5, name)
    else:
      np.testing.assert_array_equal(found[name], one[name], name)
  assert found["correct"].size == found["counted"].sum() == two_processes.IMAGES
  written = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
  assert len(written) == 1


@pytest.mark.slow
def test_two_processes_copy_one_checkpoint_to_a_store(tmp_path):
  """Of a state that is split over both; each restores it from its own copy."""
  (tmp_path / "store" / "bucket").mkdir(parents=True)
  program = tiny.ROOT / "tests" / "support" / "two_processes.py"
  port, place = free_port(), "s3://bucket/run"
  two = [start(n, 2, port, program, tmp_path / "two", place) for n in range(2)]
  said = [process.communicate(timeout=300) for process in two]
  assert [process.returncode for process in two] == [0, 0], said
  found = np.load(tmp_path / "two" / "found.npz")
  assert found["split"] == 4
  kept = tmp_path / "store" / "bucket" / "run" / "checkpoints" / "3"
  assert (kept / "commit_success.txt").is_file()
  assert json.loads((kept / "model" / "metadata").read_text())["plain_key"]
  alone = checkpoints._read_item(kept / "params", None)
  for path, leaf in jax.tree_util.tree_leaves_with_path({"params": alone}):
    np.testing.assert_array_equal(leaf, found[jax.tree_util.keystr(path)])


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--distributed"], "distributed: no job found; allowed: "),
    (["--distributed", "--process_id=1"], "coordinator_address: missing; "),
    (
      [
        "--distributed",
        "--process_id=2",
        "--num_processes=2",
        "--coordinator_address=localhost:1",
      ],
      "process_id: '2'; allowed: 0 to 1",
    ),
    (["--num_processes=2"], "num_processes: 2; allowed: with --distributed"),
    (["--distributed", "--wait_seconds=0"], "wait_seconds: 0; allowed: 1 to"),
    (
      [
        "--distributed",
        "--process_id=1",
        "--num_processes=2",
        "--coordinator_address=localhost:1",
        "--wait_seconds=1",
      ],
      "process 0 of 2 did not answer process 1 there within 1 s",
    ),
  ],
)
def test_a_bad_place_ends_in_one_line(words, said, command_line, tmp_path):
  found = command_line(*tiny.flags(tmp_path / "run", *words, method="at"))
  assert found.status == 1 and not (tmp_path / "run").exists()
  last = found.stderr.strip().splitlines()[-1]
  assert last.startswith("error: ") and said in last


def job(workdir, layout, method, *extra):
  processes, devices = layout
  return cluster.Job(
    tiny.flags(workdir, *FLAGS, *extra, method=method),
    workdir.with_suffix(".log"),
    f"--num_processes={processes}",
    f"--devices={devices}",
  )


def last_state(workdir):
  """Parameters and statistics after the last step."""
  _, variables = checkpoints.restore_model(workdir, step=STEPS)
  return jax.tree.map(np.asarray, variables)


def distance(a, b):
  """Largest difference of two trees, relative to the largest number of each."""
  found = [
    np.abs(x - y).max() / max(np.abs(x).max(), 1e-6)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  ]
  return float(max(found))


class Compared:
  """Two finished runs, number by number."""

  def __init__(self, one: pathlib.Path, other: pathlib.Path):
    self.one, self.other = one, other

  def _both(self, read):
    return read(self.one), read(self.other)

  def weights(self, collection: str) -> float:
    one, other = self._both(last_state)
    return distance(one[collection], other[collection])

  def metrics(self) -> float:
    one, other = self._both(cluster.metrics)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    return max(
      abs(a[name] - b[name]) / max(abs(a[name]), 1e-3)
      for a, b in zip(one, other, strict=True)
      for name in ("loss", "gradient_norm")
      if name in a
    )

  def rows(self) -> dict[str, int]:
    """Protocol to the number of images that are judged differently."""
    one, other = self._both(
      lambda run: worst_case.measured(
        json.loads((run / files.RESULTS).read_text())["rows"]
      )
    )
    found: dict[str, int] = {}
    for a, b in zip(one, other, strict=True):
      named = [(r["model"], r["attack"], r["batch_norm"]) for r in (a, b)]
      assert named[0] == named[1]
      assert a["num_examples"] == b["num_examples"] == 40
      bits = [worst_case.unpack(r) for r in (a, b)]
      # Each image once: as many bits as images, and their share is the row's.
      for row, bit in zip((a, b), bits, strict=True):
        assert len(bit) == 40 and abs(bit.mean() - row["accuracy"]) < 1e-9
      number = int((bits[0] != bits[1]).sum())
      found[a["attack"]] = found.get(a["attack"], 0) + number
    return found

  def arrays(self, name: str, ends: str) -> float:
    one, other = self._both(lambda run: np.load(run / name))
    assert one.files == other.files
    return max(
      float(np.abs(one[k] - other[k]).max() / np.abs(one[k]).max())
      for k in one.files
      if k.endswith(ends)
    )

  def describe(self) -> dict[str, object]:
    return {
      "parameters": self.weights("params"),
      "statistics": self.weights("batch_stats"),
      "metrics": self.metrics(),
      "rows": self.rows(),
      "landscape": self.arrays("loss_landscape.npz", "_loss"),
      "curvature": self.arrays("curvature.npz", "_eigenvalue"),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Method to the directory of its finished run on one device."""
  folder = tmp_path_factory.mktemp("alone")

  def find(method):
    workdir = folder / method
    if not workdir.exists():
      one = job(workdir, (1, 1), method)
      assert one.wait() == 0, one.text
    return workdir

  return find


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("method", METHODS)
def test_every_layout_makes_the_run_of_one_device(
  method, layout, alone, tmp_path, capsys
):
  other = job(tmp_path / "run", layout, method)
  assert other.wait() == 0, other.text
  found = Compared(alone(method), tmp_path / "run").describe()
  with capsys.disabled():
    print(f"\n{method} {layout[0]} x {layout[1]}: {found}")
  assert found["parameters"] < 1e-5 and found["statistics"] < 1e-5
  assert found["metrics"] < 1e-5
  # Signs of the gradient, and eigenvalues that have not converged.
  assert found["landscape"] < 1e-2 and found["curvature"] < 1e-2
  assert sum(found["rows"].values()) <= 1  # at the very edge of a decision


@pytest.mark.slow
def test_a_run_saved_on_8_devices_goes_on_on_2_and_is_evaluated_on_1(
  alone, tmp_path
):
  workdir = tmp_path / "run"
  first = job(workdir, (4, 2), "at")
  path = workdir / "metrics.jsonl"
  first.until(lambda: path.exists() and path.read_text().count("\n") > 7)
  first.process.terminate()
  assert first.wait() == 143, first.text
  assert "stopped at step" in first.text
  for layout, mode in (((1, 2), "train"), ((1, 1), "run")):
    later = job(workdir, layout, "at", f"--mode={mode}")
    assert later.wait() == 0, later.text
    assert ("resumed at step" in later.text) == (mode == "train"), later.text
  found = Compared(alone("at"), workdir).describe()
  assert found["parameters"] < 1e-5 and found["statistics"] < 1e-5
  assert sum(found["rows"].values()) <= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  pytest.importorskip("grain", reason="grain reads the pictures")
  return picture_folders.write(
    tmp_path_factory.mktemp("set"), classes=3, train=14, test=5
  )


@pytest.mark.slow
def test_processes_read_disjoint_parts_that_make_the_batch_of_one(
  folder, tmp_path
):
  port = free_port()
  program = tiny.ROOT / "tests" / "support" / "streamed_process.py"
  two = [
    start(n, 2, port, program, folder, tmp_path, JAX_NUM_CPU_DEVICES="2")
    for n in range(2)
  ]
  said = [process.communicate(timeout=300) for process in two]
  assert [process.returncode for process in two] == [0, 0], said
  parts = [np.load(tmp_path / f"{number}.npz") for number in range(2)]
  assert [part["rows"].tolist() for part in parts] == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
  ]
  whole = streamed_process.read(
    streamed_process.load(folder), np.arange(streamed_process.BATCH)
  )
  for name in ("images", "labels"):
    joined = np.concatenate([part[name] for part in parts], axis=1)
    np.testing.assert_array_equal(joined, whole[name])


@pytest.mark.slow
def test_a_streamed_run_of_two_processes_is_that_of_one(folder, tmp_path):
  """Training, validation and the evaluation in shards."""
  streamed = (
    "--config.data.name=folder",
    f"--config.data.dir={folder}",
    "--config.data.stream=True",
    "--config.data.size=16",
    "--config.data.padding=0",
    "--config.data.validation_size=6",
    "--config.data.shard_size=8",
    "--config.model.shortcut=conv",
    "--config.train.batch_size=12",
    f"--config.train.num_epochs={NUM_STREAMED // 3}",
    "--config.train.validate_every_epochs=1.0",
    "--config.evaluation.batch_size=4",
    "--config.evaluation.num_examples=0",
    "--config.evaluation.attacks=nominal,pgd2",
    "--config.figures.analyses=",
  )
  runs = [tmp_path / name for name in ("one", "two")]
  for run, layout in zip(runs, ((1, 1), (2, 1)), strict=True):
    made = job(run, layout, "at", *streamed)
    assert made.wait() == 0, made.text
  one, two = (
    checkpoints.restore_model(run, step=NUM_STREAMED)[1] for run in runs
  )
  assert distance(one, two) < 1e-5
  assert Compared(*runs).metrics() < 1e-5
  rows = [files.read_results(run)["rows"] for run in runs]
  assert [row.get("correct") for row in rows[0]] == [
    row.get("correct") for row in rows[1]
  ]
  assert {row["num_examples"] for row in rows[1]} == {15}
