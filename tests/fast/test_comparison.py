"""Several runs as one table: arithmetic, what is never merged, the pages."""

import importlib
import json
import pathlib
import re

import numpy as np
import pytest
from html_page import Page
from PIL import Image

from atat_jax import report
from atat_jax.drawing import style
from atat_jax.errors import UserError
from atat_jax.report import __main__ as command
from atat_jax.report import comparison, published

ROOT = pathlib.Path(__file__).resolve().parents[2]

ACCURACIES = {
  "running": {"nominal": 0.9, "fgsm": 0.5, "pgd20": 0.4},
  "batch": {"nominal": 0.91, "pgd20": 0.45},
}
STEPS = {"fgsm": 1, "ifgsm20": 20, "pgd7": 7, "pgd10": 10, "pgd20": 20}


def row(attack, mode, accuracy, **changes):
  attacked = attack != "nominal"
  return {
    "model": "at",
    "dataset": "cifar10",
    "split": "test",
    "num_examples": 10_000,
    "attack": attack,
    "norm": "linf" if attacked else None,
    "epsilon": 8 / 255 if attacked else None,
    "step_size": (8 if attack == "fgsm" else 2) / 255 if attacked else None,
    "num_steps": STEPS.get(attack),
    "num_restarts": 1 if attacked else None,
    "loss": "cross_entropy" if attacked else None,
    "batch_norm": mode,
    "batch_size": 100 if mode == "batch" else 500,
    "seed": 0,
    "accuracy": accuracy,
    "seconds": 1.0,
    "checkpoint_step": 9,
  } | changes


def rows(accuracies=ACCURACIES, **changes):
  return [
    row(attack, mode, accuracy, **changes)
    for mode, values in accuracies.items()
    for attack, accuracy in values.items()
  ]


def write_run(workdir, found, method="at", seed=0, rates=(), **fields):
  """A finished run; `fields` are of the objective."""
  config = {
    "seed": seed,
    "method": method,
    "objective": {"epsilon": 8 / 255, **fields},
    "train": {"batch_size": 64},
    "model": {"name": "wide_resnet", "depth": 8, "width": 2},
    "evaluation": {"attacks": f"whatever {seed}"},
    "teacher_workdir": f"teachers/{seed}",
  }
  run = {"config": config, "commit": "0123abcd", "devices": ["cpu"]}
  workdir.mkdir(parents=True)
  results = {"format": 1, "run": run, "rows": found, "diagnostics": {}}
  (workdir / "results.json").write_text(json.dumps(results))
  lines = [
    {"split": "train", "step": step, "images_per_second": rate}
    for step, rate in enumerate(rates)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (workdir / "metrics.jsonl").write_text(text)
  return workdir


def shifted(by):
  return {
    mode: {attack: accuracy + by for attack, accuracy in values.items()}
    for mode, values in ACCURACIES.items()
  }


def find(found, model, attack, mode="running"):
  chosen = [
    r
    for r in found["rows"]
    if (r["model"], r["attack"], r["batch_norm"]) == (model, attack, mode)
  ]
  assert len(chosen) == 1
  return chosen[0]


# --- Merging -----------------------------------------------------------------


def test_mean_and_standard_error_over_seeds(tmp_path):
  running = [0.41, 0.44, 0.4]
  batch = [0.5, 0.47, 0.49]
  workdirs = [
    write_run(
      tmp_path / str(seed),
      rows({"running": {"pgd20": a}, "batch": {"pgd20": b}}),
      seed=seed,
    )
    for seed, a, b in zip((3, 1, 2), running, batch, strict=True)
  ]
  found = comparison.compare(workdirs)
  assert len(found["rows"]) == 2
  for mode, values in (("running", running), ("batch", batch)):
    merged = find(found, "at", "pgd20", mode)
    assert merged["accuracy"] == pytest.approx(np.mean(values))
    error = np.std(values, ddof=1) / np.sqrt(3)
    assert merged["standard_error"] == pytest.approx(error)
    assert merged["num_runs"] == 3
    seeds = dict(zip(("3", "1", "2"), values, strict=True))
    assert merged["accuracies"] == seeds
  # Seed by seed, so that what the seeds share cancels.
  gaps = np.subtract(batch, running)
  assert find(found, "at", "pgd20", "batch")["difference"] == {
    "accuracy": pytest.approx(np.mean(gaps)),
    "standard_error": pytest.approx(np.std(gaps, ddof=1) / np.sqrt(3)),
    "num_runs": 3,
  }
  assert [run["seed"] for run in found["runs"]] == [1, 2, 3]
  json.dumps(found, allow_nan=False)


def test_one_run_has_no_standard_error(tmp_path):
  found = comparison.compare([write_run(tmp_path / "a", rows())])
  assert find(found, "at", "pgd20")["standard_error"] is None
  assert "±" not in comparison.as_markdown(found).split("## What")[0]


def test_the_network_that_was_trained_counts(tmp_path):
  both = rows(model="student") + rows(shifted(-0.3), model="teacher")
  workdir = write_run(tmp_path / "a", both, method="atat")
  found = comparison.compare([workdir])
  assert find(found, "atat", "pgd20")["accuracy"] == 0.4
  assert {r["model"] for r in found["rows"]} == {"atat"}


def test_other_trainings_are_other_rows(tmp_path):
  found = comparison.compare(
    [
      write_run(tmp_path / "a", rows(), weight=1.0),
      write_run(tmp_path / "b", rows(shifted(0.1)), weight=0.5, seed=1),
      write_run(tmp_path / "c", rows(shifted(0.2)), weight=0.5, seed=2),
    ]
  )
  assert find(found, "at (weight=1.0)", "pgd20")["accuracy"] == 0.4
  other = find(found, "at (weight=0.5)", "pgd20")
  assert other["accuracy"] == pytest.approx(0.55) and other["num_runs"] == 2
  assert found["training"] == {
    "objective.weight": {"at (weight=1.0)": "1.0", "at (weight=0.5)": "0.5"}
  }


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("num_examples", 1000),
    ("epsilon", 4 / 255),
    ("step_size", 1 / 255),
    ("num_steps", 40),
    ("num_restarts", 5),
    ("loss", "margin"),
    ("seed", 1),
    ("norm", "l2"),
    ("split", "validation"),
    ("dataset", "cifar100"),
    ("options", {"momentum": 1.0}),
  ],
)
def test_other_protocols_are_never_merged(tmp_path, field, value):
  one = rows({"running": {"pgd20": 0.4}})
  other = rows({"running": {"pgd20": 0.6}}, **{field: value})
  found = comparison.compare(
    [
      write_run(tmp_path / "a", one, seed=0),
      write_run(tmp_path / "b", other, seed=1),
    ]
  )
  assert [r["accuracy"] for r in found["rows"]] == [0.4, 0.6]
  assert [r["num_runs"] for r in found["rows"]] == [1, 1]


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_the_batch_size_counts_with_batch_statistics(tmp_path, mode):
  found = comparison.compare(
    [
      write_run(
        tmp_path / str(size),
        rows({mode: {"pgd20": 0.4}}, batch_size=size),
        seed=size,
      )
      for size in (50, 100)
    ]
  )
  assert len(found["rows"]) == (1 if mode == "running" else 2)
  (shown,) = comparison.tables(found)
  if mode == "batch":
    assert shown.head[1:] == ["pgd20 (batch_size=50)", "pgd20 (batch_size=100)"]


def test_a_column_that_a_run_lacks_is_a_dash_and_named(tmp_path):
  only = {"running": {"nominal": 0.8, "pgd20": 0.7}}
  a = write_run(tmp_path / "a", rows())
  b = write_run(tmp_path / "b", rows(only, model="alp"), method="alp")
  c = write_run(tmp_path / "c", rows(only, model="alp"), method="alp", seed=1)
  (b2,) = [tmp_path / "d"]
  write_run(b2, rows(model="alp"), method="alp", seed=2)
  found = comparison.compare([a, b, c])
  assert found["missing"] == [
    f"{b} (alp, seed 0) has no fgsm with running statistics.",
    f"{b} (alp, seed 0) has no nominal, pgd20 with batch statistics.",
    f"{c} (alp, seed 1) has no fgsm with running statistics.",
    f"{c} (alp, seed 1) has no nominal, pgd20 with batch statistics.",
  ]
  running, batch = comparison.tables(found)
  assert [cell.text for cell in running.rows[1]] == [
    "alp",
    "80.00 ± 0.00",
    "–",
    "70.00 ± 0.00",
  ]
  assert [cell.text for cell in batch.rows[1]] == ["alp", "–", "–"]
  # Where some of the runs have it, their number is told.
  running, _ = comparison.tables(comparison.compare([a, b, c, b2]))
  assert running.rows[1][2] == ("50.00", ("n = 1", "paper 60.57"))


def test_runs_that_are_not_finished_are_refused(tmp_path):
  good = write_run(tmp_path / "good", rows())
  with pytest.raises(UserError, match=r"missing has no results\.json.*main"):
    comparison.compare([good, tmp_path / "missing"])
  half = write_run(tmp_path / "half", rows(model="teacher"), method="atat")
  with pytest.raises(UserError, match="half has no results of 'atat'"):
    comparison.compare([good, half])
  with pytest.raises(UserError, match="workdirs: none"):
    comparison.compare([])


def test_a_run_counts_once(tmp_path):
  a = write_run(tmp_path / "a", rows())
  b = write_run(tmp_path / "b", rows(shifted(0.1)))
  with pytest.raises(UserError, match=f"{b} is the same training as {a}"):
    comparison.compare([a, b])


def test_time_of_a_step(tmp_path):
  def run(name, method, seed, rates):
    return write_run(
      tmp_path / name, rows(model=method), method, seed, rates=rates
    )

  found = comparison.compare(
    [
      run("a", "at", 0, (64, 640, 320)),
      run("b", "at", 1, (160, 160)),
      run("c", "alp", 0, (100,)),
      run("d", "tla", 0, ()),
    ]
  )
  at, alp = found["costs"]
  times = [64 / 320, 64 / 160]  # the median of a run
  assert at["seconds_per_step"] == pytest.approx(np.mean(times))
  assert at["standard_error"] == pytest.approx(np.std(times, ddof=1) / 2**0.5)
  assert at["relative_to_at"] == 1
  assert alp["relative_to_at"] == pytest.approx(0.64 / 0.3)


def test_times_on_other_devices_are_not_compared(tmp_path):
  a = write_run(tmp_path / "a", rows(), rates=(64,))
  b = write_run(tmp_path / "b", rows(model="alp"), "alp", rates=(64,))
  results = json.loads((b / "results.json").read_text())
  results["run"]["devices"] = ["TPU v4"]
  (b / "results.json").write_text(json.dumps(results))
  found = comparison.compare([a, b])
  assert [cost["relative_to_at"] for cost in found["costs"]] == [1, None]


def test_autoattack_that_ended_early_has_its_protocol_in_full(tmp_path):
  def run(name, method, attacks):
    attack = row("autoattack", "running", 0.1, model=method)
    attack["attacks"] = [
      {"attack": name, "numbers": f"{name}!", "accuracy": 0.1, "seconds": 1}
      for name in attacks
    ]
    return write_run(tmp_path / name, [attack], method)

  found = comparison.compare(
    [run("a", "standard", ["apgd-ce"]), run("b", "at", ["apgd-ce", "apgd-t"])]
  )
  (shown,) = comparison.tables(found)
  assert "apgd-ce (apgd-ce!), apgd-t (apgd-t!)" in shown.notes[-1]


# --- Published figures -------------------------------------------------------


def test_published_figures_are_those_of_the_page():
  """Against the page's tables, which were written by hand."""
  text = (ROOT / "docs" / "reproduction.md").read_text()
  names = {
    "Standard": "standard",
    "AT-PGD": "at",
    "ALP": "alp",
    "TLA": "tla",
    "ATAT": "atat",
  }
  columns = {
    "nominal": "nominal",
    "FGSM": "fgsm",
    "I-FGSM(20)": "ifgsm20",
    "PGD(7)": "pgd7",
    "PGD(10)": "pgd10",
    "PGD(20)": "pgd20",
  }
  count = 0
  for dataset in ("cifar10", "cifar100"):
    title = dataset.upper().replace("CIFAR", "CIFAR-")
    block = text[text.index(f"| {title} |") :].split("\n\n")[0]
    head, _, *lines = [
      [cell.strip() for cell in line.strip("|").split("|")]
      for line in block.splitlines()
    ]
    for method, *numbers in lines:
      for column, number in zip(head[1:], numbers, strict=True):
        for mode in ("running", "batch"):
          ours = row(columns[column], mode, 0.1, dataset=dataset)
          expected = pytest.approx(float(number) / 100)
          assert published.accuracy(names[method], ours) == expected
        count += 1
  assert count == 45
  assert published.accuracy("at", row("pgd20", "running", 0.1)) == 0.4587


@pytest.mark.parametrize(
  ("attack", "changes"),
  [
    ("pgd20", {"epsilon": 4 / 255}),
    ("pgd20", {"step_size": 1 / 255}),
    ("pgd20", {"num_restarts": 5}),
    ("pgd20", {"loss": "margin"}),
    ("pgd20", {"norm": "l2"}),
    ("pgd20", {"options": {"momentum": 1.0}}),
    ("pgd20", {"num_examples": 1000}),
    ("pgd20", {"split": "validation"}),
    ("pgd20", {"dataset": "digits"}),
    ("pgd20", {"batch_norm": "batch", "batch_size": 500}),
    ("fgsm", {"step_size": 2 / 255}),
    ("nominal", {"num_examples": 1000}),
    ("pgd10", {}),  # CIFAR-100 only
    ("pgd20-margin", {}),
    ("autoattack", {}),
  ],
)
def test_published_figures_only_where_the_protocol_matches(attack, changes):
  ours = row(attack, "running", 0.1) | changes
  assert published.accuracy("at", ours) is None


def test_published_figures_are_only_those_of_the_paper():
  for method in ("trades", "mart", "atat_released", "student"):
    assert published.accuracy(method, row("pgd20", "running", 0.1)) is None
  ours = row("pgd20", "running", 0.1, dataset="cifar100")
  assert published.accuracy("tla", ours) is None


# --- Pages -------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
  """The pages of three methods, given in no order; attacks as well."""
  mixed = {
    "running": {"autoattack": 0.3, "pgd20": 0.4, "nominal": 0.9, "fgsm": 0.5},
    "batch": {"pgd20": 0.45, "nominal": 0.91},
  }
  workdirs = [
    write_run(
      tmp_path / "runs" / f"{method}{seed}",
      rows(
        {
          mode: {attack: a + 0.01 * seed for attack, a in values.items()}
          for mode, values in mixed.items()
        },
        model="student" if method == "atat" else method,
      ),
      method,
      seed,
      rates=(100,),
    )
    for method in ("atat", "toy<b>|", "at")
    for seed in (0, 1)
  ]
  paths = report.write_comparison(workdirs, tmp_path / "out" / "all.runs")
  names = ["all.runs.html", "all.runs.md", "all.runs.json"]
  assert [path.name for path in paths] == names
  return paths


def test_layout_of_the_papers_tables(made):
  page = Page(made[0])
  assert page.headings[:2] == [
    "cifar10. Running statistics: one fixed classifier",
    "cifar10. Batch statistics: paper's released protocol, can overstate"
    " robustness",
  ]
  head, at, atat, toy, batch_head, batch_at, *_ = page.rows
  assert head == ["accuracy (%)", "nominal", "fgsm", "pgd20", "autoattack"]
  assert at == [
    "at",
    "90.50 ± 0.50",
    "50.50 ± 0.50",
    "40.50 ± 0.50",
    "30.50 ± 0.50",
  ]
  assert [atat[0], toy[0]] == ["atat", "toy<b>|"]
  assert batch_head == ["accuracy (%)", "nominal", "pgd20"]
  assert batch_at[0] == "at" and batch_at[2] == "45.50 ± 0.50"
  assert "paper 63.81" in page.text and "+5.0 ± 0.0" in page.text
  assert published.SOURCE in page.text
  for text in (
    "pgd20: linf, epsilon 8/255, 20 steps of 2/255, 1 restart, cross_entropy"
    " loss; 10,000 cifar10 test images, seed 0; BatchNorm: batch statistics of"
    " 100 images",
    "cifar10, running statistics, autoattack",
    "0123abcd",
  ):
    assert text in page.text


def test_the_page_needs_nothing_but_itself(made):
  page = Page(made[0])
  page.assert_asks_for_nothing()
  assert sum(tag == "img" for tag, _ in page.tags) == 1
  assert "<b>|" not in page.source.replace("&lt;b&gt;|", "")


def test_markdown_has_the_same_numbers(made):
  lines = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in made[1].read_text().split("\n\n- ")[0].splitlines()
    if line.startswith("|")
  ]
  assert lines[0][1:] == ["nominal", "fgsm", "pgd20", "autoattack"]
  assert [line[0] for line in lines[2:]] == [
    "at [2 runs]",
    "atat [2 runs]",
    "toy<b>\\| [2 runs]",
  ]
  assert lines[3][3] == "40.50 ± 0.50 [paper 63.81]"


def count_pixels(path, color):
  with Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB")).astype(int)
  rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return (abs(pixels - rgb) <= 20).all(-1).sum()


def test_the_chart_shows_what_was_measured(made, tmp_path):
  (path,) = made[2].parent.glob("*.png")
  assert path.name == "all.runs_cifar10.png"
  assert count_pixels(path, style.BLUE) > 200
  assert count_pixels(path, style.VERMILION) > 20  # hollow squares
  running = {"running": ACCURACIES["running"]}
  workdir = write_run(tmp_path / "running", rows(running))
  report.write_comparison([workdir], tmp_path / "one")
  assert count_pixels(tmp_path / "one_cifar10.png", style.BLUE) > 50
  assert count_pixels(tmp_path / "one_cifar10.png", style.VERMILION) == 0


def test_the_command(tmp_path, capsys):
  workdir = write_run(tmp_path / "a", rows())
  command.main([str(workdir), "--out", str(tmp_path / "c")])
  assert capsys.readouterr().out.splitlines()[0] == (
    f"comparison: {tmp_path / 'c.html'}"
  )
  assert set(json.loads((tmp_path / "c.json").read_text())) == {
    "format",
    "source",
    "runs",
    "rows",
    "missing",
    "training",
    "costs",
  }


# --- The page of the reproduction --------------------------------------------


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
  missing = 0 if reproduction.RESULTS.exists() else len(markers) - 1
  missing += not reproduction.RESULTS.with_name("costs.json").exists()
  assert text.count("Not measured yet.") == missing
  for name in re.findall(r"\(figures/(\w+\.png)\)", text):
    assert (reproduction.FIGURES / name).exists()


def test_measured_parts_come_from_the_comparison(reproduction, made, tmp_path):
  page = (
    "Before.\n<!-- generated: batch_statistics -->\nold\n<!-- end -->\n"
    "<!-- generated: provenance -->\n<!-- end -->\nAfter.\n"
  )
  found = reproduction.generate(page, made[2])
  assert "old" not in found
  assert found.startswith("Before.\n") and found.endswith("After.\n")
  lines = [line for line in found.splitlines() if line.startswith("| at ")]
  (cells,) = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
  assert cells == ["at", "40.50 ± 0.50", "45.50 ± 0.50", "+5.0 ± 0.0", "2"]
  assert "6 runs; commit `0123abcd`" in found
  assert reproduction.generate(found, made[2]) == found
  nothing = reproduction.generate(found, tmp_path / "none.json")
  assert nothing.count("Not measured yet.") == 2 and "40.50" not in nothing
  with pytest.raises(UserError, match="generated: 'x'; allowed: accuracies"):
    reproduction.generate("<!-- generated: x -->\n<!-- end -->", made[2])


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
  from atat_jax import objectives

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
      assert config.seed == run.seed and config.train.num_epochs == 1
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
    ("--running_attacks=bim", "evaluation.attack: 'bim'"),
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


@pytest.mark.slow
def test_all_runs_then_nothing_is_left_to_do(methods, tmp_path, monkeypatch):
  flags = [
    f"--workdir={tmp_path}",
    "--methods=atat",
    "--seeds=0,1",
    "--attacks=nominal,fgsm",
    "--running_attacks=apgd2",
    "--running_examples=20",
    "--set=train.num_epochs=1",
    "--set=train.batch_size=256",
    "--set=objective.num_steps=1",
    "--set=model.width=1",
    "--set=evaluation.validation_attack=pgd1",
    "--set=evaluation.num_examples=40",
    "--set=figures.attack=pgd1",
  ]
  methods.main(flags)
  found = json.loads((tmp_path / "comparison.json").read_text())
  assert [(r["label"], r["seed"]) for r in found["runs"]] == [
    ("standard", 0),
    ("standard", 1),
    ("atat", 0),
    ("atat", 1),
  ]
  assert {
    (r["model"], r["attack"], r["batch_norm"], r["num_examples"], r["num_runs"])
    for r in found["rows"]
  } == {
    (model, *protocol, 2)
    for model in ("standard", "atat")
    for protocol in (
      ("nominal", "running", 40),
      ("fgsm", "running", 40),
      ("nominal", "batch", 40),
      ("fgsm", "batch", 40),
      ("apgd2", "running", 20),
    )
  }
  assert found["missing"] == []
  assert not (tmp_path / "seed0" / "atat" / "teacher").exists()

  def fail(*args):
    raise AssertionError("a finished run was run again")

  monkeypatch.setattr(methods.pipeline, "run", fail)
  methods.main(flags)
  for more in ("--attacks=nominal,fgsm,ifgsm2", "--running_examples=30"):
    with pytest.raises(AssertionError, match="run again"):
      methods.main([*flags, more])


@pytest.mark.slow
def test_costs_of_a_step_are_measured(monkeypatch, tmp_path, capsys):
  monkeypatch.syspath_prepend(ROOT)
  costs = importlib.import_module("benchmarks.costs")
  original = costs.steps.make_train_step
  out = tmp_path / "costs.json"
  costs.main(
    [
      "--methods=standard",
      "--set=train.batch_size=256",
      "--set=model.width=1",
      "--turns=3",
      f"--out={out}",
    ]
  )
  (found,) = json.loads(out.read_text())["rows"]
  assert found["method"] == "standard" and found["num_steps"] == 3 * (2 * 4 - 1)
  assert 0 < found["seconds_per_step"] < found["compile_seconds"]
  # At least the activations of the first stage: 16 channels of 8 x 8.
  assert found["memory_bytes"] > 256 * 8 * 8 * 16 * 4
  assert "| standard |" in capsys.readouterr().out
  assert costs.steps.make_train_step is original
