"""Numbers that are not finite: one rule, for whatever `ATTACKS` lists.

Every attack meets classifiers that break in one way each, at half of the
images. One compiled program serves all ways.
"""

import functools
import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from atat_jax import attacks
from atat_jax.attacks import base, nonfinite, search
from atat_jax.errors import NonFiniteWarning

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
EPSILON = 0.1
SHAPE = (6, 3, 2, 2)
PIXELS = 12
CLASSES = 4
CLASS = np.arange(CLASSES)
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
SEARCHES = ("apgd", "fab", "square")
PROGRAMS = [
  (name, norm)
  for name, attack in attacks.ATTACKS.items()
  if name not in ("fgsm", "ifgsm")  # the program of pgd
  for norm in base.norms(attack)
]


def _sound(x, logits, broken):
  del x, broken
  return logits


def _nan_everywhere(x, logits, broken):
  del x
  return jnp.where(broken, jnp.nan, logits)


def _nan_in_parts_of_the_ball(x, logits, broken):
  """Not at the image itself, whose pixels are multiples of 1/64."""
  itself = (jnp.abs(x * 64 - jnp.round(x * 64)) < 1e-3).all((1, 2, 3))
  bad = jnp.floor(x.sum((1, 2, 3)) * 4000) % 4 > 0
  return jnp.where(broken & (bad & ~itself)[:, None], jnp.nan, logits)


def _an_infinite_logit_of_a_wrong_class(x, logits, broken):
  del x
  return jnp.where(broken & (CLASS == 1), jnp.inf, logits)


def _the_label_at_minus_infinity(x, logits, broken):
  del x
  return jnp.where(broken & (CLASS == 0), -jnp.inf, logits)


def _a_loss_that_overflows(x, logits, broken):
  """Logits of 3e38 and -3e38 are finite, their difference is not."""
  del x
  return jnp.where(broken, jnp.array([-3e38, 3e38, 0, 0]), logits)


def _broken_slope(x, broken):
  """Zero, with an infinite slope where it is broken."""
  moves = x - jax.lax.stop_gradient(x)
  sound = jnp.where(broken, 0.0, 1.0).reshape(-1, 1, 1, 1)
  return jnp.sqrt(moves + sound) - sound


def _no_gradient(x, logits, broken):
  bad = _broken_slope(x, broken).sum((1, 2, 3))
  return logits + jnp.where(broken, bad[:, None] * CLASS, 0.0)


def _a_gradient_with_two_bad_entries(x, logits, broken):
  bad = _broken_slope(x[:, :1, :1], broken).sum((1, 2, 3))
  return logits + jnp.where(broken, bad[:, None] * CLASS, 0.0)


FAULTS = {
  fault.__name__[1:]: fault
  for fault in (
    _sound,
    _nan_everywhere,
    _nan_in_parts_of_the_ball,
    _an_infinite_logit_of_a_wrong_class,
    _the_label_at_minus_infinity,
    _a_loss_that_overflows,
    _no_gradient,
    _a_gradient_with_two_bad_entries,
  )
}
OF_GRADIENTS = ("no_gradient", "a_gradient_with_two_bad_entries")


def _classifier(weights: Any, fault: Any, images: jax.Array) -> jax.Array:
  """Linear; breaks at the images whose last pixel is bright."""
  logits = images.reshape(len(images), -1) @ weights
  broken = images[:, -1, -1, -1:] > 0.5
  return jax.lax.switch(fault, [*FAULTS.values()], images, logits, broken)


def _problem(fault: str) -> tuple[Any, jax.Array, jax.Array, np.ndarray]:
  generator = np.random.default_rng(0)
  # Far from the box's border, so that the ball is whole.
  pixels = generator.integers(16, 48, SHAPE) / 64
  broken = np.arange(SHAPE[0]) % 2 == 1
  pixels[:, -1, -1, -1] = np.where(broken, 0.75, 0.25)
  weights = generator.normal(size=(PIXELS, CLASSES))
  flat = pixels.reshape(len(pixels), -1)
  logits = flat @ weights
  short = 1 + logits[:, 1:].max(-1) - logits[:, 0]
  weights[:, 0] += (short / flat.sum(-1)).max()  # class 0 wins, by 1 or more
  images = jnp.asarray(pixels, jnp.float32)
  classifier = Partial(
    _classifier,
    jnp.asarray(weights, jnp.float32),
    jnp.int32([*FAULTS].index(fault)),
  )
  labels = jnp.zeros(SHAPE[0], jnp.int32)
  return classifier, images, labels, broken


def _run(name: str, norm: str, problem: Any, **changes: Any) -> np.ndarray:
  classifier, images, labels, _ = problem
  offered = dict(
    epsilon=EPSILON * {"linf": 1, "l2": 3, "l1": 9}[norm],
    step_size=EPSILON / 3,
    num_steps=6,
    num_queries=25,
    norm=norm,
  )
  known = inspect.signature(attacks.ATTACKS[name]).parameters
  arguments = {k: v for k, v in offered.items() if k in known} | changes
  return np.asarray(
    attacks.ATTACKS[name](KEY, classifier, images, labels, **arguments)
  )


def _assert_in_ball_and_box(
  adversarial: np.ndarray, images: Any, norm: str
) -> None:
  assert np.isfinite(adversarial).all()
  assert adversarial.min() >= 0 and adversarial.max() <= 1
  delta = adversarial.astype(np.float64) - np.asarray(images, np.float64)
  length = np.linalg.norm(delta.reshape(len(delta), -1), ORDER[norm], axis=1)
  epsilon = EPSILON * {"linf": 1, "l2": 3, "l1": 9}[norm]
  assert (length <= epsilon * (1 + 1e-6) + 1e-6).all()


@functools.cache
def _without_fault(name: str, norm: str) -> np.ndarray:
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    return _run(name, norm, _problem("sound"))


@pytest.mark.parametrize(("name", "norm"), PROGRAMS)
def test_a_bad_number_stays_in_its_example_and_is_counted(name, norm):
  expected = _without_fault(name, norm)
  for fault in FAULTS:
    if fault == "sound":
      continue
    problem = classifier, images, _, broken = _problem(fault)
    with nonfinite.collect() as found:
      adversarial = _run(name, norm, problem)
    _assert_in_ball_and_box(adversarial, images, norm)
    np.testing.assert_array_equal(
      adversarial[~broken], expected[~broken], err_msg=fault
    )
    logits = np.asarray(classifier(adversarial))
    if fault in OF_GRADIENTS:
      assert found.points == 0, fault
      assert (found.gradients > 0) == (name != "square"), fault
    else:
      assert found.points > 0, fault
    if name in SEARCHES and fault == "nan_in_parts_of_the_ball":
      # The image itself is finite: nothing else is preferred to it.
      assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_one_warning_a_call_at_the_line_of_the_caller(name):
  problem = _problem("nan_everywhere")
  norm = base.norms(attacks.ATTACKS[name])[0]
  with pytest.warns(NonFiniteWarning, match=r"^\w+: \d+ evaluations") as w:
    _run(name, norm, problem)
  assert len(w) == 1
  assert w[0].filename == __file__


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_traced_attacks_are_silent_and_finite(name):
  classifier, images, labels, _ = _problem("nan_everywhere")
  adversarial = jax.jit(
    lambda x: attacks.ATTACKS[name](
      KEY,
      classifier,
      x,
      labels,
      epsilon=EPSILON,
      num_steps=3,
      **({"step_size": 0.03} if name == "pgd" else {}),
    )
  )(images)
  _assert_in_ball_and_box(np.asarray(adversarial), images, "linf")


# Counts and images of tiny linear cases, by numpy in float64.


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_bad_entries_count_as_zero_in_every_step(norm):
  problem = classifier, images, _, broken = _problem(
    "a_gradient_with_two_bad_entries"
  )
  weights = np.asarray(classifier.args[0], np.float64)
  x = np.asarray(images, np.float64)
  radius = EPSILON * {"linf": 1, "l2": 3, "l1": 9}[norm]
  expected = x.copy()
  for _ in range(6):
    logits = expected.reshape(len(x), -1) @ weights
    others = np.where(np.arange(CLASSES) == 0, -np.inf, logits)
    slope = (weights[:, others.argmax(-1)] - weights[:, :1]).T.copy()
    slope[broken, :2] = 0
    if norm == "linf":
      step = np.sign(slope)
    elif norm == "l2":
      step = slope / np.linalg.norm(slope, axis=1, keepdims=True)
    else:
      steepest = np.abs(slope).max(1, keepdims=True)
      step = np.sign(slope) * (np.abs(slope) == steepest)
    delta = expected + EPSILON / 3 * step.reshape(SHAPE) - x
    if norm == "linf":
      delta = np.clip(delta, -radius, radius)
    # Six steps stay in the balls of the other norms.
    expected = np.clip(x + delta, 0, 1)
  with nonfinite.collect() as found:
    adversarial = _run("pgd", norm, problem, random_start=False, loss="margin")
  np.testing.assert_allclose(adversarial, expected, rtol=0, atol=2e-6)
  assert np.abs(expected - x)[broken].max() > 0.03
  assert (found.points, found.gradients) == (0, 6 * broken.sum())


def test_a_bad_sample_counts_as_zero_in_the_mean():
  """Two of four draws have no gradient; the others point to either side."""
  slopes = jnp.array([[3.0, 1.0], [-1.0, 1.0]])

  def draw(key, images):
    kind = jax.random.randint(key, (), 0, 3)
    x = images.reshape(len(images), -1)
    score = x @ jnp.where(kind < 2, slopes[jnp.minimum(kind, 1)], 0.0)
    bad = jnp.where(kind == 2, jnp.inf, 0.0) * (x - x).sum(-1)
    return jnp.stack([jnp.zeros_like(score), score + bad], -1)

  seen = []

  def spied(key, images):
    jax.debug.callback(
      lambda data: seen.append(np.array(data)), jax.random.key_data(key)
    )
    return draw(key, images)

  images = jnp.full((1, 1, 2, 1), 0.5)
  for seed in range(3):
    seen.clear()
    with nonfinite.collect() as found:
      adversarial = attacks.pgd(
        jax.random.key(seed),
        attacks.Randomized(Partial(spied)),
        images,
        [0],
        epsilon=1.0,
        step_size=0.1,
        num_steps=1,
        norm="l2",
        loss="margin",
        random_start=False,
        eot_samples=8,
      )
    jax.effects_barrier()
    keys = [jax.random.wrap_key_data(data) for data in seen]
    kinds = np.array([int(jax.random.randint(k, (), 0, 3)) for k in keys])
    assert {2} < set(kinds)
    # Infinity times 0 is NaN: neither logits nor gradient of such a draw.
    mean = np.asarray(slopes, np.float64)[kinds[kinds < 2]].sum(0) / 8
    expected = 0.5 + 0.1 * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(adversarial.ravel(), expected, atol=1e-6)
    assert found.points == (kinds == 2).sum()


def _two_wells(images):
  """Class 0 loses where the pixel is bright; logits are NaN where it is dark.

  argmax takes NaN for the largest, here that of class 1.
  """
  x = images.mean((1, 2, 3))
  dark = jnp.where(x < 0.5, jnp.nan, 0.0)
  return jnp.stack([0 * x, x - 0.9 + dark], -1)


@pytest.mark.parametrize("targeted", [False, True])
def test_restarts_prefer_a_finite_attempt_to_one_that_is_not(targeted):
  """Of eight starts some are dark. None that is may be the strongest."""
  images = jnp.full((64, 1, 1, 1), 0.5)
  labels = jnp.zeros(64, jnp.int32)
  arguments = dict(epsilon=0.3, step_size=1e-3, num_steps=1)
  if targeted:
    arguments |= dict(targets=jnp.ones(64, jnp.int32))
  with nonfinite.collect() as found:
    single, several = (
      attacks.pgd(
        KEY, _two_wells, images, labels, num_restarts=number, **arguments
      )
      for number in (1, 8)
    )
  assert 0.3 < (single < 0.5).mean() < 0.7
  assert (several > 0.5).all()
  # Not fooled either: the brightest, which is the strongest, is the best.
  assert several.mean() > single[single > 0.5].mean() + 0.05
  # One step of each start, and once more each to be compared.
  assert 64 * 9 * 0.3 < found.points < 2 * 64 * 9 * 0.7


def test_unusable_clean_logits_do_not_decide_what_is_aimed_at():
  """The label is left out, though its logit is NaN, and others are ranked."""
  logits = jnp.array(
    [
      [jnp.nan, 1.0, 2.0, 3.0],
      [5.0, jnp.inf, -jnp.inf, 3.0],
      [0.0, 1.0, 2.0, 3.0],
      [jnp.nan] * 4,
    ]
  )
  ranked = search.ranked(logits, jnp.array([0, 3, 0, 2]))
  assert ranked[:3].tolist() == [[3, 2, 1], [1, 0, 2], [2, 1, 0]]
  assert sorted(ranked[3].tolist()) == [0, 1, 3]


@pytest.mark.parametrize("scale", [1e-20, 1e-14, 1.0, 1e14, 1e25, 1e33])
@pytest.mark.parametrize("name", ["pgd", "apgd", "fab"])
def test_the_scale_of_the_logits_moves_no_step_to_zero(name, scale):
  """In float32 the squares of slopes above 1e19 are infinite."""
  weights = np.random.default_rng(1).normal(size=(PIXELS, 2))
  images = jnp.full(SHAPE, 0.5)
  labels = jnp.asarray(
    (images.reshape(6, -1) @ jnp.asarray(weights)).argmax(-1), jnp.int32
  )
  classifier = Partial(
    lambda w, x: (
      (x - 0.5).reshape(len(x), -1) @ w
      - 0.01 * scale * jax.nn.one_hot(1 - labels, 2)
    ),
    jnp.asarray(weights * scale, jnp.float32),
  )
  arguments = dict(epsilon=0.3, norm="l2")
  if name == "pgd":
    arguments |= dict(
      step_size=0.3, num_steps=1, loss="margin", random_start=False
    )
  elif name == "apgd":
    arguments |= dict(num_steps=2, loss="margin")
  else:
    arguments |= dict(num_steps=2)
  adversarial = attacks.ATTACKS[name](
    KEY, classifier, images, labels, **arguments
  )
  if name == "pgd":
    slope = weights[:, 1 - labels[0]] - weights[:, labels[0]]
    expected = 0.5 + 0.3 * slope / np.linalg.norm(slope)
    np.testing.assert_allclose(
      adversarial.reshape(6, -1), np.tile(expected, (6, 1)), atol=1e-6
    )
  assert (classifier(adversarial).argmax(-1) != labels).all()
