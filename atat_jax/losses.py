"""Losses per example: [B, K] or maps to [B]. Means and masks are applied outside."""

from collections.abc import Callable

import chex
import jax.numpy as jnp
import optax

from atat_jax.typing import Array


def cross_entropy(logits: Array, labels: Array) -> Array:
  """-log softmax(logits)[label].

  Args:
    logits: [B, K].
    labels: int32 [B].

  Returns:
    [B].
  """
  chex.assert_equal_shape_prefix([logits, labels], 1)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def margin(logits: Array, labels: Array) -> Array:
  """max_{i != y} z_i - z_y (Carlini and Wagner, 2017): positive where fooled.

  Args:
    logits: [B, K].
    labels: int32 [B].

  Returns:
    [B].
  """
  chex.assert_equal_shape_prefix([logits, labels], 1)
  is_label = jnp.arange(logits.shape[-1]) == labels[:, None]
  correct = jnp.where(is_label, logits, 0.0).sum(-1)
  wrong = jnp.where(is_label, -jnp.inf, logits).max(-1)
  return wrong - correct


ATTACK_LOSSES: dict[str, Callable[[Array, Array], Array]] = {
  "cross_entropy": cross_entropy,
  "margin": margin,
}
"""What an untargeted attack increases, by name."""


def norm(x: Array, p: int = 2) -> Array:
  """The p-norm of each example, with gradient 0 (not NaN) where it is 0.

  Args:
    x: [B, ...]; all but the first axis are flattened.
    p: 1 or 2.

  Returns:
    [B].
  """
  x = x.reshape(x.shape[0], -1)
  if p == 1:
    return (x * jnp.sign(x)).sum(-1)  # the gradient of jnp.abs at 0 is 1
  squared = jnp.square(x).sum(-1)
  zero = squared == 0  # not "squared <= 0": a NaN must stay one
  # Both wheres are needed: the inner one keeps 0 out of the root's gradient.
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))


def distance(a: Array, b: Array, p: int = 2) -> Array:
  """||a - b||_p of each example: Eq. (4) for maps, Eq. (6) for logits.

  Args:
    a: [B, ...].
    b: The same shape.
    p: 1 or 2.

  Returns:
    [B].
  """
  chex.assert_equal_shape([a, b])
  return norm(a - b, p)
