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
from diagnostic import check
from jax.tree_util import Partial

from atat_jax import attacks, rng
from atat_jax.attacks import base, diagnostics, nonfinite, search
from atat_jax.attacks.autoattack import slots
from atat_jax.attacks.autoattack.progress import Store
from atat_jax.errors import NonFiniteWarning
from atat_jax.runs import files

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


# AutoAttack.

SHORT = {
  "apgd-ce": {"num_steps": 6},
  "fab-t": {"num_steps": 4},
  "square": {"num_queries": 12},
}


def _autoattack(fault: str, **changes: Any) -> attacks.AutoAttackResult:
  classifier, images, labels, _ = _problem(fault)
  version = changes.pop("version", tuple(SHORT))
  arguments = dict(
    epsilon=EPSILON,
    version=version,
    options={name: SHORT[name] for name in version},
    progress=False,
  )
  return attacks.autoattack(
    KEY, classifier, images, labels, **arguments | changes
  )


@functools.cache
def _sound_result() -> attacks.AutoAttackResult:
  return _autoattack("sound")


# A loss that overflows is that of a misclassified image: it is not attacked.
@pytest.mark.parametrize(
  "fault",
  [x for x in FAULTS if x not in ("sound", "a_loss_that_overflows")],
)
def test_autoattack_counts_what_is_not_finite(fault):
  expected = _sound_result()
  assert not expected.diagnostics["nonfinite"]["flag"]
  assert expected.robust.tolist().count(True) not in (0, 6)
  with pytest.warns(NonFiniteWarning, match=r"^autoattack: \d+ ") as caught:
    found = _autoattack(fault)
  assert len(caught) == 1 and caught[0].filename == __file__
  classifier, images, labels, broken = _problem(fault)
  clean = np.asarray(classifier(images))
  logits = np.asarray(classifier(found.adversarial))
  _assert_in_ball_and_box(found.adversarial, images, "linf")
  np.testing.assert_array_equal(
    found.adversarial[~broken], expected.adversarial[~broken]
  )
  np.testing.assert_array_equal(found.robust[~broken], expected.robust[~broken])
  # Nothing that is not finite is robust, and nothing of it has fooled.
  known = np.isfinite(clean).all(-1)
  assert not found.robust[~known].any()
  assert found.clean_accuracy == (known & (clean.argmax(-1) == labels)).mean()
  fooled = known & ~found.robust & (clean.argmax(-1) == np.asarray(labels))
  assert np.isfinite(logits[fooled]).all()
  assert (logits[fooled].argmax(-1) != 0).all()
  check(found.diagnostics["nonfinite"], True)
  for one in found.diagnostics.values():
    check(one)
  message = found.diagnostics["nonfinite"]["message"]
  assert ("clean image" in message) is bool((~known).any())
  assert message in found.summary()


class _StoppedError(Exception):
  pass


def test_an_interrupted_autoattack_counts_as_if_it_had_not_been(
  tmp_path, monkeypatch
):
  fault, path = "nan_in_parts_of_the_ball", tmp_path / "state.npz"
  with nonfinite.collect() as counts:
    expected = _autoattack(fault)
  save, saves = Store.save, []

  def stop(self, *args):
    save(self, *args)
    saves.append(0)
    if len(saves) % 2 == 0:
      raise _StoppedError

  monkeypatch.setattr(Store, "save", stop)
  with nonfinite.collect() as again:
    for _ in range(100):
      try:
        found = _autoattack(fault, state_path=path, save_every_s=0.0)
        break
      except _StoppedError:
        continue
  assert len(saves) > 6
  np.testing.assert_array_equal(found.adversarial, expected.adversarial)
  assert found.robust_accuracy == expected.robust_accuracy
  assert found.diagnostics["nonfinite"] == expected.diagnostics["nonfinite"]
  assert (again.points, again.gradients) == (counts.points, counts.gradients)
  assert counts.points > 0


def test_an_unfinished_state_from_before_the_counts_is_resumed(
  tmp_path, monkeypatch
):
  """Its runs go on; what was counted before is not known."""
  path, save, saves = tmp_path / "state.npz", Store.save, []

  def stop(self, *args):
    save(self, *args)
    saves.append(0)
    if len(saves) == 1:
      raise _StoppedError

  monkeypatch.setattr(Store, "save", stop)
  with pytest.raises(_StoppedError):
    _autoattack("sound", state_path=path, save_every_s=0.0)
  with np.load(path) as file:
    arrays = dict(file)
  leaves = sorted(name for name in arrays if "leaf" in name)
  for name in (*leaves[-2:], "nonfinite/apgd-ce", "checksums"):
    del arrays[name]
  files.write_arrays(path, arrays)
  loads = []
  monkeypatch.setattr(
    slots.Slots,
    "_queue",
    lambda self, done, robust, running, old=slots.Slots._queue: (
      loads.append(running),
      old(self, done, robust, running),
    )[1],
  )
  found = _autoattack("sound", state_path=path)
  assert any(run[0] >= 0 for run in loads[0])  # it did go on
  np.testing.assert_array_equal(found.adversarial, _sound_result().adversarial)


def test_a_claimed_image_that_scores_not_finite_is_not_fooled(monkeypatch):
  expected = _sound_result()
  score, judge = diagnostics.Scorer.__call__, rng.stream(KEY, "judge apgd-ce")
  spoilt = []

  def spoil(self, images, batch_size, key):
    logits = score(self, images, batch_size, key)
    if (jax.random.key_data(key) == jax.random.key_data(judge)).all():
      logits[0] = np.nan
      spoilt.append(images[0])
    return logits

  monkeypatch.setattr(diagnostics.Scorer, "__call__", spoil)
  with nonfinite.collect() as counts:
    found = _autoattack("sound", version=("apgd-ce",))
  row = int((expected.adversarial == spoilt[0]).all((1, 2, 3)).argmax())
  assert found.robust[row] and not expected.robust[row]
  assert found.robust_accuracy["apgd-ce"] == found.robust.mean()
  images = np.asarray(_problem("sound")[1])
  np.testing.assert_array_equal(found.adversarial[row], images[row])
  assert "1 adversarial image" in found.diagnostics["nonfinite"]["message"]
  assert (counts.points, counts.gradients) == (1, 0)


def _scaled(scale: Any, weights: Any, images: jax.Array) -> jax.Array:
  return scale * (images.reshape(len(images), -1) @ weights)


def test_a_loss_that_the_scale_blinds_is_told():
  """And the number is too high: another loss shows it."""
  (weights, _), images, labels, _ = (
    _problem("sound")[0].args,
    *_problem("sound")[1:],
  )
  arguments = dict(epsilon=0.3, progress=False, batch_size=8)
  accuracies = {}
  for scale in (1.0, 1e4):
    classifier = Partial(_scaled, jnp.float32(scale), weights)
    for name in ("apgd-ce", "apgd-t"):
      found = attacks.autoattack(
        KEY,
        classifier,
        images,
        labels,
        version=[name],
        options={name: {"num_steps": 10}},
        **arguments,
      )
      accuracies[name, scale] = found.accuracy
      warned = [text for text in found.warnings if "cross_entropy" in text]
      assert len(warned) == (name == "apgd-ce" and scale > 1)
    if scale > 1:
      assert "blind_targeted_dlr" in found.diagnostics
  assert accuracies["apgd-ce", 1e4] > accuracies["apgd-t", 1e4]
  assert accuracies["apgd-ce", 1.0] == accuracies["apgd-t", 1.0]
