"""Rules that flag an evaluation which overstates robustness."""

import json

import pytest

from atat_jax import evaluation


def rows(accuracies, model="student", batch_norm="running", count=10_000):
  """Makes rows of a table from {attack: accuracy}."""
  made = []
  for attack, value in accuracies.items():
    steps = attack.removeprefix("pgd").removesuffix("-margin")
    made.append(
      {
        "model": model,
        "attack": attack,
        "batch_norm": batch_norm,
        "num_steps": int(steps) if attack.startswith("pgd") else 1,
        "num_examples": count,
        "accuracy": value,
      }
    )
  return made


def flags(found):
  return {name: rule["flag"] for name, rule in found.items()}


SOUND = {
  "nominal": 0.9,
  "fgsm": 0.6,
  "pgd7": 0.51,
  "pgd20": 0.5,
  "pgd20-margin": 0.49,
}


def test_a_sound_evaluation_raises_no_flag():
  made = rows(SOUND) + rows({**SOUND, "pgd20": 0.503}, batch_norm="batch")
  found = evaluation.diagnose(made, "student")
  assert flags(found) == {
    "batch_statistics": False,
    "iterations_beat_one_step": False,
    "steps_converged": False,
    "margin_loss": False,
  }
  for rule in found.values():
    assert set(rule) == {"title", "rule", "value", "flag", "message"}
    assert isinstance(rule["flag"], bool)
  json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
  ("changed", "flag", "value"),
  [
    # An attack with more steps must not leave more.
    ({"fgsm": 0.45}, "iterations_beat_one_step", 0.05),
    ({"fgsm": 0.0}, "iterations_beat_one_step", 0.5),
    # Going from 7 to 20 steps still lowers it.
    ({"pgd7": 0.53}, "steps_converged", 0.03),
    # Cross-entropy overstates.
    ({"pgd20-margin": 0.4}, "margin_loss", 0.1),
  ],
)
def test_each_rule_raises_its_own_flag(changed, flag, value):
  found = evaluation.diagnose(rows({**SOUND, **changed}), "student")
  assert [name for name, on in flags(found).items() if on] == [flag]
  assert found[flag]["value"] == pytest.approx(value)


def test_batch_statistics_that_flatter_are_flagged():
  batch = {**SOUND, "nominal": 0.99, "fgsm": 0.61, "pgd20": 0.56}
  made = rows(SOUND) + rows(batch, batch_norm="batch")
  found = evaluation.diagnose(made, "student")
  assert flags(found)["batch_statistics"]
  # The largest gap under an attack; what they do to clean images is no matter.
  assert found["batch_statistics"]["value"] == pytest.approx(0.06)
  assert "6.0 points more under pgd20" in found["batch_statistics"]["message"]
  only_clean = {**SOUND, "nominal": 0.99}
  made = rows(SOUND) + rows(only_clean, batch_norm="batch")
  assert not flags(evaluation.diagnose(made, "student"))["batch_statistics"]


def test_noise_of_few_examples_raises_no_flag():
  """3 points are noise with 100 images, and a finding with 10,000."""
  for count, expected in ((100, False), (10_000, True)):
    made = rows({**SOUND, "fgsm": 0.47}, count=count)
    found = evaluation.diagnose(made, "student")
    assert flags(found)["iterations_beat_one_step"] is expected


def test_rules_without_their_rows_are_left_out():
  assert evaluation.diagnose([], "student") == {}
  assert evaluation.diagnose(rows(SOUND), "teacher") == {}
  assert evaluation.diagnose(rows({"nominal": 0.9}), "student") == {}
  found = evaluation.diagnose(rows({"fgsm": 0.6, "pgd7": 0.5}), "student")
  assert set(found) == {"iterations_beat_one_step"}
  # Batch statistics alone measure no fixed classifier.
  made = rows({**SOUND, "fgsm": 0.0}, batch_norm="batch")
  assert evaluation.diagnose(made, "student") == {}


def test_models_are_judged_apart():
  made = rows(SOUND) + rows({**SOUND, "fgsm": 0.1}, model="teacher")
  assert not any(flags(evaluation.diagnose(made, "student")).values())
  teacher = flags(evaluation.diagnose(made, "teacher"))
  assert teacher["iterations_beat_one_step"]


def test_rows_of_other_example_counts_are_not_compared():
  """PGD on the first 50 images says nothing about FGSM on all of them."""
  made = rows({"fgsm": 0.6, "pgd7": 0.5, "pgd20": 0.5})
  made += rows({"pgd20": 0.85}, count=50)
  found = evaluation.diagnose(made, "student")
  assert not any(flags(found).values())
  assert found["steps_converged"]["value"] == pytest.approx(0)
