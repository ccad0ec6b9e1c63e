"""Every line of the benchmarks' plans, at toy size on a CPU.

So that a window on a GPU is not lost to a command that could not have run.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import toy_plans

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLANS = sorted(path.stem for path in (ROOT / "benchmarks/plans").glob("*.txt"))


def _reference():
  """The original AutoAttack's clone; "": it is installed; None: not here."""
  named = os.environ.get("ATAT_JAX_AUTOATTACK")
  if named:
    return str(pathlib.Path(named).resolve())
  return "" if importlib.util.find_spec("autoattack") else None


def _check(module, args):
  """Looks at what a line has left."""
  if module != "benchmarks.methods":
    text = args.out.read_text(encoding="utf-8")
    if module == "benchmarks.honest":
      assert text.count("\n| `") == 9 and "PGD-20" in text
      return
    found = json.loads(text)
    assert {"command", "commit", "machine"} <= set(found)
    assert found.get("rows") or found["networks"]
    return
  if args.train_only:
    for method in ("standard", *args.methods):
      assert (args.workdir / f"seed0/{method}/checkpoints").is_dir()
    return
  found = json.loads((args.workdir / "comparison.json").read_text())
  assert found["missing"] == []
  labels = {run["label"] for run in found["runs"]}
  assert {"standard", *args.methods} <= labels or len(labels) == 2
  attacks = {row["attack"] for row in found["rows"]}
  assert {*args.attacks.split(","), args.running_attacks} <= attacks
  assert {shift["label"] for shift in found["shifts"]} == labels


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_every_line_of_a_plan_runs_at_toy_size(plan, tmp_path):
  """Runs the first of lines that differ by seeds and numbers only."""
  pytest.importorskip("torch")
  run = importlib.import_module("benchmarks.run")
  commands = run.read_plans([str(run.PLANS / f"{plan}.txt")])
  ran = set()
  (data := tmp_path / "data").mkdir()
  reference = _reference()
  names = {
    "OUT": str(tmp_path / "out"),
    "DATA": str(toy_plans.data(data)),
    "REFERENCE": reference or "",
  }
  for command in commands:
    module, arguments = toy_plans.small(command.text, names)
    if module == "benchmarks.autoattack" and reference is None:
      continue  # needs the original
    benchmark = importlib.import_module(module)
    args = benchmark.parser().parse_args(arguments)
    if (work := toy_plans.work(module, arguments)) in ran:
      assert benchmark.make_runs(args)  # its configurations are sound, too
      continue
    ran.add(work)
    # Each in a process of its own, as plans run them.
    done = subprocess.run(
      [sys.executable, "-m", module, *arguments],
      cwd=ROOT,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, f"{command.name}\n{done.stderr[-5000:]}"
    _check(module, args)


def test_small_lines_name_the_same_work():
  """Module, methods, seeds, dtypes and files are those of the line."""
  names = {"OUT": "/out", "DATA": "/data", "REFERENCE": "/aa"}
  run = importlib.import_module("benchmarks.run")
  for plan in PLANS:
    for command in run.read_plans([str(run.PLANS / f"{plan}.txt")]):
      module, arguments = toy_plans.small(command.text, names)
      parser = importlib.import_module(module).parser()
      args = vars(parser.parse_args(arguments))
      kept = vars(parser.parse_args(toy_plans.split(command.text, names)[1]))
      for field in ("config", "recipe", "methods", "seeds", "dtype", "method"):
        assert args.get(field) == kept.get(field)
      for field in ("workdir", "out", "attacks", "running_attacks", "saving"):
        assert args.get(field) == kept.get(field)
