"""Two runs of one seed are the same to the last bit, whatever is around them.

Each run is a process of its own. Compared are all arrays of the last
checkpoints, `metrics.jsonl` but for the speed, and `results.json` but for times
and what names the machine's state.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

ITEMS = ("params", "batch_stats", "opt_state", "run", "ema")

FEW = (
  "--config.train.num_epochs=1",
  "--config.train.ema_decay=0.9",
  "--config.evaluation.attacks=nominal,pgd1",
  "--config.figures.analyses=",
)


def run(workdir, *extra, mode="train", method="standard", env=None, cwd=None):
  """Runs `main.py` in a process; returns its working directory."""
  arguments = tiny.flags(workdir, *FEW, *extra, method=method, mode=mode)
  arguments[0] = arguments[0].replace("configs", str(tiny.ROOT / "configs"))
  outcome = subprocess.run(
    [sys.executable, "-W", "ignore", str(tiny.ROOT / "main.py"), *arguments],
    env={
      **os.environ,
      **tiny.QUICK,
      "PYTHONPATH": str(tiny.ROOT),
      **(env or {}),
    },
    cwd=cwd or tiny.ROOT,
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )
  assert outcome.returncode == 0, outcome.stderr[-2000:]
  return workdir


def arrays(workdir):
  """All arrays of the last checkpoint, by item and path, read by Orbax."""
  place = pathlib.Path(workdir).absolute() / "checkpoints"
  step = max(int(x.name) for x in place.iterdir() if x.name.isdigit())
  found = {"step": np.asarray(step)}
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ITEMS:
      if not (place / str(step) / item).is_dir():
        continue
      tree = checkpointer.restore(place / str(step) / item)
      for where, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
          leaf = jax.random.key_data(leaf)
        found[item + jax.tree_util.keystr(where)] = np.asarray(leaf)
  return found


def assert_same(actual, expected, *, items=ITEMS):
  a, b = arrays(actual), arrays(expected)
  assert a.keys() == b.keys() and len(a) > 20
  for name, value in a.items():
    if name == "step" or name.startswith(items):
      np.testing.assert_array_equal(value, b[name], name)


def metrics(workdir):
  return tiny.metrics(workdir / "metrics.jsonl")


def results(workdir):
  """`results.json` without what may differ between two equal runs."""
  found = json.loads((workdir / "results.json").read_text())
  rows = [
    {k: v for k, v in row.items() if k != "seconds"} for row in found["rows"]
  ]
  return rows, found["diagnostics"], found["run"]["config"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return run(tmp_path_factory.mktemp("reference") / "run")


@pytest.mark.slow
def test_another_process_and_its_surroundings_change_nothing(
  reference, tmp_path
):
  """Hash seed, time zone, locale and folder, all of them at once."""
  elsewhere = tmp_path / "a folder"
  elsewhere.mkdir()
  env = {
    "PYTHONHASHSEED": "12345",
    "TZ": "Pacific/Kiritimati",
    "LC_ALL": "C",
  }
  again = run(tmp_path / "run", env=env, cwd=elsewhere)
  assert_same(again, reference)
  assert metrics(again) == metrics(reference)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atat", "tla"])
def test_two_whole_runs_are_the_same(method, tmp_path):
  first = run(
    tmp_path / "1", method=method, mode="run", env={"PYTHONHASHSEED": "1"}
  )
  second = run(
    tmp_path / "2", method=method, mode="run", env={"PYTHONHASHSEED": "2"}
  )
  assert_same(second, first)
  assert metrics(second) == metrics(first)
  assert results(second) == results(first)


@pytest.mark.slow
@pytest.mark.parametrize(
  "extra",
  [
    "--config.train.log_every_steps=3",
    "--config.train.validate_every_epochs=0.3",
  ],
)
def test_what_is_only_watched_changes_nothing(extra, reference, tmp_path):
  """Log lines and validations; the sums are those of the log."""
  again = run(tmp_path / "run", extra)
  items = ("params", "batch_stats", "opt_state", "ema")
  assert_same(again, reference, items=items)


@pytest.mark.slow
def test_steps_in_one_program_differ_by_rounding_only(reference, tmp_path):
  """Nothing depends on how many steps a program takes, but for rounding."""
  programs = [
    run(tmp_path / str(size), f"--config.train.steps_per_dispatch={size}")
    for size in (2, 4)
  ]
  assert_same(*programs)
  a, b = arrays(programs[0]), arrays(reference)
  for name, value in a.items():
    if name.startswith(("params", "ema")):
      np.testing.assert_allclose(value, b[name], rtol=0.05, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_policy_changes_rounding_only(policy, reference, tmp_path):
  """The choice between two states is part of another program."""
  again = run(tmp_path / "run", f"--config.train.nonfinite={policy}")
  a, b = arrays(again), arrays(reference)
  for name, value in a.items():
    if name.startswith(("params", "ema")):
      np.testing.assert_allclose(value, b[name], rtol=0.05, atol=2e-3)


@pytest.mark.slow
def test_where_a_run_was_resumed_changes_nothing(tmp_path):
  """The run goes on from the checkpoint before its last, in another process."""
  longer = "--config.train.num_epochs=2"
  whole, parts = (run(tmp_path / name, longer) for name in ("whole", "parts"))
  shutil.rmtree(parts / "checkpoints" / str(2 * tiny.STEPS_PER_EPOCH))
  run(parts, longer)
  assert_same(parts, whole)
  assert metrics(parts) == metrics(whole)


@pytest.mark.slow  # imports everything in another process
def test_a_gpu_is_told_to_repeat_before_it_starts():
  code = """
from jax._src import xla_bridge
from atat_jax import pipeline, runtime
from atat_jax.runs import provenance
assert not xla_bridge.backends_are_initialized()
runtime.set_up(distributed=False, deterministic=True)
assert xla_bridge.backends_are_initialized()  # XLA knows every flag
print(provenance.record([])["xla_flags"], end="")
"""
  given = "--xla_backend_optimization_level=0"
  outcome = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "XLA_FLAGS": given, "PYTHONPATH": str(tiny.ROOT)},
    capture_output=True,
    text=True,
    timeout=100,
    check=True,
  )
  assert outcome.stdout == f"{given} --xla_gpu_deterministic_ops=true"
  assert "--deterministic: not needed on CPU" in outcome.stderr
