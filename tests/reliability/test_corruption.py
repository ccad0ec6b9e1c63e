"""Damaged files: found, made good or refused in one line, never believed."""

import json
import logging
import os
import pathlib
import random
import shutil
import sys
from collections import Counter

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import corruption
import tiny

from atat_jax import checkpoints
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, inventory

pytest_plugins = ("tiny",)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Files of every kind, which no test changes."""
  workdir = tmp_path_factory.mktemp("source") / "run"
  corruption.build(workdir)
  return workdir


@pytest.fixture
def workdir(source, tmp_path):
  checkpoints._say.cache_clear()
  return pathlib.Path(shutil.copytree(source, tmp_path / "run"))


@pytest.fixture
def said(caplog):
  """Warnings of the package so far, as one text."""
  logging.getLogger("atat_jax").propagate = True
  caplog.set_level(logging.WARNING)
  return lambda: " | ".join(
    r.getMessage() for r in caplog.records if r.name.startswith("atat_jax")
  )


def folder(workdir, step):
  return workdir / "checkpoints" / str(step)


def flip(path, where=None):
  content = bytearray(path.read_bytes())
  content[len(content) // 2 if where is None else where] ^= 4
  path.write_bytes(content)


def largest(path):
  return max(
    (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )


def weights_of(step):
  return corruption.digest(corruption.make_state(step).ema)


def restored(workdir, **kwargs):
  return corruption.digest(checkpoints.restore_model(workdir, **kwargs)[1])


def check(found):
  bad = [x for x in found if x[-1] in (corruption.SILENT, corruption.TRACEBACK)]
  assert not bad


def test_no_damage_is_silent_or_a_traceback(source):
  found = list(corruption.trials(source, random.Random(1), 1, share=0.017))
  assert len(found) >= 40
  check(found)
  # They did something: the harness sees each way out.
  assert {what for *_, what in found} >= {
    corruption.HARMLESS,
    corruption.GOOD,
    corruption.REFUSED,
  }


@pytest.mark.slow
def test_no_damage_is_silent_or_a_traceback_in_bulk(source, capsys):
  found = list(corruption.trials(source, random.Random(2), 1, share=0.25))
  assert len(found) >= 388
  kinds = Counter((target.name, what) for target, _, _, what in found)
  with capsys.disabled():
    sys.stdout.write(f"\n{len(found)} damages\n{corruption.table(kinds)}\n")
  check(found)


def test_the_harness_sees_what_is_silent(source, tmp_path, monkeypatch):
  """Without the comparison, most damages of arrays give another network."""
  monkeypatch.setattr(checkpoints, "_check", lambda *_: None)
  (best,) = (t for t in corruption.targets() if t.name.endswith("best: best"))
  workdir = pathlib.Path(shutil.copytree(source, tmp_path / "run"))
  expected = best.use(workdir)
  flip(largest(folder(workdir, 8) / "ema"))
  assert corruption.outcome(best, workdir, expected) == corruption.SILENT


def test_a_damaged_best_is_passed_over_and_said(workdir, said):
  assert restored(workdir) == weights_of(8)
  damaged = largest(folder(workdir, 8) / "ema")
  flip(damaged)
  assert restored(workdir) == weights_of(4)
  assert str(damaged) in said() and "step 4, is used" in said()
  assert checkpoints.find(workdir) == (4, "best of the intact")
  assert checkpoints.find(workdir, which="last") == (4, "last of the intact")
  with pytest.raises(DamagedFileError, match=r"step: 8 is damaged .*; allowed"):
    checkpoints.restore_model(workdir, step=8)
  assert damaged.exists()  # a reader moves nothing
  flip(largest(folder(workdir, 4) / "ema"))
  with pytest.raises(DamagedFileError, match="no intact checkpoint"):
    checkpoints.restore_model(workdir)


@pytest.mark.parametrize("damage", ["empty", "delete"])
def test_metrics_of_one_step_do_not_choose_another(workdir, said, damage):
  """The best stays readable, and a step without its metrics is no best."""
  metrics = folder(workdir, 4) / "metrics" / "metrics"
  metrics.write_bytes(b"") if damage == "empty" else metrics.unlink()
  assert checkpoints.find(workdir) == (8, "best of the intact")
  assert str(metrics) in said()
  metrics = folder(workdir, 8) / "metrics" / "metrics"
  metrics.write_bytes(b"") if damage == "empty" else metrics.unlink()
  with pytest.raises(DamagedFileError, match="no intact"):
    checkpoints.find(workdir)


@pytest.mark.parametrize("item", ["params", "opt_state", "run", "ema"])
def test_files_of_two_steps_are_not_exchanged(workdir, said, item):
  a, b = folder(workdir, 4) / item, folder(workdir, 8) / item
  a.rename(workdir / "a")
  b.rename(a)
  (workdir / "a").rename(b)
  with checkpoints.Checkpointer(workdir, corruption._spec()) as keeper:
    assert keeper.latest_step() is None
  assert "step 8 is damaged" in said() and "step 4 is damaged" in said()
  assert len(list((workdir / "damaged").iterdir())) == 2  # nothing is lost


def test_a_renamed_step_is_not_believed(workdir, said):
  folder(workdir, 8).rename(folder(workdir, 12))
  assert checkpoints.find(workdir, which="last").step == 4
  assert "holds {'step': 8}" in said()


def test_files_that_do_not_belong_to_a_checkpoint(workdir, said):
  (folder(workdir, 8) / "params" / "d" / ".nfs0001").write_bytes(b"x")
  assert checkpoints.find(workdir) == (8, "best")
  extra = folder(workdir, 8) / "ema" / "d" / "0123"
  extra.write_bytes(b"x")
  assert checkpoints.find(workdir).step == 4
  assert f"{extra}: does not belong here" in said()


def test_a_missing_item_or_inventory_is_found(workdir):
  shutil.rmtree(folder(workdir, 8) / "ema")
  assert checkpoints.find(workdir).step == 4
  (folder(workdir, 4) / inventory.NAME).unlink()
  with pytest.raises(DamagedFileError, match=f"{inventory.NAME}: missing"):
    checkpoints.find(workdir, step=4)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"image_shape": [60000, 60000, 1]}, "image_shape"),
    ({"image_shape": [8, 8]}, "image_shape"),
    ({"image_shape": [8, 8, 1.0]}, "image_shape"),
    ({"fields": {"width": 10**9}}, "width above"),
    ({"fields": {"depth": 60_002}}, "depth above"),
    ({"fields": {"depth": 26, "width": 10_000}}, "numbers"),
    ({"fields": {"width": 3}}, r"ema: .* has shape \(64,\), but"),
    ({"fields": {"activation": "nope"}}, "no network can be made"),
    ({"name": "nope"}, "no network can be made"),
    ({"name": 3}, "not the description"),
  ],
)
def test_the_description_of_a_network_has_limits(workdir, change, named):
  """Also where whoever wrote it made a checksum for it, or none."""
  path = folder(workdir, 8) / "model" / "metadata"
  spec = json.loads(path.read_text())
  for key, value in change.items():
    spec[key] = {**spec[key], **value} if isinstance(value, dict) else value
  path.write_text(json.dumps(spec))
  assert checkpoints.find(workdir).step == 4
  inventory.write(folder(workdir, 8), {"step": 8})
  with pytest.raises(DamagedFileError, match=named) as error:
    checkpoints.restore_model(workdir, step=8)
  assert "\n" not in str(error.value)


def make_old(workdir, step):
  """Makes a checkpoint what an earlier version wrote: without checksums."""
  (folder(workdir, step) / inventory.NAME).unlink()
  path = folder(workdir, step) / "model" / "metadata"
  spec = json.loads(path.read_text())
  del spec["checksums"]
  path.write_text(json.dumps(spec))


def test_a_checkpoint_of_an_earlier_version_is_read_and_said(workdir, said):
  for step in corruption.STEPS:
    make_old(workdir, step)
  assert restored(workdir) == weights_of(8)
  assert "not verified" in said()
  with checkpoints.Checkpointer(workdir, corruption._spec()) as keeper:
    found = keeper.restore(corruption.make_state(0), 8)
  expected = corruption.make_state(8)
  assert corruption.digest(found) == corruption.digest(expected)
  # What cannot be read is passed over all the same.
  for path in (folder(workdir, 8) / "ema").rglob("manifest.ocdbt"):
    path.write_bytes(b"")
  assert checkpoints.find(workdir) == (4, "best of the intact")


def test_a_training_moves_damage_away_and_computes_it_again(
  finished, tmp_path, said
):
  checkpoints._say.cache_clear()
  workdir = finished.copy(tmp_path / "run")
  flip(largest(folder(workdir, 20) / "params"))
  lines = workdir / "metrics.jsonl"
  tiny.run(workdir, "train")
  assert "step 20 is damaged" in said() and "goes on from step 15" in said()
  assert (workdir / "damaged" / "checkpoints-20").is_dir()
  assert tiny.metrics(lines) == tiny.metrics(finished.workdir / lines.name)
  for which in ("best", "last"):
    a, b = (
      checkpoints.restore_model(w, which=which)[1]
      for w in (workdir, finished.workdir)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_results_tell_that_another_checkpoint_was_evaluated(
  finished, tmp_path, said
):
  checkpoints._say.cache_clear()
  workdir = finished.copy(tmp_path / "run")
  best = finished.results["run"]["checkpoints"]["student"]["step"]
  flip(largest(folder(workdir, best) / "params"))
  tiny.run(workdir, "evaluate", tiny.config(evaluation__attacks="nominal"))
  results = files.read_results(workdir)
  record = results["run"]["checkpoints"]
  assert record["student"]["which"] == "best of the intact"
  assert record["student"]["step"] != best
  assert record["teacher"] == finished.results["run"]["checkpoints"]["teacher"]
  assert f"step {best} is damaged" in said()
  # The numbers of the damaged one are not lost.
  (copy,) = (workdir / "damaged").iterdir()
  assert json.loads(copy.read_text()) == finished.results


def test_a_save_that_fails_is_one_line(workdir, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(inventory, "write", full)
  with pytest.raises(UserError, match=r"cannot be written .*No space") as error:
    with checkpoints.Checkpointer(workdir, corruption._spec()) as keeper:
      keeper.save(corruption.make_state(12), 12, 0.3)
  assert "\n" not in str(error.value)
  # It has no name yet, so that the one before is the last.
  assert checkpoints.find(workdir, which="last") == (8, "last")


def test_a_file_that_may_not_be_read_is_not_called_damaged(workdir):
  path = folder(workdir, 8) / "ema" / "_METADATA"
  path.chmod(0)
  if os.access(path, os.R_OK):
    pytest.skip("root may read everything")
  with pytest.raises(UserError, match="Permission denied"):
    checkpoints.find(workdir)
  assert files.read_results(workdir)
