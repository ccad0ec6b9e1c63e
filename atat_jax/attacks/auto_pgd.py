"""Auto-PGD (Croce and Hein, 2020; the l1 version Croce and Hein, 2021).

Projected gradient ascent with momentum that halves its own step size and goes
back to the best point when it no longer makes progress. One `step` evaluates
the classifier and then moves, so that step 0 evaluates the starting point and a
run of n steps needs n + 1 evaluations.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax import checks, losses
from atat_jax.attacks import balls, base, search
from atat_jax.attacks.search import Problem, SearchSettings
from atat_jax.attacks.simplex import project_l1
from atat_jax.attacks.targeting import Targeting, aiming
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier

MOMENTUM = 0.75
RHO = 0.75
"""Share of a window's steps that must raise the loss for the step to stay."""

# The l1 version takes sparse steps, whose size falls by a factor to a floor.
_L1_STEP_FACTOR = 1.5
_L1_SMALLEST_STEP = 0.1

# Radii of the parts of an enlarged l1 run, as multiples of epsilon.
_ENLARGED = (3.0, 2.0, 1.0)


class APGDState(NamedTuple):
  """State of runs, one row each; x is evaluated next.

  Attributes:
    x: Current iterate [B, H, W, C].
    previous: Iterate before x.
    best: Point of highest loss.
    best_gradient: Gradient at `best`.
    best_loss: Loss at `best`, [B]; minus infinity where it is not finite.
    last_loss: Loss of the last point, [B]; 0 before there is one.
    checked_loss: `best_loss` at the last checkpoint.
    halved: bool [B]: whether the last checkpoint halved the step.
    step_size: Step size, [B].
    rises: int32 [B]: steps since the last checkpoint that raised the loss.
    steps: int32 [B]: steps since the last checkpoint.
    window: int32 [B]: steps from the last checkpoint to the next.
    kept: int32 [B]: pixels that an l1 step moves.
    support: int32 [B]: pixels in which `best` differed from the image at the
      last checkpoint.
    adversarial: Images that the attack returns.
    fooled: bool [B]: whether they are misclassified.
    bad_points: int32 [B]: evaluations whose logits or loss were not finite.
    bad_gradients: int32 [B]: other evaluations whose gradient was not finite.
  """

  x: Array
  previous: Array
  best: Array
  best_gradient: Array
  best_loss: Array
  last_loss: Array
  checked_loss: Array
  halved: Array
  step_size: Array
  rises: Array
  steps: Array
  window: Array
  kept: Array
  support: Array
  adversarial: Array
  fooled: Array
  bad_points: Array
  bad_gradients: Array


def _percent(share: int, steps: Array) -> Array:
  return jnp.maximum(share * steps // 100, 1)


def _unit(x: Array) -> Array:
  size = balls.l2_length(x)
  usable = (size >= 1e-12) & jnp.isfinite(size)
  return jnp.where(usable, x / (size + 1e-12), balls.unit("l2", x))


def _into_l2(x: Array, images: Array, epsilon: Array) -> Array:
  delta = x - images
  shorter = jnp.minimum(epsilon, balls.l2_length(delta))
  return jnp.clip(images + _unit(delta) * shorter, 0.0, 1.0)


def _support(x: Array, images: Array) -> Array:
  differs = (x != images).reshape(len(x), -1)
  return differs.sum(-1, dtype=jnp.int32)


def _kept(support: Array) -> Array:
  # Support / 1.5, rounded up. Computed in integers, as in floats a whole number
  # can be rounded either way, depending on how the program was compiled.
  return (2 * support + 2) // 3


@dataclasses.dataclass(frozen=True)
class APGD:
  """APGD as a `search.Search`.

  Attributes:
    norm: "linf", "l2" or "l1".
    loss: One of `losses.ATTACK_LOSSES` or `losses.TARGETED_LOSSES`; or
      several, of which `SearchSettings.loss` selects one in the program.
    eot_samples: Number of gradients averaged at each point.
    enlarged: l1 only: whether to run with three times epsilon, then twice, then
      epsilon, each part starting from the best point of the one before.
  """

  norm: str = "linf"
  loss: str | tuple[str, ...] = "cross_entropy"
  eot_samples: int = 1
  enlarged: bool = False

  def __post_init__(self) -> None:
    """Refuses an enlarged ball in norms other than l1."""
    checks.boolean("enlarged", self.enlarged)
    checks.count("eot_samples", self.eot_samples)
    if self.enlarged and self.norm != "l1":
      raise UserError(
        f"enlarged: True with norm {self.norm!r}; allowed: with l1 only"
      )

  @property
  def _radii(self) -> tuple[float, ...]:
    return _ENLARGED if self.enlarged else (1.0,)

  @property
  def beginning(self) -> "APGD":
    """Search that begins alike: the same for every loss."""
    return dataclasses.replace(self, loss="cross_entropy", eot_samples=1)

  def num_evaluations(self, num_steps: int) -> int:
    """Steps, and one evaluation of every part's starting point."""
    return num_steps + len(self._radii)

  def _restart(
    self, x: Array, images: Array, epsilon: Array, num_steps: Array
  ) -> APGDState:
    """Returns the state of a part that begins at x."""
    rows = jnp.zeros(images.shape[0], images.dtype)
    # Losses are compared; in 16 bits too many would be equal.
    no_loss = rows.astype(jnp.promote_types(images.dtype, jnp.float32))
    integers = jnp.zeros(images.shape[0], jnp.int32)
    window = _percent(4 if self.norm == "l1" else 22, num_steps)
    largest_step = epsilon if self.norm == "l1" else 2 * epsilon
    return APGDState(
      x=x,
      previous=x,
      best=x,
      best_gradient=jnp.zeros_like(x),
      best_loss=no_loss,
      last_loss=no_loss,
      checked_loss=no_loss,
      halved=jnp.ones_like(rows, bool),
      step_size=rows + largest_step.reshape(-1),
      rises=integers,
      steps=integers,
      window=integers + window,
      kept=integers + -(-images[0].size // 5),
      support=integers + images[0].size,
      adversarial=x,
      fooled=jnp.zeros_like(rows, bool),
      bad_points=integers,
      bad_gradients=integers,
    )

  def _continue(
    self, x: Array, images: Array, epsilon: Array, num_steps: Array
  ) -> APGDState:
    """Returns the state of an l1 part that continues from another's best."""
    x = images + project_l1(x - images, images, epsilon)
    support = _support(x, images)
    return self._restart(x, images, epsilon, num_steps)._replace(
      kept=_kept(support), support=support
    )

  def start(self, problem: Problem, settings: SearchSettings) -> APGDState:
    """Draws a point on the ball's surface, clipped to [0, 1]."""
    images, epsilon = problem.images, settings.epsilon
    draw = jax.random.uniform if self.norm == "linf" else jax.random.normal
    t = jax.vmap(lambda key: draw(key, images.shape[1:], images.dtype))(
      problem.keys
    )
    radius, _, steps, _ = self._part(jnp.zeros_like(problem.labels), settings)
    if self.norm == "l1":
      x = jnp.clip(images + project_l1(t, images, radius), 0.0, 1.0)
      begin = self._continue if self.enlarged else self._restart
      return begin(x, images, radius, steps)
    if self.norm == "linf":
      t = 2 * t - 1
      t = t / (search.rows(balls.length("linf", t), t) + 1e-12)
    else:
      t = _unit(t)
    x = jnp.clip(images + epsilon * t, 0.0, 1.0)
    return self._restart(x, images, radius, steps)

  def step(
    self,
    classifier: Classifier,
    key: Array,
    problem: Problem,
    settings: SearchSettings,
    state: APGDState,
    i: Array,
  ) -> APGDState:
    """Evaluates x, keeps the best point, adapts the step size and moves."""
    logits, loss, gradient, counts = base.evaluate(
      classifier,
      key,
      state.x,
      functools.partial(self._loss, problem, settings),
      eot_samples=self.eot_samples,
    )
    # A loss of minus infinity stands for numbers that are not finite.
    wrong = (logits.argmax(-1) != problem.labels) & (loss > -jnp.inf)
    radius, within, _, last = self._part(i, settings)
    state = self._observe(state, loss, gradient, first=within == 0)
    fooled = wrong & last
    state = state._replace(
      adversarial=search.select(fooled, state.x, state.best),
      fooled=fooled,
      bad_points=state.bad_points + counts.points,
      bad_gradients=state.bad_gradients + counts.gradients,
    )
    moved = self._move(
      state, gradient, problem.images, radius, within, settings.num_steps
    )
    if not self.enlarged:
      return moved
    return self._next_part(state, moved, problem.images, settings, i)

  def _loss(
    self, problem: Problem, settings: SearchSettings, logits: Array
  ) -> Array:
    names = (self.loss,) if isinstance(self.loss, str) else self.loss
    forms = [functools.partial(losses.attack_loss, name) for name in names]
    arguments = logits, problem.labels, problem.targets
    return lax.switch(settings.loss, forms, *arguments)

  def _part(
    self, i: Array, settings: SearchSettings
  ) -> tuple[Array, Array, Array, Array]:
    """Locates rows that have made i steps within the parts of their run.

    Returns:
      Radius [B, 1, 1, 1], steps made within the part [B], steps of the part
      [B], and whether it is the last part [B].
    """
    steps = jnp.zeros_like(i) + settings.num_steps
    radius = jnp.zeros_like(i, settings.epsilon.dtype) + settings.epsilon
    part = jnp.zeros_like(i)
    begins = jnp.zeros_like(i)
    if self.enlarged:  # three tenths of the steps, three tenths, and the rest
      first = jnp.minimum(-(-3 * steps // 10), steps // 2)
      part = jnp.minimum(i // (first + 1), 2)
      begins = part * (first + 1)
      radius = radius * jnp.asarray(self._radii, radius.dtype)[part]
      steps = jnp.where(part < 2, first, steps - 2 * first)
    last = part == len(self._radii) - 1
    return radius.reshape(-1, 1, 1, 1), i - begins, steps, last

  def _observe(
    self, state: APGDState, loss: Array, gradient: Array, *, first: Array
  ) -> APGDState:
    """Keeps the best point and counts the steps that raised the loss."""
    loss = loss.astype(state.best_loss.dtype)
    better = first | (loss > state.best_loss)
    # Like the reference, which compares the first step's loss with 0.
    rises = state.rises + (~first & (loss > state.last_loss))
    return state._replace(
      best=search.select(better, state.x, state.best),
      best_gradient=search.select(better, gradient, state.best_gradient),
      best_loss=jnp.where(better, loss, state.best_loss),
      checked_loss=jnp.where(first, loss, state.checked_loss),
      last_loss=jnp.where(first, 0.0, loss),
      rises=rises,
      steps=state.steps + ~first,
    )

  def _move(
    self,
    state: APGDState,
    gradient: Array,
    images: Array,
    epsilon: Array,
    within: Array,
    num_steps: Array,
  ) -> APGDState:
    """Applies the checkpoint where it is due, and makes the step."""
    due = state.steps == state.window
    if self.norm == "l1":
      state, back = self._l1_checkpoint(state, due, images, epsilon)
    else:
      state, back = self._checkpoint(state, due, num_steps)
    x = search.select(back, state.best, state.x)
    gradient = search.select(back, state.best_gradient, gradient)
    state = state._replace(
      steps=jnp.where(due, 0, state.steps),
      rises=jnp.where(due, 0, state.rises),
    )
    step_size = search.rows(state.step_size, x)
    if self.norm == "l1":
      direction = balls.sparse_sign(gradient, state.kept)
      delta = x + step_size * direction - images
      moved = images + project_l1(delta, images, epsilon)
      return state._replace(x=moved, previous=x)
    if self.norm == "linf":
      direction = jnp.sign(gradient)

      def project(y: Array) -> Array:
        y = jnp.clip(y, images - epsilon, images + epsilon)
        return jnp.clip(y, 0.0, 1.0)

    else:
      direction = _unit(gradient)

      def project(y: Array) -> Array:
        return _into_l2(y, images, epsilon)

    target = project(x + step_size * direction)
    share = search.rows(jnp.where(within > 0, MOMENTUM, 1.0), x).astype(x.dtype)
    # `previous` is the iterate before x even where x went back to `best`.
    moved = project(
      x + (target - x) * share + (x - state.previous) * (1 - share)
    )
    return state._replace(x=moved, previous=x)

  def _checkpoint(
    self, state: APGDState, due: Array, num_steps: Array
  ) -> tuple[APGDState, Array]:
    """Halves the step of rows without progress, which return to their best."""
    few = state.rises <= RHO * state.window
    stuck = ~state.halved & (state.checked_loss >= state.best_loss)
    halve = few | stuck
    shorter = jnp.maximum(
      state.window - _percent(3, num_steps), _percent(6, num_steps)
    )
    back = due & halve
    return state._replace(
      step_size=jnp.where(back, state.step_size / 2, state.step_size),
      halved=jnp.where(due, halve, state.halved),
      checked_loss=jnp.where(due, state.best_loss, state.checked_loss),
      window=jnp.where(due, shorter, state.window),
    ), back

  def _l1_checkpoint(
    self, state: APGDState, due: Array, images: Array, epsilon: Array
  ) -> tuple[APGDState, Array]:
    """Restores the full step where the support shrinks, else reduces it."""
    support = _support(state.best, images)
    shrinks = 20 * support < 19 * state.support  # below 95 percent
    full = jnp.zeros_like(state.step_size) + epsilon.reshape(-1)
    smaller = jnp.maximum(
      state.step_size / _L1_STEP_FACTOR, full * _L1_SMALLEST_STEP
    )
    step_size = jnp.where(shrinks, full, smaller)
    return state._replace(
      step_size=jnp.where(due, step_size, state.step_size),
      kept=jnp.where(due, _kept(support), state.kept),
      support=jnp.where(due, support, state.support),
    ), due & shrinks

  def _next_part(
    self,
    state: APGDState,
    moved: APGDState,
    images: Array,
    settings: SearchSettings,
    i: Array,
  ) -> APGDState:
    """Starts the next part at the best point where a part has ended."""
    _, within, steps, last = self._part(i, settings)
    radius, _, next_steps, _ = self._part(i + 1, settings)
    begun = self._continue(state.best, images, radius, next_steps)._replace(
      bad_points=moved.bad_points, bad_gradients=moved.bad_gradients
    )
    return search.select(~last & (within == steps), begun, moved)


def _aims(
  loss: str, targeting: str, norm: str, num_targets: int, num_classes: int
) -> dict[str, Any]:
  """Returns the arguments of `search.run` that depend on the kind of loss."""
  aims = aiming(targeting, norm, num_targets, num_classes)
  return aims if base.check_loss(loss, num_classes) else {"loss": loss}


def apgd(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  epsilon: float,
  num_steps: int = 100,
  norm: str = "linf",
  loss: str = "cross_entropy",
  num_targets: int = 9,
  num_restarts: int = 1,
  eot_samples: int = 1,
  enlarged: bool = False,
  targeting: Targeting = "logits",
) -> Array:
  """Auto-PGD (Croce and Hein, 2020), which needs no step size.

  Args:
    key: Random key of the starts.
    classifier: Callable from images to logits; see `pgd`.
    images: Float [B, H, W, C] in [0, 1].
    labels: True classes, integers [B].
    epsilon: Radius of the ball, in the unit of the pixels.
    num_steps: Number of gradient steps of a run.
    norm: "linf", "l2" or "l1" (the sparse steps of Croce and Hein, 2021).
    loss: Name of the loss, as in `pgd`.
    num_targets: Number of classes that a targeted loss aims at, as in `pgd`.
    num_restarts: Number of runs (for each target).
    eot_samples: Gradients averaged at each point, for `Randomized` classifiers.
    enlarged: l1 only: whether the radius shrinks from three times epsilon.
    targeting: Way to choose these classes, one of `targeting.TARGETINGS`.

  Returns:
    [B, H, W, C] in ball and box: misclassified if found, else of highest loss.

  Raises:
    UserError: A wrong argument, or too few classes for the loss, by name.
  """
  base.check_norm(norm, epsilon)
  classifier, images, labels, num_classes = base.check_arguments(
    classifier,
    images,
    labels,
    num_steps=num_steps,
    num_targets=num_targets,
    num_restarts=num_restarts,
    eot_samples=eot_samples,
  )
  return search.run(
    key,
    classifier,
    images,
    labels,
    search=APGD(norm, loss, eot_samples, enlarged),
    epsilon=epsilon,
    num_steps=num_steps,
    num_restarts=num_restarts,
    **_aims(loss, targeting, norm, num_targets, num_classes),
  )
