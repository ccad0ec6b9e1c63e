"""AutoAttack: its parts, its bookkeeping, its durability, its honesty."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from atat_jax import attacks, models, sharding
from atat_jax.attacks.auto_pgd import APGD
from atat_jax.attacks.autoattack import slots, versions
from atat_jax.attacks.autoattack.progress import Store
from atat_jax.attacks.autoattack.run import autoattack
from atat_jax.attacks.fast_boundary import FAB
from atat_jax.attacks.square_search import Square
from atat_jax.errors import UserError

KEY = jax.random.key(5)
SHAPE = (4, 5, 2)
CLASSES = 6
SHORT = {
  "apgd-ce": {"num_steps": 7},
  "apgd-t": {"num_steps": 6, "num_targets": 3},
  "fab-t": {"num_steps": 6, "num_targets": 2},
  "square": {"num_queries": 30},
}


def _mlp(params, images):
  flat = images.reshape(len(images), -1) - 0.5
  return jnp.tanh(flat @ params["w1"]) @ params["w2"]


def _make(classes=CLASSES, shape=SHAPE, count=30, seed=0):
  """A classifier, images, and labels that it gets right but for a few."""
  generator = np.random.default_rng(seed)
  size = int(np.prod(shape))
  params = {
    "w1": generator.normal(size=(size, 24)) * 2 / np.sqrt(size),
    "w2": generator.normal(size=(24, classes)),
  }
  classifier = Partial(
    _mlp, jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
  )
  images = generator.uniform(size=(count, *shape)).astype(np.float32)
  labels = np.array(classifier(images).argmax(-1), np.int32)
  labels[::10] = (labels[::10] + 1) % classes
  return classifier, images, labels


@pytest.fixture(scope="module")
def problem():
  return _make()


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(jax.devices()[:1])


def _attack(problem, mesh, **changes):
  classifier, images, labels = problem
  arguments = {
    "epsilon": 0.05,
    "options": SHORT,
    "batch_size": 16,
    "mesh": mesh,
    "progress": False,
  }
  return autoattack(
    changes.pop("key", KEY), classifier, images, labels, **arguments | changes
  )


@pytest.fixture(scope="module")
def result(problem, mesh):
  return _attack(problem, mesh)


# --- What it consists of -----------------------------------------------------

# Written out from the specification: name to (algorithm, loss, steps, targets,
# restarts, EOT samples).
_LINF = {
  "standard": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 1, 1),
    "apgd-t": (APGD, "targeted_dlr", 100, 9, 1, 1),
    "fab-t": (FAB, None, 100, 9, 1, None),
    "square": (Square, None, 5000, 1, 1, None),
  },
  "fast": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 1, 1),
    "apgd-t": (APGD, "targeted_dlr", 100, 9, 1, 1),
  },
  "rand": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 1, 20),
    "apgd-dlr": (APGD, "dlr", 100, 1, 1, 20),
  },
  "plus": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 5, 1),
    "apgd-dlr": (APGD, "dlr", 100, 1, 5, 1),
    "fab": (FAB, None, 100, 1, 5, None),
    "square": (Square, None, 5000, 1, 1, None),
    "apgd-t": (APGD, "targeted_dlr", 100, 9, 1, 1),
    "fab-t": (FAB, None, 100, 9, 1, None),
  },
}


def _numbers(job):
  return (
    type(job.search),
    getattr(job.search, "loss", None),
    job.num_steps,
    job.num_targets,
    job.num_restarts,
    getattr(job.search, "eot_samples", None),
  )


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("version", _LINF)
def test_versions_are_those_of_the_specification(version, norm):
  made = versions.make(version, norm=norm, num_classes=10)
  assert made.version == version
  found = {job.name: _numbers(job) for job in made.jobs}
  assert found == _LINF[version] and list(found) == list(_LINF[version])
  assert all(job.search.norm == norm for job in made.jobs)
  for job in made.jobs:
    if job.name in ("fab", "fab-t"):
      assert job.search.targeted == (job.name == "fab-t")


def test_l1_restarts_and_begins_with_a_larger_radius():
  made = {
    job.name: job
    for job in versions.make("standard", norm="l1", num_classes=10).jobs
  }
  assert made["apgd-ce"].num_restarts == 5 and made["apgd-ce"].search.enlarged
  assert made["apgd-t"].num_targets == 5 and made["apgd-t"].search.enlarged
  assert made["apgd-t"].num_restarts == 1
  assert made["fab-t"].num_targets == 9
  assert made["square"].num_steps == 5000


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 1000])
def test_few_and_many_classes(classes):
  made = versions.make("standard", norm="linf", num_classes=classes)
  jobs = {job.name: job for job in made.jobs}
  loss = "targeted_margin" if classes < 4 else "targeted_dlr"
  assert jobs["apgd-t"].search.loss == loss
  for name in ("apgd-t", "fab-t"):
    assert jobs[name].num_targets == min(9, classes - 1)


def test_a_list_and_other_numbers():
  made = versions.make(
    ["square", "apgd-dlr"],
    norm="linf",
    num_classes=10,
    options={"square": {"num_queries": 7}},
  )
  assert [job.name for job in made.jobs] == ["square", "apgd-dlr"]
  assert made.version == "custom" and made.jobs[0].num_steps == 7


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ({"version": "best"}, "version: 'best'; allowed: fast, plus, rand"),
    ({"version": []}, "version: "),
    ({"version": ["square", "square"]}, "at most once"),
    ({"version": ["pgd"]}, "version: 'pgd'; allowed: apgd-ce"),
    ({"options": {"fab": {"num_steps": 3}}}, "options: 'fab'; allowed: "),
    (
      {"options": {"square": {"num_steps": 3}}},
      r"options\['square'\]: 'num_steps'; allowed: num_queries",
    ),
    (
      {"options": {"square": {"num_queries": 0}}},
      r"options\['square'\].num_queries: 0; allowed: an integer > 0",
    ),
  ],
)
def test_unknown_versions_and_numbers(arguments, named):
  with pytest.raises(UserError, match=named):
    versions.make(
      **{"version": "standard", "norm": "linf", "num_classes": 10, **arguments}
    )


# --- What it returns ---------------------------------------------------------


def test_the_result_is_the_pointwise_worst_case(problem, result):
  classifier, images, labels = problem
  clean = np.asarray(classifier(images).argmax(-1)) == labels
  right = np.asarray(classifier(result.adversarial).argmax(-1)) == labels
  np.testing.assert_array_equal(result.robust, right)
  assert result.clean_accuracy == pytest.approx(clean.mean())
  assert 0 < result.accuracy < result.clean_accuracy
  assert not (result.robust & ~clean).any()
  # Who stands, and who was wrong without an attack, has its own image.
  same = (result.adversarial == images).all((1, 2, 3))
  np.testing.assert_array_equal(same, result.robust | ~clean)
  assert np.abs(result.adversarial - images).max() <= 0.05 + 1e-6
  accuracies = list(result.robust_accuracy.values())
  assert accuracies == sorted(accuracies, reverse=True)
  assert accuracies[-1] == result.accuracy
  assert list(result.robust_accuracy) == ["clean", *SHORT]


def test_each_attack_alone_breaks_no_one_else(problem, mesh, result):
  """The ensemble's survivors are those that every attack alone leaves."""
  survivors = np.ones(30, bool)
  for name in SHORT:
    alone = _attack(problem, mesh, version=[name], options={name: SHORT[name]})
    survivors &= alone.robust
  np.testing.assert_array_equal(survivors, result.robust)


@pytest.mark.parametrize("batch_size", [5, 100])
def test_batch_size_makes_no_difference(problem, mesh, result, batch_size):
  other = _attack(problem, mesh, batch_size=batch_size)
  np.testing.assert_array_equal(other.robust, result.robust)
  assert other.robust_accuracy == result.robust_accuracy
  np.testing.assert_allclose(other.adversarial, result.adversarial, atol=1e-4)


def test_eight_devices_equal_one(problem, eight_devices, result):
  other = _attack(problem, sharding.make_mesh(eight_devices))
  np.testing.assert_array_equal(other.robust, result.robust)
  assert other.robust_accuracy == result.robust_accuracy


def test_an_example_does_not_depend_on_the_others(problem, mesh, result):
  classifier, images, labels = problem
  first = _attack((classifier, images[:11], labels[:11]), mesh)
  np.testing.assert_array_equal(first.robust, result.robust[:11])


def test_same_key_same_result(problem, mesh, result):
  again = _attack(problem, mesh)
  np.testing.assert_array_equal(again.adversarial, result.adversarial)
  other = _attack(problem, mesh, key=jax.random.key(6))
  assert not np.array_equal(other.adversarial, result.adversarial)


def test_no_one_right_and_no_one_broken(problem, mesh):
  classifier, images, _ = problem
  wrong = (np.asarray(classifier(images).argmin(-1))).astype(np.int32)
  nothing = _attack((classifier, images, wrong), mesh)
  assert nothing.accuracy == nothing.clean_accuracy == 0
  assert list(nothing.robust_accuracy) == ["clean"]
  np.testing.assert_array_equal(nothing.adversarial, images)
  everything = _attack(problem, mesh, epsilon=1e-6)
  assert everything.accuracy == everything.clean_accuracy > 0
  np.testing.assert_array_equal(everything.adversarial, images)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_stay_in_their_ball(problem, mesh, norm):
  epsilon = {"l2": 0.2, "l1": 0.7}[norm]
  found = _attack(problem, mesh, norm=norm, epsilon=epsilon)
  delta = (found.adversarial - problem[1]).reshape(30, -1).astype(np.float64)
  length = np.linalg.norm(delta, axis=1, ord=int(norm[1]))
  assert length.max() <= epsilon * (1 + 1e-5)
  assert 0 < found.accuracy < found.clean_accuracy
  assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1


@pytest.mark.parametrize(
  ("classes", "shape", "count"),
  [(2, (3, 3, 1), 7), (3, (6, 4, 3), 1), (1000, (4, 4, 3), 9)],
)
def test_any_classes_channels_sizes(classes, shape, count, mesh):
  made = _make(classes, shape, count)
  found = _attack(made, mesh, version="standard")
  assert found.adversarial.shape == (count, *shape)
  assert found.accuracy <= found.clean_accuracy
  few = found.diagnostics["num_classes"]
  assert few["flag"] == (classes < 4)
  if classes < 4:
    assert "apgd-t" in few["message"] and few["message"] in found.summary()


def test_plus_runs_all_six(problem, mesh):
  options = {
    **SHORT,
    "apgd-dlr": {"num_steps": 4},
    "fab": {"num_steps": 3, "num_restarts": 2},
  }
  found = _attack(problem, mesh, version="plus", options=options)
  order = ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
  assert list(found.robust_accuracy) == ["clean", *order]


def test_a_randomised_classifier(mesh):
  classifier, images, labels = _make()

  def noisy(params, key, images):
    noise = 0.05 * jax.random.normal(key, images.shape)
    return _mlp(params, images + noise)

  randomized = attacks.Randomized(Partial(noisy, classifier.args[0]))
  options = {
    "apgd-ce": {"num_steps": 4, "eot_samples": 3},
    "apgd-dlr": {"num_steps": 4, "eot_samples": 3},
  }
  problem = randomized, images, labels
  found = _attack(problem, mesh, version="rand", options=options)
  assert found.accuracy < found.clean_accuracy
  again = _attack(problem, mesh, version="rand", options=options)
  np.testing.assert_array_equal(found.robust, again.robust)
  told = _attack(problem, mesh, version=["apgd-ce"], options={})
  assert told.diagnostics["randomized"]["flag"]
  assert any("rand" in message for message in told.warnings)


def test_summary_states_the_protocol(result):
  text = result.summary()
  for part in (
    "linf",
    "epsilon 0.05",
    "30 examples",
    "seed 0-5",
    "batch_norm as in the classifier",
    "6 steps, 3 targets, 1 restart",
    "30 queries",
    f"{100 * result.accuracy:.2f} %",
  ):
    assert part in text, part
  lines = [line for line in text.splitlines() if line.startswith("|")]
  assert len({line.count("|") for line in lines}) == 1
  assert len(lines) == 2 + 1 + len(SHORT)


# --- Diagnostics -------------------------------------------------------------


def test_a_sound_classifier_raises_no_flag(result):
  assert {k: v["flag"] for k, v in result.diagnostics.items()} == dict.fromkeys(
    (
      "probabilities",
      "num_classes",
      "zero_gradients",
      "randomized",
      "batch_dependence",
      "masking",
      "rescored",
    ),
    False,
  )
  assert result.warnings == []


def test_batch_statistics_are_noticed(small, mesh):
  flags = {}
  for mode in ("running", "batch"):
    classifier = models.classifier(
      small.model, small.variables, batch_norm=mode
    )
    labels = np.asarray(classifier(small.images).argmax(-1))
    found = _attack(
      (classifier, small.images, labels),
      mesh,
      batch_size=8,
      version=["apgd-ce"],
      options={"apgd-ce": {"num_steps": 3}},
    )
    flags[mode] = found.diagnostics["batch_dependence"]["flag"]
    assert found.protocol["batch_norm"] == mode
    assert f"batch_norm {mode}" in found.summary()
  assert flags == {"running": False, "batch": True}


def test_masked_gradients_are_noticed(mesh):
  """Pixels are rounded: no gradient, but Square gets through."""
  classifier, images, labels = _make()

  def rounded(params, images):
    return _mlp(params, jnp.round(images * 20) / 20)

  masked = Partial(rounded, classifier.args[0])
  labels = np.asarray(masked(images).argmax(-1))
  found = _attack((masked, images, labels), mesh, epsilon=0.2)
  assert found.diagnostics["zero_gradients"]["flag"]
  assert found.diagnostics["zero_gradients"]["value"] == 1
  assert found.diagnostics["masking"]["flag"]


def test_probabilities_are_noticed(problem, mesh):
  classifier, images, labels = problem
  softmax = Partial(lambda c, images: jax.nn.softmax(c(images)), classifier)
  found = _attack(
    (softmax, images, labels), mesh, version=["apgd-ce"], options={}
  )
  assert found.diagnostics["probabilities"]["flag"]
  assert "Warning: The outputs are probabilities" in found.summary()


# --- Work --------------------------------------------------------------------


def test_sizes_of_batches(monkeypatch):
  assert slots.sizes(128, 1) == [48, 36, 24, 18, 12, 9, 6]  # of CPU's caches
  assert slots.sizes(1000, 8)[0] == 384
  monkeypatch.setattr(slots, "_costs", lambda: slots._Costs(64, 1))
  assert slots.sizes(128, 1) == [128, 96, 64, 48, 32, 24, 16]
  assert slots.sizes(100, 8) == [104, 80, 56, 40, 32, 24, 16]
  assert slots.sizes(3, 1) == [3, 2, 1]
  assert slots.sizes(4, 8) == [8]


@pytest.mark.parametrize(
  ("pending", "size"),
  [(500, 128), (130, 128), (120, 96), (85, 64), (70, 48), (30, 32), (3, 16)],
)
def test_the_size_that_wastes_least(pending, size, monkeypatch):
  """70 are 48 and 22, which fit into 24; a batch of 96 would idle a quarter."""
  monkeypatch.setattr(slots, "_costs", lambda: slots._Costs(batch=4, program=1))
  assert slots._best_size(slots.sizes(128, 1), pending) == size


def test_nothing_compiles_for_other_numbers_of_examples(
  problem, mesh, compilations, monkeypatch
):
  """One program for each size, however many examples there are."""
  classifier, images, labels = problem
  # Which size hands over to which depends on who falls when.
  monkeypatch.setattr(slots, "_costs", lambda: slots._Costs(4, 10**9))
  short = {"version": ["apgd-ce"], "options": {"apgd-ce": {"num_steps": 3}}}

  def attack(classifier, count, **changes):
    made = classifier, images[-count:], labels[-count:]
    return _attack(made, mesh, batch_size=4, **short | changes)

  for count in (1, 2, 3, 5, 30):  # all sizes: one, two and four rows
    attack(classifier, count)
  other = jax.tree.map(lambda w: 1.01 * w, classifier)
  before = compilations()
  for count in (7, 13, 25, 29):
    attack(other, count, epsilon=0.01 * count, key=jax.random.key(count))
  assert compilations() == before


def test_broken_examples_make_room(problem, mesh):
  """Rows are given to who is next: far fewer steps than a batch at a time."""
  classifier, images, labels = problem
  looked = []

  def counting(params, images):
    jax.debug.callback(lambda: looked.append(len(images)))
    return _mlp(params, images)

  watched = Partial(counting, classifier.args[0])
  options = {"apgd-t": {"num_steps": 40, "num_targets": 5}}
  found = _attack(
    (watched, images, labels),
    mesh,
    epsilon=0.2,
    version=["apgd-t"],
    options=options,
    batch_size=8,
  )
  jax.effects_barrier()
  assert found.accuracy == 0  # so that hardly a run has to be made to its end
  rows = sum(looked)
  assert rows < 0.2 * 27 * 5 * 41, rows


# --- Durability --------------------------------------------------------------


class _KilledError(Exception):
  pass


def _killed_after(monkeypatch, number):
  """Saves after every few steps; the process dies after so many saves."""
  save, saves = Store.save, []

  def dying(self, *args):
    save(self, *args)
    saves.append(args)
    if len(saves) == number:
      raise _KilledError

  monkeypatch.setattr(Store, "save", dying)
  return saves


@pytest.mark.parametrize("number", [1, 3, 4, 6, 9, 12])
def test_a_killed_evaluation_goes_on(
  number, problem, mesh, result, tmp_path, monkeypatch
):
  path = tmp_path / "folder" / "state.npz"
  with monkeypatch.context() as patch:
    saves = _killed_after(patch, number)
    with pytest.raises(_KilledError):
      _attack(problem, mesh, state_path=path, save_every_s=0.0)
  state = saves[-1][0]
  assert path.exists()
  steps = []
  advance = slots._jitted_advance

  def counting(*args, **kwargs):
    steps.append(1)
    return advance(*args, **kwargs)

  monkeypatch.setattr(slots, "_jitted_advance", counting)
  found = _attack(problem, mesh, state_path=path)
  np.testing.assert_array_equal(found.robust, result.robust)
  np.testing.assert_allclose(found.adversarial, result.adversarial, atol=1e-6)
  assert found.robust_accuracy == result.robust_accuracy
  assert set(found.seconds) == set(result.seconds)
  rest = len(steps)
  steps.clear()
  _attack(problem, mesh)
  # One save a turn, and one more at the end of each attack.
  finished = len([n for n in state.accuracies if n != "clean"])
  assert rest == len(steps) - (number - finished)


def test_a_finished_evaluation_does_nothing_again(
  problem, mesh, result, tmp_path, monkeypatch
):
  path = tmp_path / "state.npz"
  _attack(problem, mesh, state_path=path)
  monkeypatch.setattr(slots, "_jitted_advance", None)
  again = _attack(problem, mesh, state_path=path)
  np.testing.assert_array_equal(again.adversarial, result.adversarial)
  assert again.robust_accuracy == result.robust_accuracy


@pytest.mark.parametrize(
  ("what", "message"),
  [
    ("classifier", "belongs to another classifier"),
    ("images", "belongs to other images"),
    ("labels", "belongs to other images"),
    ("epsilon", "belongs to other images, labels, epsilon"),
    ("key", "belongs to other images"),
    ("norm", "belongs to other images"),
    ("options", "belongs to other images"),
  ],
)
def test_a_state_of_something_else_is_refused(
  what, message, problem, mesh, tmp_path
):
  classifier, images, labels = problem
  path = tmp_path / "state.npz"
  short = {"version": ["apgd-ce"], "options": {"apgd-ce": {"num_steps": 2}}}
  _attack(problem, mesh, state_path=path, **short)
  before = path.read_bytes()
  changed = {
    "classifier": (
      (jax.tree.map(lambda w: 1.1 * w, classifier), images, labels),
      {},
    ),
    "images": ((classifier, np.clip(images + 1e-3, 0, 1), labels), {}),
    "labels": ((classifier, images, (labels + 1) % CLASSES), {}),
    "epsilon": (problem, {"epsilon": 0.06}),
    "key": (problem, {"key": jax.random.key(9)}),
    "norm": (problem, {"norm": "l2"}),
    "options": (problem, {"options": {"apgd-ce": {"num_steps": 3}}}),
  }
  other, arguments = changed[what]
  with pytest.raises(UserError, match=message):
    _attack(other, mesh, state_path=path, **short | arguments)
  assert path.read_bytes() == before


def test_a_damaged_state_is_refused(problem, mesh, tmp_path):
  path = tmp_path / "state.npz"
  for content in (b"", b"PK nonsense"):
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a state of autoattack"):
      _attack(problem, mesh, state_path=path)
    assert path.read_bytes() == content
  with pytest.raises(UserError, match="is a folder"):
    _attack(problem, mesh, state_path=tmp_path)


_SCRIPT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
import test_autoattack as t
mesh = t.sharding.make_mesh(jax.devices()[:1])
t._attack(t._make(), mesh, state_path=sys.argv[1], save_every_s=0.0,
          options={"apgd-ce": {"num_steps": 100000}}, version=["apgd-ce"],
          epsilon=1e-4)
"""


def test_a_process_killed_for_good(problem, mesh, tmp_path):
  """SIGKILL in the middle of a run leaves a state that can be gone on with."""
  path = tmp_path / "state.npz"
  process = subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(path)],
    cwd=pathlib.Path(__file__).parent,
    env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)},
  )
  deadline = time.monotonic() + 120
  while not path.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
    assert process.poll() is None
  time.sleep(0.5)
  process.send_signal(signal.SIGKILL)
  process.wait()
  with np.load(path, allow_pickle=False) as file:
    made = file["in_flight/i"]
    assert 0 < made.max() < 100_000
    assert float(file["seconds/apgd-ce"]) > 0
    assert "accuracies/apgd-ce" not in file


# --- Errors ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"epsilon": 0}, "epsilon: 0; allowed"),
    ({"epsilon": 8}, "epsilon: 8; allowed: at most 1"),
    ({"norm": "l0"}, "norm: 'l0'; allowed: l1, l2, linf"),
    ({"version": "Standard"}, "version: 'Standard'; allowed"),
    ({"batch_size": 0}, "batch_size: 0; allowed"),
  ],
)
def test_bad_arguments(changes, named, problem, mesh):
  with pytest.raises(UserError, match=named):
    _attack(problem, mesh, **changes)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda x, y: (x * 255, y), r"images: values in"),
    (lambda x, y: ((x * 255).astype(np.uint8), y), "images: dtype uint8"),
    (lambda x, y: (x[0], y), r"images: shape"),
    (lambda x, y: (x, y[:-1]), r"labels: shape \(29,\)"),
    (lambda x, y: (x, y.astype(np.float32)), "labels: dtype float32"),
    (lambda x, y: (x, y + CLASSES), "labels: values in"),
  ],
)
def test_bad_data(change, named, problem, mesh):
  classifier, images, labels = problem
  with pytest.raises(UserError, match=named):
    _attack((classifier, *change(images, labels)), mesh)
