"""The scripts that make all runs of the methods, run in full."""

import importlib
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def methods(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module("benchmarks.methods")


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
