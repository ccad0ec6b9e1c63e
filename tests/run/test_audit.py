"""The audit: each flag raised by what it is for, and by nothing sound."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnostic import check
from jax.tree_util import Partial

from atat_jax import attacks, models, sharding
from atat_jax.attacks.auto_pgd import apgd
from atat_jax.attacks.base import Randomized
from atat_jax.errors import UserError
from atat_jax.evaluation.auditing import audit

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(5)
EPSILONS = {"linf": 0.03, "l2": 0.2, "l1": 1.0}
SMALL = {
  "batch_size": 16,
  "num_examples": 32,
  "num_steps": (20, 40, 100),
  "num_noise": 20,
  "mesh": sharding.make_mesh(jax.devices()[:1]),
  "progress": False,
}
ORDER = [
  "in_ball",
  "probabilities",
  "zero_gradients",
  "randomized",
  "batch_dependence",
  "rescored",
  "steps",
  "attack_strength",
  "epsilon",
  "noise",
  "nonfinite",
]


def _mlp(params, images):
  centred = 2 * (images.reshape(len(images), -1) - 0.5)
  return jnp.tanh(centred @ params["w1"]) @ params["w2"]


def _quantised(params, images):
  """No gradient anywhere."""
  return _mlp(params, jnp.round(4 * images) / 4)


def _reversed(params, images):
  """The values are the network's, the gradients point the other way."""
  seen = _mlp(params, images)
  return 2 * jax.lax.stop_gradient(seen) - seen


def _softmax(params, images):
  return jax.nn.softmax(1e3 * _mlp(params, images))


def _linear(params, images):
  """The margin of classes 0 and 1 is (x - 0.5) w."""
  value = (images.reshape(len(images), -1) - 0.5) @ params["w1"][:, 0]
  return _two(value, 0 * value)


def _constant(params, images):
  return _two(jnp.ones(len(images)), images.mean((1, 2, 3)))


def _relative(params, images):
  """An image is compared with the others of its batch."""
  means = images.mean((1, 2, 3))
  return _two(means - means.mean(), means.mean() - means)


DEPTH = 24


def _lock(params, images):
  """Pixel k counts once the k - 1 before are moved: steps one by one."""
  moved = (images.reshape(len(images), -1)[:, :DEPTH] - 0.5) / 0.03
  turned = jnp.cumprod(moved > 0.7, axis=1)
  counts = jnp.concatenate([jnp.ones_like(turned[:, :1]), turned[:, :-1]], 1)
  value = (counts * moved).sum(1)
  return _two(0.75 * DEPTH + 0 * value, value)


def _two(first, second):
  never = jnp.full_like(first, -100)
  return jnp.stack([first, second, never, never], 1)


KINDS = (
  _mlp,
  _quantised,
  _reversed,
  _softmax,
  _linear,
  _constant,
  _relative,
  _lock,
)


def _one_of(kind, params, images):
  return jax.lax.switch(kind, KINDS, params, images)


class Case:
  """A smooth network that nobody defended, and images that it gets right."""

  def __init__(self):
    generator = np.random.default_rng(0)
    self.images = generator.uniform(0.1, 0.9, (40, 8, 8, 1)).astype(np.float32)
    params = {
      "w1": generator.normal(size=(64, 16)) / 4,
      "w2": generator.normal(size=(16, 4)),
    }
    self.params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    self.mlp = self.classifier(_mlp)
    self.only_mlp = Partial(_mlp, self.params)  # quicker to compile
    self.labels = np.asarray(self.mlp(self.images).argmax(-1))
    assert len(set(self.labels.tolist())) == 4

  def classifier(self, kind):
    """All kinds are one program, to spare the tests seven compilations."""
    number = jnp.asarray(KINDS.index(kind), jnp.int32)
    return Partial(_one_of, number, self.params)

  def attack(self, classifier=None, epsilon=EPSILONS["linf"], num_steps=100):
    return np.array(
      attacks.pgd(
        jax.random.key(9),
        classifier or self.mlp,
        self.images,
        self.labels,
        epsilon=epsilon,
        step_size=epsilon / 4,
        num_steps=num_steps,
        loss="margin",
      )
    )

  def audit(self, classifier=None, adversarial=None, **options):
    classifier = classifier or self.mlp
    if adversarial is None:
      adversarial = self.attack(classifier)
    options = {"epsilon": EPSILONS["linf"], **SMALL, **options}
    found = audit(
      KEY, classifier, self.images, self.labels, adversarial, **options
    )
    for rule in found.values():
      check(rule)
    return found


@pytest.fixture(scope="module")
def case():
  return Case()


def flags(found):
  return {name for name, rule in found.items() if rule["flag"]}


# --- Sound -------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_strong_attack_on_an_undefended_network_raises_no_flag(case, norm):
  epsilon = EPSILONS[norm]
  classifier = case.mlp if norm == "linf" else case.only_mlp
  if norm == "l1":
    adversarial = apgd(
      KEY, classifier, case.images, case.labels, epsilon=epsilon, norm=norm
    )
  else:
    adversarial = attacks.pgd(
      jax.random.key(9),
      classifier,
      case.images,
      case.labels,
      epsilon=epsilon,
      step_size=epsilon / 4,
      num_steps=100,
      norm=norm,
      loss="margin",
    )
  found = case.audit(classifier, adversarial, norm=norm, epsilon=epsilon)
  assert list(found) == ORDER
  assert not flags(found), [found[name] for name in flags(found)]
  # The attack does leave some: that is not why noise raises no flag.
  right = np.asarray(classifier(adversarial).argmax(-1)) == case.labels
  assert 0 < right[:32].sum() < 32
  assert norm in found["in_ball"]["rule"]


def test_pgd_stalls_in_l1_and_the_audit_says_so(case):
  adversarial = attacks.pgd(
    jax.random.key(9),
    case.only_mlp,
    case.images,
    case.labels,
    epsilon=2.0,
    step_size=0.5,
    num_steps=100,
    norm="l1",
    loss="margin",
  )
  found = case.audit(case.only_mlp, adversarial, norm="l1", epsilon=2.0)
  assert flags(found) == {"attack_strength"}
  assert "APGD with 100 steps" in found["attack_strength"]["message"]


def test_no_attack_succeeds_in_a_tiny_ball(case):
  """That is no flag: there is nothing to find."""
  adversarial = case.attack(epsilon=1e-5)
  found = case.audit(adversarial=adversarial, epsilon=1e-5)
  assert not flags(found)
  assert found["noise"]["message"].startswith("Nothing fools the classifier")
  assert "100.0% at 1e-05" in found["epsilon"]["message"]


def test_numbers_of_a_linear_classifier_are_known(case):
  """Where the margin per pixel's weight is above the radius, it stands.

  Some images are classified wrongly, the last batch is not full, and the given
  images are the clean ones.
  """
  generator = np.random.default_rng(3)
  images = generator.uniform(0.3, 0.7, (43, 8, 8, 1)).astype(np.float32)
  weights = np.asarray(case.params["w1"][:, 0], np.float64)
  distance = (images.reshape(43, -1) - 0.5) @ weights / np.abs(weights).sum()
  labels = (distance < 0).astype(np.int32)
  labels[::5] = 1 - labels[::5]
  chosen = np.flatnonzero((distance < 0) == labels)[:21]
  assert chosen[-1] < 30 and len(chosen) == 21
  distance = np.abs(distance[chosen])
  epsilon = float(np.sort(distance)[10:12].mean())
  found = audit(
    KEY,
    case.classifier(_linear),
    images,
    labels,
    images,
    **{**SMALL, "num_examples": 21},
    epsilon=epsilon,
  )
  share = (distance > epsilon).mean()
  assert share == 10 / 21
  check(found["attack_strength"], True, 1 - share)
  text = f"{100 * share:.1f}%"
  assert found["steps"]["message"] == (
    f"Of 21 images PGD leaves {text} after 20, {text} after 40, {text} after"
    " 100 steps: it has converged."
  )
  check(found["steps"], False, 0.0)
  curve = re.findall(r"([\d.]+)% at ([\d.e-]+)", found["epsilon"]["message"])
  radius = epsilon
  for accuracy, written in curve:
    assert float(written) == pytest.approx(radius, rel=1e-3)
    expected = 100 * (distance > radius).mean()
    assert float(accuracy) == pytest.approx(expected, abs=0.05)
    radius *= 2
  assert distance.max() < radius / 2 and len(curve) > 1
  check(found["epsilon"], False, 0.0)
  assert flags(found) == {"attack_strength", "noise"}


# --- What the classifier is ----------------------------------------------------


def test_quantised_inputs_hide_gradients(case):
  """Attacks are blind, the accuracy does not reach 0."""
  found = case.audit(case.classifier(_quantised))
  assert {"zero_gradients", "epsilon"} <= flags(found)
  check(found["zero_gradients"], True, 1.0)
  assert "survive even the ball" in found["epsilon"]["message"]
  assert not flags(found) & {"in_ball", "probabilities", "batch_dependence"}


def test_gradients_that_mislead_show_as_the_ball_grows(case):
  """Nothing that looks at the gradient at one point could tell."""
  found = case.audit(case.classifier(_reversed))
  assert flags(found) == {"epsilon", "noise"}
  assert found["epsilon"]["value"] > 0.9


def test_one_answer_for_all_images_does_not_reach_zero(case):
  labels = np.zeros_like(case.labels)
  constant = case.classifier(_constant)
  found = audit(
    KEY, constant, case.images, labels, case.images, epsilon=0.03, **SMALL
  )
  assert flags(found) == {"epsilon"}
  assert "the same answer whatever" in found["epsilon"]["message"]
  check(found["epsilon"], True, 1.0)


def test_a_saturated_softmax_is_seen(case):
  found = case.audit(case.classifier(_softmax))
  assert {"probabilities", "zero_gradients"} <= flags(found)


def test_batch_statistics_are_seen(small):
  """What running statistics do is in `test_diagnostics`."""
  classifier = models.classifier(
    small.model, small.variables, batch_norm="batch"
  )
  images = np.random.default_rng(0).uniform(size=(16, *small.images.shape[1:]))
  images = images.astype(np.float32)
  labels = np.asarray(classifier(images).argmax(-1))
  options = {**SMALL, "num_steps": (1, 2), "num_noise": 2}
  found = audit(
    KEY, classifier, images, labels, images, epsilon=0.01, **options
  )
  check(found["batch_dependence"], True)


def test_images_that_score_otherwise_in_another_batch(case):
  labels = np.arange(40) % 2
  relative = case.classifier(_relative)
  found = audit(
    KEY, relative, case.images, labels, case.images, epsilon=0.01, **SMALL
  )
  assert {"batch_dependence", "rescored"} <= flags(found)


def test_a_randomised_classifier_is_seen_and_attacked_on_average(case):
  def noisy(params, key, images):
    noise = 0.05 * jax.random.normal(key, images.shape)
    return _mlp(params, images + noise)

  classifier = Randomized(Partial(noisy, case.params))
  options = {"num_examples": 16, "num_steps": (5, 10), "num_noise": 5}
  found = case.audit(classifier, case.attack(), **options)
  assert "batch_dependence" not in found and "rescored" not in found
  assert flags(found) == {"randomized"}
  weak = case.audit(classifier, case.images, **options)
  assert flags(weak) == {"randomized", "attack_strength", "noise"}
  # Shares of looks, not whole images.
  assert (16 * weak["attack_strength"]["value"]) % 1 != 0


# --- What the attack is --------------------------------------------------------


def test_no_attack_at_all_is_weak(case):
  found = case.audit(adversarial=case.images)
  assert flags(found) == {"attack_strength", "noise"}
  assert "the attack 100.0%" in found["noise"]["message"]
  strong = case.audit()
  assert strong["noise"]["value"] == pytest.approx(
    found["noise"]["value"] + found["attack_strength"]["value"], abs=0.07
  )


def test_images_that_break_the_rules(case):
  adversarial = case.attack().astype(np.float64)
  outside = case.images + 1.01 * (adversarial - case.images)
  found = case.audit(adversarial=outside)
  assert flags(found) == {"in_ball"}
  check(found["in_ball"], True, 1.01 * EPSILONS["linf"])
  # Not a number: no success either, whatever the classifier makes of it.
  adversarial[:8, 3, 3] = np.nan
  adversarial[8:16, 3, 3] = np.inf
  found = case.audit(adversarial=adversarial)
  assert "not finite: 16 images." in (found["in_ball"]["message"])
  assert flags(found) >= {"in_ball", "attack_strength"}


def test_an_attack_that_needs_many_steps_is_seen(case):
  images = np.full((40, 8, 8, 1), 0.5, np.float32)
  labels = np.zeros(40, np.int32)

  classifier = case.classifier(_lock)

  def run(num_steps):
    adversarial = attacks.pgd(
      jax.random.key(9),
      classifier,
      images,
      labels,
      epsilon=0.03,
      step_size=0.0075,
      num_steps=num_steps,
      loss="margin",
    )
    options = {**SMALL, "num_steps": (10, 20, 400)}
    return audit(
      KEY, classifier, images, labels, adversarial, epsilon=0.03, **options
    )

  found = run(400)
  assert flags(found) == {"steps"}
  check(found["steps"], True, 1.0)
  leaves = "100.0% after 10, 100.0% after 20, 0.0% after 400 steps"
  assert leaves in found["steps"]["message"]
  assert flags(run(20)) == {"steps", "attack_strength", "noise"}


# --- Use -----------------------------------------------------------------------


def test_other_numbers_compile_nothing(case, compilations):
  adversarial = case.attack()
  first = case.audit(adversarial=adversarial)
  before = compilations()
  again = case.audit(adversarial=adversarial)
  assert again == first  # a function of the key
  case.audit(
    adversarial=adversarial,
    epsilon=0.031,
    num_steps=(3, 9, 27, 81),
    num_noise=7,
  )
  assert compilations() == before


def test_the_bar_says_what_runs(case, capsys):
  case.audit(case.mlp, case.images, progress=True)
  shown = capsys.readouterr().err
  for text in ("steps: PGD(100), radius 0.03", "noise: 20 points", "2 flags"):
    assert text in shown
  assert "100%" in shown


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"adversarial": np.zeros((40, 8, 8))}, "adversarial: shape"),
    ({"adversarial": np.zeros((39, 8, 8, 1))}, "adversarial: shape"),
    ({"adversarial": np.zeros((40, 8, 8, 1), int)}, "adversarial: dtype int"),
    ({"images": np.full((40, 8, 8, 1), 1.5)}, "images: values in"),
    ({"images": np.zeros((40, 8, 8))}, "images: shape .40, 8, 8.;"),
    ({"images": np.zeros((0, 8, 8, 1))}, "images: shape"),
    ({"labels": np.zeros(39, int)}, "labels: shape"),
    ({"labels": np.full(40, 4)}, "labels: values in"),
    ({"epsilon": 8}, "epsilon: 8"),
    ({"norm": "l3"}, "norm: 'l3'"),
    ({"batch_size": 0}, "batch_size: 0"),
    ({"num_examples": 1.5}, "num_examples: 1.5"),
    ({"num_noise": 0}, "num_noise: 0"),
    ({"num_steps": (20,)}, "num_steps: .20,.; allowed: two or more"),
    ({"num_steps": (100, 20)}, "num_steps: .100, 20."),
    ({"num_steps": (20, 20)}, "num_steps: .20, 20."),
    ({"num_steps": 20}, "num_steps: 20"),
    ({"num_steps": (0, 20)}, "num_steps: 0"),
    ({"classifier": 3}, "classifier: int"),
  ],
)
def test_errors_name_the_argument(case, options, named):
  arguments = {
    "classifier": case.mlp,
    "images": case.images,
    "labels": case.labels,
    "adversarial": case.images,
    "epsilon": 0.03,
    **SMALL,
  }
  with pytest.raises(UserError, match=named):
    audit(KEY, **{**arguments, **options})


def test_a_classifier_that_is_always_wrong_is_an_error(case):
  labels = (case.labels + 1) % 4
  with pytest.raises(UserError, match="none of the 40 images"):
    audit(
      KEY, case.mlp, case.images, labels, case.images, epsilon=0.03, **SMALL
    )


# --- Numbers that are not finite ---------------------------------------------


def _fragile(params, images):
  """The network, but for the darkest images, whose logits are NaN."""
  dark = images.mean((1, 2, 3)) < params["dark"]
  return jnp.where(dark[:, None], jnp.nan, _mlp(params, images))


def test_images_without_finite_logits_are_counted_and_not_fooled(case):
  means = case.images.mean((1, 2, 3))
  dark = jnp.asarray(np.sort(means)[2:4].mean(), jnp.float32)
  classifier = Partial(_fragile, {**case.params, "dark": dark})
  # Dark images are made of all others, so that an attack seems to succeed.
  given = case.images.copy()
  given[means >= float(dark)] *= 0.5
  assert (given.mean((1, 2, 3)) < float(dark)).sum() > 30
  found = case.audit(classifier, given, epsilon=0.5, num_steps=(1, 2))
  assert found["nonfinite"]["flag"]
  assert (
    "3 clean images with logits that are not" in found["nonfinite"]["message"]
  )
  # Nothing was fooled, so that the attack is weak.
  assert found["attack_strength"]["flag"]
  assert "the attack leaves 100.0%" in found["attack_strength"]["message"]
