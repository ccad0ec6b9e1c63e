"""Checkpoints: which are kept, how they come back, and which are left alone."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from atat_jax import checkpoints, models, sharding, state
from atat_jax.errors import UserError
from atat_jax.optim import make_optimizer

pytest_plugins = ("tiny",)

IMAGE_SHAPE = (8, 8, 1)


def make_model(**fields):
  return models.create(
    "wide_resnet", **{"depth": 8, "width": 1, "strides": (1, 1, 2), **fields}
  )


@pytest.fixture(scope="module")
def model():
  return make_model()


@pytest.fixture(scope="module")
def spec(model):
  return checkpoints.model_spec("wide_resnet", model, IMAGE_SHAPE)


@pytest.fixture(scope="module")
def make_state(model, make_variables):
  """Makes a train state from a seed, with no value at its initial one."""

  def make(seed, mesh=None, averages=False):
    images = jnp.zeros((1, *IMAGE_SHAPE))
    made = state.create(
      model,
      make_optimizer(lambda count: 0.1),
      jax.random.key(seed),
      images,
      metric_names=("loss", "accuracy_clean"),
      term_names=("cross_entropy", "gradient"),
      initial=make_variables(model, images, seed),
      averages=averages,
    )
    generator = np.random.default_rng(seed)

    def fill(leaf):
      if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf + seed
      return jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype)

    made = made.replace(
      step=jnp.int32(seed),
      opt_state=jax.tree.map(fill, made.opt_state),
      sums=jax.tree.map(fill, made.sums),
      ema=jax.tree.map(fill, made.ema),
      nonfinite={"cross_entropy": jnp.int32(7), "gradient": jnp.int32(9)},
    )
    return made if mesh is None else sharding.put_replicated(mesh, made)

  return make


def save(workdir, spec, states):
  """Saves (step, state, accuracy) one after the other."""
  with checkpoints.Checkpointer(workdir, spec) as checkpointer:
    for step, saved, accuracy in states:
      checkpointer.save(saved, step, accuracy)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory, spec, make_state):
  """A run with checkpoints at steps 4, the best, and 8; no test changes it."""
  workdir = tmp_path_factory.mktemp("two") / "run"
  save(workdir, spec, [(4, make_state(1), 0.5), (8, make_state(2), 0.4)])
  return workdir


def steps_of(workdir):
  return sorted(
    int(path.name)
    for path in (workdir / "checkpoints").iterdir()
    if path.name.isdigit()
  )


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_best_and_last_two_are_kept(tmp_path, spec, make_state):
  accuracies = [0.2, 0.6, 0.5, 0.4, 0.3]
  states = [
    (5 * i, make_state(i), accuracy)
    for i, accuracy in enumerate(accuracies, start=1)
  ]
  save(tmp_path, spec, states)
  assert steps_of(tmp_path) == [10, 20, 25]
  assert checkpoints.checkpoint_step(tmp_path) == 10
  assert checkpoints.checkpoint_step(tmp_path, which="last") == 25
  for which, seed in (("best", 2), ("last", 5)):
    _, variables = checkpoints.restore_model(tmp_path, which=which)
    assert_equal(variables, state.variables(make_state(seed)))
  with checkpoints.Checkpointer(tmp_path, spec) as checkpointer:
    assert checkpointer.latest_step() == 25  # a resumed run goes on from here


def test_the_best_may_be_the_last_or_the_first(tmp_path, spec, make_state):
  saved = make_state(1)
  rising = [(1, saved, 0.1), (2, saved, 0.2), (3, saved, 0.3)]
  save(tmp_path / "rising", spec, rising)
  # The one before stays, should the last be damaged.
  assert steps_of(tmp_path / "rising") == [2, 3]
  assert checkpoints.checkpoint_step(tmp_path / "rising") == 3
  falling = [(1, saved, 0.3), (2, saved, 0.2), (3, saved, 0.1)]
  save(tmp_path / "falling", spec, falling)
  assert steps_of(tmp_path / "falling") == [1, 2, 3]
  assert checkpoints.checkpoint_step(tmp_path / "falling") == 1


def test_an_unmeasured_checkpoint_is_never_the_best(tmp_path, spec, make_state):
  save(tmp_path, spec, [(5, make_state(1), 0.0), (7, make_state(2), None)])
  assert steps_of(tmp_path) == [5, 7]
  assert checkpoints.checkpoint_step(tmp_path) == 5
  assert checkpoints.checkpoint_step(tmp_path, which="last") == 7
  # It goes as soon as it is none of the last two.
  save(tmp_path, spec, [(10, make_state(3), 0.4), (15, make_state(4), 0.3)])
  assert steps_of(tmp_path) == [10, 15]


def test_before_the_first_validation_the_last_will_do(
  tmp_path, spec, make_state
):
  save(tmp_path, spec, [(3, make_state(1), None)])
  assert checkpoints.checkpoint_step(tmp_path) == 3
  _, variables = checkpoints.restore_model(tmp_path)
  assert_equal(variables, state.variables(make_state(1)))


def test_a_model_comes_back_from_disk_alone(
  tmp_path, make_variables, monkeypatch
):
  """The checkpoint knows the network; no configuration is needed."""
  model = make_model(
    depth=10,
    num_classes=3,
    activation="silu",
    shortcut="conv",
    normalization="dataset",
    mean=(0.25, 0.5),
    std=(0.5, 0.125),
    padding="symmetric",
    batch_norm_epsilon=1e-5,
    dtype="bfloat16",
  )
  shape = (8, 8, 2)
  variables = make_variables(model, jnp.zeros((1, *shape)))
  made = state.create(
    model,
    make_optimizer(lambda count: 0.1),
    jax.random.key(0),
    jnp.zeros((1, *shape)),
    metric_names=("loss",),
    term_names=("gradient",),
    initial=variables,
  )
  spec = checkpoints.model_spec("wide_resnet", model, shape)
  save(tmp_path / "run", spec, [(1, made, 0.5)])
  monkeypatch.chdir(tmp_path)  # relative paths too
  found, restored = checkpoints.restore_model("run")
  assert found == model
  assert_equal(restored, variables)


def test_a_state_comes_back_whole(tmp_path, spec, make_state):
  saved = make_state(4)
  save(tmp_path, spec, [(4, saved, 0.5)])
  with checkpoints.Checkpointer(tmp_path, spec) as checkpointer:
    assert_equal(checkpointer.restore(make_state(1), 4), saved)


def test_averaged_weights_are_restored_for_evaluation(
  tmp_path, spec, make_state
):
  """They lie beside the trained weights, from which training resumes."""
  saved = make_state(4, averages=True)
  save(tmp_path, spec, [(4, saved, 0.5)])
  with checkpoints.Checkpointer(tmp_path, spec) as checkpointer:
    assert_equal(checkpointer.restore(make_state(1, averages=True), 4), saved)
  _, variables = checkpoints.restore_model(tmp_path)
  assert_equal(variables, saved.ema)
  assert_equal(variables, state.evaluated(saved))
  _, variables = checkpoints.restore_model(tmp_path, averaged=False)
  assert_equal(variables, state.variables(saved))


@pytest.mark.parametrize("averages", [False, True])
def test_an_average_is_neither_invented_nor_dropped(
  tmp_path, spec, make_state, averages
):
  saved = make_state(4, averages=averages)
  save(tmp_path, spec, [(4, saved, 0.5)])
  wanted = make_state(1, averages=not averages)
  with checkpoints.Checkpointer(tmp_path, spec) as checkpointer:
    with pytest.raises(UserError, match="ema_decay, swa_start") as error:
      checkpointer.restore(wanted, 4)
  message = str(error.value)
  assert len(message.splitlines()) == 1 and str(tmp_path) in message
  assert ("has no such" in message) == (not averages)


def test_items_can_be_read_one_by_one(tmp_path, spec, make_state):
  """Weights can be read with Orbax alone, without the optimizer's state."""
  saved = make_state(4)
  save(tmp_path, spec, [(4, saved, 0.5)])
  folder = tmp_path.absolute() / "checkpoints" / "4"
  assert {"params", "batch_stats", "opt_state", "run", "model"} <= {
    path.name for path in folder.iterdir()
  }
  with ocp.StandardCheckpointer() as reader:
    assert_equal(reader.restore(folder / "params"), saved.params)
    assert_equal(reader.restore(folder / "batch_stats"), saved.batch_stats)
  shutil.rmtree(folder / "opt_state")
  _, variables = checkpoints.restore_model(tmp_path)
  assert_equal(variables, state.variables(saved))


@pytest.mark.parametrize(("saver", "reader"), [(8, 1), (1, 8)])
def test_a_checkpoint_opens_on_other_devices(
  tmp_path, spec, make_state, eight_devices, saver, reader
):
  meshes = {n: sharding.make_mesh(eight_devices[:n]) for n in (saver, reader)}
  saved = make_state(4, meshes[saver])
  save(tmp_path, spec, [(4, saved, 0.5)])
  target = make_state(1, meshes[reader])
  with checkpoints.Checkpointer(tmp_path, spec) as checkpointer:
    found = checkpointer.restore(target, 4)
  assert_equal(found, saved)
  for leaf, wanted in zip(
    jax.tree.leaves(found), jax.tree.leaves(target), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
  _, variables = checkpoints.restore_model(tmp_path)
  assert_equal(variables, state.variables(saved))
  devices = {d for x in jax.tree.leaves(variables) for d in x.devices()}
  assert len(devices) == 1


def test_a_missing_checkpoint_is_refused_with_those_that_exist(
  tmp_path, two_saved, make_state
):
  with pytest.raises(UserError, match="nothing has no checkpoints"):
    checkpoints.restore_model(tmp_path / "nothing")
  assert not (tmp_path / "nothing").exists()
  (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UserError, match="no complete checkpoint"):
    checkpoints.restore_model(tmp_path / "empty")
  assert list((tmp_path / "empty" / "checkpoints").iterdir()) == []
  with pytest.raises(UserError, match="step: 6; allowed: 4, 8"):
    checkpoints.restore_model(two_saved, step=6)
  with pytest.raises(UserError, match="which: 'newest'; allowed: best, last"):
    checkpoints.restore_model(two_saved, which="newest")
  _, variables = checkpoints.restore_model(two_saved, step=8)
  assert_equal(variables, state.variables(make_state(2)))


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"width": 2}, r"model\.width: 2, .* has 1;"),
    ({"strides": (1, 2, 2)}, r"model\.strides: \(1, 2, 2\), .*\(1, 1, 2\)"),
    ({"num_classes": 7}, r"model\.num_classes: 7, .* has 10;"),
    # The same shapes, and yet another function.
    ({"activation": "relu"}, r"model\.activation: 'relu', .* 'leaky_relu'"),
  ],
)
def test_another_network_is_refused_and_nothing_deleted(
  two_saved, make_state, fields, named
):
  before = tiny.snapshot(two_saved)
  other = checkpoints.model_spec(
    "wide_resnet", make_model(**fields), IMAGE_SHAPE
  )
  with checkpoints.Checkpointer(two_saved, other) as checkpointer:
    with pytest.raises(UserError, match=named) as error:
      checkpointer.restore(make_state(1), 8)
    assert len(str(error.value).splitlines()) == 1
    assert str(two_saved / "checkpoints") in str(error.value)
  assert tiny.snapshot(two_saved) == before


def test_another_kind_of_network_is_refused(tmp_path, spec, make_state):
  saved = make_state(1)
  save(tmp_path, {**spec, "name": "mlp"}, [(4, saved, 0.5)])
  with checkpoints.Checkpointer(tmp_path, spec) as checkpointer:
    with pytest.raises(UserError, match=r"model: 'wide_resnet', .*'mlp'"):
      checkpointer.restore(saved, 4)
  with pytest.raises(UserError, match="model: 'mlp'"):
    checkpoints.restore_model(tmp_path)


@pytest.mark.parametrize(
  ("mode", "method"),
  [
    pytest.param(
      "evaluate",
      "atat",
    ),
    ("train", "standard"),
  ],
)
def test_a_workdir_without_its_configuration_is_refused_too(
  finished, tmp_path, mode, method
):
  """Without `config.json` the checkpoint itself tells the network."""
  workdir = finished.copy(tmp_path / "run")
  (workdir / "config.json").unlink()
  before = tiny.snapshot(workdir / "checkpoints")
  made = tiny.config(method, model__activation="relu", train__num_epochs=3)
  with pytest.raises(UserError, match=r"model\.activation") as error:
    tiny.run(workdir, mode, made)
  assert len(str(error.value).splitlines()) == 1
  assert tiny.snapshot(workdir / "checkpoints") == before


def half_written(workdir, step):
  """Makes the folder that an unfinished or killed save leaves."""
  folder = workdir / "checkpoints" / f"{step}.orbax-checkpoint-tmp-17"
  (folder / "params").mkdir(parents=True)
  (folder / "params" / "shard").write_bytes(b"half")
  return folder


def test_reading_leaves_a_running_training_alone(tmp_path, two_saved):
  workdir = pathlib.Path(shutil.copytree(two_saved, tmp_path / "run"))
  half = half_written(workdir, 12)
  before = tiny.snapshot(workdir)
  for which in ("best", "last"):
    checkpoints.restore_model(workdir, which=which)
  assert tiny.snapshot(workdir) == before
  assert half.exists()
  assert checkpoints.checkpoint_step(workdir, which="last") == 8


def test_the_remains_of_a_killed_save_are_removed(tmp_path, spec, make_state):
  save(tmp_path, spec, [(4, make_state(1), 0.5)])
  half = half_written(tmp_path, 8)
  save(tmp_path, spec, [(8, make_state(2), 0.6)])
  assert checkpoints.checkpoint_step(tmp_path, which="last") == 8
  assert not half.exists()


def test_metrics_are_stored_with_the_checkpoint(finished):
  (line,) = (
    line
    for line in tiny.metrics(finished.workdir / "metrics.jsonl")
    if line["split"] == "validation"
    and line["step"] == checkpoints.checkpoint_step(finished.workdir)
  )
  step = str(line["step"])
  path = finished.workdir / "checkpoints" / step / "metrics" / "metrics"
  stored = json.loads(path.read_text())
  # Chosen by the robust accuracy, not by the clean one.
  assert stored[checkpoints.METRIC] == line["accuracy_adversarial"]
  assert stored["accuracy_clean"] == line["accuracy_clean"]


def test_the_best_is_the_most_robust_of_all_validations(finished):
  for directory, name in (
    (finished.workdir, "accuracy_adversarial"),
    (finished.workdir / "teacher", "accuracy_clean"),
  ):
    scores = {
      line["step"]: line[name]
      for line in tiny.metrics(directory / "metrics.jsonl")
      if line["split"] == "validation"
    }
    best = checkpoints.checkpoint_step(directory)
    assert scores[best] == max(scores.values())
    assert checkpoints.checkpoint_step(directory, which="last") == max(scores)


def test_a_network_without_batch_norm_is_saved_too(tmp_path):
  fields = dict(stage_sizes=(1,), stage_channels=(2,), hidden=3, num_classes=2)
  model = models.create("vgg16", **fields)
  saved = state.create(
    model,
    make_optimizer(lambda count: 0.1),
    jax.random.key(0),
    jnp.zeros((1, 4, 4, 3)),
    metric_names=("loss",),
    term_names=("gradient",),
  )
  spec = checkpoints.model_spec("vgg16", model, (4, 4, 3))
  save(tmp_path, spec, [(1, saved, 0.5)])
  with checkpoints.Checkpointer(tmp_path, spec) as checkpointer:
    restored = checkpointer.restore(saved, 1)
  assert_equal(restored.params, saved.params)
  assert restored.batch_stats == {}
  again, variables = checkpoints.restore_model(tmp_path)
  assert checkpoints.model_spec("vgg16", again, (4, 4, 3)) == spec
  assert set(variables) == {"params"}
  assert_equal(variables["params"], saved.params)
