"""Evaluation: counts against plain loops, protocols, diagnostics."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from atat_jax import attacks, checkpoints, data, evaluation, models, sharding
from atat_jax.data.base import Split
from atat_jax.errors import UserError
from atat_jax.rng import stream
from atat_jax.runs import wording

pytest_plugins = ("tiny",)

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


# --- Accuracy ----------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 23, 50])
def test_accuracy_is_that_of_a_plain_loop(linear, split, mesh, batch_size):
  classifier, weights = linear
  correct, robust = np.zeros((2, 3), int)
  for image, label in zip(split.images, split.labels, strict=True):
    x = image.reshape(-1) / 255.0
    logits = x @ weights
    correct[label] += logits.argmax() == label
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    gradient = weights @ (shares - np.eye(3)[label])  # of the cross-entropy
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
  """The first images, which fill the last batch, are of the class it says."""
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
  """A classifier that compares an image with its batch, against numpy."""

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
    for number, size in ((1, 8), (2, 8), (8, 16), (8, 5))
  }
  assert len(found) == 1


def test_it_is_a_function_of_the_key(finished):
  model, variables = checkpoints.restore_model(finished.workdir)
  classifier = models.classifier(model, variables)
  test = data.load("digits").test
  test = Split(test.images[:64], test.labels[:64])
  seen = []
  protocol = evaluation.parse("pgd1", epsilon=0.2, step_size=0.1)

  class Spy:
    """A protocol that keeps what it made."""

    def run(self, *args):
      seen.append(np.asarray(protocol.run(*args)))
      return seen[-1]

  mesh = sharding.make_mesh(jax.devices()[:1])
  for seed in (0, 0, 1):
    evaluation.accuracy(
      jax.random.key(seed),
      classifier,
      test,
      protocol=Spy(),
      batch_size=32,
      mesh=mesh,
    )
  np.testing.assert_array_equal(seen[0], seen[2])
  np.testing.assert_array_equal(seen[1], seen[3])
  assert not np.array_equal(seen[0], seen[4])
  # Each batch has its own random start, not the first one's again.
  clean = test.images / 255.0
  noise = [seen[i] - clean[32 * i : 32 * i + 32] for i in range(2)]
  assert not np.allclose(np.abs(noise[0]), np.abs(noise[1]), atol=0.05)


@pytest.mark.parametrize("model_name", ["student", "teacher"])
def test_rows_are_what_a_notebook_computes(finished, model_name):
  """The numbers of `results.json` with the public functions alone."""
  rows = [r for r in finished.results["rows"] if r["model"] == model_name]
  folder = {"student": "", "teacher": "teacher"}[model_name]
  model, variables = checkpoints.restore_model(finished.workdir / folder)
  test = data.load("digits", validation_size=128).test
  images = (test.images[: tiny.NUM_TEST] / 255.0).astype(np.float32)
  labels = test.labels[: tiny.NUM_TEST]
  for row in rows:
    classifier = models.classifier(
      model, variables, batch_norm=row["batch_norm"]
    )
    size = row["batch_size"]
    assert (
      size
      == {
        "running": tiny.BATCH_SIZE,
        "batch": tiny.STATISTICS_SIZE,
      }[row["batch_norm"]]
    )
    correct = 0
    for number, start in enumerate(range(0, tiny.NUM_TEST, size)):
      batch = np.arange(start, start + size) % tiny.NUM_TEST
      x, y = images[batch], labels[batch]
      key = stream(jax.random.key(row["seed"]), "evaluation", number)
      numbers = {k: row[k] for k in ("epsilon", "step_size", "num_steps")}
      if row["attack"] == "fgsm":
        x = attacks.fgsm(key, classifier, x, y, epsilon=row["epsilon"])
      elif row["attack"] == "pgd2":
        x = attacks.pgd(
          key, classifier, x, y, norm=row["norm"], loss=row["loss"], **numbers
        )
      right = np.asarray(classifier(x).argmax(-1)) == y
      correct += right[: tiny.NUM_TEST - start].sum()
    assert row["accuracy"] == pytest.approx(correct / tiny.NUM_TEST, abs=1e-6)


# --- Protocols ---------------------------------------------------------------

NUMBERS = {"epsilon": 0.2, "step_size": 0.05}


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("nominal", ("nominal", None, None, None, None, None, None)),
    ("fgsm", ("fgsm", "linf", 0.2, 0.2, 1, 1, "cross_entropy")),
    ("ifgsm20", ("ifgsm", "linf", 0.2, 0.05, 20, 1, "cross_entropy")),
    ("pgd7", ("pgd", "linf", 0.2, 0.05, 7, 3, "cross_entropy")),
    ("pgd100-margin", ("pgd", "linf", 0.2, 0.05, 100, 3, "margin")),
    ("pgd20-dlr", ("pgd", "linf", 0.2, 0.05, 20, 3, "dlr")),
    ("apgd", ("apgd", "linf", 0.2, None, 100, 1, "cross_entropy")),
    ("apgd50-dlr", ("apgd", "linf", 0.2, None, 50, 1, "dlr")),
    ("fab", ("fab", "linf", 0.2, None, 100, 1, None)),
    ("square700", ("square", "linf", 0.2, None, 700, 1, None)),
    ("autoattack", ("autoattack", "linf", 0.2, None, None, None, None)),
    (
      "square:norm=l2:epsilon=128/255:num_queries=9",
      ("square", "l2", 128 / 255, None, 9, 1, None),
    ),
    (
      "pgd:num_steps=5:step_size=0.1:loss=margin:num_restarts=2",
      ("pgd", "linf", 0.2, 0.1, 5, 2, "margin"),
    ),
  ],
)
def test_names_of_protocols(name, expected):
  found = evaluation.parse(name, num_restarts=3, **NUMBERS)
  assert found.name == name
  assert (
    found.attack,
    found.norm,
    found.epsilon,
    found.step_size,
    found.num_steps,
    found.num_restarts,
    found.loss,
  ) == expected
  described = found.describe()
  assert len(described.splitlines()) == 1
  for number in expected[2:4]:
    assert number is None or wording.pixels(number) in described
  for number in expected[4:6]:
    assert number is None or str(number) in described


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("pgd20", {}),
    ("pgd20-targeted_margin", {"num_targets": 9}),
    ("pgd20:num_targets=3:loss=targeted_dlr", {"num_targets": 3}),
    (
      "pgd20:momentum=1:random_start=false",
      {"momentum": 1.0, "random_start": False},
    ),
    ("apgd100-targeted_dlr", {"num_targets": 9}),
    ("apgd:norm=l1:enlarged=true", {"enlarged": True}),
    ("fab:num_targets=4", {"num_targets": 4}),
    ("autoattack", {"version": "standard"}),
    ("autoattack-fast", {"version": "fast"}),
    ("autoattack:version=rand", {"version": "rand"}),
  ],
)
def test_what_is_special_about_a_protocol(name, options):
  found = evaluation.parse(name, **NUMBERS)
  assert dict(found.options) == options
  for option, value in options.items():
    assert f"{option} {value}" in found.describe()
    assert found.arguments()[option] == value


@pytest.mark.parametrize(
  ("name", "named"),
  [
    ("pgd20:momentun=1", "'momentun'; allowed: eot_samples, epsilon"),
    ("pgd20:momentum", "once, as :<parameter>=<value>"),
    ("pgd20:norm=l2:norm=l1", "each parameter once"),
    ("pgd20:momentum=fast", "momentum: 'fast'; allowed: a number"),
    ("pgd20:momentum=-1", "momentum: -1.0; allowed"),
    ("pgd20:num_restarts=1.5", "num_restarts: '1.5'; allowed: an integer"),
    ("pgd20:num_restarts=0", "num_restarts: 0; allowed"),
    ("pgd20:random_start=no", "random_start: 'no'; allowed: true or false"),
    ("pgd20:epsilon=8/0", "epsilon: '8/0'; allowed: a number"),
    ("apgd:loss=hinge", "loss: 'hinge'; allowed: cross_entropy"),
    ("square:norm=l0", "norm: 'l0'; allowed: l1, l2, linf"),
    ("autoattack:version=best", "version: 'best'; allowed: fast, plus"),
  ],
)
def test_parameters_that_are_none(name, named):
  with pytest.raises(UserError, match=named):
    evaluation.parse(name, **NUMBERS)


@pytest.mark.parametrize(
  "name",
  [
    "",
    "PGD20",
    "pgd",
    "pgd0",
    "pgd-3",
    "pgd1.5",
    "pgd020",
    "ifgsm",
    "fgsm2",
    "nominal3",
    "pgd20-hinge",
    "pgd20:num_steps=5",
    "pgd20-dlr:loss=margin",
    "square5-margin",
    "autoattack100",
    "autoattack-best",
    "nominal:epsilon=1",
    "ifgsm20-margin",
    "fgsm-margin",
    "nominal-margin",
    " pgd20",
  ],
)
def test_names_that_are_none(name):
  with pytest.raises(UserError) as error:
    evaluation.parse(name, **NUMBERS)
  assert repr(name) in str(error.value)
  assert "pgd<steps>" in str(error.value)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"epsilon": 0.0}, "epsilon: 0.0"),
    ({"epsilon": float("nan")}, "epsilon: nan"),
    ({"step_size": -1.0}, "step_size: -1.0"),
    ({"num_restarts": 0}, "num_restarts: 0"),
    ({"norm": "l0"}, "norm: 'l0'; allowed: l1, l2, linf"),
  ],
)
def test_numbers_out_of_range(options, named):
  with pytest.raises(UserError, match=named):
    evaluation.parse("pgd2", **{**NUMBERS, **options})
  evaluation.parse("nominal", **{**NUMBERS, **options})  # has no numbers


def test_l2_is_for_pgd_only():
  assert evaluation.parse("pgd2", norm="l2", **NUMBERS).norm == "l2"
  for name in ("fgsm", "ifgsm2"):
    with pytest.raises(UserError, match="norm: 'l2'; allowed: linf for"):
      evaluation.parse(name, norm="l2", **NUMBERS)


def test_lists_of_protocols():
  found = evaluation.parse_list("nominal, pgd2 ,fgsm,", **NUMBERS)
  assert [protocol.name for protocol in found] == ["nominal", "pgd2", "fgsm"]
  for names in ("", " , "):
    with pytest.raises(UserError, match="attacks: "):
      evaluation.parse_list(names, **NUMBERS)
  with pytest.raises(UserError, match=r"'pgd2,fgsm,pgd2'; .*once"):
    evaluation.parse_list("pgd2,fgsm,pgd2", **NUMBERS)


def test_a_protocol_runs_its_attack(linear, split):
  classifier, _ = linear
  images = (split.images / 255.0).astype(np.float32)
  key = jax.random.key(3)

  def run(name, **options):
    made = evaluation.parse(name, **{**NUMBERS, **options})
    return np.asarray(made.run(key, classifier, images, split.labels))

  np.testing.assert_array_equal(run("nominal"), images)
  arguments = (key, classifier, images, split.labels)
  np.testing.assert_array_equal(
    run("fgsm"), attacks.fgsm(*arguments, epsilon=0.2)
  )
  numbers = {"epsilon": 0.2, "step_size": 0.05, "num_steps": 3}
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


# --- Diagnostics -------------------------------------------------------------


def rows(accuracies, model="student", batch_norm="running", count=10_000):
  """Rows of a table from {attack: accuracy}."""
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


def test_noise_of_few_examples_is_no_flag():
  """3 points are nothing with 100 images, and something with 10,000."""
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


@pytest.mark.slow
def test_bfloat16_is_as_robust_as_float32(finished):
  """The same weights, all 1,797 digits: within 0.3 points, five images."""
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
    assert abs(full - half) <= 0.003, found
