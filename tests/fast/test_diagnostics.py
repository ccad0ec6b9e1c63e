"""Signs seen from a classifier alone: each rule by numpy, on both sides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnostic import check
from jax.tree_util import Partial

from atat_jax import models, sharding
from atat_jax.attacks import base, diagnostics

KEY = jax.random.key(11)
LABELS = np.array([0, 1, 2, 0], np.int32)


def made(seed=0, shape=(4, 3)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- Randomised --------------------------------------------------------------


@pytest.mark.parametrize(("angle", "flag"), [(0.8e-4, False), (1.3e-4, True)])
def test_logits_that_turn_are_randomised(angle, flag):
  """Logits of any length are scaled to 1; the largest pair of looks counts."""
  first = np.array([[3.0, 0.0], [0.0, 5.0]])
  turned = first.copy()
  turned[1] = 2 * np.array([np.sin(angle), np.cos(angle)])
  for looks in ([first, first, turned], [turned, first, first]):
    found = diagnostics.randomized(looks, np.array([0, 1]))
    check(found, flag, 2 * np.sin(angle / 2))
  assert ("version='rand'" in found["message"]) is flag


def test_another_number_of_correct_answers_is_randomised():
  """However close the logits are."""
  a, b = np.array([[1.0, 1.0 + 1e-6]]), np.array([[1.0 + 1e-6, 1.0]])
  check(diagnostics.randomized([a, b], np.array([1])), True)
  check(diagnostics.randomized([a, a], np.array([1])), False, 0.0)
  # Both are right as often where the label is neither.
  three = [np.pad(x, ((0, 0), (0, 1))) for x in (a, b)]
  check(diagnostics.randomized(three, np.array([2])), False)


# --- Probabilities -----------------------------------------------------------


def _softmax(logits):
  shares = np.exp(logits)
  return shares / shares.sum(-1, keepdims=True)


def test_softmax_outputs_are_probabilities():
  check(diagnostics.probabilities(_softmax(made())), True, 0.0)
  check(diagnostics.probabilities(np.eye(3)), True, 0.0)
  logits = made()
  off = np.abs(logits.sum(-1) - 1).max()
  check(diagnostics.probabilities(logits), False, off)
  check(diagnostics.probabilities(np.log(_softmax(logits))), False)


@pytest.mark.parametrize(
  ("row", "flag"),
  [
    ([0.4, 0.6 + 0.9e-5], True),  # the sum
    ([0.4, 0.6 + 1.1e-5], False),
    ([-0.9e-5, 1 + 0.9e-5], True),  # below 0
    ([-1.1e-5, 1.0], False),
    ([0.5, 1.5], False),
    ([0.5, 0.2], False),
    ([2.0, -1.0], False),  # the sum is 1, the range is not
  ],
)
def test_tolerances_of_probabilities(row, flag):
  rows = np.array([[0.3, 0.7], row])
  off = abs(sum(row) - 1)
  check(diagnostics.probabilities(rows), flag, off)


# --- Classes -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("classes", "named"),
  [
    (10, []),
    (9, ["t:"]),
    (4, ["t:"]),
    (3, ["t:", "t: the DLR"]),
    (2, ["t:", "t: the DLR", "d"]),
  ],
)
def test_numbers_of_classes(classes, named):
  found = diagnostics.num_classes(classes, {"d": 3, "t": 4}, {"t": 9})
  check(found, bool(named), classes)
  without = [name for name, needs in (("d", 3), ("t", 4)) if classes < needs]
  assert ("DLR" in found["message"]) is bool(without)
  assert found["message"].startswith(", ".join(without))
  if named:
    assert f"t: only {classes - 1} classes" in found["message"]


# --- Gradients ---------------------------------------------------------------


def _partly_blind(kind, images):
  """An image brighter than 0.5 has no gradient, or one that is no number."""
  value = images.mean((1, 2, 3))
  bright = value > 0.5
  if kind == "zero":
    other = jnp.where(bright, 0.0, value)
  else:  # sqrt has no derivative at 0
    other = jnp.sqrt(jnp.where(bright, 0.0, value) * value)
  return jnp.stack([other, jnp.zeros_like(other)], 1)


@pytest.mark.parametrize("kind", ["zero", "nan"])
@pytest.mark.parametrize("num_bright", [0, 1, 3])
def test_images_without_gradient_are_counted(kind, num_bright):
  images = np.full((4, 2, 2, 1), 0.3, np.float32)
  images[:num_bright] = 0.7
  classifier = base.as_pytree(functools.partial(_partly_blind, kind))
  found = diagnostics.zero_gradients(
    KEY, classifier, images, np.zeros(4, int), radius=0.1
  )
  check(found, num_bright > 0, num_bright / 4)
  if num_bright:
    assert found["message"].startswith(f"{num_bright} of 4 images")


def _flat_at_the_image(centre, images):
  delta = images - centre
  value = jnp.square(delta).sum((1, 2, 3))
  return jnp.stack([value, -value], 1)


def test_gradients_are_taken_at_random_starts():
  """Where the gradient is 0 at the image itself, attacks are not blind."""
  images = np.full((4, 2, 2, 1), 0.5, np.float32)
  classifier = Partial(_flat_at_the_image, jnp.asarray(images))
  labels = np.zeros(4, int)
  found = diagnostics.zero_gradients(
    KEY, classifier, images, labels, radius=0.1
  )
  check(found, False, 0.0)


# --- Square after the others -------------------------------------------------


@pytest.mark.parametrize(
  ("last", "flag"), [(0.5, False), (0.498, False), (0.4979, True), (0, True)]
)
def test_square_that_finds_more_is_a_sign_of_masking(last, flag):
  accuracies = {"clean": 0.9, "apgd-ce": 0.6, "apgd-t": 0.5, "square": last}
  found = diagnostics.masking(accuracies)
  check(found, flag, 0.5 - last)
  assert ("masked" in found["message"]) is flag


def test_masking_needs_an_attack_before_square():
  for names in (("clean", "apgd-ce"), ("clean", "square"), ("clean",)):
    assert diagnostics.masking(dict.fromkeys(names, 0.5)) is None
  assert diagnostics.masking(dict.fromkeys(("clean", "fab-t", "square"), 0.5))


# --- Batches -----------------------------------------------------------------


def test_the_scorer_is_a_plain_loop_over_full_batches():
  """The last batch is filled up from the first images."""

  def relative(images):
    means = images.mean((1, 2, 3))
    return jnp.stack([means, means - means.mean()], 1)

  images = np.random.default_rng(0).uniform(size=(7, 2, 3, 1))
  images = images.astype(np.float32)
  score = diagnostics.Scorer(Partial(relative), sharding.make_mesh())
  means = images.mean((1, 2, 3), np.float64)
  for size in (1, 3, 7, 8):
    expected = np.empty((7, 2))
    for first in range(0, 7, size):
      batch = means[np.arange(first, first + size) % 7]
      rows = np.stack([batch, batch - batch.mean()], 1)[: 7 - first]
      expected[first : first + size] = rows
    np.testing.assert_allclose(score(images, size, KEY), expected, atol=1e-6)


def test_the_scorer_gives_each_batch_its_own_random_numbers():
  noisy = base.Randomized(
    Partial(lambda key, x: jax.random.normal(key, (len(x), 2)))
  )
  score = diagnostics.Scorer(noisy, sharding.make_mesh())
  images = np.zeros((6, 1, 1, 1), np.float32)
  one, same = score(images, 2, KEY), score(images, 2, KEY)
  np.testing.assert_array_equal(one, same)
  assert len(np.unique(one)) == 12
  assert not np.isin(score(images, 2, jax.random.key(12)), one).any()


IMAGES = np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1) / 10


class Predict:
  """Logits [x, 1 - x, 0], and `shift` more where the batch size is `moved`."""

  def __init__(self, shift=0.0, moved=2):
    self.shift, self.moved, self.seen = shift, moved, []

  def __call__(self, images, batch_size, key):
    self.seen.append((images.reshape(-1), batch_size))
    x = images.reshape(-1, 1) + self.shift * (batch_size == self.moved)
    return np.concatenate([x, 1 - x, 0 * x], 1)


@pytest.mark.parametrize(
  ("shift", "flag"), [(0.0, False), (0.0085, False), (0.0095, True)]
)
def test_logits_that_depend_on_the_batch(shift, flag):
  """Relative to the largest logit, 0.9: the threshold is at 0.009."""
  predict = Predict(shift)
  logits = predict(IMAGES, 4, KEY)
  found = diagnostics.batch_dependence(
    KEY, predict, IMAGES, logits, batch_size=4
  )
  check(found, flag, shift / 0.9)
  # As many as a batch, others than the first batch's, half at a time.
  images, size = predict.seen[-1]
  assert len(images) == 4 and size == 2
  assert set(images) != set(IMAGES[:4].reshape(-1))


def test_predictions_that_move_are_counted():
  predict = Predict(0.45)
  logits = predict(IMAGES, 4, KEY)
  found = diagnostics.batch_dependence(
    KEY, predict, IMAGES, logits, batch_size=4
  )
  moved = predict.seen[-1][0]  # from below 0.5 to above
  number = (moved < 0.5).sum()
  assert number and f"({number} of 4 predictions change)" in found["message"]


@pytest.mark.parametrize(
  ("count", "moved", "flag"),
  [(8, 0, False), (8, 1, False), (8, 2, True), (300, 3, False), (300, 4, True)],
)
def test_predictions_that_move_are_seen_beside_a_large_logit(
  count, moved, flag
):
  """Relative to a logit of 100 the change of the others is small."""
  images = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)

  def predict(images, batch_size, key):
    del key
    number = images.reshape(-1)
    value = np.where((batch_size == count) | (number >= moved), 0.4, -0.4)
    return np.stack([value, 0 * value, 0 * value - 100], 1)

  logits = predict(images, count, KEY)
  found = diagnostics.batch_dependence(
    KEY, predict, images, logits, batch_size=count
  )
  check(found, flag, 0.008 * (moved > 0))


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_batch_norm_by_the_batch_is_seen(small, mode):
  images = np.random.default_rng(0).uniform(size=(16, *small.images.shape[1:]))
  images = images.astype(np.float32)
  mesh = sharding.make_mesh(jax.devices()[:1])
  predict = diagnostics.Scorer(
    models.classifier(small.model, small.variables, batch_norm=mode), mesh
  )
  logits = predict(images, 8, KEY)
  found = diagnostics.batch_dependence(
    KEY, predict, images, logits, batch_size=8
  )
  check(found, mode == "batch")


@pytest.mark.parametrize(
  ("count", "differ", "flag"),
  [
    (1000, 0, False),
    (1000, 1, False),
    (1000, 2, True),  # of one kind the accuracy moves by 0.002
    (100, 1, True),
    (5000, 5, False),
    (5000, 6, True),
  ],
)
def test_images_that_score_otherwise(count, differ, flag):
  robust = np.arange(count) % 2 == 0
  claims = robust.copy()
  claims[: 2 * differ : 2] = False
  found, seen = _rescored(robust, claims)
  check(found, flag, differ / count)
  assert (f"({differ} image" in found["message"]) is bool(differ)
  assert not np.array_equal(seen, np.arange(count))
  np.testing.assert_array_equal(np.sort(seen), np.arange(count))


@pytest.mark.parametrize(("pairs", "flag"), [(5, False), (6, True)])
def test_differences_that_cancel_are_seen(pairs, flag):
  """Of 5000: the accuracy is the same, 0.2 % of the images may differ."""
  robust = np.arange(5000) % 2 == 0
  claims = robust.copy()
  claims[: 2 * pairs] = ~claims[: 2 * pairs]  # as many one way as the other
  check(_rescored(robust, claims)[0], flag, 0.0)


def _rescored(robust, claims):
  """Images whose only pixel is their number, and who is robust in truth."""
  count, seen = len(robust), []

  def predict(images, batch_size, key):
    assert batch_size == 3
    rows = np.round(images.reshape(-1) * count).astype(int)
    seen.extend(rows)
    return np.eye(2)[np.where(robust[rows], 0, 1)]

  images = (np.arange(count) / count).reshape(-1, 1, 1, 1)
  found = diagnostics.rescored(
    KEY, predict, images, np.zeros(count, int), claims, batch_size=3
  )
  return found, np.array(seen)
