"""The scripts that make all runs of the methods, and the page about them."""

import importlib
import json
import pathlib
import re

import pytest
import run_files

from atat_jax import objectives
from atat_jax.errors import UserError
from atat_jax.report import merge

ROOT = pathlib.Path(__file__).resolve().parents[2]


def write_runs(folder):
  """Two runs of a method, with both kinds of statistics."""
  return [
    run_files.write_run(
      folder / f"at{seed}",
      [
        run_files.result_row(
          "at", "pgd20", mode, accuracy + 0.01 * seed, dataset="cifar10"
        )
        for mode, accuracy in (("running", 0.4), ("batch", 0.45))
      ],
      seed=seed,
    )
    for seed in (0, 1)
  ]


@pytest.fixture
def reproduction(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module("benchmarks.reproduction")


def test_the_page_says_what_was_measured(reproduction):
  """As its JSON has it; where there is none, nothing."""
  text = reproduction.PAGE.read_text(encoding="utf-8")
  assert reproduction.generate(text, reproduction.RESULTS) == text
  markers = re.findall(r"<!-- generated: (\w+) -->", text)
  assert sorted(markers) == sorted(reproduction.PARTS)
  results, others = reproduction.RESULTS, reproduction.OTHERS
  missing = 0 if results.exists() else len(markers) - len(others)
  missing += sum(not results.with_name(f"{x}.json").exists() for x in others)
  assert text.count("Not measured yet.") == missing
  for name in re.findall(r"\(figures/(\w+\.png)\)", text):
    assert (reproduction.FIGURES / name).exists()


def test_measured_parts_come_from_the_comparison(reproduction, tmp_path):
  page = (
    "Before.\n<!-- generated: batch_statistics -->\nold\n<!-- end -->\n"
    "<!-- generated: provenance -->\n<!-- end -->\nAfter.\n"
  )
  path = tmp_path / "comparison.json"
  path.write_text(json.dumps(merge.compare(write_runs(tmp_path))))
  found = reproduction.generate(page, path)
  assert "old" not in found
  assert found.startswith("Before.\n") and found.endswith("After.\n")
  lines = [line for line in found.splitlines() if line.startswith("| at ")]
  (cells,) = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
  assert cells == ["at", "40.50 ± 0.50", "45.50 ± 0.50", "2"]
  assert "2 runs; commit `0123abcd`" in found
  assert reproduction.generate(found, path) == found
  nothing = reproduction.generate(found, tmp_path / "none.json")
  assert nothing.count("Not measured yet.") == 2 and "40.50" not in nothing
  with pytest.raises(UserError, match=r"generated: 'x'; allowed: .*accuracies"):
    reproduction.generate("<!-- generated: x -->\n<!-- end -->", path)


def test_costs_are_relative_to_at(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  costs = importlib.import_module("benchmarks.costs")
  rows = [
    costs.merge(
      [
        {
          "method": method,
          "num_steps": 10,
          "seconds_per_step": seconds * factor,
          "memory_bytes": mib * 2**20,
          "compile_seconds": compiling,
        }
        for factor, compiling in ((0.5, 3.0), (2.0, 0.1), (1.0, 0.1))
      ]
    )
    for method, seconds, mib in (("standard", 0.02, 10), ("at", 0.08, 40))
  ]
  assert [row["num_steps"] for row in rows] == [30, 30]
  line, last = (
    [cell.strip() for cell in text.strip("|").split("|")]
    for text in costs.as_markdown(rows).splitlines()[2:]
  )
  assert line == [
    "standard",
    "20.0",
    "10.0 to 40.0",
    "0.25",
    "10.0",
    "0.25",
    "3.0",
  ]
  assert last == ["at", "80.0", "40.0 to 160.0", "1.00", "40.0", "1.00", "3.0"]
  assert costs.as_markdown(rows[:1]).count(" – |") == 2


# --- The command that makes all runs -----------------------------------------


@pytest.fixture
def methods(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module("benchmarks.methods")


def test_every_registered_method_is_run(methods):
  args = methods.parser().parse_args(["--workdir=all"])
  assert args.methods == list(objectives.OBJECTIVES)


def make_runs(methods, *flags):
  args = methods.parser().parse_args(["--workdir=all", *flags])
  return methods.make_runs(args)


def test_runs_of_all_seeds_share_a_teacher_a_seed(methods):
  runs = make_runs(
    methods,
    "--methods=atat",
    "--seeds=4,2",
    "--attacks=nominal,pgd20",
    "--set=objective.lambda1=0.5",
    "--set=train.num_epochs=1",
  )
  assert [(run.method, run.seed) for run in runs] == [
    ("standard", 4),
    ("atat", 4),
    ("standard", 2),
    ("atat", 2),
  ]
  for run in runs:
    assert run.workdir == pathlib.Path("all", f"seed{run.seed}", run.method)
    alone, both = run.configs
    assert alone.evaluation.attacks == "autoattack-fast"
    assert alone.evaluation.batch_norm == ("running",)
    assert both.evaluation.batch_norm == ("running", "batch")
    assert both.evaluation.attacks == "nominal,pgd20"
    for config in run.configs:
      # Another seed: a fresh student must not start at its teacher's weights.
      assert (config.seed == run.seed) == (run.method != "standard")
      assert config.train.num_epochs == 1
      if run.method == "atat":
        assert config.teacher_workdir == f"all/seed{run.seed}/standard"
        assert config.objective.lambda1 == 0.5
      else:
        assert config.teacher_workdir is None


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--set=train.nothing=1", "set: 'train.nothing=1'; allowed"),
    ("--set=train.num_epochs=many", "set: 'train.num_epochs=many'"),
    ("--set=train.num_epochs=0", "train.num_epochs: 0"),
    ("--methods=none", "method: 'none'"),
    ("--config=nowhere.py", "config: nowhere.py"),
    ("--running_attacks=bim", "evaluation.attacks: 'bim'"),
  ],
)
def test_bad_flags_are_refused_before_anything_runs(methods, flag, message):
  with pytest.raises(UserError, match=re.escape(message)):
    make_runs(methods, flag)


def test_time_left(methods):
  runs = make_runs(methods, "--methods=standard,atat", "--seeds=0,1")
  assert methods.remaining(runs, {}) is None
  assert methods.remaining(runs, {"standard": [10, 20]}) == 4 * 15
  seconds = {"standard": [10], "atat": [100]}
  assert methods.remaining(runs[1:], seconds) == 100 + 10 + 100
