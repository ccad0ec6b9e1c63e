"""Training end to end: resumed runs are bit-equal, divergence is reported."""

import collections
import contextlib
import gzip
import json
import re
import shutil
import signal
import types

import jax
import minimal
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from atat_jax import (
  checkpoints,
  config,
  evaluation,
  objectives,
  sharding,
  state,
  steps,
  train,
)
from atat_jax.data.base import Dataset, Split
from atat_jax.errors import TrainingDivergedError, UserError
from atat_jax.training import profile
from atat_jax.training.interrupts import Interrupted

pytest_plugins = ("tiny",)

ITEMS = ("params", "batch_stats", "opt_state", "run")


def stored(directory, step, items=ITEMS):
  """Reads a checkpoint with Orbax alone, by item and path."""
  found = {}
  with ocp.StandardCheckpointer() as checkpointer:
    for item in items:
      path = directory.absolute() / "checkpoints" / str(step) / item
      leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path))
      for where, leaf in leaves:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
          leaf = jax.random.key_data(leaf)
        found[item + jax.tree_util.keystr(where)] = np.asarray(leaf)
  return found


def assert_same_run(directory, expected, step, items=ITEMS):
  """Checks that checkpoints are bit-equal, and metrics equal but for the speed."""
  a, b = stored(directory, step, items), stored(expected, step, items)
  assert set(a) == set(b)
  assert {item for item in items if any(k.startswith(item) for k in a)} == {
    *items
  }
  for name in a:
    assert a[name].dtype == b[name].dtype, name
    assert np.array_equal(a[name], b[name]), name
  assert tiny.metrics(directory / "metrics.jsonl") == tiny.metrics(
    expected / "metrics.jsonl"
  )


def stop(workdir, step, seed, signum=signal.SIGTERM):
  """Trains until the signal; returns the message of the stopped run."""
  handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with (
    tiny.signal_before(step, seed, signum),
    pytest.raises(Interrupted) as stopped,
  ):
    tiny.run(workdir, "train")
  assert stopped.value.signum == signum
  assert handlers == [
    signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)
  ]
  return str(stopped.value)


def test_stopped_twice_and_killed_it_ends_the_same(finished, tmp_path):
  workdir = tmp_path / "run"
  teacher, made = workdir / "teacher", tiny.config()

  # In the middle of an epoch, of a log interval and between validations.
  message = stop(workdir, 6, tiny.teacher_seed(made), signal.SIGINT)
  assert message.startswith("teacher: stopped at step 6 of 10")
  assert str(teacher / "checkpoints") in message and "same command" in message
  assert checkpoints.checkpoint_step(teacher, which="last") == 6
  sums = stored(teacher, 6)["run['sums']['loss']"]
  assert sums[1] == 2 * 128  # steps 5 and 6 wait for the log line of step 8
  assert not (workdir / "checkpoints").exists()

  message = stop(workdir, 13, made.seed)
  assert message.startswith("student: stopped at step 13 of 20")
  assert_same_run(teacher, finished.workdir / "teacher", tiny.TEACHER_STEPS)
  lines = tiny.metrics(workdir / "metrics.jsonl")
  assert lines[-1]["step"] == 12
  # A checkpoint that nobody validated is the last, never the best.
  assert checkpoints.checkpoint_step(workdir, which="last") == 13
  assert checkpoints.checkpoint_step(workdir) in (5, 10)

  # A later kill leaves lines beyond the checkpoint, the last one torn,
  with (workdir / "metrics.jsonl").open("a") as file:
    for step in (15, 16):
      file.write(json.dumps({"split": "train", "step": step, "loss": 9}) + "\n")
    file.write('{"split": "train", "step": 20, "lo')
  # and a checkpoint that was being written.
  half = workdir / "checkpoints" / "16.orbax-checkpoint-tmp-1"
  shutil.copytree(workdir / "checkpoints" / "13", half)
  shutil.rmtree(half / "opt_state")
  tiny.run(workdir, "train")
  assert_same_run(workdir, finished.workdir, tiny.STUDENT_STEPS)
  best = checkpoints.checkpoint_step(finished.workdir)
  assert checkpoints.checkpoint_step(workdir) == best


def test_a_signal_at_a_stages_last_step_stops_the_run(tmp_path):
  workdir = tmp_path / "run"
  seed = tiny.teacher_seed(tiny.config())
  with tiny.instant_steps():
    message = stop(workdir, tiny.TEACHER_STEPS, seed)
  assert message.startswith("teacher: ")
  assert checkpoints.checkpoint_step(workdir / "teacher", which="last") == 10
  assert not (workdir / "checkpoints").exists()


def test_a_finished_teacher_and_two_devices_give_the_same_student(
  finished, tmp_path
):
  """Two devices give the same numbers, and the teacher is not trained again."""
  workdir = tmp_path / "run"
  made = tiny.config(teacher_workdir=str(finished.workdir / "teacher"))
  tiny.run(workdir, "train", made, num_devices=2)
  assert not (workdir / "teacher").exists()
  found = tiny.metrics(workdir / "metrics.jsonl")
  expected = tiny.metrics(finished.workdir / "metrics.jsonl")
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for name, value in a.items():
      if isinstance(value, str):
        assert value == b[name]
      elif name.startswith("accuracy"):
        assert value == pytest.approx(b[name], abs=0.05), (a["step"], name)
      else:
        # Rounding turns the sign of a few gradients in the attack (1e-4 after
        # four steps), and that grows; statistics of half a batch would be off
        # by per cents at once.
        tolerance = 2e-3 if a["step"] <= 4 else 0.05
        assert value == pytest.approx(b[name], rel=tolerance), (a["step"], name)


def test_a_teacher_of_another_network_is_refused(finished, tmp_path):
  teacher = str(finished.workdir / "teacher")
  before = tiny.snapshot(finished.workdir)
  made = tiny.config(model__width=2, teacher_workdir=teacher)
  with pytest.raises(UserError, match=r"model\.width: 2.*teacher") as error:
    tiny.run(tmp_path / "run", "train", made)
  assert len(str(error.value).splitlines()) == 1
  assert tiny.snapshot(finished.workdir) == before


def test_a_teacher_that_does_not_exist_is_named(tmp_path):
  made = tiny.config(teacher_workdir=str(tmp_path / "none"))
  with pytest.raises(UserError, match="none has no checkpoints"):
    tiny.run(tmp_path / "run", "train", made)
  assert not (tmp_path / "none").exists()


def test_the_student_starts_with_the_teachers_weights(finished, tmp_path):
  """Section 3.2 of the paper: parameters; here running statistics as well."""
  workdir = tmp_path / "run"
  made = tiny.config(teacher_workdir=str(finished.workdir / "teacher"))
  with tiny.instant_steps():
    tiny.run(workdir, "train", made)
  student = stored(workdir, tiny.STUDENT_STEPS)
  best = checkpoints.checkpoint_step(finished.workdir / "teacher")
  teacher = stored(finished.workdir / "teacher", best)
  names = [n for n in student if n.startswith(("params", "batch_stats"))]
  assert names
  for name in names:
    np.testing.assert_array_equal(student[name], teacher[name])


def test_nothing_compiles_after_the_first_validation(finished):
  numbers = {
    directory: [
      (split, step, number)
      for name, split, step, number in finished.compilations.lines
      if name == directory
    ]
    for directory in ("teacher", "run")
  }
  for directory, total in (
    ("teacher", tiny.TEACHER_STEPS),
    ("run", tiny.STUDENT_STEPS),
  ):
    warm = next(n for s, _, n in numbers[directory] if s == "validation")
    split, step, last = numbers[directory][-1]
    assert (split, step) == ("validation", total)
    assert last == warm, directory
  evaluations = finished.compilations.evaluations
  assert evaluations[-1][3] > evaluations[0][2]  # it does count
  # The turn of the first network compiles one attack with running statistics and
  # three with batch statistics (as published, statistics fixed, margin), whatever
  # their steps; the other's weights are arguments of the same programs.
  running, batch = evaluations[-20:-14], evaluations[-14:]
  for rows in (running, batch):
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [row[:2] for row in first] == [row[:2] for row in second]
    assert all(after == before for _, _, before, after in second)
    for name, size, before, after in first:
      if name.startswith("pgd2"):  # all but the random start is fgsm's program
        assert after <= before + 1, (name, size)


def test_no_function_compiles_twice(finished):
  """Single operations are left out: jax does not print all that tells them apart."""
  counted = collections.Counter(finished.compilations.programs)
  names = collections.Counter(name for name, _ in counted)
  assert names["dispatch"] == names["build"] == 2  # teacher and student
  assert names["_pgd"] == 3  # validation, running and batch statistics
  repeated = {
    name: count
    for (name, _), count in counted.items()
    if count > 1 and not hasattr(jax.lax, name.lstrip("_"))
  }
  # Each stage has a schedule of its own, each set of options is tried once, and
  # batch statistics are attacked by three programs of the same arguments.
  expected = {"schedule": 2, "_pgd": 3}
  assert repeated in (expected, expected | {"probe": 2})


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path, monkeypatch):
  """The first start keeps every program, the second one adds none."""
  cache = tmp_path / "cache"
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
  with contextlib.closing(tiny.CommandLine(tmp_path)) as command_line:
    entries = []
    for name in ("first", "second"):
      outcome = command_line(*tiny.flags(tmp_path / name))
      assert not outcome.status, outcome.stderr
      entries.append({path.name for path in cache.glob("*-cache")})
  assert len(entries[0]) > 20
  assert entries[0] == entries[1]


def test_a_profile_of_two_steps(tmp_path):
  """The steps only count, as their content does not matter here."""
  made = tiny.config("standard", profile_steps=(3, 4))
  with tiny.instant_steps():
    tiny.run(tmp_path / "run", "train", made)
  (trace,) = (tmp_path / "run/profile").rglob("perfetto_trace.json.gz")
  with gzip.open(trace) as file:
    assert json.load(file)["traceEvents"]
  assert list(trace.parent.glob("*.xplane.pb"))  # for TensorBoard


def test_a_profile_ends_with_the_run(tmp_path):
  """An interrupted run leaves no recording that blocks the next one."""
  trace = profile.Trace(tmp_path, (1, 9))
  with pytest.raises(KeyError), trace:
    trace.before(1, ())
    raise KeyError
  jax.profiler.start_trace(str(tmp_path / "again"))
  jax.profiler.stop_trace()


def test_divergence_keeps_the_last_good_checkpoint(command_line, tmp_path):
  workdir = tmp_path / "run"
  # At 0.65 of 10 steps the rate goes from 0.2 to 2e29.
  outcome = command_line(
    *tiny.flags(
      workdir,
      "--config.train.num_epochs=1",
      "--config.train.schedule=piecewise",
      "--config.train.boundaries=(0.65,)",
      "--config.train.factor=1e30",
      method="standard",
    )
  )
  assert outcome.status == 1
  errors = outcome.stderr.replace("\r", "\n").splitlines()
  (line,) = [text for text in errors if text.startswith("error: ")]
  assert errors[-1] == line and "Traceback" not in outcome.stderr
  assert "step 5 is kept" in line and str(workdir / "checkpoints") in line
  match = re.search(r"not finite at step (\d+): ([a-z_, ]+);", line)
  assert match, line
  # After the checkpoint, not after the log line that would have shown it.
  assert 5 < int(match[1]) <= 8
  assert set(match[2].split(", ")) <= {"cross_entropy", "gradient"}
  assert checkpoints.checkpoint_step(workdir, which="last") == 5
  _, variables = checkpoints.restore_model(workdir)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
  lines = tiny.metrics(workdir / "metrics.jsonl")
  assert [text["step"] for text in lines] == [4, 5]
  assert not (workdir / "results.json").exists()


def test_divergence_counts_steps_as_log_lines_do(tmp_path):
  made = tiny.config(
    "standard",
    train__learning_rate=1e30,
    train__log_every_steps=1,
    train__schedule="constant",
  )
  workdir = tmp_path / "run"
  with pytest.raises(TrainingDivergedError) as error:
    tiny.run(workdir, "train", made)
  message = str(error.value)
  assert len(message.splitlines()) == 1
  assert "there is none yet" in message and "learning_rate" in message
  lines = tiny.metrics(workdir / "metrics.jsonl")
  step = int(re.search(r"at step (\d+)", message)[1])
  # The lines before it were written, its own was not.
  assert step == (lines[-1]["step"] if lines else 0) + 1
  assert not list((workdir / "checkpoints").glob("[0-9]*"))


# Gradients of the terms.


def added(workdir, step, fields):
  """How much longer logit pairing makes the gradient of the step after one."""
  found = []
  for weight in (objectives.defaults("alp")["weight"], 0.0):
    made = tiny.config("alp", **fields, objective__weight=weight)
    plan = config.make_plan(made)
    (stage,), dataset = plan.stages, plan.data.load()
    mesh = sharding.make_mesh(jax.devices()[:1])
    outline = train.make_outline(
      plan, stage, workdir, len(dataset.train.labels)
    )
    prepared = train.prepare(plan, stage, None, dataset, mesh, None, outline)
    before, saved = checkpoints.restore_before(
      workdir, prepared.start([]), step + 1
    )
    assert saved == step
    _, gradient, _ = prepared.differentiate(before, range(step, step + 1), None)
    found.append(jax.tree.leaves(jax.device_get(gradient)))
  whole, rest = (np.concatenate([x.ravel() for x in each]) for each in found)
  return np.linalg.norm(whole - rest) / np.linalg.norm(rest)


def test_comparing_gradients_changes_no_weight(tmp_path, capsys, monkeypatch):
  minimal.register_data_set(monkeypatch)
  minimal.register_network(monkeypatch)
  small = {"data__name": "minimal", "model__name": "minimal"}
  for asked in (False, True):
    made = tiny.config("alp", **small, train__term_gradients=asked)
    tiny.run(tmp_path / str(asked), "train", made)
  items = ("params", "opt_state", "run")  # there are no statistics
  one, other = (stored(tmp_path / str(x), 4, items) for x in (False, True))
  assert set(one) == set(other)
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)
  without, lines = (
    [
      {k: v for k, v in line.items() if k != "images_per_second"}
      for line in tiny.metrics(tmp_path / str(asked) / "metrics.jsonl")
    ]
    for asked in (False, True)
  )
  name = "gradient_ratio/logit_pairing"
  ratios = {x["step"]: x.pop(name) for x in lines if name in x}
  assert lines == without
  assert list(ratios) == [1, 2, 3, 4] and all(
    0 < x < 100 for x in ratios.values()
  )
  shown = f"gradients relative to cross-entropy: logit_pairing {ratios[2]:.2g}"
  assert capsys.readouterr().out.count(shown) == 1
  assert ratios[3] == pytest.approx(added(tmp_path / "True", 3, small), 1e-3)
  # A finished run is not another one for having compared them, or not.
  tiny.run(tmp_path / "True", "train", tiny.config("alp", **small))


# Methods.


@pytest.mark.parametrize("method", ["atat", "atat_released"])
def test_only_the_papers_student_starts_from_the_teacher(
  method, tmp_path, monkeypatch
):
  """The paper starts from the teacher, the released code from fresh weights."""
  started = []

  def create(*_, initial, **__):
    started.append(initial)
    raise KeyboardInterrupt

  monkeypatch.setattr(state, "create", create)
  teacher = {"params": {}}
  monkeypatch.setattr(
    checkpoints, "restore_model", lambda *_, **__: (None, teacher)
  )
  plan = config.make_plan(
    tiny.config(method, teacher_workdir=str(tmp_path / "teacher"))
  )
  split = Split(np.zeros((200, 8, 8, 1), np.uint8), np.zeros(200, np.int32))
  with pytest.raises(KeyboardInterrupt):
    train.train(
      plan,
      tmp_path / "run",
      Dataset(plan.data.spec, split, split, split),
      sharding.make_mesh(jax.devices()[:1]),
    )
  assert started == [teacher if method == "atat" else None]


@pytest.mark.slow
@pytest.mark.parametrize(
  "method", sorted({*objectives.OBJECTIVES} - {"atat", "standard"})
)
def test_every_method_trains_and_is_evaluated(method, tmp_path):
  """A whole run from configuration to page; only some methods train a teacher."""
  made = tiny.config(method)
  tiny.run(tmp_path, made=made)
  needs_teacher = objectives.create(method, **made.objective).needs_teacher
  assert (tmp_path / "teacher").exists() == needs_teacher
  lines = tiny.metrics(tmp_path / "metrics.jsonl")
  for line in lines:
    numbers = [v for v in line.values() if isinstance(v, int | float)]
    assert np.isfinite(numbers).all()
  train_lines = [line for line in lines if line["split"] == "train"]
  assert train_lines[-1]["step"] == tiny.STUDENT_STEPS
  assert train_lines[-1]["loss"] < train_lines[0]["loss"]
  assert ("accuracy_clean" in train_lines[0]) == (method != "at")
  assert (tmp_path / "report.html").exists()


OPTIONS = {
  "train__num_epochs": 1,
  "train__schedule": "constant",
  "train__accumulate_steps": 2,
  "train__label_smoothing": 0.1,
  "data__mix": "cutmix",
  "data__extra_fraction": 0.25,
}


@pytest.fixture
def validations(monkeypatch):
  """Collects the variables of each validated network; no accuracy is computed."""
  found = []

  def judge(key, classifier, data, **kwargs):
    found.append(jax.tree.map(np.array, jax.tree.leaves(classifier)))
    of_weights = float(np.abs(found[-1][0].sum())) % 1
    return types.SimpleNamespace(accuracy=of_weights, nonfinite=0)

  monkeypatch.setattr(evaluation, "judge", judge)
  return found


def of_item(found, item):
  return {
    name.removeprefix(f"{item}['params']").removeprefix(item): leaf
    for name, leaf in found.items()
    if name.startswith(item) and "batch_stats" not in name
  }


@pytest.mark.parametrize(
  "average",
  [
    pytest.param({"train__ema_decay": 0.9}, marks=pytest.mark.slow),
    {"train__swa_start": 0.4, "train__statistics_batches": 3},
  ],
  ids=["ema", "swa"],
)
def test_resumed_with_averages_and_extra_images_it_ends_the_same(
  tmp_path, validations, average
):
  generator = np.random.default_rng(0)
  np.savez(
    tmp_path / "extra.npz",
    image=generator.integers(0, 256, (50, 8, 8, 1), np.uint8),
    label=generator.integers(0, 10, 50),
  )
  made = tiny.config(
    "standard", **OPTIONS, **average, data__extra=str(tmp_path / "extra.npz")
  )
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  tiny.run(whole, "train", made)
  first = list(validations)
  with (
    tiny.signal_before(8, made.seed),
    pytest.raises(Interrupted),
  ):
    tiny.run(parts, "train", made)
  # The checkpoint in between also differs from the trained weights.
  _, averaged = checkpoints.restore_model(parts, which="last")
  _, trained = checkpoints.restore_model(parts, which="last", averaged=False)
  for item in ("params", "batch_stats"):
    assert not np.array_equal(
      *(jax.tree.leaves(v[item])[-1] for v in (averaged, trained))
    )
  tiny.run(parts, "train", made)
  assert_same_run(parts, whole, tiny.STEPS_PER_EPOCH, (*ITEMS, "ema"))

  # Validated, selected and restored are the averaged weights.
  items = stored(whole, tiny.STEPS_PER_EPOCH, (*ITEMS, "ema"))
  raw, kept = of_item(items, "params"), of_item(items, "ema")
  assert set(raw) == set(kept)
  assert all(not np.array_equal(raw[name], kept[name]) for name in raw)
  _, restored = checkpoints.restore_model(whole, which="last")
  validated = {leaf.tobytes() for leaf in first[-1]}
  for leaf in jax.tree.leaves(restored):
    assert np.asarray(leaf).tobytes() in validated
  for name, leaf in kept.items():
    assert leaf.tobytes() in validated, name
    assert raw[name].tobytes() not in validated, name


def test_too_few_extra_images_are_told_before_training(tmp_path, monkeypatch):
  np.savez(
    tmp_path / "x.npz",
    image=np.zeros((9, 8, 8, 1), np.uint8),
    label=np.zeros(9, np.int32),
  )
  made = tiny.config("standard", data__extra=str(tmp_path / "x.npz"))
  monkeypatch.delattr(steps, "make_train_step")
  with pytest.raises(UserError, match=r"extra_fraction: 90 .* 9 in .*x\.npz"):
    tiny.run(tmp_path / "run", "train", made)
  assert not (tmp_path / "run").exists()
