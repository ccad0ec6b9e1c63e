"""Losses against numpy in float64, and where their gradients are delicate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import losses

BATCH, CLASSES = 6, 5


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
  np.testing.assert_allclose(
    losses.cross_entropy(logits, labels), expected, rtol=1e-12
  )
  gradient = jax.grad(lambda z: losses.cross_entropy(z, labels).sum())(logits)
  np.testing.assert_allclose(
    gradient, softmax - np.eye(CLASSES)[labels], atol=1e-12
  )


def test_cross_entropy_of_extreme_logits():
  logits = jnp.array([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]])
  labels = jnp.array([0, 2])
  np.testing.assert_allclose(losses.cross_entropy(logits, labels), [0, 2e4])


def test_margin_and_its_gradient(batch):
  logits, labels = batch
  expected, gradient = [], np.zeros_like(logits)
  for i, (row, label) in enumerate(zip(logits, labels, strict=True)):
    others = [k for k in range(CLASSES) if k != label]
    best = max(others, key=lambda k: row[k])
    expected.append(row[best] - row[label])
    gradient[i, best], gradient[i, label] = 1, -1
  np.testing.assert_allclose(losses.margin(logits, labels), expected)
  np.testing.assert_array_equal(
    jax.grad(lambda z: losses.margin(z, labels).sum())(logits), gradient
  )


def test_margin_is_positive_exactly_where_fooled(batch):
  logits, _ = batch
  best = logits.argmax(-1)
  fooled = np.arange(BATCH) % 2 == 0
  labels = np.where(fooled, (best + 1) % CLASSES, best)
  np.testing.assert_array_equal(losses.margin(logits, labels) > 0, fooled)


def test_margin_with_two_classes_is_finite():
  logits, labels = jnp.array([[2.0, -1.0]]), jnp.array([0])
  assert losses.margin(logits, labels).tolist() == [-3.0]


@pytest.mark.parametrize("name", losses.ATTACK_LOSSES)
def test_attack_losses_are_per_example(name, batch):
  """[B] out, examples apart, higher where the label's logit is lower."""
  loss = losses.ATTACK_LOSSES[name]
  logits, labels = batch
  values = loss(logits, labels)
  assert values.shape == (BATCH,)
  order = np.random.default_rng(1).permutation(BATCH)
  np.testing.assert_allclose(loss(logits[order], labels[order]), values[order])
  np.testing.assert_allclose(loss(logits[2:3], labels[2:3]), values[2:3])
  weaker = logits - np.eye(CLASSES)[labels]
  assert (loss(weaker, labels) > values).all()


@pytest.mark.parametrize("p", [1, 2])
def test_distance_and_its_gradient(p, x64):
  generator = np.random.default_rng(0)
  a, b = generator.normal(size=(2, 4, 3, 2))
  difference = (a - b).reshape(4, -1)
  expected = np.linalg.norm(difference, ord=p, axis=1)
  np.testing.assert_allclose(losses.distance(a, b, p), expected, rtol=1e-12)
  gradient = jax.grad(lambda a: losses.distance(a, b, p).sum())(a)
  by_hand = np.sign(a - b)
  if p == 2:
    by_hand = (a - b) / expected[:, None, None]
  np.testing.assert_allclose(gradient, by_hand, rtol=1e-12)


def test_distance_is_the_norm_and_not_its_square():
  a = jnp.array([[3.0, 4.0]])
  assert losses.distance(a, jnp.zeros_like(a)).tolist() == [5.0]
  assert losses.distance(a, jnp.zeros_like(a), 1).tolist() == [7.0]


@pytest.mark.parametrize("p", [1, 2])
def test_gradient_at_distance_zero_is_zero(p):
  """One example at zero, one that is not: neither spoils the other."""
  a = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  b = jnp.array([[1.0, 2.0], [0.0, 0.0]])
  value, gradient = jax.jit(
    jax.value_and_grad(lambda a: losses.distance(a, b, p).sum())
  )(a)
  assert value == (7.0 if p == 1 else 5.0)
  expected = [[0, 0], [1, 1] if p == 1 else [0.6, 0.8]]
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_tiny_distances_do_not_underflow_into_nan():
  a = jnp.full((1, 4), 1e-25)  # its square is no float32
  value, gradient = jax.value_and_grad(lambda a: losses.norm(a).sum())(a)
  assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize(
  "call",
  [
    lambda: losses.cross_entropy(jnp.zeros((3, 2)), jnp.zeros(2, jnp.int32)),
    lambda: losses.margin(jnp.zeros((3, 2)), jnp.zeros(2, jnp.int32)),
    lambda: losses.distance(jnp.zeros((3, 2)), jnp.zeros((3, 1))),
  ],
  ids=["cross_entropy", "margin", "distance"],
)
def test_shapes_that_would_broadcast_are_refused(call):
  with pytest.raises(AssertionError):
    call()
