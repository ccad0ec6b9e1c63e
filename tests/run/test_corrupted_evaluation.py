"""Evaluation on corrupted images: true accuracies, one program, resumable."""

import json

import corrupted_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import evaluation
from atat_jax.data import corruptions
from atat_jax.errors import UserError
from atat_jax.evaluation import corrupted
from atat_jax.process import stops

pytestmark = pytest.mark.usefixtures("quick_compilation")

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (11, 4, 3, 1), np.uint8)
WEIGHTS = GENERATOR.normal(size=(12, 3)).astype(np.float32)


def logits(weights, images):
  return images.reshape(len(images), -1) @ weights


CLASSIFIER = jax.tree_util.Partial(logits, jnp.asarray(WEIGHTS))
LABELS = np.argmax(logits(WEIGHTS, IMAGES / 255.0), -1)


@pytest.fixture
def two_kinds(monkeypatch):
  """Two corruptions that compile at once, in the place of fifteen."""
  kinds = ("brightness", "contrast")
  found = {kind: corruptions.CORRUPTIONS[kind] for kind in kinds}
  monkeypatch.setattr(corruptions, "CORRUPTIONS", found)


def measure(source, count=11, **options):
  return evaluation.benchmark(
    jax.random.key(3),
    CLASSIFIER,
    IMAGES[:count],
    LABELS[:count],
    **{"epsilon": 0.1, "attacks": "nominal", "batch_size": 4} | options,
    corruptions=str(source),
  ).content["corruptions"]


def accuracies(rows):
  return {(row["corruption"], row["severity"]): row["accuracy"] for row in rows}


@pytest.mark.parametrize("count", [11, 6])
def test_published_images_have_the_accuracy_of_a_plain_loop(tmp_path, count):
  arrays = corrupted_files.write(tmp_path, (4, 3, 1), LABELS)
  rows = measure(tmp_path, count, dataset="cifar10")
  expected = {
    (kind, number): np.mean(
      logits(WEIGHTS, block[:count] / 255.0).argmax(-1) == LABELS[:count]
    )
    for kind, blocks in arrays.items()
    for number, block in enumerate(blocks, 1)
  }
  assert accuracies(rows) == pytest.approx(expected)
  assert len(set(expected.values())) > 3
  for row in rows:
    assert (row["benchmark"], row["dataset"]) == ("CIFAR-10-C", "cifar10")
    assert (row["num_examples"], row["batch_norm"]) == (count, "running")
    assert row["nonfinite"] == 0 and "seed" not in row


def test_generated_images_are_those_of_the_function(two_kinds):
  rows = measure("generated")
  for kind in corruptions.CORRUPTIONS:
    for severity in (1, 5):
      made = corruptions.corrupt(
        jax.random.key(3), IMAGES / 255.0, kind=kind, severity=severity
      )
      expected = np.mean(logits(WEIGHTS, made).argmax(-1) == LABELS)
      assert accuracies(rows)[kind, severity] == pytest.approx(expected)
  assert {row["benchmark"] for row in rows} == {corruptions.GENERATED}
  assert {row["seed"] for row in rows} == {3} and len(rows) == 10
  assert accuracies(measure("generated", batch_size=11)) == accuracies(rows)


def test_nothing_is_compiled_for_a_corruption(
  tmp_path, two_kinds, compilations
):
  for name in ("a", "b"):
    corrupted_files.write(tmp_path / name, (4, 3, 1), LABELS, seed=len(name))
  measure(tmp_path / "a")
  before = compilations()
  assert len(measure(tmp_path / "b")) == 10
  assert compilations() == before


def test_an_interrupted_evaluation_goes_on(tmp_path, two_kinds, monkeypatch):
  folder, out = tmp_path / "c", tmp_path / "out"
  corrupted_files.write(folder, (4, 3, 1), LABELS)
  expected = measure(folder)
  calls = []

  def stopped():
    calls.append(1)
    if len(calls) == 18:
      raise stops.Interrupted("stopped", 2)

  with monkeypatch.context() as patch:
    patch.setattr(corrupted.stops, "check", stopped)
    with pytest.raises(stops.Interrupted):
      measure(folder, out=out)
  kept = json.loads((out / "results.json").read_text())["corruptions"]
  assert 2 < len(kept) < 8
  measured, measure_one = [], corrupted._measure

  def counted(row, *rest):
    measured.append(row)
    return measure_one(row, *rest)

  monkeypatch.setattr(corrupted, "_measure", counted)
  rows = measure(folder, out=out)
  assert len(measured) == 10 - len(kept) and rows[: len(kept)] == kept
  assert accuracies(rows) == accuracies(expected)
  measured.clear()
  assert measure(folder, out=out) == rows and not measured
  # Other files in the same folder are other images.
  corrupted_files.write(folder, (4, 3, 1), LABELS, seed=1)
  assert len(measure(folder, out=out)) == 20 and len(measured) == 10


def test_logits_that_are_not_finite_are_wrong_and_counted(two_kinds):
  def bright_is_nan(images):
    means = images.mean((1, 2, 3))
    found = jnp.stack([means, 1 - means], 1)
    return jnp.where(means[:, None] > 0.6, jnp.nan, found)

  images = np.full((4, 4, 3, 1), 140, np.uint8)  # 0.55
  rows = evaluation.benchmark(
    jax.random.key(0),
    jax.tree_util.Partial(bright_is_nan),
    images,
    np.zeros(4, int),
    epsilon=0.1,
    attacks="nominal",
    corruptions="generated",
  ).content["corruptions"]
  found = {
    (row["corruption"], row["severity"]): (row["accuracy"], row["nonfinite"])
    for row in rows
  }
  assert found["contrast", 5] == (1.0, 0)
  assert found["brightness", 5] == (0.0, 4)


def test_bad_corruptions_are_refused_before_anything_is_measured(tmp_path):
  for bad, told in (
    ("nowhere", "nowhere does not exist"),
    (tmp_path, "labels.npy does not exist"),
  ):
    with pytest.raises(UserError, match=f"^corruptions: .*{told}"):
      measure(bad, batch_size=0)
  corrupted_files.write(tmp_path, (4, 3, 1), LABELS[::-1])
  with pytest.raises(UserError, match=r"labels\.npy: image 0 has class"):
    measure(tmp_path)
