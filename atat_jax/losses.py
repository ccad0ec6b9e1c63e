"""Losses of each example, [B]. The caller applies means and masks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from atat_jax import checks
from atat_jax.errors import UserError, shown
from atat_jax.typing import Array


def _checked(logits: Array, *classes: Array) -> tuple[Array, ...]:
  """Checks logits [B, K], labels [B] and targets [B] by shape and dtype."""
  logits = checks.batch(logits, "logits", ndim=2)
  return logits, *(
    checks.classes(one, logits.shape[0], name)
    for one, name in zip(classes, ("labels", "targets"), strict=False)
  )


def _checked_pair(
  a: Array, b: Array, first: str, second: str, ndim: int | None = None
) -> tuple[Array, Array]:
  """Checks that two floating-point batches have one shape."""
  a = checks.batch(a, first, ndim=ndim)
  b = checks.batch(b, second, ndim=ndim)
  if a.shape != b.shape:
    raise UserError(
      f"{second}: shape {b.shape}; allowed: {a.shape}, that of {first}"
    )
  return a, b


def _check_order(p: int) -> None:
  if p not in (1, 2) or isinstance(p, bool):
    raise UserError(f"p: {shown(p)}; allowed: 1, 2")


def cross_entropy(logits: Array, labels: Array) -> Array:
  """Computes -log softmax(logits)[label].

  Args:
    logits: [B, K].
    labels: int32 [B].

  Returns:
    [B].
  """
  logits, labels = _checked(logits, labels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def soft_cross_entropy(logits: Array, targets: Array) -> Array:
  """Computes -sum_k target_k log softmax(logits)_k.

  Args:
    logits: [B, K].
    targets: [B, K]: one-hot, smoothed or mixed labels.

  Returns:
    [B].
  """
  logits, targets = _checked_pair(logits, targets, "logits", "targets", ndim=2)
  return optax.softmax_cross_entropy(logits, targets)


def mixture_cross_entropy(
  clean: Array, adversarial: Array, targets: Array
) -> Array:
  """Averages the cross-entropies of each clean image and its adversarial one.

  Args:
    clean: Logits of the clean images, [B, K].
    adversarial: Logits of the adversarial images, [B, K].
    targets: Targets of both, [B, K].

  Returns:
    [B].
  """
  clean, targets = _checked_pair(clean, targets, "clean", "targets", ndim=2)
  adversarial, _ = _checked_pair(
    adversarial, targets, "adversarial", "targets", ndim=2
  )
  return 0.5 * (
    soft_cross_entropy(clean, targets)
    + soft_cross_entropy(adversarial, targets)
  )


def kl_divergence(p_logits: Array, q_logits: Array) -> Array:
  """Computes KL(p || q) of two softmaxes: sum_k p_k (log p_k - log q_k).

  Args:
    p_logits: [B, K].
    q_logits: [B, K].

  Returns:
    [B].
  """
  p_logits, q_logits = _checked_pair(
    p_logits, q_logits, "p_logits", "q_logits", ndim=2
  )
  return optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(q_logits), jax.nn.log_softmax(p_logits)
  )


def mean_square(a: Array, b: Array) -> Array:
  """Averages (a - b)^2 over all but the first axis.

  Args:
    a: [B, ...].
    b: The same shape.

  Returns:
    [B].
  """
  a, b = _checked_pair(a, b, "a", "b")
  return jnp.square(a - b).reshape(a.shape[0], -1).mean(-1)


def _logit(logits: Array, classes: Array) -> Array:
  # A masked sum, because the gradient of a gather is a slow scatter.
  mask = jnp.arange(logits.shape[-1]) == classes[:, None]
  return jnp.where(mask, logits, 0.0).sum(-1)


def _check_classes(loss: str, logits: Array) -> None:
  if logits.shape[-1] < MIN_CLASSES[loss]:
    raise UserError(
      f"logits: {logits.shape[-1]} classes; allowed: at least"
      f" {MIN_CLASSES[loss]} for {loss!r}"
    )


def margin(logits: Array, labels: Array) -> Array:
  """Computes max_{i != y} z_i - z_y (Carlini and Wagner, 2017): > 0 if fooled.

  Args:
    logits: [B, K].
    labels: int32 [B].

  Returns:
    [B].
  """
  logits, labels = _checked(logits, labels)
  is_label = jnp.arange(logits.shape[-1]) == labels[:, None]
  correct = _logit(logits, labels)
  wrong = jnp.where(is_label, -jnp.inf, logits).max(-1)
  return wrong - correct


def dlr(logits: Array, labels: Array) -> Array:
  """Computes the difference of logits ratio (Croce and Hein, 2020, Eq. 6).

  (max_{i != y} z_i - z_y) / (z_pi1 - z_pi3), with pi in descending order of the
  logits: a margin that is invariant to rescaling of the logits.

  Args:
    logits: [B, K], K >= 3.
    labels: int32 [B].

  Returns:
    [B].
  """
  logits, labels = _checked(logits, labels)
  _check_classes("dlr", logits)
  top = lax.top_k(logits, 3)[0]
  return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Array, labels: Array, targets: Array) -> Array:
  """Computes the targeted difference of logits ratio (Croce and Hein, Eq. 7).

  (z_t - z_y) / (z_pi1 - (z_pi3 + z_pi4) / 2).

  Args:
    logits: [B, K], K >= 4.
    labels: int32 [B].
    targets: int32 [B].

  Returns:
    [B].
  """
  logits, labels, targets = _checked(logits, labels, targets)
  _check_classes("targeted_dlr", logits)
  top = lax.top_k(logits, 4)[0]
  scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12
  return targeted_margin(logits, labels, targets) / scale


def targeted_margin(logits: Array, labels: Array, targets: Array) -> Array:
  """Computes z_t - z_y (multi-targeted attack; Gowal et al., 2019).

  Args:
    logits: [B, K].
    labels: int32 [B].
    targets: int32 [B].

  Returns:
    [B].
  """
  logits, labels, targets = _checked(logits, labels, targets)
  return _logit(logits, targets) - _logit(logits, labels)


ATTACK_LOSSES: dict[str, Callable[[Array, Array], Array]] = {
  "cross_entropy": cross_entropy,
  "margin": margin,
  "dlr": dlr,
}
"""Losses that an untargeted attack increases, by name."""

TARGETED_LOSSES: dict[str, Callable[[Array, Array, Array], Array]] = {
  "targeted_dlr": targeted_dlr,
  "targeted_margin": targeted_margin,
}
"""Losses that an attack on one target class after another increases, by name."""


def attack_loss(
  name: str, logits: Array, labels: Array, targets: Array | None = None
) -> Array:
  """Computes a loss of attacks by its name.

  Args:
    name: One of `ATTACK_LOSSES` or `TARGETED_LOSSES`.
    logits: [B, K].
    labels: int32 [B].
    targets: int32 [B]; needed by targeted losses.

  Returns:
    [B].
  """
  checks.choice("loss", name, (*ATTACK_LOSSES, *TARGETED_LOSSES))
  if name in TARGETED_LOSSES:
    if targets is None:
      raise UserError(
        f"targets: None; allowed: one for each image for {name!r}"
      )
    return TARGETED_LOSSES[name](logits, labels, targets)
  return ATTACK_LOSSES[name](logits, labels)


MIN_CLASSES = {"dlr": 3, "targeted_dlr": 4}
"""Smallest number of classes of a loss, where that is more than two."""


def norm(x: Array, p: int = 2) -> Array:
  """Computes the p-norm of each example; its gradient at 0 is 0, not NaN.

  Args:
    x: [B, ...]; all but the first axis are flattened.
    p: 1 or 2.

  Returns:
    [B].
  """
  x = checks.batch(x, "x")
  _check_order(p)
  x = x.reshape(x.shape[0], -1)
  if p == 1:
    return (x * jnp.sign(x)).sum(-1)  # the gradient of jnp.abs at 0 is 1
  squared = jnp.square(x).sum(-1)
  zero = squared == 0  # not "squared <= 0": a NaN must stay one
  # The inner `where` keeps 0 out of the gradient of the root.
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))


def distance(a: Array, b: Array, p: int = 2) -> Array:
  """Computes ||a - b||_p: Eq. (4) for maps, Eq. (6) for logits.

  Args:
    a: [B, ...].
    b: The same shape.
    p: 1 or 2.

  Returns:
    [B].
  """
  a, b = _checked_pair(a, b, "a", "b")
  _check_order(p)
  return norm(a - b, p)
