"""Attacks as loops with one state an example.

APGD, FAB and Square share this shape: a run begins at a point, looks at the
classifier once a step, and ends when it has fooled it or has used up its
steps. Nothing in a run depends on the other rows of a batch or on how far they
are, so `run` can stop when all are done, and AutoAttack can hand a finished
row's place to another example (`slots.py`) without a new compilation.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax import compilation, losses, rng
from atat_jax.attacks import base
from atat_jax.typing import Array, Classifier


class Problem(NamedTuple):
  """What runs are given, one row each.

  Attributes:
    keys: [B] random keys, one a run: neighbours change nothing.
    images: [B, H, W, C] clean.
    labels: int32 [B].
    targets: int32 [B]; the class to reach, for attacks that have one.
    restart: int32 [B]; 0 for the first attempt.
  """

  keys: Array
  images: Array
  labels: Array
  targets: Array
  restart: Array


class Settings(NamedTuple):
  """Numbers that may change without a new compilation.

  Attributes:
    epsilon: Radius, of the images' dtype.
    num_steps: int32.
  """

  epsilon: Array
  num_steps: Array


class State(Protocol):
  """Of a run, one row each: a NamedTuple of arrays with these two among them."""

  @property
  def adversarial(self) -> Array:
    """[B, H, W, C] in ball and box: what the attack returns."""

  @property
  def fooled(self) -> Array:
    """bool [B]: whether `adversarial` is misclassified."""


AnyState = TypeVar("AnyState", bound=Any)


class Search(Protocol[AnyState]):
  """An attack: a frozen dataclass of its options, hashable, so static in jit."""

  def num_evaluations(self, num_steps: int) -> int:
    """Calls of `step` in a whole run (on the host)."""

  def start(self, problem: Problem, settings: Settings) -> AnyState:
    """The state before the first look at the classifier."""

  def step(
    self,
    classifier: Classifier,
    key: Array,
    problem: Problem,
    settings: Settings,
    state: AnyState,
    i: Array,
  ) -> AnyState:
    """One step; i int32 [B] counts each row's steps so far, key is for EOT."""


def make_problem(
  key: Array,
  images: Array,
  labels: Array,
  targets: Array,
  *,
  examples: Array,
  runs: Array,
  restarts: Array,
) -> Problem:
  """Rows whose random numbers depend on the example and the run alone.

  Args:
    key: Of the attack.
    images: [B, H, W, C].
    labels: int32 [B].
    targets: int32 [B].
    examples: int32 [B]: the number of each row's example in the data.
    runs: int32 [B]: the number of its run.
    restarts: int32 [B].

  Returns:
    The problem.
  """
  keys = jax.vmap(
    lambda example, run: jax.random.fold_in(
      jax.random.fold_in(key, example), run
    )
  )(examples, runs)
  return Problem(keys, images, labels, targets, restarts)


def rows(mask: Array, x: Array) -> Array:
  """A mask [B] shaped to go with x [B, ...]."""
  return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def select(mask: Array, new: AnyState, old: AnyState) -> AnyState:
  """Row by row, new where mask [B] and old elsewhere."""
  return jax.tree.map(lambda a, b: jnp.where(rows(mask, a), a, b), new, old)


def advance(
  search: Search[AnyState],
  classifier: Classifier,
  key: Array,
  problem: Problem,
  settings: Settings,
  state: AnyState,
  i: Array,
  *,
  limit: Array,
  count: Array | int,
) -> tuple[AnyState, Array]:
  """At most `count` steps of every row that is neither done nor fooled.

  Args:
    search: The attack.
    classifier: Callable from images to logits.
    key: For classifiers that are randomised.
    problem: The rows.
    settings: Epsilon and steps.
    state: Where they are.
    i: int32 [B]: steps that each row has made.
    limit: int32: steps of a whole run.
    count: Steps to make; fewer where all rows are finished before.

  Returns:
    The state and i. Rows that are finished keep theirs.
  """

  def active(state: AnyState, i: Array) -> Array:
    return ~state.fooled & (i < limit)

  def body(carry: tuple[AnyState, Array, Array]) -> Any:
    state, i, done = carry
    runs = active(state, i)
    new = search.step(
      classifier,
      jax.random.fold_in(key, done),
      problem,
      settings,
      state,
      i,
    )
    return select(runs, new, state), i + runs, done + 1

  def goes_on(carry: tuple[AnyState, Array, Array]) -> Array:
    state, i, done = carry
    return (done < count) & active(state, i).any()

  state, i, _ = lax.while_loop(goes_on, body, (state, i, jnp.int32(0)))
  return state, i


def ranked(logits: Array) -> Array:
  """int32 [B, K - 1]: the classes from the second highest logit down."""
  return jnp.argsort(-logits, axis=-1)[:, 1:].astype(jnp.int32)


def _run(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  epsilon: Array,
  num_steps: Array,
  limit: Array,
  num_restarts: Array,
  num_targets: Array,
  *,
  search: Search[Any],
  loss: str,
) -> Array:
  """All runs of an attack, one after the other, the best of each example."""
  batch = jnp.arange(images.shape[0], dtype=jnp.int32)
  settings = Settings(epsilon, num_steps)
  noise_key = rng.stream(key, "noise")

  def strength(x: Array, run: Array | int) -> tuple[Array, Array]:
    logits = base.apply(classifier, rng.stream(noise_key, "score", run), x)
    return logits, losses.ATTACK_LOSSES[loss](logits, labels)

  logits, value = strength(images, 0)
  targets = ranked(logits)

  def attempt(carry: Any) -> Any:
    run, best, fooled, value = carry
    problem = make_problem(
      rng.stream(key, "run"),
      images,
      labels,
      jnp.take(targets, run // num_restarts, axis=1),
      examples=batch,
      runs=jnp.full_like(batch, run),
      restarts=jnp.full_like(batch, run % num_restarts),
    )
    state, _ = advance(
      search,
      classifier,
      rng.stream(noise_key, "run", run),
      problem,
      settings,
      search.start(problem, settings),
      jnp.where(fooled, limit, 0).astype(jnp.int32),
      limit=limit,
      count=limit,
    )
    new_value = strength(state.adversarial, run + 1)[1]
    # A fooled example is stronger than one that is not, whatever its loss.
    better = ~fooled & (state.fooled | (new_value > value))
    return (
      run + 1,
      jnp.where(rows(better, images), state.adversarial, best),
      fooled | state.fooled,
      jnp.where(better, new_value, value),
    )

  def goes_on(carry: Any) -> Array:
    run, _, fooled, _ = carry
    return (run < num_targets * num_restarts) & ~fooled.all()

  # What is misclassified without any attack stays as it is.
  fooled = logits.argmax(-1) != labels
  first = (jnp.int32(0), images, fooled, value)
  return lax.while_loop(goes_on, attempt, first)[1]


_jitted = compilation.jit(_run, static_argnames=("search", "loss"))


def run(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  search: Search[Any],
  epsilon: Array | float,
  num_steps: int,
  num_restarts: int = 1,
  num_targets: int = 1,
  loss: str = "margin",
) -> Array:
  """All runs of an attack on one batch; arguments as `base` has checked them.

  Args:
    key: Random key.
    classifier: A pytree callable.
    images: [B, H, W, C] in [0, 1].
    labels: int32 [B].
    search: The attack.
    epsilon: Radius.
    num_steps: Steps of a run.
    num_restarts: Runs for each target.
    num_targets: Classes aimed at: those of the highest logits on the clean
      image, the true one aside. 1 for attacks that aim at none.
    loss: What tells which of several failed attempts is the strongest.

  Returns:
    [B, H, W, C]: the first misclassified point found for an example, else the
    point of highest `loss` over the runs, the clean image among them.
  """
  return _jitted(
    key,
    classifier,
    images,
    labels,
    jnp.asarray(epsilon, images.dtype),
    jnp.asarray(num_steps, jnp.int32),
    jnp.asarray(search.num_evaluations(num_steps), jnp.int32),
    jnp.asarray(num_restarts, jnp.int32),
    jnp.asarray(num_targets, jnp.int32),
    search=search,
    loss=loss,
  )
