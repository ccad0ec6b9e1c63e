"""What a run leaves: files, tables, intervals, provenance, wording."""

import errno
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
from scipy import stats

from atat_jax.errors import UserError
from atat_jax.evaluation import ranking
from atat_jax.runs import files, intervals, provenance, tables, wording

ROOT = pathlib.Path(__file__).resolve().parents[2]


def row(model, attack, batch_norm, accuracy, **changes):
  attacked = attack != "nominal"
  return {
    "model": model,
    "dataset": "digits",
    "split": "test",
    "num_examples": 297,
    "attack": attack,
    "norm": "linf" if attacked else None,
    "epsilon": 8 / 255 if attacked else None,
    "step_size": 2 / 255 if attacked else None,
    "num_steps": 20 if attacked else None,
    "num_restarts": 1 if attacked else None,
    "loss": "cross_entropy" if attacked else None,
    "batch_norm": batch_norm,
    "batch_size": 100,
    "seed": 0,
    "accuracy": accuracy,
    "seconds": 1.0,
  } | changes


# --- Files -------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "figures" / "a.png"
  files.write_bytes(path, b"old")

  def fail(self, content):
    with open(self, "wb") as file:
      file.write(content[:1])
    raise OSError(errno.ENOSPC, "no space left")

  monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
  with pytest.raises(UserError, match=r"a\.png: no space"):
    files.write_bytes(path, b"new")
  assert path.read_bytes() == b"old"
  assert os.listdir(path.parent) == ["a.png"]


def test_files_are_read_as_they_were_written(tmp_path):
  path = files.write_text(tmp_path / "new" / "a.txt", "é\n")
  assert path.read_bytes() == "é\n".encode()
  path = files.write_json(tmp_path / "a.json", {"a": [1, None]})
  assert files.read_json(path) == {"a": [1, None]}
  arrays = {"x": np.arange(3, dtype=np.float32), "name": np.array("é")}
  found = files.read_arrays(files.write_arrays(tmp_path / "a.npz", arrays))
  assert {name: (a.dtype, a.tolist()) for name, a in found.items()} == {
    name: (a.dtype, a.tolist()) for name, a in arrays.items()
  }
  with pytest.raises(ValueError, match="JSON"):
    files.write_json(path, {"a": float("nan")})


def test_a_file_that_is_not_there_is_none(tmp_path):
  assert files.read_json(tmp_path / "a.json") is None
  assert files.read_arrays(tmp_path / "a.npz") is None
  assert files.read_results(tmp_path) is None
  assert files.read_autoattack(tmp_path, 0.1, "linf") == {}
  assert files.read_metrics(tmp_path / "metrics.jsonl") == {}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "not valid JSON"),
    ("[]", "JSON object"),
    ('{"format": 2}', "format is 2, only 1"),
  ],
)
def test_damaged_results_are_refused(tmp_path, content, message):
  (tmp_path / "results.json").write_text(content)
  with pytest.raises(UserError, match=f"results.json.*{message}"):
    files.read_results(tmp_path)


def test_damaged_arrays_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  for content in (b"", b"not an archive"):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz cannot be read"):
      files.read_arrays(path)
  files.write_arrays(path, {"x": np.zeros(1)})
  with pytest.raises(UserError, match=r"a\.npz cannot be read \(it has no y"):
    files.read_arrays(path)["y"]


def test_metrics_of_an_interrupted_run(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    '{"split": "train", "step": 2, "loss": 5.0}\n'
    '{"split": "train", "step": 3, "lo\n'  # killed here
    '{"split": "train", "step": 1, "loss": 9.0}\n'
    '{"split": "train", "step": 2, "loss": 4.0}\n'  # resumed from step 1
    '"not an object"\n'
    '{"split": "validation", "step": 2, "accuracy_clean": 0.5}'
  )
  metrics = files.read_metrics(path)
  assert [line["loss"] for line in metrics["train"]] == [9.0, 4.0]
  assert len(metrics["validation"]) == 1


def test_autoattack_is_the_row_of_most_images_with_running_statistics(tmp_path):
  rows = [
    row("a", "autoattack-fast", "running", 0.5, num_examples=100),
    row("a", "autoattack", "running", 0.4),
    row("a", "autoattack-fast", "running", 0.3),
    row("a", "autoattack", "batch", 0.2),
    row("a", "autoattack", "running", 0.1, norm="l2"),
    row("b", "autoattack", "running", 0.1, epsilon=4 / 255),
    row("b", "pgd20", "running", 0.1),
  ]
  files.write_json(tmp_path / files.RESULTS, {"format": 1, "rows": rows})
  assert files.read_autoattack(tmp_path, 8 / 255, "linf") == {"a": rows[2]}


# --- Tables ------------------------------------------------------------------


def test_rows_of_one_protocol_share_a_column():
  rows = [
    row("student", "nominal", "batch", 0.8),
    row("student", "nominal", "running", 0.7),
    row("teacher", "pgd20", "running", 0.2),
    row("student", "pgd20", "running", 0.3),
    row("student", "pgd20", "running", 0.4),  # evaluated again
    row("student", "pgd20", "running", 0.1, epsilon=0.3),
  ]
  nominal, weak, strong = tables.columns(rows)
  labels = [nominal.label, weak.label, strong.label]
  assert labels == ["nominal", "pgd20 (epsilon=8/255)", "pgd20 (epsilon=0.3)"]
  assert nominal.accuracy("student", "batch") == 0.8
  assert nominal.accuracy("teacher", "running") is None
  assert weak.accuracy("student", "running") == 0.4
  assert strong.accuracy("student", "running") == 0.1
  assert tables.series(rows) == [
    ("teacher", "running"),
    ("student", "running"),
    ("student", "batch"),
  ]


def test_columns_are_in_the_papers_order_and_autoattack_is_last():
  names = ["autoattack", "square5000", "pgd20", "fgsm", "nominal"]
  found = tables.columns([row("a", name, "running", 0.1) for name in names])
  assert [column.label for column in tables.in_paper_order(found)] == [
    "nominal",
    "fgsm",
    "pgd20",
    "square5000",
    "autoattack",
  ]


def test_a_protocol_in_words():
  options = {"options": {"momentum": 0.75}, "num_restarts": 5}
  columns = tables.columns(
    [
      row("student", "pgd20", "running", 0.1, **options),
      row("student", "pgd20", "batch", 0.2, **options),
      row("student", "nominal", "running", 0.1, num_examples=10_000),
      row("student", "square", "running", 0.1, num_steps=5000, step_size=None),
      # As earlier versions have measured it.
      row("student", "autoattack", "batch", 0.1, num_steps=None, loss=None),
    ]
  )
  assert [tables.protocol(column) for column in columns] == [
    "linf, epsilon 8/255, 20 steps of 2/255, 5 restarts, cross_entropy loss,"
    " momentum 0.75; 297 digits test images, seed 0; BatchNorm: running"
    " statistics and batch statistics of 100 images",
    "clean images, no attack; 10,000 digits test images, seed 0; BatchNorm:"
    " running statistics",
    "linf, epsilon 8/255, 5,000 queries, 1 restart, cross_entropy loss; 297"
    " digits test images, seed 0; BatchNorm: running statistics",
    "linf, epsilon 8/255, 1 restart; 297 digits test images, seed 0; BatchNorm:"
    " batch statistics of 100 images, filled up with images that are still"
    " robust",
  ]


def test_a_markdown_table_is_aligned_and_escaped():
  lines = [["attack", "accuracy", "network"], ["a|b", "9.5", "x"]]
  assert tables.markdown([*lines, ["c", "–", "wide"]]).splitlines() == [
    "| attack | accuracy | network |",
    "| ------ | -------: | ------- |",
    "| a\\|b   |      9.5 | x       |",
    "| c      |        – | wide    |",
  ]
  head, rule, _ = tables.markdown(lines, "rll").splitlines()
  assert rule == "| -----: | -------- | ------- |"
  assert head == "| attack | accuracy | network |"


# --- Intervals ---------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 100, 10_000])
def test_the_interval_of_a_proportion_is_wilsons(share, count):
  share = round(share * count) / count
  z = stats.norm.ppf(0.975)
  center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
  root = np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
  half = z * root / (1 + z**2 / count)
  low, high = intervals.proportion(share, count)
  assert low == pytest.approx(center - half, abs=1e-12)
  assert high == pytest.approx(center + half, abs=1e-12)
  assert 0 <= low <= share <= high <= 1


def test_the_interval_of_a_mean_is_students():
  values = np.random.default_rng(0).normal(size=(3, 5, 2))
  mean, interval = intervals.mean(values, axis=1)
  assert mean.shape == (3, 2) and interval.shape == (3, 2, 2)
  expected = stats.ttest_1samp(values, 0.0, axis=1).confidence_interval(0.95)
  np.testing.assert_allclose(interval, np.stack(expected, -1), rtol=1e-12)


def test_no_interval_of_a_mean_claims_certainty():
  for values in ([2.0], [0.1] * 7):
    mean, interval = intervals.mean(np.array(values))
    assert mean == pytest.approx(values[0]) and np.isnan(interval).all()
  # By row: one whose values are equal, one whose are not.
  _, interval = intervals.mean(np.array([[3.0, 3.0, 3.0], [1.0, 2.0, 3.0]]))
  assert np.isnan(interval).tolist() == [[True, True], [False, False]]


def _binormal(generator, area, m, n):
  shift = np.sqrt(2) * stats.norm.ppf(area)
  return generator.normal(shift, size=m), generator.normal(size=n)


def _exponential(generator, area, m, n):
  scale = area / (1 - area)
  return generator.exponential(scale, size=m), generator.exponential(size=n)


def _all_or_nothing(generator, area, m, n):
  """A positive example beats all negative ones or none."""
  wins = generator.uniform(size=m) < area
  return np.where(wins, 2.0, -2.0), generator.uniform(size=n)


@pytest.mark.parametrize("draw", [_binormal, _exponential, _all_or_nothing])
@pytest.mark.parametrize(
  ("area", "m", "n"),
  [(0.8, 20, 20), (0.95, 10, 10), (0.98, 10, 50), (0.98, 30, 100)],
)
def test_intervals_of_areas_near_1_cover_as_often_as_they_say(draw, area, m, n):
  generator = np.random.default_rng(1)
  number, covered, by_delong = 400, 0, 0
  for _ in range(number):
    above, below = draw(generator, area, m, n)
    positive = np.arange(m + n) < m
    share, error = ranking.auc(np.append(above, below), positive)
    low, high = intervals.area(share, error, m, n)
    assert 0 <= low <= share <= high <= 1
    covered += low <= area <= high
    by_delong += abs(share - area) <= stats.norm.ppf(0.975) * error
    # The mirrored question has the mirrored answer.
    mirrored = intervals.area(1 - share, error, n, m)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-7)
  # Less three standard errors of the simulation, and of its small groups.
  assert covered / number > 0.91
  if area > 0.9:
    assert by_delong / number < 0.9  # it would have shown


@pytest.mark.parametrize(("m", "n"), [(10, 10), (10, 500), (200, 12)])
def test_perfect_separation_leaves_a_doubt(m, n):
  scores = np.append(np.arange(m) + n, np.arange(n))
  share, error = ranking.auc(scores, np.arange(m + n) < m)
  assert (share, error) == (1, 0)
  low, high = intervals.area(share, error, m, n)
  count = min(m, n)
  assert high == 1
  assert low == pytest.approx(intervals.proportion(1.0, count)[0], abs=1e-12)
  # The worst scores of an area just within: one group of m wins all or nothing.
  assert 0.005 < low**count < 0.05
  assert np.isnan(intervals.area(1.0, float("nan"), 1, n)).all()


def test_scores_that_are_all_equal_tell_nothing():
  positive = np.arange(30) < 11
  share, error = ranking.auc(np.full(30, 0.1), positive)
  assert share == pytest.approx(0.5) and error == pytest.approx(0, abs=1e-12)
  low, high = intervals.area(share, error, 11, 19)
  assert low < 0.3 and high > 0.7


def test_newcombes_end_solves_his_equation():
  """Method 5 in his words, by a fine grid rather than a root."""
  m, n, share = 14, 33, 0.91
  grid = np.linspace(1e-6, 1 - 1e-6, 200_001)
  star = (m + n) / 2 - 1
  spread = 1 + star * (1 - grid) / (2 - grid) + star * grid / (1 + grid)
  error = np.sqrt(grid * (1 - grid) * spread / (m * n))
  inside = grid[np.abs(grid - share) <= stats.norm.ppf(0.975) * error]
  low, high = intervals.area(share, 1e-3, m, n)  # DeLong's is inside
  assert (low, high) == pytest.approx((inside[0], inside[-1]), abs=1e-5)


# --- Provenance --------------------------------------------------------------


def test_the_console_command_is_shown_by_its_name(monkeypatch):
  words = ["/a b/bin/atat-jax", "attack", "runs/a b"]
  monkeypatch.setattr(sys, "argv", words)
  monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
  assert shlex.split(provenance.command()) == ["atat-jax", "attack", "runs/a b"]


def test_the_record_of_a_result(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["main.py", "--workdir=a b"])
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  found = provenance.record(["TPU v4"], config={"seed": 1})
  assert list(found) == [
    "command",
    "commit",
    "date",
    "devices",
    "cpus",
    "versions",
    "config",
  ]
  assert shlex.split(found["command"]) == ["python", "main.py", "--workdir=a b"]
  assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\+00:00", found["date"])
  assert found["devices"] == ["TPU v4"] and found["cpus"] == os.cpu_count()
  assert set(found["versions"]) >= {"jax", "flax"}
  json.dumps(found, allow_nan=False)
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
  record = provenance.record([])
  assert record["xla_flags"] == "--xla_gpu_deterministic_ops=true"


def test_the_commit_without_git_is_that_of_the_environment(monkeypatch):
  def fail(*args, **kwargs):
    raise OSError("no git")

  monkeypatch.setattr(subprocess, "run", fail)
  monkeypatch.delenv("ATAT_JAX_COMMIT", raising=False)
  assert provenance.commit() is None
  monkeypatch.setenv("ATAT_JAX_COMMIT", "0123abcd")
  assert provenance.commit() == "0123abcd"


# --- Wording -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (8 / 255, "8/255"),
    (float(np.float32(8 / 255)), "8/255"),
    (0.0314, "8/255"),
    (0.031, "0.031"),
    (0.5 / 255, "0.001961"),
    (128 / 255, "128/255"),
    (0.2, "0.2"),  # 51/255, but nobody writes so
    (1.0, "1"),
    (12.0, "12"),
    (0.0, "0"),
    (None, "none"),
  ],
)
def test_pixels(value, text):
  assert wording.pixels(value) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.0421, "0.04 s"),
    (2.34, "2.3 s"),
    (59.4, "59 s"),
    (59.9, "1 min 0 s"),
    (200, "3 min 20 s"),
    (7265, "2 h 1 min"),
  ],
)
def test_duration(seconds, text):
  assert wording.duration(seconds) == text


def test_numbers_in_words():
  assert wording.percent(0.63812) == "63.8%"
  assert wording.percent(0.5, 2) == "50.00%"
  assert wording.percent(None) == "–"
  assert wording.plural(1, "image") == "1 image"
  assert wording.plural(10_000, "query") == "10,000 queries"
  assert wording.listed(["a"]) == "a"
  assert wording.listed(["a", "b", "c"]) == "a, b and c"


def test_an_attack_in_words():
  assert wording.attack() == ""
  assert wording.attack(norm="l2", epsilon=0.5, num_steps=1) == (
    "l2, epsilon 0.5, 1 step"
  )
  assert wording.attack(num_steps=2, unit="query", options=[("p", 0.8)]) == (
    "2 queries, p 0.8"
  )


def test_runs_and_report_start_without_matplotlib_and_jax():
  code = (
    "import sys, atat_jax.report, atat_jax.runs.provenance; "
    "print([m for m in ('matplotlib', 'jax') if m in sys.modules])"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.strip() == "[]"


def test_the_facts_of_a_record_count_its_devices():
  record = provenance.record(["cpu", "cpu", "gpu"], commit="abc")
  facts = provenance.facts(record)
  assert facts["Devices"] == "2 x cpu, 1 x gpu"
  assert f"jax {importlib.metadata.version('jax')}, " in facts["Versions"]
  assert facts["Commit"] == "abc"
  nothing = {"Devices": "", "Versions": "", "Commit": "not recorded"}
  assert provenance.facts({}) == nothing
