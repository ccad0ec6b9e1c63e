"""Accuracies on corrupted images: their means, tables and the page."""

import json
import random

import corrupted_files
import numpy as np
import pytest
import run_files

from atat_jax import analyses, figures, report
from atat_jax.errors import UserError
from atat_jax.report import run_page
from atat_jax.runs import corrupted, files, results_format

CLEAN = run_files.ACCURACIES["student", "running"]["nominal"]
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
  monkeypatch.setattr(figures, "draw_results", lambda _: [])
  monkeypatch.setattr(figures, "draw_curves", lambda _: [])
  monkeypatch.setattr(analyses, "sections", lambda *_: [])


def results(found):
  return {**run_files.results(), "corruptions": found}


def page(workdir, content):
  workdir.mkdir(exist_ok=True)
  (workdir / files.RESULTS).write_text(json.dumps(content))
  return run_page.write_report(workdir).read_text()


def test_means_are_over_all_corruptions_and_severities():
  rows = corrupted_files.rows()
  ((grid,),) = corrupted.grids(run_files.results()["rows"], rows)
  accuracies = np.array([row["accuracy"] for row in rows]).reshape(15, 5)
  assert grid.mean() == pytest.approx(accuracies.mean())
  assert grid.mean("fog") == pytest.approx(accuracies[9].mean())
  assert grid.mean(severity=2) == pytest.approx(accuracies[:, 1].mean())
  assert grid.clean == CLEAN
  assert corrupted.summary(grid)[:2] == [CLEAN, grid.mean()]
  # One that is not of the fifteen is shown, and in no mean.
  more = [*rows, {**rows[0], "corruption": "spatter", "accuracy": 0.0}]
  ((other,),) = corrupted.grids([], more)
  assert other.mean() == grid.mean() and other.kinds == [*grid.kinds, "spatter"]
  assert other.clean is None


def test_an_unfinished_evaluation_has_no_mean():
  ((grid,),) = corrupted.grids([], corrupted_files.rows()[:-1])
  assert grid.mean() is None and grid.mean(severity=5) is None
  assert grid.mean("jpeg_compression") is None
  assert grid.mean("fog") is not None and grid.mean(severity=1) is not None
  text = report.results_table(results(corrupted_files.rows()[:-1]))
  assert "Unfinished: student, running statistics has 74 accuracies" in text


def test_networks_modes_and_images_are_not_mixed():
  rows = [
    *corrupted_files.rows(batch_norm="batch"),
    *corrupted_files.rows(),
    *corrupted_files.rows(model="teacher"),
    *corrupted_files.rows(benchmark="atat_jax-corruptions-v1", seed=3),
    *corrupted_files.rows(num_examples=5),
  ]
  found = corrupted.grids(run_files.results()["rows"], rows)
  assert [len(grids) for grids in found] == [3, 1, 1]
  assert [grid.name for grid in found[0]] == [
    "student, running statistics",
    "teacher, running statistics",
    "student, batch statistics of 100 images",
  ]
  cleans = [grid.clean for grids in found for grid in grids]
  expected = [CLEAN, 0.9832, 0.9596, CLEAN, None]
  assert cleans == expected
  assert "seed 3" in corrupted.images(found[1][0])
  assert "not to be compared with CIFAR-10-C" in corrupted.images(found[1][0])


def test_the_page_and_the_terminal_name_the_protocol_and_the_numbers(tmp_path):
  content = results(corrupted_files.rows())
  text = page(tmp_path, content)
  # 0.9 minus means of 0.3 and 0.07
  for shown in (
    *(
      "CIFAR-10-C: 297 digits test images at each severity",
      "53.00",
      "gaussian noise",
    ),
    *("jpeg compression", "80.00", "26.00", "by corruption and severity"),
  ):
    assert shown in text, shown
  table = report.results_table(content)
  assert "53.00" in table and "CIFAR-10-C: 297 digits test images" in table
  assert "corrupted" not in report.results_table(run_files.results())
  assert "Accuracy on corrupted" not in page(tmp_path, run_files.results())


def test_rows_of_others_are_text_or_refused(tmp_path):
  values = [None, True, -1, 0, 1.5, 6, 10**18, "", [], {}, "\x1b[2J", SCRIPT]
  choose = random.Random(0)
  shown = 0
  for _ in range(60):
    rows = corrupted_files.rows(model="m", batch_norm="batch")[:2]
    field, value = choose.choice(list(rows[0])), choose.choice(values)
    rows[1][field] = value
    try:
      text = page(tmp_path, results(rows))
      table = report.results_table(results(rows))
    except UserError as error:
      assert str(error).isprintable() and field in str(error)
      continue
    shown += 1
    assert SCRIPT not in text
    assert all(line.isprintable() for line in table.split("\n"))
  assert 5 < shown < 40
  for bad in (None, {}, [[]], ["x"]):
    assert "corruptions" in results_format.fault(results(bad))
