"""Several runs as one table: arithmetic, what is never merged, the pages."""

import json
import pathlib
import re

import numpy as np
import pytest
import run_files
from html_page import Page
from pictures import is_color, pixels
from run_files import write_run

from atat_jax import objectives, report
from atat_jax.drawing import style
from atat_jax.errors import UserError
from atat_jax.figures import comparison as figures
from atat_jax.report import __main__ as command
from atat_jax.report import comparison, layout, merge, published

pytest_plugins = ("pictures",)

ROOT = pathlib.Path(__file__).resolve().parents[2]

ACCURACIES = {
  "running": {"nominal": 0.9, "fgsm": 0.5, "pgd20": 0.4},
  "batch": {"nominal": 0.91, "pgd20": 0.45},
}


def row(attack, mode, accuracy, **changes):
  return (
    run_files.result_row(
      changes.pop("model", "at"),
      attack,
      mode,
      accuracy,
      dataset="cifar10",
      num_examples=10_000,
      batch_size=100 if mode == "batch" else 500,
    )
    | changes
  )


def rows(accuracies=ACCURACIES, **changes):
  return [
    row(attack, mode, accuracy, **changes)
    for mode, values in accuracies.items()
    for attack, accuracy in values.items()
  ]


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
  found = merge.compare(workdirs)
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
  found = merge.compare([write_run(tmp_path / "a", rows())])
  assert find(found, "at", "pgd20")["standard_error"] is None
  assert "±" not in comparison.as_markdown(found).split("## What")[0]


def test_runs_that_agree_have_no_standard_error(tmp_path):
  workdirs = [
    write_run(tmp_path / str(seed), rows(), seed=seed) for seed in range(3)
  ]
  found = merge.compare(workdirs)
  assert find(found, "at", "pgd20")["standard_error"] is None
  text = comparison.as_markdown(found).split("## What")[0]
  assert "±" not in text and "runs that all agree" in text
  assert merge.mean_and_error([0.1, 0.3 - 0.2]) == (pytest.approx(0.1), None)


def test_the_network_that_was_trained_counts(tmp_path):
  both = rows(model="student") + rows(shifted(-0.3), model="teacher")
  workdir = write_run(tmp_path / "a", both, method="atat")
  found = merge.compare([workdir])
  assert find(found, "atat", "pgd20")["accuracy"] == 0.4
  assert {r["model"] for r in found["rows"]} == {"atat"}


def test_other_trainings_are_other_rows(tmp_path):
  found = merge.compare(
    [
      write_run(tmp_path / "a", rows(), weight=1.0),
      write_run(tmp_path / "b", rows(shifted(-0.1)), weight=0.5, seed=1),
      write_run(tmp_path / "c", rows(shifted(-0.2)), weight=0.5, seed=2),
    ]
  )
  assert find(found, "at (weight=1.0)", "pgd20")["accuracy"] == 0.4
  other = find(found, "at (weight=0.5)", "pgd20")
  assert other["accuracy"] == pytest.approx(0.25) and other["num_runs"] == 2
  assert found["training"] == {
    "objective.weight": {"at (weight=1.0)": "1.0", "at (weight=0.5)": "0.5"}
  }


def test_a_run_of_an_older_version_is_the_same_training(tmp_path):
  fields = {"attack_method": "pgd", "single_step_size": 0.0}
  workdirs = [
    write_run(tmp_path / "older", rows(), num_steps=7),
    write_run(tmp_path / "newer", rows(), seed=1, num_steps=7, **fields),
  ]
  found = merge.compare(workdirs)
  assert find(found, "at", "pgd20")["num_runs"] == 2


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
  found = merge.compare(
    [
      write_run(tmp_path / "a", one, seed=0),
      write_run(tmp_path / "b", other, seed=1),
    ]
  )
  assert [r["accuracy"] for r in found["rows"]] == [0.4, 0.6]
  assert [r["num_runs"] for r in found["rows"]] == [1, 1]


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_the_batch_size_counts_with_batch_statistics(tmp_path, mode):
  found = merge.compare(
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
  (shown,) = layout.tables(found)
  if mode == "batch":
    assert shown.head[1:] == ["pgd20 (batch_size=50)", "pgd20 (batch_size=100)"]


def test_a_column_that_a_run_lacks_is_a_dash_and_named(tmp_path):
  only = {"running": {"nominal": 0.8, "pgd20": 0.7}}
  a = write_run(tmp_path / "a", rows())
  b = write_run(tmp_path / "b", rows(only, model="alp"), method="alp")
  c = write_run(tmp_path / "c", rows(only, model="alp"), method="alp", seed=1)
  (b2,) = [tmp_path / "d"]
  write_run(b2, rows(model="alp"), method="alp", seed=2)
  found = merge.compare([a, b, c])
  assert found["missing"] == [
    f"{b} (alp, seed 0) has no fgsm with running statistics.",
    f"{b} (alp, seed 0) has no nominal, pgd20 with batch statistics.",
    f"{c} (alp, seed 1) has no fgsm with running statistics.",
    f"{c} (alp, seed 1) has no nominal, pgd20 with batch statistics.",
  ]
  running, batch = layout.tables(found)
  assert [(cell.text, cell.error) for cell in running.rows[1]] == [
    ("alp", ""),
    ("80.00", ""),
    ("–", ""),
    ("70.00", ""),
  ]
  assert [cell.text for cell in batch.rows[1]] == ["alp", "–", "–"]
  # Where some of the runs have it, their number is told.
  running, _ = layout.tables(merge.compare([a, b, c, b2]))
  assert running.rows[1][2] == (
    "50.00",
    ("n = 1", "49.0–51.0", "paper 60.57"),
    "",
  )


def test_runs_that_are_not_finished_are_refused(tmp_path):
  good = write_run(tmp_path / "good", rows())
  with pytest.raises(UserError, match=r"missing has no results\.json.*main"):
    merge.compare([good, tmp_path / "missing"])
  half = write_run(tmp_path / "half", rows(model="teacher"), method="atat")
  with pytest.raises(UserError, match="half has no results of 'atat'"):
    merge.compare([good, half])
  with pytest.raises(UserError, match=r"workdirs: \[\]"):
    merge.compare([])


def test_a_run_counts_once(tmp_path):
  a = write_run(tmp_path / "a", rows())
  b = write_run(tmp_path / "b", rows(shifted(-0.1)))
  with pytest.raises(UserError, match=f"{b} is the same training as {a}"):
    merge.compare([a, b])


def test_time_of_a_step(tmp_path):
  def run(name, method, seed, rates):
    return write_run(
      tmp_path / name, rows(model=method), method, seed, rates=rates
    )

  found = merge.compare(
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
  found = merge.compare([a, b])
  assert [cost["relative_to_at"] for cost in found["costs"]] == [1, None]


def test_autoattack_that_ended_early_has_its_protocol_in_full(tmp_path):
  def run(name, method, attacks):
    attack = row("autoattack", "running", 0.1, model=method)
    attack["attacks"] = [
      {"attack": name, "numbers": f"{name}!", "accuracy": 0.1, "seconds": 1}
      for name in attacks
    ]
    return write_run(tmp_path / name, [attack], method)

  found = merge.compare(
    [run("a", "standard", ["apgd-ce"]), run("b", "at", ["apgd-ce", "apgd-t"])]
  )
  (shown,) = layout.tables(found)
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


def test_methods_are_in_the_order_of_the_registry(tmp_path):
  names = [*reversed(objectives.OBJECTIVES), "another"]
  found = merge.compare(
    [write_run(tmp_path / name, rows(model=name), name) for name in names]
  )
  expected = [*objectives.OBJECTIVES, "another"]
  assert [run["label"] for run in found["runs"]] == expected


def test_published_figures_are_only_those_of_the_paper():
  for method in ("trades", "mart", "atat_released", "student"):
    assert published.accuracy(method, row("pgd20", "running", 0.1)) is None
  ours = row("pgd20", "running", 0.1, dataset="cifar100")
  assert published.accuracy("tla", ours) is None


# --- Pages -------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The pages of three methods, given in no order; attacks as well."""
  tmp_path = tmp_path_factory.mktemp("made")
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
    "cifar10. Batch statistics: paper's released protocol, no fixed classifier,"
    " its attack can fail",
  ]
  head, at, atat, toy, batch_head, batch_at, *_ = page.rows
  assert head == ["accuracy (%)", "nominal", "fgsm", "pgd20", "autoattack"]
  assert at == [
    "at 2 runs",
    "90.50 ± 0.50 paper 87.25",
    "50.50 ± 0.50 paper 56.22",
    "40.50 ± 0.50 paper 45.87",
    "30.50 ± 0.50",
  ]
  assert [atat[0], toy[0]] == ["atat 2 runs", "toy<b>| 2 runs"]
  assert batch_head == ["accuracy (%)", "nominal", "pgd20"]
  assert batch_at[2] == "45.50 ± 0.50 +5.0 paper 45.87"
  assert "paper 63.81" in page.text
  assert published.SOURCE in page.text
  for text in (
    "pgd20: linf, epsilon 8/255, 20 steps of 2/255, 1 restart, cross_entropy"
    " loss; 10,000 cifar10 test images, seed 0; BatchNorm: batch statistics of"
    " 100 images",
    "cifar10, running statistics, autoattack",
    "0123abcd",
    "12,345",
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
    "toy\\<b>\\| [2 runs]",
  ]
  assert lines[3][3] == "40.50 ± 0.50 [paper 63.81]"


def count_pixels(path, color):
  return is_color(pixels(path), color).sum()


def test_the_chart_shows_what_was_measured(made, tmp_path):
  (path,) = made[2].parent.glob("*.png")
  assert path.name == "all.runs_cifar10.png"
  colors = style.model_colors(("at", "atat", "toy<b>|"))
  for color in colors.values():
    assert count_pixels(path, color) > 50
  (drawn,) = figures.draw(made[2], tmp_path)
  assert drawn.name == path.name
  assert drawn.read_bytes() == path.read_bytes()


def limits(*spans):
  return figures._limits(
    [
      {"accuracy": a, "standard_error": error, "published": None}
      for a, error in spans
    ]
  )


def test_an_axis_spreads_its_points():
  low, high = limits((0.62, None), (0.70, 0.01), (0.66, None))
  assert 60 < low < 62 and 71 < high < 75
  low, high = limits((0.5, None))  # a single point is in the middle
  assert low < 48 and 52 < high


def test_a_method_far_below_the_others_does_not_squeeze_them():
  others = [(a, None) for a in (0.62, 0.65, 0.66, 0.68, 0.7)]
  low, _ = limits((0.0, None), *others)
  assert 55 < low < 62
  low, _ = limits((0.0, None), (0.01, None), *others)  # not a few
  assert low < 0


@pytest.mark.parametrize(("worst", "arrow"), [(0.0, True), (0.6, False)])
def test_an_arrow_is_a_point_left_of_the_axis(
  worst, arrow, figures_drawn, tmp_path
):
  accuracies = [worst, 0.62, 0.65, 0.66, 0.68, 0.7]
  found = [
    row("pgd20", "running", accuracy, model=f"m{k}")
    | {"standard_error": None, "published": None}
    for k, accuracy in enumerate(accuracies)
  ]
  path = tmp_path / "a.json"
  path.write_text(json.dumps({"format": 1, "rows": found}))
  figures.draw(path)
  (ax,) = figures_drawn["a_cifar10"].axes
  arrows = [line for line in ax.lines if line.get_marker() == "<"]
  assert [line.get_xdata()[0] for line in arrows] == [ax.get_xlim()[0]] * arrow
  assert [text.get_text() for text in ax.texts] == [
    f"{100 * accuracy:.1f}" for accuracy in accuracies
  ]


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
    "recipe",
    "costs",
    "shifts",
  }
