"""The command: the files of a run, running it again, and its errors."""

import html.parser
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
import tiny

from atat_jax import (
  analyses,
  checkpoints,
  data,
  evaluation,
  report,
  steps,
)
from atat_jax.data import corruptions
from atat_jax.errors import UserError
from atat_jax.evaluation import accuracies, measuring
from atat_jax.training.interrupts import Interrupted

pytest_plugins = ("tiny",)

# Section 4 of the design.
RUN_FILES = {
  "config.json",
  "metrics.jsonl",
  "results.csv",
  "results.json",
  "report.html",
  "attention.npz",
}
RUN_FOLDERS = {"teacher", "checkpoints", "tensorboard", "figures"}
ROW_FIELDS = {
  "model",
  "dataset",
  "split",
  "num_examples",
  "attack",
  "norm",
  "epsilon",
  "step_size",
  "num_steps",
  "num_restarts",
  "loss",
  "batch_norm",
  "seed",
  "accuracy",
  "class_accuracy",
  "correct",
  "seconds",
}


def names(directory):
  return {path.name for path in directory.iterdir()}


def read_rows(workdir):
  rows = json.loads((workdir / "results.json").read_text())["rows"]
  return {(r["model"], r["batch_norm"], r["attack"]): r for r in rows}


def read_measured(workdir):
  rows = read_rows(workdir)
  return {key: rows[key] for key in rows if key[-1] != "worst_case"}


def over_classes(row):
  """The accuracy of a row as the mean of its classes, weighted by their size."""
  labels = data.load("digits").test.labels[: row["num_examples"]]
  counts = np.bincount(labels, minlength=10)
  shares = row["class_accuracy"]
  assert [share is None for share in shares] == list(counts == 0)
  return sum(s * n for s, n in zip(shares, counts, strict=True) if n) / sum(
    counts
  )


# --- The files of a run ------------------------------------------------------


def test_a_run_makes_the_files_of_the_contract(finished):
  workdir = finished.workdir
  assert names(workdir) == RUN_FILES | RUN_FOLDERS
  assert names(workdir / "teacher") == {
    "checkpoints",
    "metrics.jsonl",
    "tensorboard",
  }
  for directory in (workdir / "tensorboard", workdir / "teacher/tensorboard"):
    assert [name.startswith("events.out.tfevents") for name in names(directory)]
  drawn = list((workdir / "figures").iterdir())
  assert {path.suffix for path in drawn} == {".png", ".pdf"}
  for path in drawn:
    start = b"%PDF-" if path.suffix == ".pdf" else b"\x89PNG\r\n\x1a\n"
    assert path.read_bytes().startswith(start)
  stored = json.loads((workdir / "config.json").read_text())
  expected = json.loads(json.dumps(tiny.config().to_dict()))
  assert stored == expected


def test_results_obey_the_contract(finished):
  results = finished.results
  assert results["format"] == 1
  assert set(results) == {"format", "run", "rows", "diagnostics"}
  run = results["run"]
  assert {"config", "commit", "devices", "versions"} <= set(run)
  assert run["config"] == json.loads(json.dumps(tiny.config().to_dict()))
  assert run["versions"]["jax"] == jax.__version__
  assert run["devices"] and isinstance(run["devices"], list)
  assert run["class_names"] == list("0123456789")
  assert set(run["num_parameters"]) == {"teacher", "student"}
  for folder, role in (("teacher", "teacher"), ("", "student")):
    _, variables = checkpoints.restore_model(finished.workdir / folder)
    sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
    assert run["num_parameters"][role] == sum(sizes)

  rows = results["rows"]
  keys = [(row["model"], row["batch_norm"], row["attack"]) for row in rows]
  assert sorted(keys) == sorted(
    (model, mode, attack)
    for model in ("teacher", "student")
    for mode, attacks in tiny.MEASURED.items()
    for attack in (*attacks, "worst_case")
  )
  assert [row["attack"] for row in rows[-4:]] == 4 * ["worst_case"]
  rows = rows[:-4]
  config = tiny.config().evaluation
  for row in rows:
    assert set(row) >= ROW_FIELDS
    assert 0 <= row["accuracy"] <= 1
    assert over_classes(row) == pytest.approx(row["accuracy"])
    count = row["accuracy"] * tiny.NUM_TEST
    assert count == pytest.approx(round(count), abs=1e-4)
    assert row["num_examples"] == tiny.NUM_TEST
    assert (row["dataset"], row["split"]) == ("digits", "test")
    assert row["seed"] == 0 and row["seconds"] >= 0
    numbers = [row[k] for k in ("norm", "epsilon", "step_size", "num_steps")]
    epsilon = config.epsilon
    assert (
      numbers
      == {
        "nominal": [None, None, None, None],
        "fgsm": ["linf", epsilon, epsilon, 1],
        "pgd2": ["linf", epsilon, config.step_size, 2],
      }[re.split("[:-]", row["attack"])[0]]
    )
    attacked = row["attack"] != "nominal"
    loss = "margin" if "-margin" in row["attack"] else "cross_entropy"
    assert row["loss"] == (loss if attacked else None)
    fixed = row["attack"].endswith(":statistics=fixed")
    assert row.get("options") == ({"statistics": "fixed"} if fixed else None)
    assert row["num_restarts"] == (1 if attacked else None)
  for diagnostic in results["diagnostics"].values():
    assert set(diagnostic) == {"title", "rule", "value", "flag", "message"}
    assert math.isfinite(diagnostic["value"])
  assert {name.split("_")[0] for name in results["diagnostics"]} == {
    "teacher",
    "student",
  }


def test_metrics_name_every_term(finished):
  student = tiny.metrics(finished.workdir / "metrics.jsonl")
  assert [(line["split"], line["step"]) for line in student] == [
    ("train", 4),
    ("validation", 5),
    ("train", 8),
    ("validation", 10),
    ("train", 12),
    ("validation", 15),
    ("train", 16),
    ("train", 20),
    ("validation", 20),
  ]
  config = tiny.config()
  for line in student:
    assert line["epoch"] == line["step"] / tiny.STEPS_PER_EPOCH
    assert all(
      math.isfinite(value)
      for value in line.values()
      if not isinstance(value, str)
    )
    if line["split"] == "validation":
      assert 0 <= line["accuracy_adversarial"] <= line["accuracy_clean"] <= 1
      assert line["attack"].startswith("pgd1: linf, epsilon 0.2")
      continue
    total = (  # Eq. (7)
      line["cross_entropy"]
      + config.objective.lambda1 * line["attention"]
      + config.objective.lambda2 * line["logit_pairing"]
    )
    assert line["loss"] == pytest.approx(total, rel=1e-5)
  teacher = tiny.metrics(finished.workdir / "teacher/metrics.jsonl")
  assert [(line["split"], line["step"]) for line in teacher] == [
    ("train", 4),
    ("validation", 5),
    ("train", 8),
    ("train", 10),
    ("validation", 10),
  ]
  assert all("accuracy_adversarial" not in line for line in teacher)


def test_the_learning_rate_is_the_schedules(finished):
  config = tiny.config().train
  lines = tiny.metrics(finished.workdir / "metrics.jsonl")
  rates = {
    line["step"]: line["learning_rate"]
    for line in lines
    if line["split"] == "train"
  }
  # One cycle: rises as a cosine from a 25th in the first quarter of 20 steps,
  # falls to a 10,000th of the first. Step n is made at the rate of n - 1.
  peak, low, end = config.learning_rate, 1 / 25, 1 / 25e4
  for step, rate in rates.items():
    position = (step - 1) / tiny.STUDENT_STEPS
    if position < config.warmup_fraction:
      share, a, b = position / config.warmup_fraction, low, 1
    else:
      share = (position - config.warmup_fraction) / (1 - config.warmup_fraction)
      a, b = 1, end
    expected = peak * (b + (a - b) * (1 + math.cos(math.pi * share)) / 2)
    assert rate == pytest.approx(expected, rel=1e-4)


def test_attention_maps_are_those_of_both_networks(finished):
  with np.load(finished.workdir / "attention.npz") as arrays:
    images = arrays["images"]
    assert images.shape == (2, 8, 8, 1)
    for model in ("teacher", "student"):
      distance = np.abs(arrays[f"{model}_adversarial"] - images).max()
      assert 0 < distance <= 0.2 + 1e-6
      for kind in ("clean", "adversarial"):
        maps = arrays[f"{model}_{kind}_map"]
        assert maps.shape == (2, 4, 4) and (maps >= 0).all()
    assert not np.array_equal(
      arrays["teacher_adversarial"], arrays["student_adversarial"]
    )


class Page(html.parser.HTMLParser):
  """Text and pictures of a page, and its references to other files."""

  def __init__(self, path):
    super().__init__()
    self.text, self.pictures, self.foreign = "", 0, []
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    for name, value in attrs:
      if name in ("src", "href"):
        self.pictures += tag == "img"
        if not value.startswith("data:image/png;base64,"):
          self.foreign.append(value)

  def handle_data(self, data):
    self.text += data


def test_the_report_shows_the_numbers(finished):
  page = Page(finished.workdir / "report.html")
  assert page.foreign == []
  drawn = list((finished.workdir / "figures").glob("*.png"))
  assert page.pictures == len(drawn)
  for row in finished.results["rows"]:
    assert f"{100 * row['accuracy']:.2f}" in page.text
  assert f"{tiny.NUM_TEST} digits test images" in page.text


# --- Doing it again ----------------------------------------------------------


def forbid(monkeypatch, module, name):
  def fail(*args, **kwargs):
    raise AssertionError(f"{name} was called")

  monkeypatch.setattr(module, name, fail)


@pytest.mark.parametrize("mode", ["run", "train", "evaluate"])
def test_finished_work_is_not_done_again(finished, tmp_path, monkeypatch, mode):
  workdir = finished.copy(tmp_path / "run")
  before = tiny.snapshot(workdir)
  forbid(monkeypatch, steps, "make_train_step")
  forbid(monkeypatch, accuracies, "judge")
  forbid(monkeypatch, report, "write_report")
  tiny.run(workdir, mode)
  after = tiny.snapshot(workdir)
  assert set(after) == set(before)
  for path in before:
    if path == "config.json":  # written again, the same
      assert after[path][1] == before[path][1]
    else:
      assert after[path] == before[path], path


def test_more_attacks_add_rows_and_keep_the_old(
  finished, tmp_path, monkeypatch
):
  workdir = finished.copy(tmp_path / "run")
  before = read_rows(workdir)
  judge, calls = accuracies.judge, []

  def counted(*args, **kwargs):
    calls.append(kwargs["protocol"].name)
    return judge(*args, **kwargs)

  monkeypatch.setattr(accuracies, "judge", counted)
  forbid(monkeypatch, steps, "make_train_step")
  made = tiny.config(evaluation__attacks="fgsm,ifgsm2")
  tiny.run(workdir, "evaluate", made)
  after = read_rows(workdir)
  batch = ["ifgsm2", "ifgsm2:statistics=fixed", "ifgsm2-margin"]
  # Teacher and student; running statistics come first.
  assert calls == [*2 * ["ifgsm2"], *2 * batch]
  assert set(after) - set(before) == {
    (model, mode, attack)
    for model in ("teacher", "student")
    for mode, attacks in (("running", ["ifgsm2"]), ("batch", batch))
    for attack in attacks
  }
  for key, row in before.items():
    if key[-1] == "worst_case":
      more = ["ifgsm2"] if key[1] == "running" else batch
      assert sorted(after[key]["worst_of"].split(", ")) == sorted(
        [*tiny.MEASURED[key[1]], *more]
      )
      assert after[key]["accuracy"] <= row["accuracy"]
    else:
      assert after[key] == row

  # The report is older than the results now, and is written anew.
  written = []
  monkeypatch.setattr(report, "write_report", written.append)
  tiny.run(workdir, "run", made)
  assert written == [workdir]
  assert len(calls) == 8


@pytest.fixture(scope="module")
def quick_look(finished, tmp_path_factory):
  """A finished run that was also evaluated on the first ten images."""
  workdir = finished.copy(tmp_path_factory.mktemp("quick") / "run")
  made = tiny.config(evaluation__attacks="pgd2", evaluation__num_examples=10)
  tiny.run(workdir, "evaluate", made)
  return workdir


def test_a_protocol_is_all_its_numbers(finished, quick_look):
  """Another number of images is another row."""
  rows = json.loads((quick_look / "results.json").read_text())["rows"]
  before = finished.results["rows"]
  assert [row for row in rows if row["num_examples"] == tiny.NUM_TEST] == before
  quick = [row for row in rows if row not in before]
  assert {row["num_examples"] for row in quick} == {10}
  # There is no worst case of one attack.
  batch = ["pgd2", "pgd2:statistics=fixed", "pgd2-margin", "worst_case"]
  assert sorted((row["batch_norm"], row["attack"]) for row in quick) == sorted(
    2 * [("running", "pgd2"), *(("batch", attack) for attack in batch)]
  )


def test_a_quick_look_does_not_hide_the_whole_split(finished, quick_look):
  tiny.run(quick_look, "figures")
  text = Page(quick_look / "report.html").text
  for row in finished.results["rows"]:
    assert f"{100 * row['accuracy']:.2f}" in text


def test_a_quick_look_changes_no_diagnostics(finished, quick_look):
  found = json.loads((quick_look / "results.json").read_text())["diagnostics"]
  expected = finished.results["diagnostics"]
  assert {name: rule["value"] for name, rule in found.items()} == {
    name: rule["value"] for name, rule in expected.items()
  }


def test_autoattack_by_name(finished, tmp_path, monkeypatch, caplog):
  """AutoAttack and an attack with parameters: measured once, shown everywhere."""
  caplog.set_level("INFO", "atat_jax.evaluate")
  workdir = finished.copy(tmp_path / "run")
  names = ["autoattack-fast", "square:norm=l2:epsilon=0.5:num_queries=3"]
  made = tiny.config(
    evaluation__attacks=",".join(names),
    evaluation__num_examples=12,
  )
  tiny.run(workdir, "evaluate", made)
  rows = read_rows(workdir)
  # With batch statistics its batches would be filled up: it is left out.
  assert {mode for _, mode, attack in rows if attack == names[0]} == {"running"}
  assert {mode for _, mode, attack in rows if attack == names[1]} == {
    "running",
    "batch",
  }
  told = f"evaluate: {names[0]} with running statistics only"
  assert caplog.messages.count(told) == 1
  for model in ("teacher", "student"):
    fast, square = (rows[model, "running", name] for name in names)
    parts = fast["attacks"]
    # Without robust images the next attack has nothing to do.
    ran = [p["attack"] for p in parts]
    assert ran == ["clean", "apgd-ce", "apgd-t"][: len(ran)] and len(ran) > 1
    falling = [p["accuracy"] for p in parts]
    assert falling == sorted(falling, reverse=True)
    assert fast["accuracy"] == falling[-1]
    assert over_classes(fast) == pytest.approx(fast["accuracy"])
    assert fast["options"] == {"version": "fast"}
    assert (square["norm"], square["epsilon"]) == ("l2", 0.5)
    assert square["num_steps"] == 3
  assert len(list((workdir / "autoattack").glob("*.npz"))) == 2

  judged = rows["student", "running", names[0]]
  found = evaluation.diagnose([judged], "student")
  assert found["autoattack-fast_rescored"]["flag"] is False
  assert found["autoattack-fast_batch_dependence"]["flag"] is False

  tiny.run(workdir, "figures")
  text = Page(workdir / "report.html").text
  for part in (names[0], names[1], "version fast", "apgd-ce"):
    assert part in text, part

  forbid(monkeypatch, measuring, "_measure")
  tiny.run(workdir, "evaluate", made)


def test_the_batch_size_matters_only_with_batch_statistics(
  finished, tmp_path, monkeypatch
):
  workdir = finished.copy(tmp_path / "run")
  forbid(monkeypatch, accuracies, "judge")
  tiny.run(workdir, "evaluate", tiny.config(evaluation__batch_size=7))
  made = tiny.config(evaluation__batch_statistics_size=7)
  with pytest.raises(AssertionError, match="judge was called"):
    tiny.run(workdir, "evaluate", made)


def test_rows_of_another_checkpoint_go(finished, tmp_path):
  workdir = finished.copy(tmp_path / "run")
  path = workdir / "results.json"
  results = json.loads(path.read_text())
  for row in results["rows"]:
    if row["model"] == "student":
      row.update(checkpoint_step=3, accuracy=0.123, correct=None)
  del results["run"]["checksum"]
  path.write_text(json.dumps(results))
  made = tiny.config(evaluation__attacks="nominal")
  tiny.run(workdir, "evaluate", made)
  found = read_rows(workdir)
  assert {key for key in found if key[0] == "student"} == {
    ("student", "running", "nominal"),
    ("student", "batch", "nominal"),
  }
  before = read_rows(finished.workdir)
  for mode in ("running", "batch"):
    key = ("student", mode, "nominal")
    assert found[key]["correct"] == before[key]["correct"]
  assert len([key for key in found if key[0] == "teacher"]) == 12


def test_an_interrupted_evaluation_goes_on(finished, tmp_path, monkeypatch):
  workdir = finished.copy(tmp_path / "run")
  expected = read_rows(workdir)
  (workdir / "results.json").unlink()
  judge, calls = accuracies.judge, []

  def interrupted(*args, **kwargs):
    if len(calls) == 5:
      raise Interrupted("stopped", 2)
    calls.append(1)
    return judge(*args, **kwargs)

  monkeypatch.setattr(accuracies, "judge", interrupted)
  with pytest.raises(Interrupted):
    tiny.run(workdir, "evaluate")
  assert len(read_measured(workdir)) == 5
  calls.clear()
  with pytest.raises(Interrupted):
    tiny.run(workdir, "evaluate")
  assert len(read_measured(workdir)) == 10
  monkeypatch.setattr(accuracies, "judge", judge)
  tiny.run(workdir, "evaluate")
  found = read_rows(workdir)

  def timeless(rows):
    return {
      key: {k: v for k, v in row.items() if k != "seconds"}
      for key, row in rows.items()
    }

  assert timeless(found) == timeless(expected)
  assert list(found) == list(expected)


def test_corrupted_images_are_evaluated_beside_the_attacks(
  finished, tmp_path, monkeypatch
):
  workdir = finished.copy(tmp_path / "run")
  before = read_rows(workdir)
  kinds = {"contrast": corruptions.CORRUPTIONS["contrast"]}
  monkeypatch.setattr(corruptions, "CORRUPTIONS", kinds)
  made = tiny.config(evaluation__corruptions="generated")
  tiny.run(workdir, "evaluate", made)
  found = json.loads((workdir / "results.json").read_text())
  assert read_rows(workdir) == before
  rows = {
    (row["model"], row["batch_norm"], row["severity"]): row
    for row in found["corruptions"]
  }
  assert len(rows) == 20
  assert found["run"]["config"]["evaluation"]["corruptions"] == "generated"
  for (model, mode, _), row in rows.items():
    one = before[model, mode, "nominal"]
    for field in ("num_examples", "dataset", "checkpoint_step", "batch_size"):
      assert row[field] == one[field]
    assert row["corruption"] == "contrast" and 0 <= row["accuracy"] <= 1
  assert len({row["accuracy"] for row in rows.values()}) > 2
  # Evaluated without them, they stay.
  tiny.run(workdir, "evaluate", tiny.config(evaluation__seed=1))
  again = json.loads((workdir / "results.json").read_text())
  assert again["corruptions"] == found["corruptions"]


@pytest.mark.parametrize("mode", ["run", "evaluate"])
def test_corruptions_that_are_not_there_end_a_run_at_once(
  finished, tmp_path, monkeypatch, mode
):
  workdir = finished.copy(tmp_path / "run")
  forbid(monkeypatch, data, "load")
  made = tiny.config(evaluation__corruptions="/nowhere")
  with pytest.raises(
    UserError, match=r"^evaluation\.corruptions: /nowhere does not exist"
  ):
    tiny.run(workdir, mode, made)
  tiny.run(workdir, "figures", made)


def test_results_of_an_earlier_version_are_kept_and_completed(
  finished, tmp_path
):
  """They have no checksum, accuracy of each class and numbers of parameters."""
  workdir = finished.copy(tmp_path / "run")
  results = finished.results
  results["rows"] = results["rows"][:-4]  # without worst cases
  missing = results["rows"].pop()
  for row in results["rows"]:
    del row["class_accuracy"], row["correct"]
  del results["run"]["num_parameters"], results["run"]["checksum"]
  (workdir / "results.json").write_text(json.dumps(results))
  tiny.run(workdir, "evaluate")
  found = json.loads((workdir / "results.json").read_text())
  assert found["rows"][:-1] == results["rows"]
  assert found["rows"][-1] == {
    **missing,
    "seconds": found["rows"][-1]["seconds"],
  }
  assert set(found["run"]["num_parameters"]) == {"teacher", "student"}


def test_figures_are_redrawn_from_the_files_alone(
  finished, tmp_path, monkeypatch
):
  workdir = finished.copy(tmp_path / "run")
  expected = tiny.snapshot(workdir)
  shutil.rmtree(workdir / "figures")
  (workdir / "report.html").unlink()
  for directory in ("checkpoints", "teacher/checkpoints", "tensorboard"):
    shutil.rmtree(workdir / directory)
  forbid(monkeypatch, checkpoints, "restore_model")
  tiny.run(workdir, "figures")
  found = tiny.snapshot(workdir)
  for path, (_, digest) in expected.items():
    if path.startswith(("figures", "report")):
      assert path in found, path
      assert path == "report.html" or found[path][1] == digest, path


# --- Errors ------------------------------------------------------------------


def refused(outcome, *parts):
  """Checks for one line that names all parts, an error status, no traceback."""
  assert outcome.status not in (0, None)
  lines = outcome.stderr.strip().splitlines()
  assert len(lines) == 1, outcome.stderr
  assert lines[0].startswith("error: ")
  for part in parts:
    assert str(part) in lines[0]
  assert "Traceback" not in outcome.stderr + outcome.stdout


@pytest.mark.parametrize(
  ("extra", "parts"),
  [
    (["--config.train.lrr=0.1"], ["lrr"]),
    (["--config.trian.num_epochs=1"], ["trian"]),
    (["--config.train.num_epochs=two"], ["train.num_epochs", "two"]),
    (["--config.train.num_epochs=1.5"], ["train.num_epochs", "1.5"]),
    (["--config.data.flip=perhaps"], ["data.flip", "perhaps"]),
    (["--config.train.boundaries=abc"], ["boundaries", "abc"]),
    # A value that the plan refuses; all others are in test_config.
    (["--config.train.batch_size=0"], ["train.batch_size", "0"]),
    (["--mode=test"], ["mode", "test", "evaluate"]),
    (["--epochs=3"], ["epochs"]),
    (["train"], ["train", "--"]),
  ],
  ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_command_is_refused(command_line, tmp_path, extra, parts):
  refused(command_line(*tiny.flags(tmp_path / "run", *extra)), *parts)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["--config=configs/cifar10.py:madry"], ["madry", "standard", "atat"]),
    (["--config=configs/nothing.py"], ["nothing.py"]),
    ([], ["--config"]),
  ],
  ids=["method", "file", "none"],
)
def test_a_wrong_configuration_is_refused(
  command_line, tmp_path, arguments, parts
):
  workdir = tmp_path / "run"
  refused(command_line(*arguments, f"--workdir={workdir}"), *parts)
  assert not workdir.exists()


def test_a_missing_workdir_is_named(command_line):
  refused(command_line("--config=configs/digits.py"), "--workdir")


def test_missing_data_say_how_to_get_them(command_line, tmp_path):
  workdir = tmp_path / "run"
  outcome = command_line(
    "--config=configs/cifar10.py",
    f"--workdir={workdir}",
    f"--config.data.dir={tmp_path / 'data'}",
    f"--config.data.cache_dir={tmp_path / 'cache'}",
  )
  refused(
    outcome,
    "cifar10",
    tmp_path / "data",
    "atat_jax.data.prepare",
    "configs/digits.py",
  )
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["evaluate", "figures"])
def test_nothing_trained_yet(command_line, tmp_path, mode):
  workdir = tmp_path / "run"
  outcome = command_line(*tiny.flags(workdir, mode=mode))
  refused(outcome, workdir, "atat-jax ")
  assert not workdir.exists()


def test_a_workdir_that_is_a_file(command_line, tmp_path):
  path = tmp_path / "run"
  path.write_text("mine")
  refused(command_line(*tiny.flags(path)), "workdir", path)
  assert path.read_text() == "mine"


@pytest.mark.parametrize("mode", ["run", "train", "evaluate"])
def test_a_workdir_of_another_run_is_left_alone(command_line, finished, mode):
  before = tiny.snapshot(finished.workdir)
  outcome = command_line(
    *tiny.flags(finished.workdir, "--config.model.width=2", mode=mode)
  )
  refused(outcome, "model.width: 2", 1, finished.workdir, "--workdir")
  assert tiny.snapshot(finished.workdir) == before


def test_damaged_results_are_named_and_kept(command_line, finished, tmp_path):
  workdir = finished.copy(tmp_path / "run")
  (workdir / "results.json").write_text('{"format": 1, "rows": [')
  before = tiny.snapshot(workdir)
  for mode in ("evaluate", "figures"):
    refused(command_line(*tiny.flags(workdir, mode=mode)), "results.json")
  after = tiny.snapshot(workdir)
  assert {path: digest for path, (_, digest) in after.items()} == {
    path: digest for path, (_, digest) in before.items()
  }


def test_damaged_attention_maps_are_made_again(finished, tmp_path):
  workdir = finished.copy(tmp_path / "run")
  path = workdir / "attention.npz"
  path.write_bytes(b"no archive")
  try:
    tiny.run(workdir, "evaluate")
  except UserError as error:  # telling to delete it is fine too
    assert str(path) in str(error)
  else:
    with np.load(path) as found:
      assert found["images"].shape == (2, 8, 8, 1)


def test_a_landscape_around_an_image_that_is_not_there(finished, tmp_path):
  workdir = finished.copy(tmp_path / "run")
  made = tiny.config(figures__analyses="landscape", figures__indices=(0, 360))
  with pytest.raises(UserError, match=r"figures\.indices: 360.*0 to 359"):
    tiny.run(workdir, "evaluate", made)
  assert not (workdir / "loss_landscape.npz").exists()


@pytest.mark.slow
def test_every_analysis_of_a_run_is_on_its_page(finished, tmp_path):
  workdir = finished.copy(tmp_path / "run")
  made = tiny.config(
    figures__analyses=",".join(analyses.ANALYSES),
    figures__num_examples=20,
    figures__num_points=3,
    figures__num_steps=3,
    figures__rounds=(1, 2),
  )
  tiny.run(workdir, "run", made)
  for analysis in analyses.ANALYSES.values():
    with np.load(workdir / f"{analysis.stem}.npz") as arrays:
      assert list(arrays["networks"]) == ["teacher", "student"]
    assert list((workdir / "figures").glob(f"{analysis.stem}*.png"))
  page = Page(workdir / "report.html")
  drawn = list((workdir / "figures").glob("*.png"))
  assert page.pictures == len(drawn)
  before = tiny.snapshot(workdir)
  tiny.run(workdir, "run", made)
  after = tiny.snapshot(workdir)
  after["config.json"] = before["config.json"]  # written again, the same
  assert after == before


def test_a_batch_larger_than_the_data_is_told_before_training(tmp_path):
  made = tiny.config(train__batch_size=100_000)
  with pytest.raises(UserError, match="batch_size: 100000"):
    tiny.run(tmp_path / "run", "train", made)
  assert not (tmp_path / "run" / "teacher").exists()


def test_a_mistake_told_by_the_data_does_not_claim_the_workdir(tmp_path):
  workdir = tmp_path / "run"
  with pytest.raises(UserError, match="batch_size"):
    tiny.run(workdir, "train", tiny.config("standard", train__batch_size=9999))
  # The corrected command, up to the moment when it would train.
  with pytest.MonkeyPatch.context() as patch:
    forbid(patch, steps, "make_train_step")
    with pytest.raises(AssertionError, match="make_train_step was called"):
      tiny.run(workdir, "train", tiny.config("standard"))
