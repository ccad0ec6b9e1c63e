"""A step whose numbers are not finite: stopped, skipped or left out, replayed.

The fault is planted in the data: a white image makes the step whose batch has
it, and no other, not finite at one place.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import tiny

from atat_jax import objectives, optim, pipeline, plan, sharding, state, steps
from atat_jax.data import batches
from atat_jax.data.base import Split
from atat_jax.errors import TrainingDivergedError, UserError
from atat_jax.training import soundness
from atat_jax.training.options import Options

CLASSES = 3
BAD = 5  # the white image


class Poisoned(objectives.OBJECTIVES["standard"]):
  """Standard training in which a white image is not finite at one place."""

  place = "cross_entropy"

  def loss(self, model, variables, prepared, batch):
    found = super().loss(model, variables, prepared, batch)
    white = (batch.images.min((1, 2, 3)) == 1).any()
    if self.place == "cross_entropy":
      wrong = found.total * jnp.where(white, jnp.nan, 1.0)
      return found._replace(terms={"cross_entropy": wrong}, total=wrong)
    if self.place == "gradient":  # of a root at 0; its value is finite
      root = jnp.sqrt(jnp.where(white, 0 * found.total, 1.0))
      return found._replace(total=found.total + root)
    factor = jnp.where(white, jnp.inf, 1.0)
    stats = jax.tree.map(lambda x: x * factor, found.batch_stats)
    return found._replace(batch_stats=stats)


class PoisonedGradient(Poisoned):
  place = "gradient"


class PoisonedStatistics(Poisoned):
  place = "statistics"


class PoisonedAttack(objectives.OBJECTIVES["at"]):
  """The gradient of the attack, and nothing else, is not finite."""

  num_steps = 1
  step_size = 1e-3  # a white image stays nearly white

  def _attacked_pass(self, model, params, stats, images):
    logits, stats = super()._attacked_pass(model, params, stats, images)
    white = images.min((1, 2, 3)) > 0.9
    root = jnp.sqrt(jnp.where(white, 0 * images.sum((1, 2, 3)), 1.0))
    return logits + root[:, None], stats


PLACES = {
  "inner attack": PoisonedAttack,
  "cross_entropy": Poisoned,
  "gradient": PoisonedGradient,
  "statistics": PoisonedStatistics,
  "updated parameters": objectives.OBJECTIVES["standard"],
}


@pytest.fixture(scope="module")
def data(small):
  generator = np.random.default_rng(0)
  shape = (24, *small.images.shape[1:])
  images = generator.integers(0, 255, shape, dtype=np.uint8)
  images[BAD] = 255
  labels = generator.integers(0, CLASSES, 24).astype(np.int32)
  return Split(images, labels)


def made(small, place, **options):
  """A step in which the second update is of infinite rate, if asked for."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  objective = PLACES[place]()
  infinite = place == "updated parameters"

  def rate(step):
    return jnp.where(infinite & (step == 1), jnp.inf, 0.1)

  optimizer = optim.make_optimizer(rate)
  chosen = Options(**options)
  fresh = state.create(
    small.model,
    optimizer,
    jax.random.key(4),
    small.images[:1],
    metric_names=steps.metric_names(objective),
    term_names=steps.term_names(objective),
    initial=small.variables,
    averages=chosen.averages,
    guarded=chosen.guards,
  )
  step = steps.make_train_step(
    small.model,
    objective,
    optimizer,
    mesh=mesh,
    num_classes=CLASSES,
    options=chosen,
  )
  return step, sharding.put_replicated(mesh, fresh)


def indices(number):
  """The white image is in the second batch only."""
  return np.arange(8) + (0, 0, 8, 16)[number] + (number == 0) * 8


def assert_same(actual, expected):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(expected),
    strict=True,
  ):
    where = jax.tree_util.keystr(path)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), where)


CHANGED = ("params", "batch_stats", "opt_state", "ema", "sums")


def parts(current):
  return jax.device_get({name: getattr(current, name) for name in CHANGED})


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_step_is_noted_or_leaves_everything_as_it_was(place, small, data):
  options = {"ema_decay": 0.9, "accumulate_steps": 2, "awp_gamma": 0.01}
  if place != "cross_entropy":
    options = {"ema_decay": 0.9}
  # A rate is that of the number of updates, which a skipped step is not.
  skipped = [1, 2, 3] if place == "updated parameters" else [1]
  step, current = made(small, place, skips_nonfinite=True, **options)
  for number in range(4):
    before = parts(current)
    current = step(current, None, data, indices(number))
    assert int(current.step) == number + 1
    if number in skipped:
      assert_same(parts(current), before)
    else:
      assert not np.array_equal(
        jax.tree.leaves(before["params"])[0],
        jax.tree.leaves(parts(current)["params"])[0],
      )
  found, count = soundness.skipped(current)
  assert [number for number, _ in found] == skipped and count == len(skipped)
  assert all(place in names for _, names in found)
  assert all(
    np.isfinite(leaf).all() for leaf in jax.tree.leaves(parts(current))
  )
  assert soundness.first_wrong(current) is None
  assert soundness.skipped(soundness.forget(current)) == ([], 0)

  step, current = made(small, place, **options)
  for number in range(3):
    current = step(current, None, data, indices(number))
  first, names = soundness.first_wrong(current)
  assert first == 1 and names[0] == place


@pytest.mark.usefixtures("quick_compilation")
def test_a_step_that_the_host_leaves_out_changes_nothing(small, data):
  step, current = made(small, "cross_entropy", leaves_steps_out=True)
  current = current.replace(guard=soundness.fresh_guard([1]))
  for number in range(3):
    before = parts(current)
    current = step(current, None, data, indices(number))
    if number == 1:
      assert_same(parts(current), before)
  assert soundness.first_wrong(current) is None


# Whole runs.


@pytest.fixture
def poisoned_run(monkeypatch):
  """A tiny training whose white image is in one batch of each epoch."""
  monkeypatch.setitem(objectives.OBJECTIVES, "poisoned", Poisoned)
  load = plan.DataPlan.load

  def with_white(self):
    found = load(self)
    images = np.array(found.train.images)
    images[BAD] = 255
    train = found.train._replace(images=images)
    return dataclasses.replace(found, train=train)

  monkeypatch.setattr(plan.DataPlan, "load", with_white)
  return lambda **fields: tiny.config(
    "poisoned",
    train__num_epochs=2,
    train__schedule="constant",
    train__learning_rate=0.05,
    **fields,
  )


def bad_steps(made_config, count):
  """Steps, from 1, whose batches have the white image."""
  size = made_config.train.batch_size
  return [
    step + 1
    for step in range(count)
    if BAD
    in batches.train_indices(
      made_config.seed, step, num_examples=1309, batch_size=size
    )
  ]


def records(workdir):
  path = workdir / "nonfinite.jsonl"
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
  "policy", [pytest.param("skip", marks=pytest.mark.slow), "rollback"]
)
def test_a_run_goes_on_without_its_bad_steps(policy, poisoned_run, tmp_path):
  chosen = poisoned_run(train__nonfinite=policy)
  wrong = bad_steps(chosen, 20)
  assert len(wrong) == 2
  tiny.run(tmp_path, "train", chosen)
  lines = records(tmp_path)
  action = {"skip": "skipped", "rollback": "rolled back"}[policy]
  assert [(x["step"], x["action"]) for x in lines] == [
    (step, action) for step in wrong
  ]
  for line in lines:
    assert BAD in line["batch"]["indices"]
    assert line["terms"][0] == "cross_entropy"
  found = tiny.metrics(tmp_path / "metrics.jsonl")
  trained = [line for line in found if line["split"] == "train"]
  assert [line["step"] for line in trained] == [4, 8, 12, 16, 20]
  assert sum(line["steps_left_out"] for line in trained) == 2
  assert all(np.isfinite(line["loss"]) for line in trained)


def test_a_stopped_run_names_step_term_and_batch_and_is_replayed(
  poisoned_run, tmp_path, capsys
):
  chosen = poisoned_run(train__log_every_steps=1)
  step = bad_steps(chosen, 10)[0]
  with pytest.raises(TrainingDivergedError) as error:
    tiny.run(tmp_path, "train", chosen)
  message = str(error.value)
  assert f"not finite at step {step}: cross_entropy, gradient;" in message
  assert str(tmp_path / "nonfinite.jsonl") in message
  assert len(message.splitlines()) == 1
  (line,) = records(tmp_path)
  assert BAD in line["batch"]["indices"]

  with tiny.devices(1), tiny.quick_programs():
    pipeline.run("replay", chosen, tmp_path, step=step)
  assert "first not finite: term cross_entropy" in capsys.readouterr().out
  text = (tmp_path / f"replay-{step}.json").read_text()
  found = json.loads(text, parse_constant=pytest.fail)
  assert found["batch"] == line["batch"]
  assert found["terms"]["cross_entropy"] == "nan"
  assert found["examples"] == list(range(128))
  assert len(found["losses"]["cross_entropy"]) == 128
  paths = [leaf["path"] for leaf in found["nonfinite"]["gradient"]]
  assert "['head']['kernel']" in paths
  # A step that was logged is the same to the last bit.
  good = step - 1
  with tiny.devices(1), tiny.quick_programs():
    pipeline.run("replay", chosen, tmp_path, step=good)
  again = json.loads((tmp_path / f"replay-{good}.json").read_text())
  logged = next(
    line
    for line in tiny.metrics(tmp_path / "metrics.jsonl")
    if (line["split"], line["step"]) == ("train", good)
  )
  assert again["metrics"]["loss"] == logged["loss"]
  assert again["first_nonfinite"] is None


def test_absurd_weights_are_never_saved_as_good(tmp_path):
  fields = {
    "train__schedule": "constant",
    "train__learning_rate": 1e30,
    "train__validate_every_epochs": 0.1,
    "train__num_epochs": 1,
  }
  with pytest.raises(TrainingDivergedError, match="validation logits of 128"):
    tiny.run(tmp_path, "train", tiny.config("standard", **fields))
  assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
  # What the message advises to change can be changed.
  assert not (tmp_path / "config.json").exists()
  fields["train__learning_rate"] = 0.1
  tiny.run(tmp_path, "train", tiny.config("standard", **fields))
  assert (tmp_path / "config.json").exists()
  fields["train__learning_rate"] = 0.2
  with pytest.raises(UserError, match=r"config\.train\.learning_rate: 0\.2"):
    tiny.run(tmp_path, "train", tiny.config("standard", **fields))


@pytest.mark.parametrize("step", [None, 0, 99])
def test_a_replay_needs_a_step_of_the_training(step, tmp_path):
  with pytest.raises(UserError, match=r"^step: "):
    pipeline.run("replay", tiny.config("standard"), tmp_path, step=step)


# What a network that is not finite does to each method's terms.


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_a_network_that_is_not_finite_is_seen_in_the_terms(name, value, small):
  """The attack, which counts such gradients as 0, must not hide it."""
  few = {"num_steps": 2} if name != "standard" else {}
  objective = objectives.create(name, **few)
  head = small.variables["params"]["head"]
  bias = head["bias"].at[1].set(value)
  params = {**small.variables["params"], "head": {**head, "bias": bias}}
  broken = {**small.variables, "params": params}
  batch = objectives.make_batch(
    small.images, jnp.arange(len(small.images)) % CLASSES, CLASSES
  )

  def terms(variables):
    prepared = objective.prepare(
      jax.random.key(0), small.model, variables, small.variables, batch
    )
    return objective.loss(small.model, variables, prepared, batch).terms

  found = quick.jit(terms)(broken)
  assert not all(np.isfinite(term).all() for term in found.values())
  found = quick.jit(terms)(small.variables)
  assert all(np.isfinite(term).all() for term in found.values())
