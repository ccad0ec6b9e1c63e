"""Accuracies against plain loops and against the public attack functions."""

import base64
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from atat_jax import attacks, checkpoints, data, evaluation, models, sharding
from atat_jax.data.base import Split
from atat_jax.evaluation import accuracies
from atat_jax.rng import stream
from atat_jax.runs import files, tables

pytest_plugins = ("tiny",)
pytestmark = pytest.mark.usefixtures("quick_compilation")

NOMINAL = evaluation.parse("nominal", epsilon=0.1, step_size=0.1)
FGSM = evaluation.parse("fgsm", epsilon=0.1, step_size=0.1)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def split():
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (23, 4, 4, 1), np.uint8)
  return Split(images, generator.integers(0, 3, 23).astype(np.int32))


@pytest.fixture(scope="module")
def linear():
  """A linear classifier and its weights [16, 3] as float64."""
  weights = np.random.default_rng(1).normal(size=(16, 3))

  def logits(kernel, images):
    return images.reshape(len(images), -1) @ kernel

  return (
    jax.tree_util.Partial(logits, jnp.asarray(weights, jnp.float32)),
    weights,
  )


def accuracy(classifier, split, mesh, **options):
  options = {"protocol": NOMINAL, "batch_size": 5, **options}
  key = jax.random.key(0)
  return evaluation.accuracy(key, classifier, split, mesh=mesh, **options)


@pytest.mark.parametrize("batch_size", [7, 50])
def test_accuracy_is_that_of_a_plain_loop(linear, split, mesh, batch_size):
  classifier, weights = linear
  correct, robust = np.zeros((2, 3), int)
  for image, label in zip(split.images, split.labels, strict=True):
    x = image.reshape(-1) / 255.0
    logits = x @ weights
    correct[label] += logits.argmax() == label
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    gradient = weights @ (
      shares - np.eye(3)[label]
    )  # that of the cross-entropy
    x = np.clip(x + 0.1 * np.sign(gradient), 0, 1)
    robust[label] += (x @ weights).argmax() == label
  assert 0 < robust.sum() < correct.sum() < len(split.labels)
  for protocol, count in ((NOMINAL, correct), (FGSM, robust)):
    found = accuracy(
      classifier, split, mesh, protocol=protocol, batch_size=batch_size
    )
    assert found == pytest.approx(count.sum() / len(split.labels), abs=1e-6)
    by_class, total = evaluation.class_counts(
      jax.random.key(0),
      classifier,
      split,
      protocol=protocol,
      batch_size=batch_size,
      num_classes=3,
      mesh=mesh,
    )
    assert by_class.tolist() == count.tolist()
    assert total.tolist() == np.bincount(split.labels).tolist()
    assert found == by_class.sum() / total.sum()


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23, 24, 64])
def test_the_fill_of_the_last_batch_is_not_counted(split, mesh, batch_size):
  """The first images, which fill the last batch, are classified correctly."""
  labels = np.ones(23, np.int32)
  labels[:5] = 2
  calls = []
  found = accuracy(
    jax.tree_util.Partial(
      lambda images: jnp.zeros((len(images), 3)).at[:, 2].set(1)
    ),
    Split(split.images, labels),
    mesh,
    batch_size=batch_size,
    on_batch=calls.append,
  )
  assert found == pytest.approx(5 / 23, abs=1e-7)
  assert sum(calls) == 23 and len(calls) == -(-23 // batch_size)


def test_batch_statistics_are_those_of_real_images(split, mesh):
  """A classifier that compares an image with its batch agrees with numpy."""

  def relative(images):
    means = images.mean((1, 2, 3))
    return jnp.stack([means.mean() - means, means - means.mean()], axis=1)

  labels = (split.labels > 0).astype(np.int32)
  expected = {}
  for size in (4, 10, 23):
    correct = 0
    for start in range(0, 23, size):
      batch = [(start + i) % 23 for i in range(size)]  # filled from the first
      means = split.images[batch].mean((1, 2, 3), np.float64)
      right = (means > means.mean()) == labels[batch]
      correct += right[: 23 - start].sum()
    expected[size] = correct / 23
  assert len(set(expected.values())) > 1  # it does depend on the batch
  for size, value in expected.items():
    found = accuracy(
      jax.tree_util.Partial(relative),
      Split(split.images, labels),
      mesh,
      batch_size=size,
    )
    assert found == pytest.approx(value, abs=1e-6)


def test_devices_and_batches_make_no_difference(linear, split, eight_devices):
  classifier, _ = linear
  found = {
    accuracy(
      classifier,
      split,
      sharding.make_mesh(eight_devices[:number]),
      protocol=FGSM,
      batch_size=size,
    )
    for number, size in ((1, 8), (8, 16), (8, 5))
  }
  assert len(found) == 1


def test_accuracy_is_a_function_of_the_key(linear, split, mesh):
  seen = []
  protocol = evaluation.parse("pgd1", epsilon=0.2, step_size=0.1)

  class Spy:
    """Protocol that keeps the images it made."""

    def run(self, *args):
      seen.append(np.asarray(protocol.run(*args)))
      return seen[-1]

  split = Split(split.images[:16], split.labels[:16])
  for seed in (0, 0, 1):
    evaluation.accuracy(
      jax.random.key(seed),
      linear[0],
      split,
      protocol=Spy(),
      batch_size=8,
      mesh=mesh,
    )
  np.testing.assert_array_equal(seen[0], seen[2])
  np.testing.assert_array_equal(seen[1], seen[3])
  assert not np.array_equal(seen[0], seen[4])
  # Each batch has a random start of its own.
  clean = split.images / 255.0
  noise = [seen[i] - clean[8 * i : 8 * i + 8] for i in range(2)]
  assert not np.allclose(np.abs(noise[0]), np.abs(noise[1]), atol=0.05)


@pytest.mark.parametrize("model_name", ["student", "teacher"])
def test_rows_are_what_a_notebook_computes(finished, model_name):
  """The public functions alone give the numbers of `results.json`."""
  rows = [r for r in finished.results["rows"] if r["model"] == model_name]
  derived = [row for row in rows if row["attack"] == "worst_case"]
  rows = [row for row in rows if row not in derived]
  always = {"running": True, "batch": True}
  folder = {"student": "", "teacher": "teacher"}[model_name]
  model, variables = checkpoints.restore_model(finished.workdir / folder)
  test = data.load("digits", validation_size=128).test
  images = (test.images[: tiny.NUM_TEST] / 255.0).astype(np.float32)
  labels = test.labels[: tiny.NUM_TEST]
  # A notebook calls the classifier operation by operation, which is slower.
  predict = jax.jit(lambda classifier, x: classifier(x).argmax(-1))
  for row in rows:
    classifier = models.classifier(
      model, variables, batch_norm=row["batch_norm"]
    )
    attacked = classifier
    if "options" in row:
      assert row["options"] == {"statistics": "fixed"}
      attacked = models.classifier(
        model, variables, batch_norm="batch", fixed_statistics=True
      )
    size = row["batch_size"]
    assert (
      size
      == {
        "running": tiny.BATCH_SIZE,
        "batch": tiny.STATISTICS_SIZE,
      }[row["batch_norm"]]
    )
    correct = np.zeros(tiny.NUM_TEST, bool)
    for number, start in enumerate(range(0, tiny.NUM_TEST, size)):
      batch = np.arange(start, start + size) % tiny.NUM_TEST
      x, y = images[batch], labels[batch]
      key = stream(jax.random.key(row["seed"]), "evaluation", number)
      numbers = {k: row[k] for k in ("epsilon", "step_size", "num_steps")}
      loss = row["loss"]
      if row["attack"].startswith("fgsm"):
        x = attacks.fgsm(key, attacked, x, y, epsilon=row["epsilon"], loss=loss)
      elif row["attack"].startswith("pgd2"):
        x = attacks.pgd(
          key, attacked, x, y, norm=row["norm"], loss=loss, **numbers
        )
      right = np.asarray(predict(classifier, x)) == y
      correct[start : start + size] = right[: tiny.NUM_TEST - start]
    assert row["accuracy"] == pytest.approx(correct.mean(), abs=1e-6)
    stored = np.frombuffer(base64.b64decode(row["correct"]), np.uint8)
    np.testing.assert_array_equal(
      np.unpackbits(stored)[: tiny.NUM_TEST], correct
    )
    always[row["batch_norm"]] &= correct
  assert {row["batch_norm"]: row["accuracy"] for row in derived} == {
    mode: pytest.approx(robust.mean()) for mode, robust in always.items()
  }
  assert {
    row["batch_norm"]: set(row["worst_of"].split(", ")) for row in derived
  } == {mode: set(attacks) for mode, attacks in tiny.MEASURED.items()}


def test_a_row_counts_what_was_not_finite_and_the_report_says_so(
  finished, tmp_path, monkeypatch
):
  judge = accuracies.judge

  def spoiled(*args, **kwargs):
    found = judge(*args, **kwargs)
    if kwargs["protocol"].name != "pgd2":
      return found
    bad = np.arange(len(found.correct)) == np.flatnonzero(found.correct)[0]
    return dataclasses.replace(
      found, correct=found.correct & ~bad, finite=~bad, gradients=24
    )

  before = {
    (row["model"], row["batch_norm"], row["attack"]): row
    for row in finished.results["rows"]
  }
  workdir = finished.copy(tmp_path / "run")
  (workdir / "results.json").unlink()
  monkeypatch.setattr(accuracies, "judge", spoiled)
  tiny.run(workdir, "evaluate")
  found = files.read_results(workdir)
  worst = {
    (row["model"], row["batch_norm"]): row["accuracy"]
    for row in found["rows"]
    if row["attack"] == "worst_case"
  }
  for row in found["rows"]:
    if row["attack"] == "worst_case":
      continue
    expected = before[row["model"], row["batch_norm"], row["attack"]]
    bad = row["attack"] == "pgd2"
    assert worst[row["model"], row["batch_norm"]] <= row["accuracy"]
    assert row["accuracy"] == pytest.approx(
      expected["accuracy"] - bad / tiny.NUM_TEST
    )
    counts = [row[field] for field in tables.NONFINITE]
    assert counts == ([1, 0, 24] if bad else [0, 0, 0])
  assert found["diagnostics"]["student_nonfinite"]["flag"]
  tiny.run(workdir, "figures")
  page = (workdir / "report.html").read_text()
  assert f"1 of {tiny.NUM_TEST} images has logits that are not finite" in page
  assert not finished.results["diagnostics"]["student_nonfinite"]["flag"]


def test_each_loss_is_looked_at_once_for_each_network(finished):
  rows = finished.results["rows"]
  for row in rows:
    if row["attack"] == "worst_case":
      continue
    told = "blind_loss" in row.get("diagnostics", {})
    assert told == (row["loss"] is not None and row["batch_norm"] == "running")
  names = [name for name in finished.results["diagnostics"] if "blind" in name]
  assert sorted(names) == [
    "student_cross_entropy_blind_loss",
    "teacher_cross_entropy_blind_loss",
  ]


def test_a_protocol_runs_its_attack(linear, split):
  classifier, _ = linear
  images = (split.images / 255.0).astype(np.float32)
  key = jax.random.key(3)
  size = {"epsilon": 0.2, "step_size": 0.05}
  numbers = {**size, "num_steps": 3}

  def run(name, **options):
    made = evaluation.parse(name, **{**size, **options})
    return np.asarray(made.run(key, classifier, images, split.labels))

  np.testing.assert_array_equal(run("nominal"), images)
  arguments = (key, classifier, images, split.labels)
  np.testing.assert_array_equal(
    run("fgsm"), attacks.fgsm(*arguments, epsilon=0.2)
  )
  np.testing.assert_array_equal(
    run("ifgsm3"), attacks.ifgsm(*arguments, **numbers)
  )
  np.testing.assert_array_equal(
    run("pgd3-margin", num_restarts=2, norm="l2"),
    attacks.pgd(
      *arguments, **numbers, norm="l2", loss="margin", num_restarts=2
    ),
  )
  assert not np.array_equal(run("pgd3"), run("ifgsm3"))  # a random start
  np.testing.assert_array_equal(
    run("square:num_queries=4:norm=l1:epsilon=0.7"),
    attacks.square(*arguments, epsilon=0.7, num_queries=4, norm="l1"),
  )
  np.testing.assert_array_equal(
    run("apgd3-targeted_margin:num_targets=2"),
    attacks.apgd(
      *arguments,
      epsilon=0.2,
      num_steps=3,
      loss="targeted_margin",
      num_targets=2,
    ),
  )


@pytest.mark.slow
def test_bfloat16_is_as_robust_as_float32(finished):
  """On all 1,797 digits the accuracies differ by at most half a point.

  That is eight images; which ones are at the boundary depends on rounding.
  """
  model, variables = checkpoints.restore_model(finished.workdir)
  parts = data.load("digits", validation_size=180)
  split = Split(
    *(
      np.concatenate(arrays)
      for arrays in zip(parts.train, parts.validation, parts.test, strict=True)
    )
  )
  assert len(split.labels) == 1797
  mesh = sharding.make_mesh(jax.devices()[:1])
  found = {}
  for name in ("nominal", "pgd20"):
    protocol = evaluation.parse(name, epsilon=0.1, step_size=0.025)
    for dtype in ("float32", "bfloat16"):
      classifier = models.classifier(
        model.clone(dtype=jnp.dtype(dtype)), variables
      )
      logits = classifier(jnp.asarray(split.images[:2] / np.float32(255)))
      assert logits.dtype == jnp.float32
      found[name, dtype] = evaluation.accuracy(
        jax.random.key(0),
        classifier,
        sharding.put_replicated(mesh, split),
        protocol=protocol,
        batch_size=600,
        mesh=mesh,
      )
    full, half = found[name, "float32"], found[name, "bfloat16"]
    assert 0.3 < full < 1  # else agreement would say little
    assert abs(full - half) <= 0.005, found
