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
from flax import linen as nn
from jax.tree_util import Partial

from atat_jax import attacks, evaluation, models, sharding
from atat_jax.attacks.autoattack import screening, slots, versions
from atat_jax.attacks.autoattack.progress import Store
from atat_jax.attacks.autoattack.run import autoattack
from atat_jax.errors import UserError
from atat_jax.runs import files

pytestmark = pytest.mark.usefixtures("quick_compilation")

BEST_SIZE = slots._best_size
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


@pytest.fixture(scope="module", autouse=True)
def one_size():
  """Batches of one size, to compile one program an attack."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(slots, "_best_size", lambda allowed, *_: allowed[0])
    yield


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


# --- What it returns ---------------------------------------------------------


def test_adding_a_version_is_one_line(problem, mesh, monkeypatch):
  alone = versions.Version(("apgd-ce",))
  monkeypatch.setitem(versions.VERSIONS, "alone", alone)
  found = _attack(
    problem,
    mesh,
    version="alone",
    options={"apgd-ce": {"num_steps": 7}},
  )
  assert list(found.robust_accuracy) == ["clean", "apgd-ce"]
  protocol = evaluation.parse("autoattack-alone", epsilon=0.1, step_size=0.1)
  assert protocol.arguments()["version"] == "alone"


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


def test_batch_size_makes_no_difference(problem, mesh, result):
  other = _attack(problem, mesh, batch_size=5)
  np.testing.assert_array_equal(other.robust, result.robust)
  assert other.robust_accuracy == result.robust_accuracy
  np.testing.assert_allclose(other.adversarial, result.adversarial, atol=1e-4)


def test_smaller_batches_take_over_and_make_no_difference(
  problem, mesh, result, monkeypatch
):
  monkeypatch.setattr(slots, "_costs", lambda: slots._Costs(4, 1))
  sizes, take = [], slots._jitted_take

  def spy(tree, rows):
    sizes.append(len(rows))
    return take(tree, rows)

  monkeypatch.setattr(slots, "_jitted_take", spy)
  options = {"apgd-ce": SHORT["apgd-ce"]}
  other = _attack(
    problem, mesh, batch_size=6, version=["apgd-ce"], options=options
  )
  assert sizes and sizes == sorted(sizes, reverse=True) and sizes[0] < 6
  assert other.accuracy == result.robust_accuracy["apgd-ce"]
  fooled = (other.adversarial != problem[1]).any((1, 2, 3))
  assert fooled.any()
  np.testing.assert_allclose(
    other.adversarial[fooled], result.adversarial[fooled], atol=1e-4
  )


def test_eight_devices_equal_one(problem, eight_devices, result):
  other = _attack(problem, sharding.make_mesh(eight_devices))
  np.testing.assert_array_equal(other.robust, result.robust)
  assert other.robust_accuracy == result.robust_accuracy


def test_an_example_does_not_depend_on_the_others(problem, mesh, result):
  classifier, images, labels = problem
  first = _attack((classifier, images[:16], labels[:16]), mesh)
  np.testing.assert_array_equal(first.robust, result.robust[:16])


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
  names = list(SHORT) if classes == 2 else ["apgd-t", "fab-t"]
  found = _attack(
    made, mesh, version=names, options={name: SHORT[name] for name in names}
  )
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
    "6 steps, 1 restart, targeted_dlr loss, 3 targets",
    "30 queries, 1 restart",
    f"{100 * result.accuracy:.2f}%",
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
      "blind_cross_entropy",
      "blind_targeted_dlr",
      "randomized",
      "batch_dependence",
      "nonfinite",
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
  names = ("apgd-ce", "square")
  found = _attack(
    (masked, images, labels),
    mesh,
    epsilon=0.2,
    version=names,
    options={name: SHORT[name] for name in names},
  )
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


def test_nothing_compiles_for_other_numbers_of_examples(
  problem, mesh, compilations, monkeypatch
):
  """One program for each size, however many examples there are."""
  classifier, images, labels = problem
  # Which size hands over to which depends on when examples are fooled.
  monkeypatch.setattr(slots, "_costs", lambda: slots._Costs(4, 10**9))
  monkeypatch.setattr(slots, "_best_size", BEST_SIZE)
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


@pytest.mark.parametrize("number", [1, 4, 9, 12])
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


def _num_steps(path):
  """Steps that a stored state has made; 0: there is none."""
  if not path.exists():
    return 0
  with np.load(path, allow_pickle=False) as file:
    return file["in_flight/i"].max() if "in_flight/i" in file else 0


def test_a_process_killed_for_good(problem, mesh, tmp_path):
  """SIGKILL in the middle of a run leaves a state that can be gone on with."""
  path = tmp_path / "state.npz"
  process = subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(path)],
    cwd=pathlib.Path(__file__).parent,
    env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)},
  )
  deadline = time.monotonic() + 600
  while not _num_steps(path):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  with np.load(path, allow_pickle=False) as file:
    made = file["in_flight/i"]
    assert 0 < made.max() < 100_000
    assert float(file["seconds/apgd-ce"]) > 0
    assert "accuracies/apgd-ce" not in file


# --- Screening ---------------------------------------------------------------


def _another(problem, size):
  """The network with other weights of the same kind."""
  generator = np.random.default_rng(11)
  return jax.tree.map(
    lambda w: w + size * w.std() * generator.normal(size=w.shape), problem[0]
  )


@pytest.fixture(scope="module")
def screened(problem, mesh, tmp_path_factory):
  """A result with another network attacked first, and its state."""
  path = tmp_path_factory.mktemp("screened") / "state.npz"
  screen = _another(problem, 0.03)
  found = _attack(problem, mesh, screening=screen, state_path=path)
  return found, files.load_arrays(path)


def test_screening_by_the_network_itself_changes_nothing(problem, mesh, result):
  found = _attack(problem, mesh, screening=problem[0])
  np.testing.assert_array_equal(found.robust, result.robust)
  np.testing.assert_allclose(found.adversarial, result.adversarial, atol=1e-6)
  assert found.robust_accuracy == {
    name if name == "clean" else f"{name}-screening": value
    for name, value in result.robust_accuracy.items()
  }
  assert found.diagnostics["screening"]["value"] == 0
  masking = found.diagnostics["masking"]
  assert masking == result.diagnostics["masking"]


def test_only_what_fools_the_network_itself_counts(problem, screened, result):
  classifier, _, labels = problem
  found, state = screened
  right = np.asarray(classifier(found.adversarial).argmax(-1)) == labels
  np.testing.assert_array_equal(found.robust, right)
  assert np.abs(found.adversarial - problem[1]).max() <= 0.05 + 1e-6
  assert not found.diagnostics["rescored"]["flag"]
  near = state["near"]
  assert 0 < near.sum() < len(near) / 2
  # There the network itself was attacked, as if there had been no screening.
  np.testing.assert_array_equal(found.robust[near], result.robust[near])
  assert not (found.robust & ~result.robust).any()
  assert "screening: another classifier" in found.summary()
  assert (
    "on the screening network" in found.protocol["attacks"]["square-screening"]
  )


def test_a_network_that_sees_nothing_screens_nothing(problem, mesh, result):
  """All images are attacked themselves, and give what they give alone."""
  blind = jax.tree.map(jnp.zeros_like, problem[0])
  found = _attack(problem, mesh, screening=blind)
  np.testing.assert_array_equal(found.robust, result.robust)
  np.testing.assert_allclose(found.adversarial, result.adversarial, atol=1e-6)
  assert found.diagnostics["screening"]["flag"]
  assert found.diagnostics["screening"]["value"] == 1


def test_a_killed_screening_goes_on(
  problem, mesh, screened, tmp_path, monkeypatch
):
  path, (expected, state) = tmp_path / "state.npz", screened
  arguments = {"screening": _another(problem, 0.03), "state_path": path}
  with monkeypatch.context() as patch:
    _killed_after(patch, 5)
    with pytest.raises(_KilledError):
      _attack(problem, mesh, save_every_s=0.0, **arguments)
  found = _attack(problem, mesh, **arguments)
  np.testing.assert_array_equal(found.robust, expected.robust)
  assert found.robust_accuracy == expected.robust_accuracy
  np.testing.assert_array_equal(files.load_arrays(path)["near"], state["near"])
  with pytest.raises(UserError, match="belongs to other"):
    _attack(problem, mesh, state_path=path)


class _Toy(nn.Module):
  """Network of one layer with a dtype."""

  num_classes: int = CLASSES
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images, *, train=False):
    x = images.reshape(len(images), -1)
    return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


def test_a_network_in_another_dtype_keeps_its_weights(problem):
  images = problem[1]
  variables = _Toy().init(KEY, images)
  given = models.classifier(_Toy(dtype=jnp.bfloat16), variables)
  judge, screen, name = screening.pair(given, "bfloat16")
  assert name == "bfloat16"
  weights = variables["params"]["Dense_0"]
  flat = images.reshape(len(images), -1)
  exact = flat @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
  np.testing.assert_allclose(judge(images), exact, rtol=1e-5, atol=1e-5)
  error = np.abs(np.asarray(screen(images)) - exact).max()
  assert 1e-4 < error < 0.1  # eight bits
  assert screen.args[0] is variables


@pytest.mark.slow
def test_a_network_is_screened_in_bfloat16(mesh):
  model = models.create(
    "wide_resnet", depth=10, width=1, num_classes=5, normalization="none"
  )
  images = np.random.default_rng(0).uniform(size=(24, 8, 8, 3))
  images = images.astype(np.float32)
  variables = model.init(KEY, images[:2])
  classifier = models.classifier(model, variables)
  labels = np.asarray(classifier(images).argmax(-1), np.int32)
  problem = classifier, images, labels
  plain = _attack(problem, mesh, epsilon=0.01)
  found = _attack(problem, mesh, epsilon=0.01, screening="bfloat16")
  right = np.asarray(classifier(found.adversarial).argmax(-1)) == labels
  np.testing.assert_array_equal(found.robust, right)
  assert abs(found.accuracy - plain.accuracy) <= 1 / 24
  assert found.protocol["screening"].startswith("bfloat16, confirmed")


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("bfloat16", "whose dtype cannot be changed"),
    ("int8", "screening: 'int8'; allowed: bfloat16"),
    (3, "screening: 3; allowed: bfloat16, a classifier, or None"),
    (lambda x: x.mean((1, 2)), "a classifier of 2 classes; allowed: 6"),
    (attacks.Randomized(lambda key, x: x), "with a Randomized classifier"),
  ],
)
def test_a_wrong_screening_network_is_refused(given, message, problem, mesh):
  with pytest.raises(UserError, match=message):
    _attack(problem, mesh, screening=given)


def test_a_protocol_says_how_it_was_screened():
  protocol = evaluation.parse(
    "autoattack-plus:targeting=malt:screening=bfloat16",
    epsilon=0.1,
    step_size=0.1,
  )
  said = {"targeting": "malt", "screening": "bfloat16", "version": "plus"}
  assert dict(protocol.options) == said
  assert protocol.arguments() == said | {"norm": "linf", "epsilon": 0.1}
  assert "screening bfloat16" in protocol.describe()
  plain = evaluation.parse("autoattack", epsilon=0.1, step_size=0.1)
  assert dict(plain.options) == {"version": "standard"}
  with pytest.raises(UserError, match="screening: 'x'; allowed: bfloat16"):
    evaluation.parse("autoattack:screening=x", epsilon=0.1, step_size=0.1)


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
