"""A training that overfits catastrophically: what is measured, kept and said."""

import logging

import jax
import minimal
import numpy as np
import pytest
import tiny

from atat_jax import checkpoints, evaluation, models, report, sharding
from atat_jax.config import make_plan

# Accuracies under one step and under the attack: planted at each validation.
PLANTED = {1: (0.5, 0.4), 2: (0.6, 0.5), 3: (0.9, 0.0), 4: (1.0, 0.1)}


@pytest.fixture
def configured(monkeypatch):
  """Makes the configuration of a run of four steps on few images."""
  minimal.register_data_set(monkeypatch)
  minimal.register_network(monkeypatch)

  def make(**fields):
    return tiny.config(
      "at",
      data__name="minimal",
      model__name="minimal",
      objective__attack_method="n_fgsm",
      evaluation__validation_attack="pgd2",
      **fields,
    )

  return make


def validations(workdir):
  lines = tiny.metrics(workdir / "metrics.jsonl")
  return {line["step"]: line for line in lines if line["split"] == "validation"}


def test_validations_measure_fgsm_and_change_no_weight(configured, tmp_path):
  found = {}
  for asked in (False, True):
    workdir = tmp_path / str(asked)
    made = configured(train__overfitting_alarm=asked)
    tiny.run(workdir, "train", made)
    found[asked] = checkpoints.restore_model(workdir, which="last")
  lines = validations(tmp_path / "True")
  assert not any("alarm" in line for line in lines.values())
  single = {step: line.pop("accuracy_fgsm") for step, line in lines.items()}
  assert lines == validations(tmp_path / "False")
  for one, other in zip(
    *(jax.tree.leaves(variables) for _, variables in found.values()),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)
  # The attack of that name, by its own function.
  model, variables = found[True]
  measured = evaluation.accuracy(
    jax.random.key(0),
    models.classifier(model, variables),
    make_plan(made).data.load().validation,
    protocol=evaluation.parse("fgsm", epsilon=0.2, step_size=0.01),
    batch_size=tiny.BATCH_SIZE,
    mesh=sharding.make_mesh(jax.devices()[:1]),
  )
  assert measured == single[max(single)]


def test_a_collapse_is_said_and_the_good_checkpoint_counts(
  configured, tmp_path, monkeypatch, caplog
):
  judge, steps = evaluation.judge, iter(PLANTED)

  def planted(*args, protocol, **kwargs):
    judged = judge(*args, protocol=protocol, **kwargs)
    if protocol.name == "nominal":
      planted.step = next(steps)
      return judged
    share = PLANTED[planted.step][protocol.name == "pgd2"]
    correct = np.arange(len(judged.correct)) < share * len(judged.correct)
    return evaluation.accuracies.Judged(correct, judged.finite)

  caplog.set_level(logging.WARNING)
  with monkeypatch.context() as patch:
    patch.setattr(evaluation, "judge", planted)
    tiny.run(tmp_path, "train", configured())
  lines = validations(tmp_path)
  assert {step: "alarm" in line for step, line in lines.items()} == {
    1: False,
    2: False,
    3: True,
    4: True,
  }
  (message,) = [text for text in caplog.messages if "catastrophic" in text]
  assert message.startswith("at: step 3: ")
  assert "the checkpoint of step 2 counts" in message
  # The last two are kept as well, and neither took its place.
  assert checkpoints.checkpoint_step(tmp_path) == 2
  assert checkpoints.checkpoint_step(tmp_path, which="last") == 4
  made = configured(
    evaluation__attacks="nominal", evaluation__batch_norm=("running",)
  )
  tiny.run(tmp_path, "evaluate", made)
  text = report.write_report(tmp_path).read_text()
  assert "2 of 4 validations of the training showed catastrophic" in text
  assert "the first at step 3:" in text and "This page is of step 2." in text
