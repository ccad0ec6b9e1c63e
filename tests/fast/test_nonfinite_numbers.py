"""Numbers that are not finite: counting, telling, and checks that see them."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnostic import check
from jax.tree_util import Partial

from atat_jax import losses, sharding
from atat_jax.attacks import balls, diagnostics, nonfinite
from atat_jax.errors import NonFiniteWarning, UserError

KEY = jax.random.key(2)
NAN, INF = np.nan, np.inf
BAD_ROWS = [[NAN, 1, 2], [INF, 1, 2], [1, -INF, 2], [NAN, INF, -INF]]


# Counting.


@pytest.mark.parametrize("row", BAD_ROWS)
def test_logits_that_are_not_finite_are_no_prediction(row):
  """Whatever argmax makes of them."""
  logits = np.array([row, [0, 1, 2]], np.float32)
  for label in range(3):
    labels = np.array([label, label])
    right = diagnostics.correct(logits, labels)
    wrong = nonfinite.misses(jnp.asarray(logits), jnp.asarray(labels))
    assert right.tolist() == [False, label == 2]
    assert wrong.tolist() == [False, label != 2]


def test_points_and_gradients_are_counted_once_each():
  usable = jnp.array([True, True, False, False])
  gradient = np.zeros((4, 2, 1, 1))
  gradient[1, 0], gradient[2] = INF, NAN
  points, gradients = nonfinite.count(usable, jnp.asarray(gradient))
  assert points.tolist() == [0, 0, 1, 1]
  assert gradients.tolist() == [0, 1, 0, 0]  # of a bad point nothing is said
  assert [int(x) for x in nonfinite.total((points, gradients))] == [2, 1]
  clean = nonfinite.clean(jnp.array([NAN, INF, -INF, 3.0, -0.0]))
  assert clean.tolist() == [0, 0, 0, 3, 0]


# Telling.


def test_counts_are_gathered_where_they_are_asked_for():
  with nonfinite.collect() as outer:
    nonfinite.report("one", jnp.int32(2), 1)
    with nonfinite.collect() as inner:
      nonfinite.report("two", 5, jnp.int32(0))
    nonfinite.report("three", jnp.int32(1), 0)
  assert (outer.points, outer.gradients) == (3, 1)
  assert (outer.points, outer.gradients) == (3, 1)  # reading changes nothing
  assert (inner.points, inner.gradients) == (5, 0)
  with pytest.warns(NonFiniteWarning, match="^four: 2 evaluations "):
    nonfinite.report("four", 2, 0)  # after the block as before it


def test_a_block_that_fails_gathers_no_longer():
  with pytest.raises(KeyError), nonfinite.collect():
    raise KeyError
  with pytest.warns(NonFiniteWarning):
    nonfinite.report("pgd", 1, 0)


def test_what_is_finite_or_traced_is_not_told():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    nonfinite.report("pgd", jnp.int32(0), 0)
    jax.jit(lambda n: nonfinite.report("pgd", n, n))(3)
    with nonfinite.collect() as found:
      jax.jit(lambda n: nonfinite.report("pgd", n, 0))(3)
  assert found.points == found.gradients == 0


# Steps.


@pytest.mark.parametrize("norm", balls.BALLS)
@pytest.mark.parametrize("exponent", [-36, -25, -13, 0, 13, 25, 37])
def test_steps_have_one_length_whatever_the_gradients(norm, exponent):
  """By numpy in float64, whose range is enough."""
  small = np.random.default_rng(0).normal(size=(3, 4, 4, 1))
  small[2] = 0
  gradient = jnp.asarray(small * 10.0**exponent, jnp.float32)
  step = np.asarray(balls.BALLS[norm].direction(gradient), np.float64)
  wide = np.asarray(gradient, np.float64)
  flat = wide[:2].reshape(2, -1)
  if norm == "linf":
    expected = np.sign(flat)
  elif norm == "l2":
    expected = flat / np.linalg.norm(flat, axis=1, keepdims=True)
  else:
    steepest = np.abs(flat).max(1, keepdims=True)
    expected = np.sign(flat) * (np.abs(flat) == steepest)
  np.testing.assert_allclose(step[:2].reshape(2, -1), expected, rtol=2e-6)
  assert (step[2] == 0).all()


@pytest.mark.parametrize("exponent", [0, 12, 25, 37])
def test_the_l2_projection_of_what_is_far_away(exponent):
  delta = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
  far = jnp.asarray(delta * 10.0**exponent, jnp.float32)
  images = jnp.full(delta.shape, 0.5)
  found = balls.BALLS["l2"].project(far, images, 0.25)
  length = np.linalg.norm(delta.reshape(2, -1), axis=1).reshape(2, 1, 1, 1)
  np.testing.assert_allclose(found, 0.25 * delta / length, rtol=1e-5)


def test_equal_logits_have_a_finite_ratio():
  logits = jnp.array([[2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 3.0, 3.0]])
  labels = jnp.array([0, 0])
  for name in (*losses.ATTACK_LOSSES, *losses.TARGETED_LOSSES):
    value, slope = jax.jit(
      jax.value_and_grad(
        lambda z, name=name: losses.attack_loss(
          name, z, labels, jnp.array([1, 1])
        ).sum()
      )
    )(logits)
    assert np.isfinite(value) and np.isfinite(slope).all(), name


# Checks that see what is not finite.


def _bad(logits, rows):
  logits = np.array(logits, np.float32)
  logits[rows, 0] = NAN
  return logits


def test_every_check_of_logits_is_flagged_where_it_cannot_judge():
  logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
  labels = logits.argmax(-1).astype(np.int32)
  images = np.zeros((5, 1, 1, 1), np.float32)
  images[:, 0, 0, 0] = np.arange(5) / 5

  def predict(table):
    def by_number(images, batch_size, key):
      del batch_size, key
      return table[np.round(images.reshape(-1) * 5).astype(int)]

    return by_number

  for rows in ([], [3], [0, 1, 2, 3, 4]):
    bad = _bad(logits, rows)
    flag = bool(rows)
    robust = diagnostics.correct(bad, labels)
    found = {
      "randomized": diagnostics.randomized([bad, bad], labels),
      "probabilities": diagnostics.probabilities(bad),
      "batch_dependence": diagnostics.batch_dependence(
        KEY, predict(bad), images, bad, batch_size=5
      ),
      "rescored": diagnostics.rescored(
        KEY, predict(bad), images, labels, robust, batch_size=2
      ),
    }
    for name, one in found.items():
      check(one, flag)
      assert (f"{len(rows)} of 5 images left out" in one["message"]) is flag
      assert one["title"].endswith("finite") is flag, name


def test_logits_that_are_finite_at_times_only_differ():
  logits = np.ones((4, 3), np.float32)
  labels = np.zeros(4, np.int32)
  found = diagnostics.randomized([logits, _bad(logits, [2])], labels)
  check(found, True)
  assert "randomised" in found["message"]

  def predict(images, batch_size, key):
    del key
    return _bad(logits, [1])[: len(images)] if batch_size == 2 else logits

  images = np.zeros((4, 1, 1, 1), np.float32)
  found = diagnostics.batch_dependence(
    KEY, predict, images, logits, batch_size=4
  )
  check(found, True)
  assert "(1 of 4 predictions change)" in found["message"]


def test_logits_whose_squares_overflow_are_compared():
  logits = np.array([[1e30, 2e30], [3.0, 4.0]], np.float32)
  other = logits[:, ::-1]
  labels = np.zeros(2, np.int32)
  check(diagnostics.randomized([logits, logits], labels), False, 0.0)
  found = diagnostics.randomized([logits, other[:1].repeat(2, 0)], labels)
  check(found, True)


def test_a_value_that_is_no_number_is_flagged_and_can_be_stored():
  for value in (NAN, INF, -INF):
    found = diagnostics.diagnostic(
      False, flagged=("a", "b."), passed=("c", "d."), rule="r", value=value
    )
    check(found, True)
    assert found["title"] == "a"
    json.loads(json.dumps(found, allow_nan=False))
  accuracies = {"clean": 1.0, "apgd-ce": 0.5, "square": NAN}
  check(diagnostics.masking(accuracies), True)


@pytest.mark.parametrize("field", ["clean", "judged", "points", "gradients"])
def test_what_was_not_finite_is_told_by_kind(field):
  counts = dict.fromkeys(("clean", "judged", "points", "gradients"), 0)
  check(diagnostics.finite_numbers(**counts), False, 0.0)
  found = diagnostics.finite_numbers(**counts | {field: 12})
  check(found, True, 12.0)
  assert "12 " in found["message"]


# Losses that see nothing.


def _steep(scale, images):
  """Margins of 1, 2, 3, ... times the scale, by the first pixel."""
  x = images.reshape(len(images), -1)
  score = scale * (jnp.round(x[:, 0] * 16) + 0.1 * (x[:, 1:] - 0.5).sum(-1))
  low = jnp.full_like(score, -2000.0 * scale)
  return jnp.stack([score / 2, -score / 2, low, low], -1)


def _scored(scale, loss):
  images = np.full((8, 1, 2, 2), 0.5, np.float32)
  images[:, 0, 0, 0] = np.arange(1, 9) / 16
  return diagnostics.blind_loss(
    KEY,
    Partial(_steep, jnp.float32(scale)),
    images,
    np.zeros(8, np.int32),
    loss=loss,
    radius=0.001,
  )


@pytest.mark.parametrize(
  ("scale", "gone", "lost"),
  # In float32 a softmax is 1 from a margin of about 16.6 on, and exp(-x) is 0
  # from about 88 (or 103) on.
  [(1.0, 0, 0), (3.0, 0, 3), (60.0, 7, 1), (1e4, 8, 0)],
)
def test_cross_entropy_is_blind_where_the_softmax_saturates(scale, gone, lost):
  found = _scored(scale, "cross_entropy")
  check(found, gone + lost > 0, (gone + lost) / 8)
  assert ("cross_entropy" in found["message"]) and "cross" in found["title"]
  assert (f"no gradient at {gone} of 8 images" in found["message"]) is (
    gone > 0
  )
  assert (f"saturated at {lost} of 8 images" in found["message"]) is (lost > 0)


@pytest.mark.parametrize("loss", ["margin", "dlr", "targeted_dlr"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_losses_without_a_softmax_do_not_saturate(loss, scale):
  check(_scored(scale, loss), False, 0.0)


def test_an_unknown_loss_has_no_diagnostic():
  with pytest.raises(UserError, match=r"^loss: 'kl'; allowed: "):
    _scored(1.0, "kl")


def test_every_loss_of_an_ensemble_is_looked_at_in_one_program():
  images = np.full((8, 1, 2, 2), 0.5, np.float32)
  classifier = Partial(_steep, jnp.float32(1e4))
  predict = diagnostics.Scorer(
    classifier, sharding.make_mesh(jax.devices()[:1])
  )
  logits = predict(images, 8, KEY)
  found = diagnostics.diagnose_classifier(
    KEY,
    classifier,
    predict,
    images,
    np.zeros(8, np.int32),
    logits,
    batch_size=8,
    radius=0.001,
    attack_losses=("cross_entropy", "targeted_dlr", "margin"),
  )
  assert [name for name in found if name.startswith("blind")] == [
    "blind_cross_entropy",
    "blind_targeted_dlr",
  ]
  check(found["blind_cross_entropy"], True, 1.0)
  check(found["blind_targeted_dlr"], False, 0.0)
  check(found["zero_gradients"], False, 0.0)
