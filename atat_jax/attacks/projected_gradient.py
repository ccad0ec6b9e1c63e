"""FGSM, I-FGSM and PGD: one loop of projected gradient ascent.

FGSM (Goodfellow et al., 2015) is one step of epsilon from the clean image,
I-FGSM (Kurakin et al., 2017) many small ones, PGD (Madry et al., 2018) starts
at a random point of the ball. Only the gradient with respect to the images is
computed. The number of steps is a traced value: changing it, epsilon or the
step size compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atat_jax import checks, compilation, losses, rng
from atat_jax.attacks import balls, base, nonfinite, search
from atat_jax.attacks.nonfinite import Counts
from atat_jax.attacks.search import Attempt
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier, Scalar

_LARGEST_SUM = 1e30

State = TypeVar("State")
GradientFn = Callable[[Array, State], tuple[Array, State, Counts]]
"""(images, state) to the gradient, the state, and counts [B]."""


def _averaged(
  gradient_fn: GradientFn[State], samples: int
) -> GradientFn[State]:
  """Averages the gradients of several evaluations, one after the other."""
  if samples == 1:
    return gradient_fn

  def averaged(images_adv: Array, state: State) -> tuple[Array, State, Counts]:
    def sample(_: Array, carry: Any) -> Any:
      total, state, counts = carry
      gradient, state, new = gradient_fn(images_adv, state)
      total = total + gradient / samples
      return total, state, nonfinite.add(counts, new)

    none = nonfinite.zeros(images_adv.shape[:1])
    first = jnp.zeros_like(images_adv), state, none
    return lax.fori_loop(0, samples, sample, first)

  return averaged


def _loss(
  loss: str | Callable[[Array], Array],
  logits: Array,
  labels: Array,
  targets: Array | None,
) -> Array:
  if isinstance(loss, str):
    return losses.attack_loss(loss, logits, labels, targets)
  return loss(logits)


def _accumulate(momentum: Scalar, total: Array, gradient: Array) -> Array:
  """Adds a gradient to the decaying sum (Dong et al., 2018, Eq. 6)."""
  total = momentum * total + balls.unit("l1", gradient)
  # A sum that does not decay must not grow to infinity.
  return jnp.clip(total, -_LARGEST_SUM, _LARGEST_SUM)


def _confinement(
  ball: balls.Ball, images: Array, epsilon: Scalar, bounded: bool
) -> Callable[[Array], Array]:
  """Makes what keeps iterates in [0, 1], and in the balls if `bounded`."""
  if not bounded:
    return lambda images_adv: jnp.clip(images_adv, 0.0, 1.0)
  return lambda images_adv: balls.project(ball, images_adv, images, epsilon)


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
  """Runs the loop of PGD; for use inside jit.

  An entry of a gradient that is not finite counts as 0, so that the iterates
  are finite, whatever the network is.

  Args:
    logits_fn: (state, images) to (logits, state). The state is what a forward
      pass may change, e.g. running statistics; () for a fixed classifier.
    state: State before the first forward pass.
    start: First iterate [B, H, W, C].
    images: Clean images, centres of the balls.
    labels: True classes, int32 [B]; the classes to reach if `targeted`.
    epsilon: Radius.
    step_size: Length of a step.
    num_steps: Number of gradient steps.
    norm: Norm of the ball, one of `balls.BALLS`.
    loss: One of `losses.ATTACK_LOSSES`, or of `losses.TARGETED_LOSSES` with
      `targets`; or logits [B, K] to losses [B].
    targeted: Whether labels are to be reached, by descending the loss.
    targets: Classes that a targeted loss aims at, int32 [B].
    momentum: Decay of the sum of gradients (see `pgd`); None: no sum.
    eot_samples: Number of gradients averaged at each point; an entry of one
      of them that is not finite counts as 0 in the mean.

  Returns:
    The last iterate [B, H, W, C] and the last state.
  """
  return counted_ascend(
    logits_fn,
    state,
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
  )[:2]


def counted_ascend(
  logits_fn: Callable[[State, Array], tuple[Array, State]],
  state: State,
  start: Array,
  images: Array,
  labels: Array,
  *,
  epsilon: Scalar,
  step_size: Scalar,
  num_steps: Array | int,
  norm: str,
  loss: str | Callable[[Array], Array],
  targeted: bool,
  targets: Array | None,
  momentum: Scalar | None,
  eot_samples: int,
  bounded: bool = True,
) -> tuple[Array, State, Counts]:
  """Runs `ascend`, whose arguments it has, and counts what was not finite.

  Unless `bounded`, iterates are kept in [0, 1], but not in the ball (N-FGSM).

  Returns:
    The last iterate, the last state, and the counts, [B] each.
  """
  ball = balls.BALLS[norm]
  confine = _confinement(ball, images, epsilon, bounded)

  def objective(images_adv: Array, state: State) -> tuple[Array, Any]:
    logits, state = logits_fn(state, images_adv)
    value = _loss(loss, logits, labels, targets)
    sign = -1.0 if targeted else 1.0
    return sign * value.sum(), (state, nonfinite.usable(logits, value))

  def gradient_fn(
    images_adv: Array, state: State
  ) -> tuple[Array, State, Counts]:
    gradient, (state, usable) = jax.grad(objective, has_aux=True)(
      images_adv, state
    )
    counts = nonfinite.count(usable, gradient)
    return nonfinite.clean(gradient), state, counts

  averaged_fn = _averaged(gradient_fn, eot_samples)

  def body(_: Array, carry: Any) -> Any:
    images_adv, state, total, counts = carry
    gradient, state, new = averaged_fn(images_adv, state)
    if momentum is not None:
      gradient = total = _accumulate(momentum, total, gradient)
    step = step_size * ball.direction(gradient)
    images_adv = confine(images_adv + step)
    return images_adv, state, total, nonfinite.add(counts, new)

  total = () if momentum is None else jnp.zeros_like(start)
  none = nonfinite.zeros(images.shape[:1])
  images_adv, state, _, counts = lax.fori_loop(
    0, num_steps, body, (start, state, total, none)
  )
  return images_adv, state, counts


def random_start(
  key: Array, images: Array, *, epsilon: Scalar, norm: str = "linf"
) -> Array:
  """Draws points uniformly from the balls around `images`, clipped to [0, 1]."""
  ball = balls.BALLS[norm]
  return jnp.clip(images + ball.start(key, images, epsilon), 0.0, 1.0)


class _PGDNumbers(NamedTuple):
  """Arguments of `pgd` that may change without a new compilation."""

  epsilon: Any
  step_size: Any
  num_steps: Any
  random_start: Any
  momentum: Any
  """None if there is none: a plain gradient needs no sum."""

  def arrays(self, dtype: Any) -> "_PGDNumbers":
    """Returns the numbers as arrays; those of the host stay there."""
    return _PGDNumbers(
      _as_array(self.epsilon, dtype),
      _as_array(self.step_size, dtype),
      _as_array(self.num_steps, np.int32),
      _as_array(self.random_start, bool),
      None if self.momentum is None else _as_array(self.momentum, dtype),
    )


def _as_array(value: Any, dtype: Any) -> Any:
  """Converts a number; JAX would compile a program to convert one of Python."""
  on_device = isinstance(value, jax.Array)
  return jnp.asarray(value, dtype) if on_device else np.asarray(value, dtype)


@dataclasses.dataclass(frozen=True)
class _PGDOptions:
  """Arguments of `pgd` that are part of the compiled program."""

  norm: str
  loss: str
  num_restarts: int
  num_targets: int
  eot_samples: int
  targeted: bool = False

  @property
  def num_runs(self) -> int:
    """Number of runs on each example."""
    return self.num_restarts * self.num_targets

  @property
  def several_targets(self) -> bool:
    """Whether the loss aims at one class after the other."""
    return self.loss in losses.TARGETED_LOSSES


def _start(
  key: Array,
  images: Array,
  epsilon: Array,
  random: Array | bool,
  run: Array | int,
  *,
  norm: str,
) -> Array:
  """First iterate of a run."""
  return lax.cond(
    random,
    lambda: random_start(
      rng.stream(key, "start", run), images, epsilon=epsilon, norm=norm
    ),
    lambda: images,
  )


# The generator's many integer operations take XLA:CPU longer to optimise than a
# small network: they are a program of their own, which FGSM does without. The
# uniform numbers of linf are the same however much they are optimised.
_jitted_starts = {
  light: compilation.jit(_start, light=light, static_argnames="norm")
  for light in (False, True)
}


def _first_start(
  key: Array, images: Array, numbers: _PGDNumbers, norm: str
) -> Array:
  """First iterate of the first run; without a random start, no program."""
  random = numbers.random_start
  if not isinstance(random, jax.Array) and not random:
    return images
  return _jitted_starts[norm == "linf"](
    key, images, numbers.epsilon, random, np.int32(0), norm=norm
  )


def _attempt(
  key: Array,
  classifier: Classifier,
  start: Array | None,
  images: Array,
  labels: Array,
  numbers: _PGDNumbers,
  options: _PGDOptions,
  *,
  run: Array | int,
  ranked: Array | None,
) -> tuple[Array, Counts]:
  """Makes one run; returns its last iterate and its counts, [B] each."""
  randomized = isinstance(classifier, base.Randomized)

  def logits_fn(state: Any, x: Array) -> tuple[Array, Any]:
    if not randomized:
      return base.apply(classifier, key, x), state
    now, later = jax.random.split(state)
    return base.apply(classifier, now, x), later

  if start is None:
    start = _start(
      key,
      images,
      numbers.epsilon,
      numbers.random_start,
      run,
      norm=options.norm,
    )
  targets = None
  if ranked is not None:
    targets = jnp.take(ranked, run // options.num_restarts, axis=1)
  noise_key = rng.stream(key, "noise")
  images_adv, _, counts = counted_ascend(
    logits_fn,
    rng.stream(noise_key, "run", run) if randomized else (),
    start,
    images,
    labels,
    epsilon=numbers.epsilon,
    step_size=numbers.step_size,
    num_steps=numbers.num_steps,
    norm=options.norm,
    loss=options.loss,
    targeted=options.targeted,
    targets=targets,
    momentum=numbers.momentum,
    eot_samples=options.eot_samples,
  )
  return images_adv, counts


def _pgd(
  key: Array,
  classifier: Classifier,
  start: Array | None,
  images: Array,
  labels: Array,
  numbers: _PGDNumbers,
  *,
  options: _PGDOptions,
) -> tuple[Array, Counts]:
  """Makes all runs and keeps each example's strongest.

  The start of a single run is given; those of several (None) are drawn here.
  """
  noise_key = rng.stream(key, "noise")
  ranked = None
  if options.several_targets:
    clean = base.apply(classifier, rng.stream(noise_key, "clean"), images)
    ranked = search.ranked(clean, labels)
  attempt = functools.partial(
    _attempt,
    key,
    classifier,
    start,
    images,
    labels,
    numbers,
    options,
    ranked=ranked,
  )
  num_runs = options.num_runs
  if num_runs == 1:
    images_adv, counts = attempt(run=0)
    return images_adv, nonfinite.total(counts)
  loss = "margin" if options.several_targets else options.loss

  def scored(run: Array | int, *_: Array) -> Attempt:
    images_adv, counts = attempt(run=run)
    score_key = rng.stream(noise_key, "score", run)
    logits = base.apply(classifier, score_key, images_adv)
    fooled = (logits.argmax(-1) == labels) == options.targeted
    value = losses.ATTACK_LOSSES[loss](logits, labels)
    if options.targeted:
      value = -value
    return search.judged(images_adv, logits, value, fooled, counts)

  return search.strongest(scored, scored(0), runs=(1, num_runs))


_jitted = compilation.jit(_pgd, static_argnames="options")


def _checked_pgd(
  name: str,
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  targets: Array | None,
  numbers: _PGDNumbers,
  options: _PGDOptions,
) -> Array:
  """Checks the arguments of `pgd`, runs it and reports by its name."""
  checks.key(key)
  checks.boolean("random_start", numbers.random_start)
  for option in ("num_restarts", "num_targets", "eot_samples"):
    checks.count(option, getattr(options, option))
  base.check_norm(options.norm, numbers.epsilon)
  checks.not_negative("momentum", numbers.momentum)
  classifier, images, labels, num_classes = base.check_arguments(
    classifier,
    images,
    labels,
    step_size=numbers.step_size,
    num_steps=numbers.num_steps,
  )
  several_targets = base.check_loss(options.loss, num_classes)
  if targets is not None:
    if several_targets:
      raise UserError(
        f"targets: given with loss {options.loss!r}; allowed: with an"
        " untargeted loss"
      )
    labels = checks.labels(targets, images.shape[0], num_classes, "targets")
  momentum = numbers.momentum
  use_momentum = not isinstance(momentum, int | float) or momentum > 0
  num_targets = min(options.num_targets, num_classes - 1)
  base.check_runs(options.num_restarts, num_targets)
  options = dataclasses.replace(
    options,
    num_targets=num_targets if several_targets else 1,
    targeted=targets is not None,
  )
  numbers = numbers._replace(momentum=momentum if use_momentum else None)
  numbers = numbers.arrays(images.dtype)
  start = None
  if options.num_runs == 1:
    start = _first_start(key, images, numbers, options.norm)
    numbers = numbers._replace(random_start=None)  # no part of the program
  images_adv, counts = _jitted(
    key, classifier, start, images, labels, numbers, options=options
  )
  nonfinite.report(name, *counts)
  return images_adv


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
    labels: True classes, integers [B] in [0, K).
    epsilon: Radius of the ball, in the unit of the pixels (8/255).
    step_size: Length of a step, in the same unit.
    num_steps: Number of gradient steps.
    norm: "linf", "l2" or "l1".
    loss: "cross_entropy", "margin" or "dlr" (away from the true class), or
      "targeted_margin" or "targeted_dlr" (towards one class after the other).
    random_start: Whether to start uniformly in the ball or at the clean image.
    num_restarts: Number of runs (for each target); the strongest is kept per
      example: a fooled one before others, then the one of higher loss.
    targets: Classes to reach by descending an untargeted loss, integers [B].
    num_targets: Number of classes that a targeted loss aims at: those of the
      highest clean logits, the true one excepted; lowered to K - 1.
    momentum: Decay of the sum of normalised gradients; 0: the gradient alone.
    eot_samples: Gradients averaged at each point, for `Randomized` classifiers;
      entries that are not finite count as 0 in the mean.

  Returns:
    Last iterates of the strongest runs, [B, H, W, C] in the ball and in [0, 1].

  Raises:
    UserError: An argument of a wrong shape, dtype or range, or too few classes
      for the loss, by name.
  """
  numbers = _PGDNumbers(epsilon, step_size, num_steps, random_start, momentum)
  options = _PGDOptions(norm, loss, num_restarts, num_targets, eot_samples)
  return _checked_pgd(
    "pgd", key, classifier, images, labels, targets, numbers, options
  )


def _from_images(
  name: str,
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  numbers: _PGDNumbers,
  loss: str,
) -> Array:
  """Makes one run in linf from the clean images: the program of `pgd`."""
  options = _PGDOptions("linf", loss, 1, 1, 1)
  return _checked_pgd(
    name, key, classifier, images, labels, None, numbers, options
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
  loss: str = "cross_entropy",
) -> Array:
  """Iterative FGSM (Kurakin et al., 2017): linf PGD from the clean image.

  Args:
    key: Unused; every attack has the same signature.
    classifier: Callable from images to logits; see `pgd`.
    images: Float [B, H, W, C] in [0, 1].
    labels: True classes, integers [B].
    epsilon: Radius of the ball, in the unit of the pixels.
    step_size: Length of a step.
    num_steps: Number of steps.
    loss: Loss that the attack increases, see `pgd`; a targeted one aims at the
      class of the highest clean logit, the true one excepted.

  Returns:
    The last iterate, [B, H, W, C] in the ball and in [0, 1].

  Raises:
    UserError: An argument of a wrong shape, dtype or range, or too few classes
      for the loss, by name.
  """
  numbers = _PGDNumbers(epsilon, step_size, num_steps, False, 0.0)
  return _from_images("ifgsm", key, classifier, images, labels, numbers, loss)


def fgsm(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  epsilon: float,
  loss: str = "cross_entropy",
) -> Array:
  """Fast gradient sign method (Goodfellow et al., 2015).

  Args:
    key: Unused; every attack has the same signature.
    classifier: Callable from images to logits; see `pgd`.
    images: Float [B, H, W, C] in [0, 1].
    labels: True classes, integers [B].
    epsilon: Length of the one step from the clean image.
    loss: Loss that the step increases, see `ifgsm`.

  Returns:
    Adversarial images, [B, H, W, C] in the ball and in [0, 1].

  Raises:
    UserError: An argument of a wrong shape, dtype or range, or too few classes
      for the loss, by name.
  """
  numbers = _PGDNumbers(epsilon, epsilon, 1, False, 0.0)
  return _from_images("fgsm", key, classifier, images, labels, numbers, loss)
