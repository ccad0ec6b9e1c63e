"""FGSM, I-FGSM and PGD: one loop of projected gradient ascent.

FGSM (Goodfellow et al., 2015) is one step of epsilon from the clean image,
I-FGSM (Kurakin et al., 2017) many small ones, PGD (Madry et al., 2018) starts
at a random point of the ball. Only the gradient with respect to the images is
taken. The number of steps is a traced value: sweeping it, epsilon or the step
size compiles nothing.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax import checks, compilation, losses, rng
from atat_jax.attacks import base, norms
from atat_jax.typing import Array, Classifier, Scalar

State = TypeVar("State")


def ascend(
  logits_fn: Callable[[State, Array], tuple[Array, State]],
  state: State,
  start: Array,
  images: Array,
  labels: Array,
  *,
  epsilon: Scalar,
  step_size: Scalar,
  num_steps: Array | int,
  norm: str = "linf",
  loss: str = "cross_entropy",
  targeted: bool = False,
) -> tuple[Array, State]:
  """The loop of PGD. For use inside jit.

  Args:
    logits_fn: (state, images) to (logits, state). The state is what a pass may
      move, e.g. the running statistics of BatchNorm; () for a fixed classifier.
    state: The state before the first pass.
    start: First iterate [B, H, W, C].
    images: Clean images, centres of the balls.
    labels: int32 [B]; the target classes where `targeted`.
    epsilon: Radius.
    step_size: Length of a step.
    num_steps: Number of gradient steps.
    norm: One of `norms.NORMS`.
    loss: One of `losses.ATTACK_LOSSES`; descended where `targeted`.
    targeted: Whether labels are to be reached rather than left.

  Returns:
    The last iterate [B, H, W, C] and the last state.
  """
  ball, loss_fn = norms.NORMS[norm], losses.ATTACK_LOSSES[loss]
  sign = -1.0 if targeted else 1.0

  def objective(images_adv: Array, state: State) -> tuple[Array, State]:
    logits, state = logits_fn(state, images_adv)
    return sign * loss_fn(logits, labels).sum(), state

  def body(_: Array, carry: tuple[Array, State]) -> tuple[Array, State]:
    images_adv, state = carry
    gradient, state = jax.grad(objective, has_aux=True)(images_adv, state)
    step = step_size * ball.direction(gradient)
    return norms.project(ball, images_adv + step, images, epsilon), state

  return lax.fori_loop(0, num_steps, body, (start, state))


def random_start(
  key: Array, images: Array, *, epsilon: Scalar, norm: str = "linf"
) -> Array:
  """Uniform in the ball, clipped to [0, 1]."""
  ball = norms.NORMS[norm]
  return jnp.clip(images + ball.start(key, images, epsilon), 0.0, 1.0)


def _pgd(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  epsilon: Array,
  step_size: Array,
  num_steps: Array,
  use_random_start: Array,
  *,
  norm: str,
  loss: str,
  num_restarts: int,
  targeted: bool,
) -> Array:
  def attempt(restart: Array | int) -> Array:
    start = random_start(
      rng.stream(key, "start", restart), images, epsilon=epsilon, norm=norm
    )
    images_adv, _ = ascend(
      lambda state, x: (classifier(x), state),
      (),
      jnp.where(use_random_start, start, images),
      images,
      labels,
      epsilon=epsilon,
      step_size=step_size,
      num_steps=num_steps,
      norm=norm,
      loss=loss,
      targeted=targeted,
    )
    return images_adv

  if num_restarts == 1:
    return attempt(0)

  def strength(images_adv: Array) -> tuple[Array, Array]:
    logits = classifier(images_adv)
    fooled = (logits.argmax(-1) == labels) == targeted
    value = losses.ATTACK_LOSSES[loss](logits, labels)
    return fooled, -value if targeted else value

  def restart(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, ...]:
    images_adv = attempt(i)
    fooled, value = strength(images_adv)
    # A fooled example is stronger than one that is not, whatever its loss.
    better = jnp.where(fooled == best[1], value > best[2], fooled)
    return (
      jnp.where(better[:, None, None, None], images_adv, best[0]),
      jnp.where(better, fooled, best[1]),
      jnp.where(better, value, best[2]),
    )

  first = attempt(0)
  return lax.fori_loop(1, num_restarts, restart, (first, *strength(first)))[0]


_jitted = compilation.jit(
  _pgd, static_argnames=("norm", "loss", "num_restarts", "targeted")
)


def pgd(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  epsilon: float,
  step_size: float,
  num_steps: int,
  norm: str = "linf",
  loss: str = "cross_entropy",
  random_start: bool = True,
  num_restarts: int = 1,
  targets: Array | None = None,
) -> Array:
  """Projected gradient descent (Madry et al., 2018).

  Args:
    key: Random key of the starts.
    classifier: Callable from images to logits; a pytree such as
      `models.classifier` returns, or a plain function.
    images: Float [B, H, W, C] in [0, 1].
    labels: Integers [B] in [0, K): the true classes.
    epsilon: Radius of the ball, in the unit of the pixels (8/255).
    step_size: Length of a step, in the same unit.
    num_steps: Number of gradient steps.
    norm: "linf" or "l2".
    loss: "cross_entropy" or "margin".
    random_start: Whether to start uniformly in the ball or at the clean image.
    num_restarts: Independent attempts; the strongest is kept per example: a
      fooled one before others, then the one of higher loss.
    targets: Integers [B]: classes to reach; None: any but the true one.

  Returns:
    [B, H, W, C] in the ball and in [0, 1]: the last iterate of the strongest
    attempt.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  checks.choice("norm", norm, norms.NORMS)
  checks.choice("loss", loss, losses.ATTACK_LOSSES)
  checks.epsilon(epsilon, norm)
  classifier, images, labels, num_classes = base.check_arguments(
    classifier,
    images,
    labels,
    step_size=step_size,
    num_steps=num_steps,
    num_restarts=num_restarts,
  )
  if targets is not None:
    labels = checks.labels(targets, images.shape[0], num_classes, "targets")
  return _jitted(
    key,
    classifier,
    images,
    labels,
    jnp.asarray(epsilon, images.dtype),
    jnp.asarray(step_size, images.dtype),
    jnp.asarray(num_steps, jnp.int32),
    jnp.asarray(random_start, bool),
    norm=norm,
    loss=loss,
    num_restarts=num_restarts,
    targeted=targets is not None,
  )


def ifgsm(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  epsilon: float,
  step_size: float,
  num_steps: int,
) -> Array:
  """Iterative FGSM (Kurakin et al., 2017): linf PGD from the clean image.

  Args:
    key: Unused; every attack has the same signature.
    classifier: See `pgd`.
    images: Float [B, H, W, C] in [0, 1].
    labels: Integers [B].
    epsilon: Radius.
    step_size: Length of a step.
    num_steps: Number of steps.

  Returns:
    [B, H, W, C].

  Raises:
    UserError: As `pgd`.
  """
  return pgd(
    key,
    classifier,
    images,
    labels,
    epsilon=epsilon,
    step_size=step_size,
    num_steps=num_steps,
    random_start=False,
  )


def fgsm(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  epsilon: float,
) -> Array:
  """Fast gradient sign method (Goodfellow et al., 2015).

  Args:
    key: Unused; every attack has the same signature.
    classifier: See `pgd`.
    images: Float [B, H, W, C] in [0, 1].
    labels: Integers [B].
    epsilon: Length of the one step from the clean image.

  Returns:
    [B, H, W, C].

  Raises:
    UserError: As `pgd`.
  """
  return ifgsm(
    key,
    classifier,
    images,
    labels,
    epsilon=epsilon,
    step_size=epsilon,
    num_steps=1,
  )
