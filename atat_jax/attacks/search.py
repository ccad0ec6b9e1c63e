"""Attacks as loops that keep one state per example.

APGD, FAB and Square share this shape: a run begins at a point, evaluates the
classifier in every step, and ends when it has fooled the classifier or has used
up its steps. Nothing in a run depends on the other rows of the batch or on how
far they are, so `run` can stop when all are done, and AutoAttack can give the
row of a finished run to another example (`autoattack/slots.py`) without a new
compilation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from atat_jax import checks, compilation, losses, rng
from atat_jax.attacks import base, nonfinite, targeting
from atat_jax.attacks.nonfinite import Counts
from atat_jax.typing import Array, Classifier


class Problem(NamedTuple):
  """Input of the runs, one row each.

  Attributes:
    keys: [B] random keys, one per run, so that neighbours change nothing.
    images: [B, H, W, C] clean images.
    labels: int32 [B] true classes.
    targets: int32 [B] classes to reach, for attacks that aim at one.
    restart: int32 [B] number of the restart, 0 for the first.
  """

  keys: Array
  images: Array
  labels: Array
  targets: Array
  restart: Array


class SearchSettings(NamedTuple):
  """Numbers that may change without a new compilation.

  Attributes:
    epsilon: Radius, in the images' dtype.
    num_steps: Number of steps, int32.
    loss: Place of the loss among those of a search that has several, int32.
  """

  epsilon: Array
  num_steps: Array
  loss: Array | int = 0


class SearchState(Protocol):
  """State of runs, one row each: a NamedTuple of arrays, these two included."""

  @property
  def adversarial(self) -> Array:
    """[B, H, W, C] in ball and box: the images that the attack returns."""

  @property
  def fooled(self) -> Array:
    """bool [B]: whether `adversarial` is misclassified."""

  @property
  def bad_points(self) -> Array:
    """int32 [B]: evaluations whose logits or loss were not finite."""

  @property
  def bad_gradients(self) -> Array:
    """int32 [B]: other evaluations whose gradient was not finite."""


AnyState = TypeVar("AnyState", bound=Any)


class Search(Protocol[AnyState]):
  """Attack algorithm: a frozen dataclass of its options, static in jit."""

  def num_evaluations(self, num_steps: int) -> int:
    """Number of calls of `step` in a whole run (computed on the host)."""

  def start(self, problem: Problem, settings: SearchSettings) -> AnyState:
    """Returns the state before the first evaluation of the classifier."""

  def step(
    self,
    classifier: Classifier,
    key: Array,
    problem: Problem,
    settings: SearchSettings,
    state: AnyState,
    i: Array,
  ) -> AnyState:
    """Makes one step; i int32 [B] counts each row's steps, key is for EOT."""


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
  """Builds rows whose random numbers depend on example and run alone.

  Args:
    key: Random key of the attack.
    images: Clean images [B, H, W, C].
    labels: True classes, int32 [B].
    targets: Classes to reach, int32 [B].
    examples: Number of each row's example in the data, int32 [B].
    runs: Number of each row's run, int32 [B].
    restarts: Number of each row's restart, int32 [B].

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
  """Reshapes a mask [B] to broadcast against x [B, ...]."""
  return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def select(mask: Array, new: AnyState, old: AnyState) -> AnyState:
  """Selects row by row: new where mask [B], old elsewhere."""
  return jax.tree.map(lambda a, b: jnp.where(rows(mask, a), a, b), new, old)


def advance(
  search: Search[AnyState],
  classifier: Classifier,
  key: Array,
  problem: Problem,
  settings: SearchSettings,
  state: AnyState,
  i: Array,
  *,
  limit: Array,
  count: Array | int,
) -> tuple[AnyState, Array]:
  """Makes at most `count` steps in every row that is neither done nor fooled.

  Args:
    search: Attack algorithm.
    classifier: Callable from images to logits.
    key: Random key for `Randomized` classifiers.
    problem: Input of the runs.
    settings: Radius and number of steps.
    state: State of the runs.
    i: Steps that each row has made, int32 [B].
    limit: Steps of a whole run, int32.
    count: Steps to make; fewer if all rows finish before.

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

  def continues(carry: tuple[AnyState, Array, Array]) -> Array:
    state, i, done = carry
    return (done < count) & active(state, i).any()

  state, i, _ = lax.while_loop(continues, body, (state, i, jnp.int32(0)))
  return state, i


def ranked(logits: Array, labels: Array) -> Array:
  """Sorts the classes by their logits, the first left out.

  Args:
    logits: [B, K].
    labels: int32 [B]; the class that is left out where logits are not finite.

  Returns:
    int32 [B, K - 1].
  """
  largest = jnp.finfo(logits.dtype).max
  finite = jnp.nan_to_num(logits, nan=-largest, posinf=largest, neginf=-largest)
  is_label = jnp.arange(logits.shape[-1]) == labels[:, None]
  usable = nonfinite.usable(logits)[:, None]
  order = jnp.where(~usable & is_label, jnp.inf, finite)
  return jnp.argsort(-order, axis=-1)[:, 1:].astype(jnp.int32)


class Attempt(NamedTuple):
  """Images that a run returns and their strength.

  Attributes:
    images: [B, H, W, C].
    fooled: bool [B].
    value: Loss [B], larger for a stronger attempt.
    counts: Evaluations that were not finite in it, scalars.
  """

  images: Array
  fooled: Array
  value: Array
  counts: Counts


def judged(
  images: Array,
  logits: Array,
  value: Array,
  fooled: Array,
  counts: Counts,
) -> Attempt:
  """Builds an attempt from an evaluation of the images that it returns.

  Args:
    images: [B, H, W, C].
    logits: Their logits, [B, K].
    value: Their loss, [B].
    fooled: Whether they are where the attack leads, bool [B].
    counts: Evaluations that were not finite before this one, [B] each.

  Returns:
    The attempt. One of logits or loss that are not finite has not fooled and
    is weaker than any other.
  """
  usable = nonfinite.usable(logits, value)
  counts = nonfinite.add(counts, nonfinite.count(usable))
  return Attempt(
    images,
    fooled & usable,
    jnp.where(usable, value, -jnp.inf),
    nonfinite.total(counts),
  )


def strongest(
  attempt: Callable[[Array, Array], Attempt],
  first: Attempt,
  *,
  runs: tuple[int, Array | int],
  stop_when_fooled: bool = False,
) -> tuple[Array, Counts]:
  """Makes runs one after the other and keeps each example's strongest.

  A fooled example is stronger than one that is not, whatever its loss.

  Args:
    attempt: (number of the run, bool [B] examples fooled before it) to its
      result.
    first: Result to begin with.
    runs: Number of the first run, and the number after the last.
    stop_when_fooled: Whether to stop once every example is fooled.

  Returns:
    Images of the strongest attempts, [B, H, W, C], and the evaluations that
    were not finite in all of them.
  """

  def body(carry: tuple[Array, Attempt]) -> tuple[Array, Attempt]:
    run, best = carry
    new = attempt(run, best.fooled)
    better = jnp.where(
      new.fooled == best.fooled, new.value > best.value, new.fooled
    )
    counts = nonfinite.add(best.counts, new.counts)
    kept = select(better, new[:3], best[:3])
    return run + 1, Attempt(*kept, counts)

  def continues(carry: tuple[Array, Attempt]) -> Array:
    run, best = carry
    more = run < runs[1]
    return more & ~best.fooled.all() if stop_when_fooled else more

  carry = jnp.int32(runs[0]), first
  best = lax.while_loop(continues, body, carry)[1]
  return best.images, best.counts


def _targets(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  logits: Array,
  malt: str | None,
) -> Array:
  """Ranks the classes to aim at by the logits, or by MALT with a norm."""
  targets = ranked(logits, labels)
  if malt is None:
    return targets
  key = rng.stream(key, "targets")
  return targeting.malt(classifier, key, images, labels, targets, norm=malt)


def _run(
  key: Array,
  classifier: Classifier,
  images: Array,
  labels: Array,
  settings: SearchSettings,
  limit: Array,
  num_restarts: Array,
  num_targets: Array,
  *,
  search: Search[Any],
  loss: str,
  malt: str | None,
) -> tuple[Array, Counts]:
  """Makes all runs of an attack, one after the other."""
  batch = jnp.arange(images.shape[0], dtype=jnp.int32)
  noise_key = rng.stream(key, "noise")

  def score(x: Array, number: Array | int) -> tuple[Array, Array]:
    logits = base.apply(classifier, rng.stream(noise_key, "score", number), x)
    return logits, losses.ATTACK_LOSSES[loss](logits, labels)

  logits, value = score(images, 0)
  targets = _targets(noise_key, classifier, images, labels, logits, malt)

  def attempt(run: Array, fooled: Array) -> Attempt:
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
    return judged(
      state.adversarial,
      *score(state.adversarial, run + 1),
      state.fooled,
      Counts(state.bad_points, state.bad_gradients),
    )

  # An image that is misclassified without any attack stays as it is.
  none = nonfinite.zeros(labels.shape)
  first = judged(images, logits, value, logits.argmax(-1) != labels, none)
  num_runs = num_targets * num_restarts
  return strongest(attempt, first, runs=(0, num_runs), stop_when_fooled=True)


_jitted = compilation.jit(_run, static_argnames=("search", "loss", "malt"))


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
  malt: str | None = None,
) -> Array:
  """Makes all runs of an attack on a batch checked by `base.check_arguments`.

  Args:
    key: Random key.
    classifier: A pytree callable.
    images: Clean images [B, H, W, C] in [0, 1].
    labels: True classes, int32 [B].
    search: Attack algorithm; its type names the attack in warnings.
    epsilon: Radius.
    num_steps: Number of steps of a run.
    num_restarts: Number of runs for each target.
    num_targets: Number of classes aimed at: those of the highest logits on the
      clean image, the true one excepted. 1 for untargeted attacks.
    loss: Loss by which failed attempts are compared.
    malt: Norm by which `targeting.malt` chooses these classes; None: it does
      not.

  Returns:
    [B, H, W, C]: the first misclassified point found for an example, else the
    point of highest `loss` over the runs, the clean image among them.

  Raises:
    UserError: Not a random key.
  """
  base.check_runs(num_restarts, num_targets)
  adversarial, counts = _jitted(
    checks.key(key),
    classifier,
    images,
    labels,
    SearchSettings(
      jnp.asarray(epsilon, images.dtype), jnp.asarray(num_steps, jnp.int32)
    ),
    jnp.asarray(search.num_evaluations(num_steps), jnp.int32),
    jnp.asarray(num_restarts, jnp.int32),
    jnp.asarray(num_targets, jnp.int32),
    search=search,
    loss=loss,
    malt=malt,
  )
  nonfinite.report(type(search).__name__.lower(), *counts)
  return adversarial
