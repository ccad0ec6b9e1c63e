"""The queue for an accelerator: its table, data, driver, and dry runs."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from atat_jax import data
from atat_jax.config import make_plan
from atat_jax.data import base
from atat_jax.errors import UserError
from atat_jax.runs import provenance

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "accelerator" / "run.sh"
MIB = 2**20


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)


# --- Data --------------------------------------------------------------------


def splits(train, test):
  generator = np.random.default_rng(3)
  return tuple(
    base.Split(
      generator.integers(0, 256, (n, 32, 32, 3), np.uint8),
      generator.integers(0, 10, n).astype(np.int32),
    )
    for n in (train, test)
  )


def assert_equal(found, expected):
  for split, other in zip(found, expected, strict=True):
    for array, wanted in zip(split, other, strict=True):
      np.testing.assert_array_equal(array, wanted)
      assert array.dtype == wanted.dtype


def test_what_is_unpacked_is_what_was_packed(tmp_path, monkeypatch):
  from benchmarks.accelerator import pack_data

  # Sheets that are not full, of several rows, and several parts.
  monkeypatch.setattr(pack_data, "SHEET", 60)
  monkeypatch.setattr(pack_data, "PART_BYTES", 400_000)
  expected = splits(130, 7)
  folders = pack_data.pack("cifar10", expected, tmp_path)
  assert [folder.name for folder in folders] == ["cifar10-1", "cifar10-2"]
  for folder in folders:
    size = sum(path.stat().st_size for path in folder.glob("*.webp"))
    assert size <= 400_000
  out = tmp_path / "cifar10.npz"
  sha256 = pack_data.unpack("cifar10", folders[::-1], out)
  assert sha256 == pack_data.digest(*expected)
  # Through the door that a configuration uses.
  assert_equal(data.DATASETS["cifar10"].read(data_dir=str(out)), expected)


def test_packing_again_leaves_no_part_of_before(tmp_path, monkeypatch):
  from benchmarks.accelerator import pack_data

  monkeypatch.setattr(pack_data, "PART_BYTES", 10)
  assert len(pack_data.pack("cifar10", splits(3, 2), tmp_path)) == 2
  monkeypatch.undo()
  assert len(pack_data.pack("cifar10", splits(3, 2), tmp_path)) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["cifar10-1"]


def test_what_did_not_arrive_whole_is_refused(tmp_path, monkeypatch):
  from benchmarks.accelerator import pack_data

  monkeypatch.setattr(pack_data, "PART_BYTES", 10)
  folders = pack_data.pack("cifar10", splits(3, 2), tmp_path)
  out = tmp_path / "cifar10.npz"
  with pytest.raises(UserError, match="1 parts; expected 2"):
    pack_data.unpack("cifar10", folders[:1], out)
  with pytest.raises(UserError, match="0 parts; expected at least 1"):
    pack_data.unpack("cifar10", [], out)
  (path,) = folders[0].glob("*.webp")
  path.write_bytes(path.read_bytes()[::-1])
  with pytest.raises(UserError, match=r"webp: SHA-256 \w{64}; expected"):
    pack_data.unpack("cifar10", folders, out)
  path.unlink()
  with pytest.raises(UserError, match="SHA-256 missing"):
    pack_data.unpack("cifar10", folders, out)
  (folders[0] / "manifest.json").unlink()
  with pytest.raises(UserError, match=r"no manifest\.json"):
    pack_data.unpack("cifar10", folders, out)
  assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_real_data_fit_and_come_back(name, data_folder, tmp_path):
  from benchmarks.accelerator import pack_data

  root = data_folder / "tfds"
  if not (root / name).is_dir():
    pytest.skip(f"no {name} in {root}")
  expected = data.DATASETS[name].read(
    data_dir=str(root), cache_dir=str(tmp_path / "cache")
  )
  folders = pack_data.pack(name, expected, tmp_path)
  sizes = [sum(p.stat().st_size for p in f.iterdir()) for f in folders]
  # The tree and the wheels travel, too.
  assert len(folders) <= 2 and max(sizes) < 60 * MIB
  out = tmp_path / "decoded.npz"
  pack_data.unpack(name, folders, out)
  assert_equal(data.DATASETS[name].read(data_dir=str(out)), expected)


# --- The table ---------------------------------------------------------------


def test_the_pages_say_what_the_results_say():
  from benchmarks.accelerator import tables

  for path in tables.PAGES:
    page = path.read_text(encoding="utf-8")
    assert tables.generate(page) == page, (
      "run python -m benchmarks.accelerator.tables"
    )
    assert "<!-- generated: " in page


def test_every_entry_is_in_the_queue():
  from benchmarks.accelerator import entries, tables

  lines = tables.queue({}).splitlines()
  assert len(lines) == 2 + len(entries.ENTRIES)
  for line, (key, entry) in zip(
    lines[2:], entries.ENTRIES.items(), strict=True
  ):
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    assert cells[0] == f"{key}. {entry.title}"
    assert cells[1] == f"`bash benchmarks/accelerator/run.sh {key}`"
    assert cells[5] == str(entry.minutes)
    assert cells[7:] == ["waiting", f"`results/{key}.json`"]
    names = [step.name for step in entry.steps]
    assert len(set(names)) == len(names)
    assert any(step.dry is not None for step in entry.steps)


def _steps(*programs):
  from benchmarks.accelerator import entries

  return [
    (key, step)
    for key, entry in entries.ENTRIES.items()
    for step in entry.steps
    if step.arguments[: len(programs)] == programs
  ]


def test_the_comparisons_are_valid_as_they_will_run():
  from benchmarks import methods

  found = _steps("benchmarks/methods.py")
  assert len(found) == 15
  for key, step in found:
    args = methods.parser().parse_args(step.arguments[1:])
    runs = methods.make_runs(args)  # checks every field
    assert [run.method for run in runs][-1] == step.name
    config = runs[-1].configs[-1]
    assert config.recipe == "modern"
    assert config.model.dtype == "bfloat16"
    assert config.train.schedule == "one_cycle"
    assert config.data.name == "cifar100" if key == "g" else "cifar10"
    plan = make_plan(config)
    if key != "d":
      assert plan.model_spec["name"] == "preact_resnet18"
      assert plan.model.normalization == "dataset"
      assert plan.model.batch_norm_epsilon == 1e-5


def test_the_single_runs_are_valid_as_they_will_run():
  from benchmarks import methods

  found = [step for _, step in _steps("main.py")]
  found += [step.instead for _, step in _steps("benchmarks/autoattack.py")]
  assert len(found) == 1 + 1 + 10 + 8
  for step in found:
    _, mode, config, workdir, *fields = step.arguments
    assert mode.startswith("--mode=") and workdir.startswith("--workdir={run}/")
    path, _, choice = config.removeprefix("--config=").partition(":")
    made = methods.load(ROOT / path).get_config(choice)
    for field in fields:
      assert methods._override(made, field.removeprefix("--config.")), field
    make_plan(made)


def test_the_step_benchmark_is_valid_as_it_will_run():
  from benchmarks import setting, step

  found = _steps("-m", "benchmarks.step")
  cases = []
  for _, one in found:
    args = step.parser().parse_args(one.arguments[2:])
    (case,) = step.cases(args)
    setting.network(case.model, dtype=case.dtype)
    cases.append(case)
    assert (args.peer == "none") == (one.instead is None)
  assert len({case.name for case in cases}) == len(cases) == 3 * 4 * 2 * 2
  # The goal is looked at first.
  assert {(c.model, c.dtype) for c in cases[:8]} == {("wrn-28-10", "bfloat16")}


def test_the_autoattack_benchmark_is_valid_as_it_will_run():
  from benchmarks import autoattack

  ((_, step),) = _steps("benchmarks/autoattack.py")
  args = autoattack.parser().parse_args(step.arguments[1:])
  assert (args.version, args.num_examples) == ("standard", 1000)


# --- What is made of results -------------------------------------------------


ABOUT = {
  "commit": "abc",
  "date": "2030-01-02T03:04:05+00:00",
  "machine": {"device": "Fast 1", "jax": "9.9", "backend": "gpu"},
}


def result(key, statuses, **more):
  return {
    "entry": key,
    "dry": False,
    "steps": {
      name: {"status": status, "seconds": 61.0, **ABOUT}
      for name, status in statuses.items()
    },
    "results": {},
    **more,
  }


def test_status_of_an_entry():
  from benchmarks.accelerator import tables

  assert tables.status("b", None) == "waiting"
  both = result("b", {"train": "done", "compare": "failed"})
  assert tables.status("b", both) == (
    "1 of 2 steps, 1 failed; Fast 1; 2030-01-02"
  )
  both["steps"]["compare"]["status"] = "done"
  assert tables.status("b", both) == "done; Fast 1; 2030-01-02"


def test_results_are_taken_in_and_shown(tmp_path):
  from benchmarks.accelerator import tables

  came, results = tmp_path / "came", tmp_path / "results"
  came.mkdir()
  side = {"robust_accuracy": 0.4, "seconds_everything": 50.0}
  network = {
    "network": "at",
    "num_examples": 1000,
    "ours": side,
    "reference": {**side, "seconds_everything": 125.0},
  }
  found = result("b", {"train": "done", "compare": "done"})
  found["results"]["compare"] = {"networks": [network]}
  (came / "b.json").write_text(json.dumps(found))
  (came / "b_comparison_cifar10.png").write_bytes(b"png")
  (tmp_path / "results.json").write_text("{}")
  with tarfile.open(came / "b-runs.tar.gz", "w:gz") as tar:
    tar.add(tmp_path / "results.json", "at/results.json")
  assert tables.take_in(came, results) == ["b"]
  assert (results / "b" / "at" / "results.json").exists()
  assert (results / "b_comparison_cifar10.png").exists()

  page = "a\n<!-- generated: accelerator_b -->\nold\n<!-- end -->\nz\n"
  text = tables.generate(page, results)
  cells = [x.strip() for x in text.splitlines()[7].strip("|").split("|")]
  assert cells == ["at", "1000", "40.00", "40.00", "50", "125", "2.50"]
  assert "commit `abc`, 2030-01-02, Fast 1, jax 9.9" in text
  assert text.startswith("a\n<!-- generated") and text.endswith("-->\nz\n")
  assert tables.generate(text, results) == text


@pytest.mark.parametrize("change", [{"dry": True}, {"entry": "a"}])
def test_results_that_are_none_are_refused(tmp_path, change):
  from benchmarks.accelerator import tables

  found = {**result("b", {"train": "done"}), **change}
  (tmp_path / "b.json").write_text(json.dumps(found))
  with pytest.raises(UserError, match="of a dry run or another entry"):
    tables.take_in(tmp_path, tmp_path / "results")
  with pytest.raises(UserError, match="no result of the queue"):
    tables.take_in(tmp_path / "nothing", tmp_path / "results")


def test_a_profile_counts_each_kernel_of_a_stream_once():
  from benchmarks.accelerator import kernels

  def name(kind, process, thread, value):
    return {
      "ph": "M",
      "name": f"{kind}_name",
      "pid": process,
      "tid": thread,
      "args": {"name": value},
    }

  def event(process, thread, called, microseconds, **args):
    return {
      "ph": "X",
      "pid": process,
      "tid": thread,
      "name": called,
      "dur": microseconds,
      "args": args,
    }

  host = event(1, 1, "op", 9.0, hlo_op="op")
  device = [
    event(2, 5, "conv", 2.0),
    event(2, 5, "add", 1.0),
    event(2, 5, "conv", 3.0),
    event(2, 6, "XLA Modules tell it again", 6.0),
  ]
  names = [
    name("process", 1, 0, "/host:CPU"),
    name("process", 2, 0, "/device:GPU:0 Fast 1"),
    name("thread", 2, 5, "Stream #13(Compute)"),
    name("thread", 2, 6, "XLA Modules"),
  ]
  found = kernels.kernel_times([*names, host, *device])
  assert list(found) == ["conv", "add"]
  assert found == pytest.approx({"conv": 5e-6, "add": 1e-6})
  # Without a GPU, what XLA ran.
  rest = [host, event(1, 1, "python", 50.0)]
  assert kernels.kernel_times([*names, *rest]) == pytest.approx({"op": 9e-6})


# --- The driver --------------------------------------------------------------

SAVES = """
import pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
steps = int(path.read_text()) if path.exists() else 0
def save(*_):
  path.write_text(str(steps + 1))
  sys.exit(143)
signal.signal(signal.SIGTERM, save)
if steps < 1:
  time.sleep(60)
path.write_text("finished")
"""


@pytest.fixture
def driver(monkeypatch, tmp_path):
  """Makes a driver of made-up steps, for an entry "z"."""
  from benchmarks.accelerator import drive, entries

  monkeypatch.setattr(drive, "machine", lambda: ABOUT)
  monkeypatch.setattr(drive, "LEAST", 0.1)
  monkeypatch.setattr(drive, "RESULTS", tmp_path / "results")

  def make(*steps):
    entry = entries.Entry("Z", "why", 1, "what", steps)
    monkeypatch.setitem(entries.ENTRIES, "z", entry)
    return drive.Driver(
      "z",
      scratch=tmp_path / "scratch",
      out=tmp_path / "out",
      dry=False,
      places={"data": "d.npz"},
      data_sha256="0" * 64,
    )

  return make


def _python(name, code, *arguments, **more):
  from benchmarks.accelerator.entries import Step

  return Step(name, ("-c", code, *arguments), **more)


def test_done_failed_and_done_otherwise(driver, tmp_path):
  fails = "import sys; sys.exit('no such thing')"
  writes = "import sys; open(sys.argv[1], 'w').write('{\"rows\": []}')"
  steps = (
    _python("good", writes, "{run}/good.json", result="{run}/good.json"),
    _python("bad", fails),
    _python("other", fails, instead=_python("other", "print(1)")),
  )
  assert not driver(*steps).run(60)
  found = json.loads((tmp_path / "out" / "z.json").read_text())
  assert {name: one["status"] for name, one in found["steps"].items()} == {
    "good": "done",
    "bad": "failed",
    "other": "done",
  }
  assert found["results"] == {"good": {"rows": []}}
  assert found["status"] == "partly"
  assert found["steps"]["good"]["commit"] == "abc"
  (failure,) = found["steps"]["other"]["failures"]
  assert failure["last_lines"] == ["no such thing"]
  # The next call does what is not done, and only that.
  (tmp_path / "scratch" / "z" / "good.json").unlink()
  good, _, other = steps
  assert driver(good, _python("bad", "print(2)"), other).run(60)
  assert not (tmp_path / "scratch" / "z" / "good.json").exists()
  assert json.loads((tmp_path / "out" / "z.json").read_text())["results"] == {
    "good": {"rows": []}
  }


def test_at_its_time_a_step_saves_and_goes_on_at_the_next_call(
  driver, tmp_path
):
  steps = (
    _python("long", SAVES, str(tmp_path / "saved")),
    _python("next", "print(1)"),
  )
  assert not driver(*steps).run(1.5)
  found = json.loads((tmp_path / "out" / "z.json").read_text())
  assert found["steps"]["long"]["status"] == "stopped"
  assert "next" not in found["steps"]
  assert (tmp_path / "saved").read_text() == "1"
  assert driver(*steps).run(60)
  assert (tmp_path / "saved").read_text() == "finished"
  again = json.loads((tmp_path / "out" / "z.json").read_text())
  seconds = [one["steps"]["long"]["seconds"] for one in (found, again)]
  assert seconds[0] <= seconds[1] < 60  # of both calls together


def test_a_new_window_goes_on_from_the_committed_results(driver, tmp_path):
  """What came back is not done again, but for what only the machine had."""
  run = tmp_path / "scratch" / "z" / "seed0" / "standard"
  trains = (
    "import pathlib, sys; p = pathlib.Path(sys.argv[1]);"
    " (p / 'checkpoints').mkdir(parents=True); (p / 'finished.json').touch()"
  )
  teacher = _python(
    "standard",
    trains,
    "{run}/seed0/standard",
    leaves="{run}/seed0/standard/checkpoints",
  )
  needs = "import sys; sys.exit('later')"
  assert not driver(teacher, _python("student", needs)).run(60)
  results = tmp_path / "results"
  results.mkdir()
  shutil.copy(tmp_path / "out" / "z.json", results)
  (results / "z" / "seed0" / "standard").mkdir(parents=True)
  (results / "z" / "seed0" / "standard" / "finished.json").touch()
  shutil.rmtree(tmp_path / "scratch")  # a fresh machine

  checks = "import os, sys; sys.exit(not os.path.isdir(sys.argv[1]))"
  student = _python("student", checks, "{run}/seed0/standard/checkpoints")
  assert driver(teacher, student).run(60)
  assert (run / "checkpoints").is_dir()
  # All done: nothing is made for nobody.
  shutil.copy(tmp_path / "out" / "z.json", results)
  shutil.rmtree(tmp_path / "scratch")
  assert driver(teacher, student).run(60)
  assert not (run / "checkpoints").exists()


def test_without_an_accelerator_nothing_is_run(driver, monkeypatch):
  from benchmarks.accelerator import drive

  about = {**ABOUT, "machine": {**ABOUT["machine"], "backend": "cpu"}}
  monkeypatch.setattr(drive, "machine", lambda: about)
  with pytest.raises(UserError, match="accelerator: none found"):
    driver(_python("one", "print(1)")).run(60)


def test_a_copy_without_git_names_its_commit(monkeypatch):
  from atat_jax import evaluate

  def no_git(*_, **__):
    raise FileNotFoundError("git")

  monkeypatch.setattr(evaluate.subprocess, "run", no_git)
  monkeypatch.delenv("ATAT_JAX_COMMIT", raising=False)
  assert provenance.commit() is None
  monkeypatch.setenv("ATAT_JAX_COMMIT", "abc")
  assert provenance.commit() == "abc"


# --- run.sh ------------------------------------------------------------------


def run_script(tmp_path, *arguments, **environment):
  return subprocess.run(
    ["bash", str(SCRIPT), *arguments],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      "PYTHON": sys.executable,
      "SCRATCH": str(tmp_path / "scratch"),
      "CARRY": str(tmp_path / "carry"),
      "OUT": str(tmp_path / "out"),
      "JAX_PLATFORMS": "cpu",
      **environment,
    },
    check=False,
  )


@pytest.mark.parametrize(
  "arguments", [(), ("h",), ("a", "--smok"), ("bring",), ("take", "all")]
)
def test_a_wrong_command_is_refused(tmp_path, arguments):
  done = run_script(tmp_path, *arguments)
  assert done.returncode == 2
  assert "usage: run.sh" in done.stderr
  assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path):
  bare = tmp_path / "python"
  bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
  bare.chmod(0o755)
  done = run_script(tmp_path, "a", PYTHON=str(bare))
  assert done.returncode == 3
  assert "no absl chex flax jax" in done.stderr
  assert "ml_collections" in done.stderr and "prepare.sh" in done.stderr


def test_damaged_data_are_refused(tmp_path):
  from benchmarks.accelerator import pack_data

  folder, *_ = pack_data.pack("cifar10", splits(4, 2), tmp_path / "carry")
  path = folder / "test-00000.webp"
  path.write_bytes(path.read_bytes()[:-1])
  done = run_script(tmp_path, "c")
  assert done.returncode == 4, done.stderr
  assert "test-00000.webp: SHA-256" in done.stderr
  assert "data: cifar10 is damaged" in done.stderr


def test_half_of_the_data_are_not_enough(tmp_path, monkeypatch):
  from benchmarks.accelerator import pack_data

  monkeypatch.setattr(pack_data, "PART_BYTES", 10)
  _, second = pack_data.pack("cifar10", splits(4, 2), tmp_path / "carry")
  shutil.rmtree(second)
  done = run_script(tmp_path, "c")
  assert done.returncode == 4
  assert "cifar10: 1 part so far" in done.stdout
  assert "carry all parts of cifar10" in done.stderr


def test_checkpoints_travel_in_parts(tmp_path):
  file = tmp_path / "scratch" / "d" / "checkpoints" / "params"
  file.parent.mkdir(parents=True)
  content = np.random.default_rng(0).bytes(70_000_000)
  file.write_bytes(content)
  trip = tmp_path / "carry"
  for first in (0, 4):
    done = run_script(
      tmp_path, "bring", "d", str(first), OUT=str(trip / f"d-{first}")
    )
    assert not done.returncode, done.stderr
  parts = sorted(trip.rglob("d.tar.*"))
  assert [path.name[-3:] for path in parts] == [
    "000",
    "001",
    "002",
    "003",
    "004",
  ]
  assert max(path.stat().st_size for path in parts) <= 16 * MIB
  file.unlink()
  assert not run_script(tmp_path, "take", "d").returncode
  assert file.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("key", "abcdefg")
def test_a_dry_run(key, tmp_path):
  from benchmarks.accelerator import drive, entries, tables

  named = os.environ.get("ATAT_JAX_AUTOATTACK")
  reference = str(pathlib.Path(named).resolve()) if named else "nowhere"
  done = run_script(
    tmp_path, key, "--smoke", SECONDS_IN_ALL="3600", REFERENCE=reference
  )
  assert not done.returncode, done.stdout + done.stderr
  out = tmp_path / "out"
  found = json.loads((out / f"{key}.json").read_text())
  wanted = [s.name for s in entries.ENTRIES[key].steps if s.dry is not None]
  assert list(found["steps"]) == wanted
  for name, record in found["steps"].items():
    assert record["status"] == "done"
    expected = int((key, name) == ("b", "compare") and not named)
    assert len(record["failures"]) == expected, record["failures"]
  files = list(out.iterdir())
  assert len(files) <= drive.LIMITS["files"]
  assert max(path.stat().st_size for path in files) <= drive.LIMITS["bytes"]
  assert "| " in tables.entry_part(key, found)
  results = tmp_path / "results"
  results.mkdir()
  (out / f"{key}.json").write_text(json.dumps({**found, "dry": False}))
  assert tables.take_in(out, results) == [key]
  page = f"<!-- generated: accelerator_{key} -->\n<!-- end -->\n"
  assert dataclasses.asdict(entries.ENTRIES[key])["expected"] in (
    tables.generate(page, results)
  )
