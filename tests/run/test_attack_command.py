"""From a classifier to an honest table: one call, and one command."""

import base64
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import attack, evaluation
from atat_jax.errors import UserError
from atat_jax.evaluation import certifying, measuring

pytest_plugins = ("tiny",)

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(60, 196, (24, 4, 3, 1), np.uint8)
WEIGHTS = GENERATOR.normal(size=(12, 3)).astype(np.float32)
EPSILON = 0.15


def logits(weights, images):
  return images.reshape(len(images), -1) @ weights


CLASSIFIER = jax.tree_util.Partial(logits, jnp.asarray(WEIGHTS))
LABELS = np.argmax(logits(WEIGHTS, IMAGES / 255.0), -1)
LABELS[:3] = (LABELS[:3] + 1) % 3  # three images are wrong


def worst_case(margin_of=1.0):
  """Share of images whose margin no perturbation takes away, exactly."""
  pixels = IMAGES.reshape(len(IMAGES), -1) / 255.0
  robust = []
  for x, label in zip(pixels, LABELS, strict=True):
    gaps = WEIGHTS[:, [label]] - np.delete(WEIGHTS, label, 1)
    least = x @ gaps - margin_of * EPSILON * np.abs(gaps).sum(0)
    robust.append((least > 0).all())
  return float(np.mean(robust))


def measure(images=IMAGES, attacks="pgd10-margin", **options):
  arguments = {"epsilon": EPSILON, "attacks": attacks} | options
  return evaluation.benchmark(
    jax.random.key(3), CLASSIFIER, images, LABELS, **arguments
  )


def accuracies(rows):
  return {row["attack"]: row["accuracy"] for row in rows}


def test_a_linear_classifier_has_its_exact_robust_accuracy():
  attacks = "fgsm,pgd10-margin"
  rows = measure(attacks=attacks, name="mine", dataset="noise")
  found = accuracies(rows)
  assert list(found) == ["nominal", "fgsm", "pgd10-margin", "worst_case"]
  assert found["nominal"] == 21 / 24
  assert found["pgd10-margin"] == found["worst_case"] == worst_case()
  assert 0 < worst_case() < 21 / 24  # the attack does something
  row = rows[2]
  assert (row["model"], row["dataset"], row["seed"]) == ("mine", "noise", 3)
  assert (row["epsilon"], row["step_size"]) == (EPSILON, EPSILON / 4)
  assert f"{100 * worst_case():.2f}" in rows.table()
  assert "linf, epsilon 0.15, 10 steps of 0.0375" in rows.table()


def test_pixels_and_floats_give_the_same_rows():
  expected = accuracies(measure())
  assert accuracies(measure(IMAGES / 255.0)) == expected
  floats = (IMAGES / np.float32(255)).astype(np.float32)
  assert accuracies(measure(jnp.asarray(floats))) == expected


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
  first = measure(out=tmp_path)
  measured = []
  original = measuring.accuracies.judge

  def counted(*args, **kwargs):
    measured.append(kwargs["protocol"].name)
    return original(*args, **kwargs)

  monkeypatch.setattr(measuring.accuracies, "judge", counted)
  assert accuracies(measure(out=tmp_path)) == accuracies(first)
  assert measured == []
  both = measure(out=tmp_path, attacks="fgsm")
  assert measured == ["fgsm"]
  assert {"nominal", "pgd10-margin", "fgsm"} <= set(accuracies(both))


def test_certified_accuracy_is_the_exact_one_and_contradicted_by_a_fault(
  tmp_path,
):
  rows = measure(certify=True, out=tmp_path)
  (certificate,) = rows.content["certificates"]
  assert certificate["accuracy"] == worst_case()
  check = rows.diagnostics["network_certified"]
  assert (check["flag"], check["value"]) == (False, 0)
  assert "certified: " in rows.table()
  row = next(r for r in rows if r["attack"] == "pgd10-margin")
  bits = np.unpackbits(np.frombuffer(base64.b64decode(row["correct"]), "u1"))
  bits[np.flatnonzero(bits)[0]] = 0  # an image that is certified
  fooled = {**row, "correct": base64.b64encode(np.packbits(bits)).decode()}
  found = certifying.check(certificate, [fooled])
  assert found["flag"] and "1 of these: the bounds or" in found["message"]
  again = measure(certify=True, out=tmp_path, attacks="fgsm")
  assert again.content["certificates"] == [certificate]
  assert "network_certified" in again.diagnostics
  with pytest.raises(UserError, match="certify: True with norm 'l2'"):
    measure(certify=True, norm="l2")


def test_results_of_another_classifier_or_image_are_refused(tmp_path):
  measure(out=tmp_path)
  other = jax.tree_util.Partial(logits, jnp.asarray(1.5 * WEIGHTS))
  arguments = {"epsilon": EPSILON, "attacks": "fgsm", "out": tmp_path}
  key = jax.random.key(0)
  with pytest.raises(UserError, match=r"out: .* results of another classifier"):
    evaluation.benchmark(key, other, IMAGES, LABELS, **arguments)
  with pytest.raises(UserError, match=r"out: .* on other images or labels"):
    evaluation.benchmark(key, CLASSIFIER, IMAGES, LABELS[::-1], **arguments)


def test_bad_input_is_named():
  key = jax.random.key(0)
  for changes, message in (
    ({"epsilon": 8}, "epsilon: 8"),
    ({"attacks": "pdg20"}, "attacks?: 'pdg20'"),
    ({"norm": "l7"}, "norm: 'l7'"),
    ({"name": 5}, "name: 5"),
    ({"batch_size": 0}, "batch_size: 0"),
    ({"out": __file__}, "out: .* is a file; allowed: a directory"),
    ({"out": f"{__file__}/x/y"}, "out: .*[.]py is a file; allowed: a dir"),
  ):
    arguments = {"epsilon": EPSILON} | changes
    with pytest.raises(UserError, match=message):
      evaluation.benchmark(key, CLASSIFIER, IMAGES, LABELS, **arguments)
  with pytest.raises(UserError, match="labels: "):
    evaluation.benchmark(key, CLASSIFIER, IMAGES, LABELS + 1, epsilon=EPSILON)
  with pytest.raises(UserError, match="images: "):
    evaluation.benchmark(
      key, CLASSIFIER, 9.0 * IMAGES / 255, LABELS, epsilon=0.1
    )


MODULE = """
import jax, jax.numpy as jnp, numpy as np

def logits(weights, images):
  return images.reshape(len(images), -1) @ weights

def make():
  return jax.tree_util.Partial(logits, jnp.asarray(np.load("weights.npy")))

def nothing():
  return None
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "my_network_of_a_test.py").write_text(MODULE)
  np.save("weights.npy", WEIGHTS)
  np.savez("mine.npz", test_images=IMAGES, test_labels=LABELS)
  return tmp_path


def test_the_command_attacks_a_function(place, capsys):
  source = "my_network_of_a_test:make"
  command = [source, "--data=mine.npz", f"--epsilon={EPSILON}"]
  attack.main([*command, "--attacks=pgd10-margin", "--out=found"])
  printed = capsys.readouterr().out
  assert f"{100 * worst_case():.2f}" in printed
  content = json.loads((place / "found/results.json").read_text())
  assert {row["dataset"] for row in content["rows"]} == {"npz:mine"}
  assert accuracies(content["rows"])["pgd10-margin"] == worst_case()
  page = (place / "found/report.html").read_text()
  assert "npz:mine" in page and f"{100 * worst_case():.2f}" in page


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["nowhere.pth"], r"nowhere\.pth"),
    (["my_network_of_a_test:nobody"], "no attribute 'nobody'"),
    (["my_network_of_a_test:nothing"], "returned NoneType; allowed"),
    (["no_such_module_at_all:f"], "No module named"),
    (["my_network_of_a_test:make", "--num-examples=25"], "num_examples: 25"),
    (["my_network_of_a_test:make", "--attacks=pdg"], "'pdg'"),
  ],
)
def test_the_command_says_what_is_wrong(words, message, place):
  with pytest.raises(UserError, match=message):
    attack.main([*words, "--data=mine.npz", "--out=found"])
  assert not (place / "found").exists()


def test_the_command_attacks_a_run(finished, tmp_path, caplog):
  with caplog.at_level(logging.INFO, "atat_jax"):
    attack.main(
      [
        str(finished.workdir),
        "--attacks=fgsm",
        "--num-examples=60",
        "--batch-size=60",
        f"--out={tmp_path / 'found'}",
      ]
    )
  assert "WideResNet, step" in caplog.text
  rows = json.loads((tmp_path / "found/results.json").read_text())["rows"]
  assert {row["epsilon"] for row in rows} == {None, 0.2}
  assert {row["num_examples"] for row in rows} == {60}
