"""Many examples through one compiled batch, whose rows are refilled.

A run that has fooled the classifier or used up its steps gives its row to the
next one, so that a batch is full of work until little is left; then a smaller
one of a few fixed sizes takes over. Nothing compiles anew for another number
of examples.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import compilation, sharding
from atat_jax.attacks import search as search_lib
from atat_jax.attacks.search import Problem, Search, Settings
from atat_jax.typing import Array, Classifier


class _Costs(NamedTuple):
  """What batches cost, in rows looked at once.

  Attributes:
    batch: What a batch costs besides its rows.
    program: What a smaller batch, one more program to compile, has to save.
    rows: The largest batch of a device; None: as large as allowed. On CPU the
      activations of more do not stay in the caches.
  """

  batch: int
  program: int
  rows: int | None = None


_COSTS = {"cpu": _Costs(batch=4, program=4096, rows=48)}
_ACCELERATOR_COSTS = _Costs(batch=64, program=65536)


def _costs() -> _Costs:
  return _COSTS.get(jax.default_backend(), _ACCELERATOR_COSTS)


@dataclasses.dataclass(frozen=True)
class Job:
  """One attack with its numbers.

  Attributes:
    name: E.g. "apgd-t".
    search: The algorithm.
    num_steps: Of a run.
    num_targets: Classes aimed at, one run each; 1 for untargeted attacks.
    num_restarts: Runs for each target.
    steps_at_once: Steps between two looks at who has finished.
  """

  name: str
  search: Search[Any]
  num_steps: int
  num_targets: int = 1
  num_restarts: int = 1
  steps_at_once: int = 5

  @property
  def num_runs(self) -> int:
    """Of an example that holds out."""
    return self.num_targets * self.num_restarts

  @property
  def num_evaluations(self) -> int:
    """Looks of a run at the classifier, or steps that take several."""
    return self.search.num_evaluations(self.num_steps)


def _begin(
  key: Array,
  settings: Settings,
  images: Array,
  labels: Array,
  targets: Array,
  examples: Array,
  runs: Array,
  restarts: Array,
  *,
  search: Search[Any],
) -> tuple[Problem, Any, Array]:
  problem = search_lib.make_problem(
    key,
    images,
    labels,
    targets,
    examples=examples,
    runs=runs,
    restarts=restarts,
  )
  return problem, search.start(problem, settings), jnp.zeros_like(labels)


def _refill(
  fresh: Array,
  old: tuple[Problem, Any, Array],
  *args: Any,
  search: Search[Any],
) -> tuple[Problem, Any, Array]:
  return search_lib.select(fresh, _begin(*args, search=search), old)


def _advance(
  classifier: Classifier,
  key: Array,
  problem: Problem,
  settings: Settings,
  state: Any,
  i: Array,
  limit: Array,
  count: Array,
  *,
  search: Search[Any],
) -> tuple[Any, Array]:
  return search_lib.advance(
    search,
    classifier,
    key,
    problem,
    settings,
    state,
    i,
    limit=limit,
    count=count,
  )


def _take(tree: Any, rows: Array) -> Any:
  return jax.tree.map(lambda x: x[rows], tree)


_jitted_begin = compilation.jit(_begin, static_argnames="search")
_jitted_refill = compilation.jit(
  _refill, static_argnames="search", donate_argnums=1
)
_jitted_advance = compilation.jit(
  _advance, static_argnames="search", donate_argnames="state"
)
_jitted_take = compilation.jit(_take)


def sizes(batch_size: int, devices: int) -> list[int]:
  """The batch sizes used: the largest, and shares of it down to an eighth."""
  per_device = -(-batch_size // devices)
  largest = min(per_device, _costs().rows or per_device) * devices
  eighths = (8, 6, 4, 3, 2, 1.5, 1)
  shares = (math.ceil(largest * e / (8 * devices)) * devices for e in eighths)
  return sorted(set(shares), reverse=True)


def _best_size(allowed: list[int], pending: int) -> int:
  """The one by which the work costs least; of several the largest."""
  per_batch = _costs().batch

  def cost(size: int) -> tuple[int, int]:
    # Full batches, and a last one that shrinks to what it needs.
    full, rest = divmod(max(pending, size), size)
    last = min(s for s in allowed if s >= rest) + per_batch if rest else 0
    return full * (size + per_batch) + last, -size

  return min(allowed, key=cost)


class InFlight(NamedTuple):
  """Runs that are not finished, to be gone on with by another process.

  Attributes:
    examples: int [size]; -1 for a row without one.
    runs: int [size].
    i: int32 [size]: steps made.
    leaves: The arrays of the search's state.
  """

  examples: np.ndarray
  runs: np.ndarray
  i: np.ndarray
  leaves: list[np.ndarray]


class Slots:
  """The rows of a batch at work on a job.

  Attributes:
    under_way: What has been done of unfinished runs, in runs.

  Args:
    key: Of the job.
    classifier: A pytree callable, on the devices of the mesh.
    job: The attack.
    epsilon: Radius.
    images: All examples, [N, H, W, C], on the host.
    labels: int32 [N].
    ranking: int32 [N, K - 1]: classes by their clean logit, the highest first,
      the true one left out.
    mesh: The devices.
    batch_size: The largest batch.
  """

  def __init__(
    self,
    key: Array,
    classifier: Classifier,
    job: Job,
    *,
    epsilon: float,
    images: np.ndarray,
    labels: np.ndarray,
    ranking: np.ndarray,
    mesh: Mesh,
    batch_size: int,
  ):
    self.under_way = 0.0
    self._mesh, self._job = mesh, job
    self._key, settings = sharding.put_replicated(
      mesh,
      (
        key,
        Settings(
          jnp.asarray(epsilon, images.dtype),
          jnp.asarray(job.num_steps, jnp.int32),
        ),
      ),
    )
    self._settings = settings
    self._classifier = classifier
    self._images, self._labels, self._ranking = images, labels, ranking
    self._allowed = sizes(batch_size, mesh.size)
    self._limit = job.num_evaluations

  def _put(self, array: np.ndarray) -> Array:
    return sharding.put_batch(self._mesh, array)

  def _arguments(self, examples: np.ndarray, runs: np.ndarray) -> list[Any]:
    restarts = self._job.num_restarts
    targets = self._ranking[examples, runs // restarts]
    rows = (
      self._images[examples],
      self._labels[examples],
      targets.astype(np.int32),
      examples.astype(np.int32),
      runs.astype(np.int32),
      (runs % restarts).astype(np.int32),
    )
    return [self._key, self._settings, *map(self._put, rows)]

  def run(
    self,
    done: np.ndarray,
    standing: np.ndarray,
    *,
    on_fooled: Callable[[np.ndarray, np.ndarray], None],
    on_steps: Callable[[Callable[[], InFlight]], None] = lambda _: None,
    in_flight: InFlight | None = None,
  ) -> None:
    """Runs the job on all examples that are still standing.

    Args:
      done: bool [N, runs]: runs that need not be made; those made are marked.
      standing: bool [N]: who is still classified correctly. Read again and
        again: `on_fooled` takes examples out.
      on_fooled: Called with the examples fooled and their images.
      on_steps: Called after every few steps with a function that returns what
        is in flight.
      in_flight: Where to go on; left out where it does not fit.
    """
    pending = int((~done[standing]).sum())
    if not pending:
      return
    device = self._resumed(in_flight)
    if in_flight is not None and device is not None:
      examples, runs = in_flight.examples.copy(), in_flight.runs.copy()
    else:
      size = _best_size(self._allowed, pending)
      examples, runs = np.full(size, -1), np.zeros(size, int)
    queue = self._queue(done, standing, set(zip(examples, runs, strict=True)))
    examples[(examples >= 0) & ~standing[examples]] = -1
    for turn in itertools.count():
      fresh = self._fill(queue, examples, runs)
      if (examples < 0).all():
        return
      smaller = self._shrunk(examples, device)
      if smaller is not None:
        rows = np.argsort(examples < 0, kind="stable")[:smaller]
        examples, runs, fresh = examples[rows], runs[rows], fresh[rows]
        device = _jitted_take(device, self._put(rows))
      if fresh.any():
        device = self._load(device, examples, runs, fresh)
      assert device is not None
      problem, state, i = device
      # Rows without an example rest: they count as finished.
      i = jnp.where(self._put(examples < 0), self._limit, i)
      state, i = _jitted_advance(
        self._classifier,
        jax.random.fold_in(self._key, turn),
        problem,
        self._settings,
        state,
        i,
        self._limit,
        self._job.steps_at_once,
        search=self._job.search,
      )
      device = problem, state, i
      self._harvest(device, examples, runs, done, on_fooled)
      examples[(examples >= 0) & ~standing[examples]] = -1
      on_steps(
        functools.partial(
          self._snapshot, device[1:], examples.copy(), runs.copy()
        )
      )

  def _snapshot(
    self,
    device: tuple[Any, Array],
    examples: np.ndarray,
    runs: np.ndarray,
  ) -> InFlight:
    state, i = sharding.to_host(self._mesh, device)
    return InFlight(examples, runs, i, jax.tree.leaves(state))

  def _resumed(
    self, in_flight: InFlight | None
  ) -> tuple[Problem, Any, Array] | None:
    """What was in flight, back on the devices; None where it does not fit."""
    if in_flight is None or len(in_flight.examples) not in self._allowed:
      return None
    if (in_flight.examples < 0).all():
      return None
    everyone = np.ones(len(in_flight.examples), bool)
    problem, state, _ = self._load(
      None, in_flight.examples, in_flight.runs, everyone
    )
    leaves, structure = jax.tree.flatten(state)
    if [x.shape for x in leaves] != [x.shape for x in in_flight.leaves]:
      return None
    leaves = [self._put(leaf) for leaf in in_flight.leaves]
    state = jax.tree.unflatten(structure, leaves)
    return problem, state, self._put(in_flight.i)

  def _queue(
    self,
    done: np.ndarray,
    standing: np.ndarray,
    running: set[tuple[int, int]],
  ) -> Iterator[tuple[int, int]]:
    """Runs still to be made, all examples' first run first."""
    for run in range(self._job.num_runs):
      for example in np.flatnonzero(standing & ~done[:, run]).tolist():
        if standing[example] and (example, run) not in running:  # still
          yield example, run

  def _fill(
    self,
    queue: Iterator[tuple[int, int]],
    examples: np.ndarray,
    runs: np.ndarray,
  ) -> np.ndarray:
    """Gives free rows to the next runs; returns which rows are new."""
    free = np.flatnonzero(examples < 0)
    fresh = np.zeros(len(examples), bool)
    for row, (example, run) in zip(free, queue, strict=False):
      examples[row], runs[row], fresh[row] = example, run, True
    return fresh

  def _shrunk(
    self, examples: np.ndarray, device: tuple[Problem, Any, Array] | None
  ) -> int | None:
    """A smaller size, where it is enough and worth a program of its own."""
    size, active = len(examples), int((examples >= 0).sum())
    smaller = [s for s in self._allowed if active <= s < size]
    if device is None or not smaller:
      return None
    i = sharding.to_host(self._mesh, device[2])
    remaining = self._limit - int(i[examples >= 0].min())
    saved = (size - smaller[-1]) * remaining
    return smaller[-1] if saved >= _costs().program else None

  def _load(
    self,
    device: tuple[Problem, Any, Array] | None,
    examples: np.ndarray,
    runs: np.ndarray,
    fresh: np.ndarray,
  ) -> tuple[Problem, Any, Array]:
    # Rows without an example get a real image too: a classifier in batch mode
    # must not see anything else.
    spare = int(examples[examples >= 0][0])
    filled = np.where(examples < 0, spare, examples)
    arguments = self._arguments(filled, runs)
    if device is None:
      return _jitted_begin(*arguments, search=self._job.search)
    return _jitted_refill(
      self._put(fresh), device, *arguments, search=self._job.search
    )

  def _harvest(
    self,
    device: tuple[Problem, Any, Array],
    examples: np.ndarray,
    runs: np.ndarray,
    done: np.ndarray,
    on_fooled: Callable[[np.ndarray, np.ndarray], None],
  ) -> None:
    """Takes finished runs out of their rows."""
    _, state, i = device
    i, fooled = sharding.to_host(self._mesh, (i, state.fooled))
    active = examples >= 0
    won = active & fooled
    if won.any():
      # Several runs may fool the same example at once: the first one counts.
      rows = np.flatnonzero(won)
      _, first = np.unique(examples[rows], return_index=True)
      rows = rows[first]
      images = sharding.to_host(self._mesh, state.adversarial)
      on_fooled(examples[rows], images[rows])
    over = active & (fooled | (i >= self._limit))
    done[examples[over], runs[over]] = True
    examples[over] = -1
    self.under_way = float((i[examples >= 0] / self._limit).sum())
