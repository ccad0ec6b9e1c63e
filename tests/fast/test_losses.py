"""Losses against numpy in float64, and where their gradients are delicate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from atat_jax import losses
from atat_jax.errors import UserError

BATCH, CLASSES = 6, 5


@functools.cache
def _compiled(loss):
  def total(logits, *rest):
    values = loss(logits, *rest)
    return values.sum(), values

  return quick.jit(jax.value_and_grad(total, has_aux=True))


def _value_and_gradient(loss, logits, *rest):
  (_, values), gradient = _compiled(loss)(logits, *rest)
  return np.asarray(values), np.asarray(gradient)


@pytest.fixture
def batch(x64):
  generator = np.random.default_rng(0)
  logits = 3 * generator.normal(size=(BATCH, CLASSES))
  return logits, generator.integers(0, CLASSES, BATCH).astype(np.int32)


def _softmax(logits: np.ndarray) -> np.ndarray:
  exponentials = np.exp(logits - logits.max(-1, keepdims=True))
  return exponentials / exponentials.sum(-1, keepdims=True)


def test_cross_entropy_and_its_gradient(batch):
  logits, labels = batch
  softmax = _softmax(logits)
  expected = -np.log(softmax[np.arange(BATCH), labels])
  values, gradient = _value_and_gradient(losses.cross_entropy, logits, labels)
  np.testing.assert_allclose(values, expected, rtol=1e-12)
  np.testing.assert_allclose(
    gradient, softmax - np.eye(CLASSES)[labels], atol=1e-12
  )


def test_soft_cross_entropy_and_its_gradient(batch):
  logits, labels = batch
  softmax = _softmax(logits)
  one_hot = np.eye(CLASSES)[labels]
  for targets in (one_hot, 0.7 * one_hot + 0.3 * one_hot[::-1]):
    values, gradient = _value_and_gradient(
      losses.soft_cross_entropy, logits, targets
    )
    np.testing.assert_allclose(
      values, -(targets * np.log(softmax)).sum(-1), rtol=1e-12
    )
    np.testing.assert_allclose(gradient, softmax - targets, atol=1e-12)


def test_cross_entropy_of_extreme_logits():
  logits = np.array([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]], np.float32)
  values, gradient = _value_and_gradient(
    losses.cross_entropy, logits, np.array([0, 2], np.int32)
  )
  np.testing.assert_allclose(values, [0, 2e4])
  np.testing.assert_allclose(gradient, [[0, 0, 0], [1, 0, -1]])


def test_margin_and_its_gradient(batch):
  logits, labels = batch
  expected, gradient = [], np.zeros_like(logits)
  for i, (row, label) in enumerate(zip(logits, labels, strict=True)):
    others = [k for k in range(CLASSES) if k != label]
    best = max(others, key=lambda k: row[k])
    expected.append(row[best] - row[label])
    gradient[i, best], gradient[i, label] = 1, -1
  values, actual = _value_and_gradient(losses.margin, logits, labels)
  np.testing.assert_allclose(values, expected)
  np.testing.assert_array_equal(actual, gradient)


def test_margin_is_positive_exactly_where_fooled(batch):
  logits, _ = batch
  best = logits.argmax(-1)
  fooled = np.arange(BATCH) % 2 == 0
  labels = np.where(fooled, (best + 1) % CLASSES, best)
  values, _ = _value_and_gradient(
    losses.margin, logits, labels.astype(np.int32)
  )
  np.testing.assert_array_equal(values > 0, fooled)


def test_margin_with_two_classes_is_finite():
  values, _ = _value_and_gradient(
    losses.margin, np.float32([[2, -1]]), np.zeros(1, np.int32)
  )
  assert values.tolist() == [-3.0]


# Difference of logits ratio: by the label's place among the logits, 0 the top.

PLACES = pytest.mark.parametrize("place", [0, 1, 2, 3, CLASSES - 1])


def _ranked(place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Distinct logits, their classes from the top down, labels at a place."""
  generator = np.random.default_rng(place)
  logits = 3 * generator.normal(size=(BATCH, CLASSES))
  order = np.argsort(logits, axis=-1)[:, ::-1]
  return logits, order, order[:, place].astype(np.int32)


def _unit(classes: np.ndarray) -> np.ndarray:
  return np.eye(CLASSES)[classes]


@PLACES
def test_dlr_and_its_gradient(place, x64):
  logits, order, labels = _ranked(place)
  ordered = np.sort(logits, axis=-1)[:, ::-1]
  top, third = ordered[:, 0], ordered[:, 2]
  other = ordered[:, 1] if place == 0 else top
  difference, scale = other - logits[np.arange(BATCH), labels], top - third
  expected = difference / (scale + 1e-12)
  values, gradient = _value_and_gradient(losses.dlr, logits, labels)
  np.testing.assert_allclose(values, expected, rtol=1e-12)
  d_difference = _unit(order[:, 1 if place == 0 else 0]) - _unit(labels)
  d_scale = _unit(order[:, 0]) - _unit(order[:, 2])
  np.testing.assert_allclose(
    gradient,
    (d_difference - expected[:, None] * d_scale) / scale[:, None],
    rtol=1e-9,
    atol=1e-12,
  )
  # Right: negative, at least -1. Wrong: positive, 1 where it is third.
  if place == 0:
    assert ((expected < 0) & (expected >= -1)).all()
  elif place == 2:
    np.testing.assert_allclose(expected, 1)
  else:
    assert (expected > 0).all()


@PLACES
@pytest.mark.parametrize("target_place", [0, 1, 2, 3, CLASSES - 1])
def test_targeted_dlr_and_its_gradient(place, target_place, x64):
  logits, order, labels = _ranked(place)
  targets = order[:, target_place].astype(np.int32)
  ordered = np.sort(logits, axis=-1)[:, ::-1]
  scale = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
  rows = np.arange(BATCH)
  difference = logits[rows, targets] - logits[rows, labels]
  expected = difference / (scale + 1e-12)
  values, gradient = _value_and_gradient(
    losses.targeted_dlr, logits, labels, targets
  )
  np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-15)
  d_scale = _unit(order[:, 0]) - (_unit(order[:, 2]) + _unit(order[:, 3])) / 2
  d_difference = _unit(targets) - _unit(labels)
  np.testing.assert_allclose(
    gradient,
    (d_difference - expected[:, None] * d_scale) / scale[:, None],
    rtol=1e-9,
    atol=1e-12,
  )


def test_targeted_margin_and_its_gradient(batch):
  logits, labels = batch
  targets = (labels + 1 + np.arange(BATCH) % (CLASSES - 1)) % CLASSES
  rows = np.arange(BATCH)
  expected = logits[rows, targets] - logits[rows, labels]
  values, gradient = _value_and_gradient(
    losses.targeted_margin, logits, labels, targets.astype(np.int32)
  )
  np.testing.assert_array_equal(values, expected)
  np.testing.assert_array_equal(gradient, _unit(targets) - _unit(labels))


@pytest.mark.parametrize("name", ["dlr", "targeted_dlr"])
def test_no_scale_or_shift_of_the_logits_changes_a_ratio(name, batch):
  logits, labels = batch
  targets = (labels + 1) % CLASSES

  def loss(z):
    if name == "dlr":
      return _value_and_gradient(losses.dlr, z, labels)[0]
    return _value_and_gradient(losses.targeted_dlr, z, labels, targets)[0]

  expected = loss(logits)
  for scale, shift in ((1e-3, 0.0), (50.0, 0.0), (1.0, 100.0), (7.0, -3.0)):
    np.testing.assert_allclose(
      loss(scale * logits + shift), expected, rtol=1e-8
    )
  # The margin is no ratio.
  assert not np.allclose(losses.margin(2 * logits, labels), expected)


def test_ratios_of_equal_logits_are_finite():
  logits, zeros = np.zeros((2, 5), np.float32), np.zeros(2, np.int32)
  for values, gradient in (
    _value_and_gradient(losses.dlr, logits, zeros),
    _value_and_gradient(losses.targeted_dlr, logits, zeros, zeros + 1),
  ):
    assert (values == 0).all() and np.isfinite(gradient).all()


def test_ratios_of_as_few_classes_as_there_may_be():
  """3 for dlr, 4 for the targeted one; fewer are refused by the attacks."""
  assert losses.MIN_CLASSES == {"dlr": 3, "targeted_dlr": 4}
  label, logits = np.array([0], np.int32), np.float32([[4, 3, 2, 0]])
  value, _ = _value_and_gradient(losses.dlr, logits[:, :3], label)
  assert value.tolist() == [-0.5]
  value, _ = _value_and_gradient(losses.targeted_dlr, logits, label, label + 3)
  np.testing.assert_allclose(value, -4 / 3, rtol=1e-6)
  assert set(losses.MIN_CLASSES) <= {
    *losses.ATTACK_LOSSES,
    *losses.TARGETED_LOSSES,
  }


@pytest.mark.parametrize("name", losses.ATTACK_LOSSES)
def test_attack_losses_are_per_example(name, batch):
  """[B] out, examples apart, higher where the label's logit is lower."""
  loss = quick.jit(losses.ATTACK_LOSSES[name])
  logits, labels = batch
  values = loss(logits, labels)
  assert values.shape == (BATCH,)
  order = np.random.default_rng(1).permutation(BATCH)
  np.testing.assert_allclose(loss(logits[order], labels[order]), values[order])
  np.testing.assert_allclose(loss(logits[2:3], labels[2:3]), values[2:3])
  weaker = logits - np.eye(CLASSES)[labels]
  raised = loss(weaker, labels)
  if name == "dlr":  # is 1 wherever the label is third
    alike = np.isclose(values, 1) & np.isclose(raised, 1)
    assert not alike.all()
    raised = np.where(alike, np.inf, raised)
  assert (raised > values).all()


@pytest.mark.parametrize("name", losses.TARGETED_LOSSES)
def test_targeted_losses_are_per_example(name, batch):
  """[B] out, examples apart, higher where the target's logit is higher."""
  loss = quick.jit(losses.TARGETED_LOSSES[name])
  logits, labels = batch
  targets = (labels + 2) % CLASSES
  values = loss(logits, labels, targets)
  assert values.shape == (BATCH,)
  order = np.random.default_rng(1).permutation(BATCH)
  np.testing.assert_allclose(
    loss(logits[order], labels[order], targets[order]), values[order]
  )
  closer = logits + 1e-3 * np.eye(CLASSES)[targets]
  if name == "targeted_margin":
    assert (loss(closer, labels, targets) > values).all()


@pytest.mark.parametrize("p", [1, 2])
def test_distance_and_its_gradient(p, x64):
  generator = np.random.default_rng(0)
  a, b = generator.normal(size=(2, 4, 3, 2))
  difference = (a - b).reshape(4, -1)
  expected = np.linalg.norm(difference, ord=p, axis=1)
  values, gradient = _value_and_gradient(
    functools.partial(losses.distance, p=p), a, b
  )
  np.testing.assert_allclose(values, expected, rtol=1e-12)
  by_hand = np.sign(a - b)
  if p == 2:
    by_hand = (a - b) / expected[:, None, None]
  np.testing.assert_allclose(gradient, by_hand, rtol=1e-12)


def test_distance_is_the_norm_and_not_its_square():
  a, zeros = np.float32([[3, 4]]), np.zeros((1, 2), np.float32)
  distance = quick.jit(losses.distance, static_argnames="p")
  assert distance(a, zeros).tolist() == [5.0]
  assert distance(a, zeros, p=1).tolist() == [7.0]


@pytest.mark.parametrize("p", [1, 2])
def test_gradient_at_distance_zero_is_zero(p):
  """One example at zero, one that is not: neither spoils the other."""
  a, b = np.float32([[1, 2], [3, 4]]), np.float32([[1, 2], [0, 0]])
  values, gradient = _value_and_gradient(
    functools.partial(losses.distance, p=p), a, b
  )
  assert values.sum() == (7.0 if p == 1 else 5.0)
  expected = [[0, 0], [1, 1] if p == 1 else [0.6, 0.8]]
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_tiny_distances_do_not_underflow_into_nan():
  a = np.full((1, 4), 1e-25, np.float32)  # its square is no float32
  value, gradient = _value_and_gradient(losses.norm, a)
  assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize(
  "call",
  [
    lambda: losses.cross_entropy(jnp.zeros((3, 2)), jnp.zeros(2, jnp.int32)),
    lambda: losses.margin(jnp.zeros((3, 2)), jnp.zeros(2, jnp.int32)),
    lambda: losses.dlr(jnp.zeros((3, 4)), jnp.zeros(1, jnp.int32)),
    lambda: losses.targeted_dlr(
      jnp.zeros((3, 4)), jnp.zeros(3, jnp.int32), jnp.zeros(1, jnp.int32)
    ),
    lambda: losses.targeted_margin(
      jnp.zeros((3, 4)), jnp.zeros(1, jnp.int32), jnp.zeros(3, jnp.int32)
    ),
    lambda: losses.distance(jnp.zeros((3, 2)), jnp.zeros((3, 1))),
  ],
  ids=[
    "cross_entropy",
    "margin",
    "dlr",
    "targeted_dlr",
    "targeted_margin",
    "distance",
  ],
)
def test_shapes_that_would_broadcast_are_refused(call):
  with pytest.raises(UserError):
    jax.eval_shape(call)
