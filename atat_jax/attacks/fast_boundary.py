"""FAB, the fast adaptive boundary attack (Croce and Hein, 2020).

It searches for the closest misclassified point: each step goes to the decision
boundary of the linearised classifier, biased towards the clean image, and from
a misclassified point a part of the way back.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax import checks
from atat_jax.attacks import balls, base, hyperplane, nonfinite, search
from atat_jax.attacks.nonfinite import Counts
from atat_jax.attacks.search import Problem, SearchSettings
from atat_jax.attacks.targeting import Targeting, aiming
from atat_jax.typing import Array, Classifier

ALPHA_MAX = 0.1
ETA = 1.05
BETA = 0.9

# The square of a larger number, summed over an image, may not fit into float32.
_LARGEST = 1e15


class FABState(NamedTuple):
  """State of runs, one row each.

  Attributes:
    x: Current iterate [B, H, W, C].
    closest: Closest misclassified point so far.
    distance: Distance of `closest` from the image, [B]; inf before there is
      one.
    adversarial: Images that the attack returns: `closest`, or a point in the
      ball towards it.
    fooled: bool [B]: whether `closest` is in the ball.
    bad_points: int32 [B]: evaluations whose logits were not finite.
    bad_gradients: int32 [B]: other evaluations whose gradient was not finite.
  """

  x: Array
  closest: Array
  distance: Array
  adversarial: Array
  fooled: Array
  bad_points: Array
  bad_gradients: Array


def _into_ball(norm: str, x: Array, images: Array, epsilon: Array) -> Array:
  """Moves x towards the image until it is in the ball."""
  delta = x - images
  if norm == "linf":
    delta = jnp.clip(delta, -epsilon, epsilon)
  else:
    length = search.rows(balls.length(norm, delta), x)
    delta = delta * (epsilon / jnp.maximum(length, epsilon))
  return jnp.clip(images + delta, 0.0, 1.0)


def _in_range(value: Array, gradient: Array) -> tuple[Array, Array]:
  """Scales f and its gradient where lengths and products would overflow.

  The boundary f = 0 of the linearised classifier stays where it is.
  """
  largest = balls.length("linf", gradient)
  scale = jnp.where(largest > _LARGEST, largest, 1)
  # An infinite f says nothing of where the boundary is: NaN moves nothing.
  value = jnp.where(jnp.isfinite(value), value / scale, jnp.nan)
  return value, gradient / search.rows(scale, gradient)


@dataclasses.dataclass(frozen=True)
class FAB:
  """FAB as a `search.Search`.

  Attributes:
    norm: "linf", "l2" or "l1".
    targeted: Whether to aim at `problem.targets` (FAB-T) rather than at the
      class of the closest boundary, which costs a backward pass per class.
  """

  norm: str = "linf"
  targeted: bool = True

  def __post_init__(self) -> None:
    """Refuses anything but True and False."""
    checks.boolean("targeted", self.targeted)

  @property
  def beginning(self) -> "FAB":
    """Search that begins alike, whatever it aims at."""
    return dataclasses.replace(self, targeted=True)

  def num_evaluations(self, num_steps: int) -> int:
    """Number of steps, each of which evaluates two points."""
    return num_steps

  def start(self, problem: Problem, settings: SearchSettings) -> FABState:
    """Starts at the image; restarts, halfway to the surface of the ball."""
    images = problem.images
    draw = jax.random.uniform if self.norm == "linf" else jax.random.normal
    t = jax.vmap(lambda key: draw(key, images.shape[1:], images.dtype))(
      problem.keys
    )
    t = 2 * t - 1 if self.norm == "linf" else t
    # An image of one pixel may draw 0.
    size = jnp.maximum(balls.length(self.norm, t), 1e-30)
    t = t / search.rows(size, t)
    random = jnp.clip(images + 0.5 * settings.epsilon * t, 0.0, 1.0)
    x = search.select(problem.restart > 0, random, images)
    rows = jnp.zeros(images.shape[0], images.dtype)
    return FABState(
      x=x,
      closest=images,
      distance=rows + jnp.inf,
      adversarial=images,
      fooled=jnp.zeros_like(rows, bool),
      bad_points=jnp.zeros_like(problem.labels),
      bad_gradients=jnp.zeros_like(problem.labels),
    )

  def _boundary(
    self, classifier: Classifier, key: Array, problem: Problem, x: Array
  ) -> tuple[Array, Array, Counts]:
    """Computes f [B], its gradient and counts; f < 0 where the label wins."""
    labels = problem.labels
    rows = jnp.arange(len(labels))

    def difference(x: Array, classes: Array) -> tuple[Array, Any]:
      logits = base.apply(classifier, key, x)
      value = logits[rows, classes] - logits[rows, labels]
      return value.sum(), (value, nonfinite.usable(logits, value))

    if self.targeted:
      gradient, (value, usable) = jax.grad(difference, has_aux=True)(
        x, problem.targets
      )
      counts = nonfinite.count(usable, gradient)
      return *_in_range(value, nonfinite.clean(gradient)), counts
    logits, pullback = jax.vjp(lambda x: base.apply(classifier, key, x), x)
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    values = logits - logits[rows, labels][:, None]
    usable = nonfinite.usable(logits, values.max(-1) - values.min(-1))

    def body(k: Array, carry: Any) -> Any:
      nearest, best_value, best_gradient, counts = carry
      (gradient,) = pullback(
        jax.nn.one_hot(k, logits.shape[-1], dtype=logits.dtype) - own
      )
      new = nonfinite.count(usable, gradient)
      value, gradient = _in_range(values[:, k], nonfinite.clean(gradient))
      size = balls.length(balls.DUAL[self.norm], gradient) + 1e-12
      distance = jnp.where(labels == k, jnp.inf, jnp.abs(value) / size)
      better = distance < nearest
      return (
        jnp.where(better, distance, nearest),
        jnp.where(better, value, best_value),
        search.select(better, gradient, best_gradient),
        # One evaluation, however many of its gradients are not finite.
        jax.tree.map(jnp.maximum, counts, new),
      )

    start = (
      jnp.full_like(values[:, 0], jnp.inf),
      values[:, 0],
      jnp.zeros_like(x),
      nonfinite.count(usable),
    )
    return lax.fori_loop(0, logits.shape[-1], body, start)[1:]

  def step(
    self,
    classifier: Classifier,
    key: Array,
    problem: Problem,
    settings: SearchSettings,
    state: FABState,
    i: Array,
  ) -> FABState:
    """Goes to the boundary, and part of the way back if x is misclassified."""
    del i
    images, count = problem.images, len(problem.labels)
    first_key, second_key = jax.random.split(key)
    value, gradient, counts = self._boundary(
      classifier, first_key, problem, state.x
    )
    offset = (gradient * state.x).reshape(count, -1).sum(-1) - value
    ways = hyperplane.project(
      self.norm,
      jnp.concatenate([state.x, images]).reshape(2 * count, -1),
      jnp.tile(gradient.reshape(count, -1), (2, 1)),
      jnp.tile(offset, 2),
    )
    lengths = jnp.maximum(balls.length(self.norm, ways), 1e-8)
    from_x, from_image = ways.reshape(2, *images.shape)
    alpha = lengths[:count] / (lengths[:count] + lengths[count:])
    alpha = search.rows(jnp.clip(alpha, 0.0, ALPHA_MAX), images)
    x = jnp.clip(
      (1 - alpha) * (state.x + ETA * from_x)
      + alpha * (images + ETA * from_image),
      0.0,
      1.0,
    )
    logits = base.apply(classifier, second_key, x)
    wrong = nonfinite.misses(logits, problem.labels)
    at_x = nonfinite.count(nonfinite.usable(logits))
    distance = balls.length(self.norm, x - images)
    closer = wrong & (distance < state.distance)
    closest = search.select(closer, x, state.closest)
    distance = jnp.where(closer, distance, state.distance)
    fooled = distance <= settings.epsilon
    found = jnp.isfinite(distance)
    attempt = _into_ball(
      self.norm, search.select(found, closest, x), images, settings.epsilon
    )
    return FABState(
      x=search.select(wrong, images + BETA * (x - images), x),
      closest=closest,
      distance=distance,
      adversarial=search.select(fooled, closest, attempt),
      fooled=fooled,
      bad_points=state.bad_points + counts.points + at_x.points,
      bad_gradients=state.bad_gradients + counts.gradients,
    )


def fab(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  epsilon: float,
  num_steps: int = 100,
  norm: str = "linf",
  num_targets: int = 9,
  num_restarts: int = 1,
  targeted: bool = True,
  targeting: Targeting = "logits",
) -> Array:
  """Fast adaptive boundary attack (Croce and Hein, 2020), by default FAB-T.

  Args:
    key: Random key of the restarts; the first run starts at the image.
    classifier: Callable from images to logits; see `pgd`.
    images: Float [B, H, W, C] in [0, 1].
    labels: True classes, integers [B].
    epsilon: Radius of the ball: an example is fooled when a misclassified point
      is found in it.
    num_steps: Number of steps of a run.
    norm: "linf", "l2" or "l1".
    num_targets: Number of classes aimed at one after the other: those of the
      highest clean logits, the true one excepted; lowered to K - 1.
    num_restarts: Number of runs (for each target).
    targeted: Whether to aim at these classes, or at the closest boundary of
      all, which costs a backward pass per class.
    targeting: Way to choose these classes, one of `targeting.TARGETINGS`.

  Returns:
    [B, H, W, C] in the ball and in [0, 1]; if no misclassified point was found
    in the ball, the closest one found, moved into it.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  base.check_norm(norm, epsilon)
  classifier, images, labels, num_classes = base.check_arguments(
    classifier,
    images,
    labels,
    num_steps=num_steps,
    num_targets=num_targets,
    num_restarts=num_restarts,
  )
  aims = aiming(targeting, norm, num_targets, num_classes)
  return search.run(
    key,
    classifier,
    images,
    labels,
    search=FAB(norm=norm, targeted=targeted),
    epsilon=epsilon,
    num_steps=num_steps,
    num_restarts=num_restarts,
    **(aims if targeted else {}),
  )
