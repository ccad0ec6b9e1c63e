"""Losses per example: [B, K] or maps to [B]. Means and masks are applied outside."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

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


def soft_cross_entropy(logits: Array, targets: Array) -> Array:
  """-sum_k target_k log softmax(logits)_k.

  Args:
    logits: [B, K].
    targets: [B, K]: one-hot, smoothed or mixed labels.

  Returns:
    [B].
  """
  chex.assert_equal_shape([logits, targets])
  return optax.softmax_cross_entropy(logits, targets)


def mixture_cross_entropy(
  clean: Array, adversarial: Array, targets: Array
) -> Array:
  """The mean over 2B clean and adversarial images, as a value for each of B.

  Args:
    clean: Logits [B, K].
    adversarial: Logits [B, K].
    targets: [B, K], of both.

  Returns:
    [B].
  """
  return 0.5 * (
    soft_cross_entropy(clean, targets)
    + soft_cross_entropy(adversarial, targets)
  )


def kl_divergence(p_logits: Array, q_logits: Array) -> Array:
  """KL(p || q) of two softmaxes: sum_k p_k (log p_k - log q_k).

  Args:
    p_logits: [B, K].
    q_logits: [B, K].

  Returns:
    [B].
  """
  chex.assert_equal_shape([p_logits, q_logits])
  return optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(q_logits), jax.nn.log_softmax(p_logits)
  )


def mean_square(a: Array, b: Array) -> Array:
  """The mean of (a - b)^2 over all but the first axis.

  Args:
    a: [B, ...].
    b: The same shape.

  Returns:
    [B].
  """
  chex.assert_equal_shape([a, b])
  return jnp.square(a - b).reshape(a.shape[0], -1).mean(-1)


def _logit(logits: Array, classes: Array) -> Array:
  # A sum over a mask: its gradient is a product, a gather's is a slow scatter.
  mask = jnp.arange(logits.shape[-1]) == classes[:, None]
  return jnp.where(mask, logits, 0.0).sum(-1)


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
  correct = _logit(logits, labels)
  wrong = jnp.where(is_label, -jnp.inf, logits).max(-1)
  return wrong - correct


def dlr(logits: Array, labels: Array) -> Array:
  """Difference of logits ratio (Croce and Hein, 2020, Eq. 6).

  (max_{i != y} z_i - z_y) / (z_pi1 - z_pi3), pi sorting the logits from the
  highest down: a margin that no rescaling of the logits changes.

  Args:
    logits: [B, K], K >= 3.
    labels: int32 [B].

  Returns:
    [B].
  """
  top = lax.top_k(logits, 3)[0]
  return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Array, labels: Array, targets: Array) -> Array:
  """Targeted difference of logits ratio (Croce and Hein, 2020, Eq. 7).

  (z_t - z_y) / (z_pi1 - (z_pi3 + z_pi4) / 2).

  Args:
    logits: [B, K], K >= 4.
    labels: int32 [B].
    targets: int32 [B].

  Returns:
    [B].
  """
  top = lax.top_k(logits, 4)[0]
  scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12
  return targeted_margin(logits, labels, targets) / scale


def targeted_margin(logits: Array, labels: Array, targets: Array) -> Array:
  """z_t - z_y (multi-targeted attack; Gowal et al., 2019).

  Args:
    logits: [B, K].
    labels: int32 [B].
    targets: int32 [B].

  Returns:
    [B].
  """
  chex.assert_equal_shape_prefix([logits, labels, targets], 1)
  return _logit(logits, targets) - _logit(logits, labels)


ATTACK_LOSSES: dict[str, Callable[[Array, Array], Array]] = {
  "cross_entropy": cross_entropy,
  "margin": margin,
  "dlr": dlr,
}
"""What an untargeted attack increases, by name."""

TARGETED_LOSSES: dict[str, Callable[[Array, Array, Array], Array]] = {
  "targeted_dlr": targeted_dlr,
  "targeted_margin": targeted_margin,
}
"""What an attack that aims at one class after the other increases, by name."""


def attack_loss(
  name: str, logits: Array, labels: Array, targets: Array | None = None
) -> Array:
  """The loss of that name, targeted or not.

  Args:
    name: Of `ATTACK_LOSSES` or `TARGETED_LOSSES`.
    logits: [B, K].
    labels: int32 [B].
    targets: int32 [B]; needed by the targeted ones.

  Returns:
    [B].
  """
  if name in TARGETED_LOSSES:
    assert targets is not None
    return TARGETED_LOSSES[name](logits, labels, targets)
  return ATTACK_LOSSES[name](logits, labels)


MIN_CLASSES = {"dlr": 3, "targeted_dlr": 4}
"""Classes that a loss needs, where that is more than two."""


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
