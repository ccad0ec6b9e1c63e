"""The table of all methods: written from result files, and inventing nothing."""

import importlib
import json
import pathlib

import numpy as np
import pytest
import run_files

from atat_jax import objectives
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.report import layout, merge
from atat_jax.runs import files

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIELDS = {
  "standard": {},
  "at": {"starts_from_teacher": False},
  "at_from_teacher": {"starts_from_teacher": True},
  "atat": {"starts_from_teacher": True},
}


@pytest.fixture
def honest(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module("benchmarks.honest")


def write_shift(workdir, network, mean, rounds=(0, 20)):
  files.write_arrays(
    workdir / "attention_shift.npz",
    {
      "networks": np.array([network]),
      "rounds": np.array(rounds),
      "labels": np.zeros(50, np.int32),
      "layer": np.array("unit"),
      "protocol": np.array("PGD, 20 steps"),
      f"{network}_cosine_mean": np.array([0.0, mean]),
    },
  )


def write(folder, name, accuracy, seed=0, attack="autoattack", **changes):
  """A run: clean images, PGD-20 in both modes, AutoAttack, its shift."""
  method = objectives.setting(name)[0]
  row = run_files.result_row
  rows = [
    row(method, "nominal", "running", 0.9),
    row(method, "pgd20", "running", accuracy + 0.02),
    row(method, "pgd20", "batch", accuracy + 0.04),
    row(method, attack, "running", accuracy, num_examples=40),
    row(method, "pgd7", "running", 0.123),  # not a column of the table
  ]
  for one in rows:
    one.update(dataset="cifar10")
  workdir = run_files.write_run(
    folder / f"{name}{seed}",
    rows,
    method=method,
    seed=seed,
    rates=(32.0, 64.0, 64.0),
    **FIELDS[name],
  )
  if changes:
    found = json.loads((workdir / "results.json").read_text())
    found["run"]["config"]["train"].update(changes)
    run_files.save(workdir, found)
  write_shift(workdir, method, accuracy / 10)
  return workdir


def save(folder, name, runs):
  path = folder / f"{name}.json"
  path.write_text(json.dumps(merge.compare(runs)))
  return path


def cells(text):
  """Method to {head of the column: cell}."""
  lines = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text.splitlines()
    if line.startswith("|")
  ]
  return {
    line[0].strip("`"): dict(zip(lines[0], line, strict=True))
    for line in lines[2:]
  }


def test_every_method_has_a_row_and_nothing_is_invented(honest, tmp_path):
  runs = [write(tmp_path, "standard", 0.0), write(tmp_path, "at", 0.4)]
  text = honest.table(honest.read([save(tmp_path, "c", runs)]), "cifar10")
  found = cells(text)
  assert [name for name in found if name != "at_from_teacher"] == list(
    objectives.OBJECTIVES
  )
  assert found["at"] == {
    "method": "`at`",
    "starts from": "fresh",
    "clean": "90.00",
    "PGD-20": "42.00",
    "PGD-20, batch statistics": "44.00",
    "AutoAttack, 40 images": "40.00",
    "AutoAttack, 40 images, minus at_from_teacher": "–",
    "attention shift": "0.040",
    "seconds": "2",  # 2 steps of 64 images at 64 images a second
    "seeds": "1",
  }
  assert {*list(found["trades"].values())[1:]} == {"–"}
  assert "20 steps of 2/255" in text and "–: not measured" in text
  assert "12.3" not in text


def test_what_starts_from_the_teacher_is_beside_its_control(honest, tmp_path):
  """Seed by seed, so that what the standard networks share cancels."""
  runs = [
    write(tmp_path, name, accuracy + 0.1 * seed, seed)
    for name, accuracy in (("at_from_teacher", 0.3), ("atat", 0.35))
    for seed in (0, 1)
  ]
  text = honest.table(honest.read([save(tmp_path, "c", runs)]), "cifar10")
  found = cells(text)
  column = "AutoAttack, 40 images, minus at_from_teacher"
  assert found["atat"][column] == "+5.0"
  assert found["atat"]["AutoAttack, 40 images"] == "40.00 ± 5.00"
  assert found["atat"]["starts from"] == "standard network"
  # Of another file it may have another standard network.
  apart = [save(tmp_path, "a", runs[:2]), save(tmp_path, "b", runs[2:])]
  found = cells(honest.table(honest.read(apart), "cifar10"))
  assert found["atat"][column] == "–"
  assert found["atat"]["AutoAttack, 40 images"] == "40.00 ± 5.00"


def test_unequal_files_are_told(honest, tmp_path):
  one = [write(tmp_path / "1", "at", 0.4)]
  two = [
    write(tmp_path / "2", "at", 0.43, batch_size=128),
    write(
      tmp_path / "2", "atat", 0.5, attack="autoattack-fast", batch_size=128
    ),
  ]
  sources = honest.read([save(tmp_path, "1", one), save(tmp_path, "2", two)])
  text = honest.table(sources, "cifar10")
  assert "**Not one recipe**: train.batch_size is 64 and 128." in text
  assert "at, AutoAttack, 40 images: several files have it, up to 3.00" in text
  found = cells(text)
  # Another version of AutoAttack is another column.
  assert found["atat"]["AutoAttack, 40 images"] == "–"
  assert found["atat"]["AutoAttack fast, 40 images"] == "50.00"
  assert found["at"]["AutoAttack, 40 images"] == "40.00"  # the first file's


def test_results_of_single_runs_are_compared(honest, tmp_path):
  runs = [write(tmp_path, "at", 0.4), write(tmp_path, "atat", 0.5)]
  paths = []
  for run in runs:
    paths.append(tmp_path / f"{run.name}.json")
    paths[-1].write_bytes((run / "results.json").read_bytes())
  found = cells(honest.table(honest.read(paths), "cifar10"))
  assert found["atat"]["PGD-20"] == "52.00"
  assert found["atat"]["attention shift"] == "–"
  brief = honest.table(honest.read(paths), "cifar10", brief=True)
  assert "attention shift" not in brief and "trades" not in cells(brief)
  assert "`trades`" in brief.splitlines()[-1]


def test_other_files_are_refused(honest, tmp_path):
  good = save(tmp_path, "good", [write(tmp_path, "at", 0.4)])
  other = tmp_path / "other.json"
  other.write_text("{}")
  for paths, message in (
    ([tmp_path / "none.json"], "files: .*none.json; allowed: files that exist"),
    ([other], "files: .*other.json; allowed: comparison.json or results.json"),
    ([good, good], "files: .* twice; allowed: each file once"),
  ):
    with pytest.raises(UserError, match=message):
      honest.read(paths)
  found = json.loads(good.read_text())
  del found["runs"][0]["network"]
  other.write_text(json.dumps(found))
  with pytest.raises(DamagedFileError, match=r"other\.json: runs; allowed"):
    honest.read([other])
  with pytest.raises(UserError, match="files: fmnist; allowed: one of cifar10"):
    honest.publish([], [honest.Source(good, {"rows": [{"dataset": "fmnist"}]})])


def test_pages_have_the_published_numbers(honest):
  for page in honest.PAGES:
    text = page.read_text(encoding="utf-8")
    assert honest.generate(text) == text
    assert "<!-- generated: " in text


def test_the_comparison_has_the_attention_shift(tmp_path):
  runs = [write(tmp_path, "at", 0.4 + 0.2 * seed, seed) for seed in (0, 1)]
  found = merge.compare(runs)
  (shift,) = found["shifts"]
  assert shift["mean"] == pytest.approx(0.05)
  assert shift["standard_error"] == pytest.approx(0.01)
  assert (shift["num_runs"], shift["num_examples"]) == (2, 50)
  shown = layout.shifts(found)
  assert [cell.text for cell in shown.rows[0]][2] == "0.050 ± 0.010"
  assert found["recipe"]["train.batch_size"] == "64"


def test_a_shift_without_numbers_is_refused(tmp_path):
  run = write(tmp_path, "at", 0.4)
  write_shift(run, "at", float("nan"))
  with pytest.raises(DamagedFileError, match=r"attention_shift\.npz: rounds"):
    merge.compare([run])
