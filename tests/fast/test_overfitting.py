"""Catastrophic overfitting: when the alarm is raised, where, and how often."""

import json
import logging
import types

import pytest

from atat_jax.runs import overfitting
from atat_jax.training import outline, writer


def line(step, single_step, robust):
  return {
    "split": "validation",
    "step": step,
    "accuracy_fgsm": single_step,
    "accuracy_adversarial": robust,
  }


# Accuracies under a single step and under the attack, of each validation; and
# those, from 0, that show a collapse, each with the one it is compared with.
HISTORIES = {
  "a good training": ([(0.3, 0.2), (0.4, 0.3), (0.5, 0.45)], {}),
  "a collapse": ([(0.4, 0.3), (0.5, 0.45), (0.9, 0.0)], {2: 1}),
  "one that stays": ([(0.5, 0.45), (0.8, 0.1), (0.9, 0.0)], {1: 0, 2: 0}),
  "one that ends": ([(0.5, 0.45), (0.8, 0.1), (0.55, 0.46)], {1: 0}),
  "the later of equals": ([(0.5, 0.4), (0.45, 0.4), (0.45, 0.0)], {2: 1}),
  "a fall of both": ([(0.5, 0.45), (0.3, 0.0), (0.49, 0.0)], {}),
  "a fall of less": ([(0.5, 0.45), (0.6, 0.26)], {}),
  "the fall of Wong et al.": ([(0.5, 0.45), (0.5, 0.25)], {1: 0}),
  "half of a small one": ([(0.3, 0.25), (0.3, 0.12)], {1: 0}),
  "chance at the start": ([(0.1, 0.08), (0.2, 0.0)], {}),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_collapse_is_a_fall_of_the_robust_accuracy_alone(name):
  history, expected = HISTORIES[name]
  lines = [line(10 * i, *pair) for i, pair in enumerate(history)]
  found = overfitting.find(lines)
  assert {one.step: one.best for one in found} == {
    10 * step: 10 * best for step, best in expected.items()
  }
  for one in found:
    before, after = history[one.best // 10], history[one.step // 10]
    assert one.single_step == (before[0], after[0])
    assert one.robust == (before[1], after[1])


@pytest.mark.parametrize(
  "value", [None, "0.9", True, float("nan"), float("inf"), -1, [0.9]]
)
def test_lines_without_both_accuracies_are_passed_over(value):
  good, bad = line(1, 0.5, 0.45), line(3, 0.9, 0.0)
  without = {"step": 2, "accuracy_fgsm": value, "accuracy_adversarial": 0.0}
  assert [one.step for one in overfitting.find([good, without, bad])] == [3]
  assert overfitting.find([good, bad | {"accuracy_adversarial": value}]) == []


def journal(directory, saved, best):
  """A journal whose checkpointer notes what would choose the best."""

  def save(state, step, accuracy, details):
    best[step] = accuracy

  return writer.Journal(
    outline.Outline(
      name="at",
      directory=directory,
      batch_size=8,
      attack="pgd10",
      profile_steps=(),
      total=100,
      per_epoch=10,
      per_dispatch=1,
      log_every=10,
      validate_every=10,
    ),
    types.SimpleNamespace(save=save),
    saved,
    types.SimpleNamespace(),
  )


def validate(opened, step, single_step, robust):
  scores = {
    "accuracy_clean": 0.95,
    "accuracy_fgsm": single_step,
    "accuracy_adversarial": robust,
  }
  opened.save(None, step, scores, {})


def test_an_alarm_is_logged_once_and_outlives_a_stop(tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  best = {}
  with journal(tmp_path, None, best) as opened:
    validate(opened, 10, 0.5, 0.45)
    assert not caplog.messages
    validate(opened, 20, 0.9, 0.01)
    (message,) = caplog.messages
    validate(opened, 30, 0.8, 0.02)
  # A later start knows what was validated before, and forgets what it repeats.
  with journal(tmp_path, 20, best) as opened:
    validate(opened, 30, 0.9, 0.0)
    validate(opened, 40, 0.55, 0.5)
    assert caplog.messages == [message]
    validate(opened, 50, 0.9, 0.1)
  assert len(caplog.messages) == 2
  assert "at: step 50" in caplog.messages[1]
  assert "the checkpoint of step 40 counts" in caplog.messages[1]
  for part in ("step 20", "45.0% to 1.0%", "50.0% to 90.0%", "step 10 counts"):
    assert part in message
  lines = [
    json.loads(text)
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  assert {one["step"]: "alarm" in one for one in lines} == {
    10: False,
    20: True,
    30: True,
    40: False,
    50: True,
  }
  assert lines[1]["alarm"] in message
  # What chooses the checkpoint is the accuracy under the attack.
  assert max(best, key=best.get) == 40
