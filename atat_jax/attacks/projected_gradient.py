"""FGSM, I-FGSM and PGD: one loop of projected gradient ascent.

FGSM (Goodfellow et al., 2015) is one step of epsilon from the clean image,
I-FGSM (Kurakin et al., 2017) many small ones, PGD (Madry et al., 2018) starts
at a random point of the ball. Only the gradient with respect to the images is
taken. The number of steps is a traced value: sweeping it, epsilon or the step
size compiles nothing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax import checks, compilation, losses, rng
from atat_jax.attacks import balls, base, search
from atat_jax.errors import UserError
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
  loss: str | Callable[[Array], Array] = "cross_entropy",
  targeted: bool = False,
  targets: Array | None = None,
  momentum: Scalar | None = None,
  eot_samples: int = 1,
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
    norm: One of `balls.NORMS`.
    loss: One of `losses.ATTACK_LOSSES`, descended where `targeted`, or of
      `losses.TARGETED_LOSSES`, which need `targets`; or logits [B, K] to
      losses [B], which need no labels.
    targeted: Whether labels are to be reached rather than left.
    targets: int32 [B]: classes that a targeted loss aims at.
    momentum: Decay of the sum of gradients, each scaled to an l1 norm of 1,
      whose direction is taken (Dong et al., 2018, Eq. 6); None: the gradient's.
    eot_samples: Gradients averaged at each point.

  Returns:
    The last iterate [B, H, W, C] and the last state.
  """
  ball = balls.NORMS[norm]
  sign = -1.0 if targeted else 1.0

  def objective(images_adv: Array, state: State) -> tuple[Array, State]:
    logits, state = logits_fn(state, images_adv)
    if isinstance(loss, str):
      value = losses.attack_loss(loss, logits, labels, targets)
    else:
      value = loss(logits)
    return sign * value.sum(), state

  def gradient_fn(images_adv: Array, state: State) -> tuple[Array, State]:
    one = jax.grad(objective, has_aux=True)
    if eot_samples == 1:
      return one(images_adv, state)

    def sample(_: Array, carry: tuple[Array, State]) -> tuple[Array, State]:
      total, state = carry
      gradient, state = one(images_adv, state)
      return total + gradient / eot_samples, state

    first = jnp.zeros_like(images_adv), state
    return lax.fori_loop(0, eot_samples, sample, first)

  def body(_: Array, carry: Any) -> Any:
    images_adv, state, total = carry
    gradient, state = gradient_fn(images_adv, state)
    if momentum is not None:
      size = balls.l1_length(gradient)
      total = momentum * total + gradient / jnp.maximum(size, 1e-12)
      gradient = total
    step = step_size * ball.direction(gradient)
    images_adv = balls.project(ball, images_adv + step, images, epsilon)
    return images_adv, state, total

  total = () if momentum is None else jnp.zeros_like(start)
  carry = lax.fori_loop(0, num_steps, body, (start, state, total))
  return carry[0], carry[1]


def random_start(
  key: Array, images: Array, *, epsilon: Scalar, norm: str = "linf"
) -> Array:
  """Uniform in the ball, clipped to [0, 1]."""
  ball = balls.NORMS[norm]
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
  momentum: Array | None,
  *,
  norm: str,
  loss: str,
  num_restarts: int,
  num_targets: int,
  targeted: bool,
  eot_samples: int,
) -> Array:
  randomized = isinstance(classifier, base.Randomized)
  noise_key = rng.stream(key, "noise")
  several_targets = loss in losses.TARGETED_LOSSES

  def logits_fn(state: Any, x: Array) -> tuple[Array, Any]:
    if not randomized:
      return classifier(x), state
    now, later = jax.random.split(state)
    return base.apply(classifier, now, x), later

  def attempt(run: Array | int, ranked: Array | None) -> Array:
    # FGSM is so short that drawing numbers it does not want would show.
    start = lax.cond(
      use_random_start,
      lambda: random_start(
        rng.stream(key, "start", run), images, epsilon=epsilon, norm=norm
      ),
      lambda: images,
    )
    targets = None
    if ranked is not None:
      targets = jnp.take(ranked, run // num_restarts, axis=1)
    images_adv, _ = ascend(
      logits_fn,
      rng.stream(noise_key, "run", run) if randomized else (),
      start,
      images,
      labels,
      epsilon=epsilon,
      step_size=step_size,
      num_steps=num_steps,
      norm=norm,
      loss=loss,
      targeted=targeted,
      targets=targets,
      momentum=momentum,
      eot_samples=eot_samples,
    )
    return images_adv

  ranked = None
  if several_targets:
    clean = base.apply(classifier, rng.stream(noise_key, "clean"), images)
    ranked = search.ranked(clean)
  num_runs = num_restarts * num_targets
  if num_runs == 1:
    return attempt(0, ranked)
  measure = losses.ATTACK_LOSSES["margin" if several_targets else loss]

  def strength(run: Array | int, images_adv: Array) -> tuple[Array, Array]:
    score_key = rng.stream(noise_key, "score", run)
    logits = base.apply(classifier, score_key, images_adv)
    fooled = (logits.argmax(-1) == labels) == targeted
    value = measure(logits, labels)
    return fooled, -value if targeted else value

  def another(run: Array, best: tuple[Array, Array, Array]) -> tuple[Any, ...]:
    images_adv = attempt(run, ranked)
    fooled, value = strength(run, images_adv)
    # A fooled example is stronger than one that is not, whatever its loss.
    better = jnp.where(fooled == best[1], value > best[2], fooled)
    return (
      jnp.where(better[:, None, None, None], images_adv, best[0]),
      jnp.where(better, fooled, best[1]),
      jnp.where(better, value, best[2]),
    )

  first = attempt(0, ranked)
  best = (first, *strength(0, first))
  return lax.fori_loop(1, num_runs, another, best)[0]


_jitted = compilation.jit(
  _pgd,
  static_argnames=(
    "norm",
    "loss",
    "num_restarts",
    "num_targets",
    "targeted",
    "eot_samples",
  ),
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
  num_targets: int = 9,
  momentum: float = 0.0,
  eot_samples: int = 1,
) -> Array:
  """Projected gradient descent (Madry et al., 2018) and its relatives.

  With `momentum` it is MI-FGSM (Dong et al., 2018: momentum 1, no random
  start), with loss "margin" the linf attack of Carlini and Wagner (2017), with
  loss "targeted_margin" the multi-targeted attack (Gowal et al., 2019).

  Args:
    key: Random key of the starts.
    classifier: Callable from images to logits; a pytree such as
      `models.classifier` returns, a plain function, or a `Randomized` one.
    images: Float [B, H, W, C] in [0, 1].
    labels: Integers [B] in [0, K): the true classes.
    epsilon: Radius of the ball, in the unit of the pixels (8/255).
    step_size: Length of a step, in the same unit.
    num_steps: Number of gradient steps.
    norm: "linf", "l2" or "l1".
    loss: "cross_entropy", "margin" or "dlr" (away from the true class), or
      "targeted_margin" or "targeted_dlr" (towards one class after the other).
    random_start: Whether to start uniformly in the ball or at the clean image.
    num_restarts: Independent attempts (for each target); the strongest is kept
      per example: a fooled one before others, then the one of higher loss.
    targets: Integers [B]: classes to reach, by descending an untargeted loss;
      None: any but the true one.
    num_targets: Classes that a targeted loss aims at: those of the highest
      logits on the clean image, the true one aside; lowered to K - 1.
    momentum: Decay of the sum of normalised gradients; 0: the gradient alone.
    eot_samples: Gradients averaged at each point, for `Randomized` classifiers.

  Returns:
    [B, H, W, C] in the ball and in [0, 1]: the last iterate of the strongest
    attempt.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, or too few classes
      for the loss, by name.
  """
  checks.choice("norm", norm, balls.NORMS)
  checks.epsilon(epsilon, norm)
  checks.not_negative("momentum", momentum)
  classifier, images, labels, num_classes = base.check_arguments(
    classifier,
    images,
    labels,
    step_size=step_size,
    num_steps=num_steps,
    num_restarts=num_restarts,
    num_targets=num_targets,
  )
  checks.positive("eot_samples", eot_samples, integer=True)
  several_targets = base.check_loss(loss, num_classes)
  if targets is not None:
    if several_targets:
      raise UserError(
        f"targets: given with loss {loss!r}; allowed: with an untargeted loss"
      )
    labels = checks.labels(targets, images.shape[0], num_classes, "targets")
  use_momentum = not isinstance(momentum, int | float) or momentum > 0
  return _jitted(
    key,
    classifier,
    images,
    labels,
    jnp.asarray(epsilon, images.dtype),
    jnp.asarray(step_size, images.dtype),
    jnp.asarray(num_steps, jnp.int32),
    jnp.asarray(random_start, bool),
    jnp.asarray(momentum, images.dtype) if use_momentum else None,
    norm=norm,
    loss=loss,
    num_restarts=num_restarts,
    num_targets=min(num_targets, num_classes - 1) if several_targets else 1,
    targeted=targets is not None,
    eot_samples=eot_samples,
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
