"""Tables that compare settings with their controls, seed by seed."""

import importlib
import math
import pathlib

import pytest
import run_files

from atat_jax import objectives
from atat_jax.report import merge

ROOT = pathlib.Path(__file__).resolve().parents[2]

FULL = {0: 0.60, 1: 0.64, 2: 0.71}
CONTROL = {0: 0.58, 1: 0.65, 2: 0.66}


@pytest.fixture
def controls(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module("benchmarks.controls")


def write(folder, name, by_seed):
  """Writes runs of a named setting, PGD-20 and FGSM in both modes."""
  method, fields = objectives.setting(name)
  return [
    run_files.write_run(
      folder / f"{name}{seed}",
      [
        run_files.result_row(
          "student", attack, mode, accuracy + shift, dataset="digits"
        )
        for attack, mode, shift in (
          ("pgd20", "running", 0.0),
          ("pgd20-margin", "running", -0.1),
          ("pgd20", "batch", 0.2),
          ("pgd20:statistics=fixed", "batch", 0.05),
        )
      ],
      seed=seed,
      method=method,
      **{**objectives.defaults(method), **fields},
    )
    for seed, accuracy in by_seed.items()
  ]


def cells(text, name):
  (line,) = [
    line for line in text.splitlines() if line.startswith(f"| {name} ")
  ]
  return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_setting_is_compared_with_its_control_seed_by_seed(
  controls, tmp_path
):
  runs = write(tmp_path, "atat", FULL) + write(
    tmp_path, "atat_mixture", CONTROL
  )
  found = merge.compare(runs)
  text = controls.ablation(found)
  head = cells(text, "training")
  row = dict(zip(head, cells(text, "(1, 1), from the teacher"), strict=True))
  gaps = [0.02, -0.01, 0.05]
  mean = sum(gaps) / 3
  error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 2 / 3)
  assert (
    row["PGD-20, minus control"] == f"{100 * mean:+.1f} ± {100 * error:.1f}"
  )
  assert row["PGD-20"].startswith("65.00 ± ") and row["seeds"] == "3"
  assert "AutoAttack fast" not in row, "not measured"
  control = dict(
    zip(head, cells(text, "(0, 0), from the teacher"), strict=True)
  )
  assert control["PGD-20, minus control"] == "–", "no difference from itself"


def test_only_seeds_of_both_count(controls, tmp_path):
  runs = write(tmp_path, "atat", FULL)
  runs += write(tmp_path, "atat_mixture", {2: 0.66, 7: 0.1})
  text = controls.ablation(merge.compare(runs))
  row = cells(text, "(1, 1), from the teacher")
  assert "+5.0" in row


def test_the_headline_shows_the_same_classifier_under_each_attack(
  controls, tmp_path
):
  text = controls.headline(merge.compare(write(tmp_path, "atat", FULL)))
  row = cells(text, "ATAT (1, 1)")
  assert [cell.split(" ")[0] for cell in row[1:]] == [
    "85.00",  # batch statistics, as published
    "70.00",  # statistics fixed
    "65.00",  # running
    "55.00",  # margin
    "3",
  ]


def test_every_row_is_a_method_or_a_setting(controls):
  known = {*objectives.OBJECTIVES, *objectives.SETTINGS}
  assert known >= {*controls.HEADLINE_ROWS, *controls.ABLATION_ROWS}
  for _, control in controls.ABLATION_ROWS.values():
    assert control in controls.ABLATION_ROWS
