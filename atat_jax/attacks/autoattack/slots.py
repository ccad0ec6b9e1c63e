"""Runs many examples through one compiled batch, whose rows are refilled.

A run that has fooled the classifier or used up its steps gives its row to the
next run, so that the batch is full until little is left; then a smaller one, of
a few fixed sizes, takes over. Another number of examples compiles nothing.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import compilation, sharding
from atat_jax.attacks import search as search_lib
from atat_jax.attacks.search import Problem, Search, SearchSettings
from atat_jax.compilation.ahead import Ahead, placed
from atat_jax.typing import Array, Classifier


class _Costs(NamedTuple):
  """Cost of a batch, in units of one evaluation of one row.

  Attributes:
    batch: Cost of a batch besides its rows.
    program: Cost of compiling one more program, for a smaller batch.
    rows: Largest batch of a device; None: as large as allowed. On CPU the
      activations of more rows do not stay in the caches.
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
    name: Name of the attack, e.g. "apgd-t".
    search: Attack algorithm.
    num_steps: Number of steps of a run.
    num_targets: Number of classes aimed at, one run each; 1 for untargeted
      attacks.
    num_restarts: Number of runs for each target.
    steps_at_once: Number of steps between two checks for finished rows.
    targeting: Way to choose the classes aimed at, see `targeting.TARGETINGS`.
    screened: Whether it runs on the screening network, see `screening`.
  """

  name: str
  search: Search[Any]
  num_steps: int
  num_targets: int = 1
  num_restarts: int = 1
  steps_at_once: int = 5
  targeting: str = "logits"
  screened: bool = False

  @property
  def num_runs(self) -> int:
    """Number of runs on an example that is never fooled."""
    return self.num_targets * self.num_restarts

  @property
  def num_evaluations(self) -> int:
    """Number of calls of the search's step in a run."""
    return self.search.num_evaluations(self.num_steps)


def _begin(
  key: Array,
  settings: SearchSettings,
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


def _advance(
  classifier: Classifier,
  key: Array,
  turn: Array,
  problem: Problem,
  settings: SearchSettings,
  state: Any,
  i: Array,
  active: Array,
  limit: Array,
  count: Array,
  *,
  search: Search[Any],
) -> tuple[Any, Array]:
  # Free rows count as finished, so that they rest.
  i = jnp.where(active, i, limit)
  return search_lib.advance(
    search,
    classifier,
    jax.random.fold_in(key, turn),
    problem,
    settings,
    state,
    i,
    limit=limit,
    count=count,
  )


def _take(tree: Any, rows: Array) -> Any:
  return jax.tree.map(lambda x: x[rows], tree)


# Random numbers take XLA:CPU long to optimise, and are seldom drawn. Uniform
# ones, of linf, are the same however much; normal ones are rounded otherwise.
_jitted_begin = {
  light: compilation.jit(_begin, light=light, static_argnames="search")
  for light in (False, True)
}
_jitted_refill = compilation.jit(
  search_lib.select, light=True, donate_argnames="old"
)
_jitted_advance = compilation.jit(
  _advance, static_argnames="search", donate_argnames="state"
)
_jitted_take = compilation.jit(_take)


def sizes(batch_size: int, devices: int) -> list[int]:
  """Lists the batch sizes used: the largest, and fractions down to an eighth."""
  per_device = -(-batch_size // devices)
  largest = min(per_device, _costs().rows or per_device) * devices
  eighths = (8, 6, 4, 3, 2, 1.5, 1)
  shares = (math.ceil(largest * e / (8 * devices)) * devices for e in eighths)
  return sorted(set(shares), reverse=True)


def _best_size(allowed: list[int], pending: int, steps: int) -> int:
  """Selects the size that costs least for the pending runs, preferring large.

  Args:
    allowed: The sizes, the largest first.
    pending: Number of runs.
    steps: Number of evaluations of a whole run.
  """
  costs = _costs()

  def whole(size: int) -> int:
    return (size + costs.batch) * steps

  def cost(size: int) -> tuple[int, int]:
    # All batches are full except the last, which shrinks if that pays.
    full, rest = divmod(max(pending, size), size)
    last = 0
    if rest:
      smaller = min(s for s in allowed if s >= rest)
      last = min(whole(size), whole(smaller) + costs.program)
    # The program of the largest size is the one that attacks share.
    program = costs.program if size < allowed[0] else 0
    return full * whole(size) + last + program, -size

  return min(allowed, key=cost)


class InFlight(NamedTuple):
  """Unfinished runs, which another process can resume.

  Attributes:
    examples: Example of each row, int [size]; -1 for a free row.
    runs: Run of each row, int [size].
    i: Steps that each row has made, int32 [size].
    leaves: Arrays of the search's state.
  """

  examples: np.ndarray
  runs: np.ndarray
  i: np.ndarray
  leaves: list[np.ndarray]


@dataclasses.dataclass
class _Rows:
  """The rows at work; changed in place.

  Attributes:
    examples: Example of each row, int [size]; -1 for a free row.
    runs: Run of each row, int [size].
    device: Problem, state and steps made, on the devices; None before the first
      run is loaded.
  """

  examples: np.ndarray
  runs: np.ndarray
  device: tuple[Problem, Any, Array] | None = None

  @property
  def active(self) -> np.ndarray:
    """bool [size]: rows that hold a run."""
    return self.examples >= 0

  def release(self, robust: np.ndarray) -> None:
    """Frees the rows of examples that have been fooled."""
    self.examples[self.active & ~robust[self.examples]] = -1

  def fill(self, queue: Iterator[tuple[int, int]]) -> np.ndarray:
    """Gives free rows to the next runs; returns which rows are new."""
    fresh = np.zeros(len(self.examples), bool)
    free = np.flatnonzero(~self.active)
    for row, (example, run) in zip(free, queue, strict=False):
      self.examples[row], self.runs[row], fresh[row] = example, run, True
    return fresh


class Slots:
  """The rows of a batch at work on a job.

  Attributes:
    under_way: Work done in unfinished runs, in units of whole runs.
    nonfinite: Evaluations of runs that have left their rows, int64 [2]: those
      whose logits or loss, and those whose gradient was not finite.

  Args:
    key: Random key of the job.
    classifier: A pytree callable, on the devices of the mesh.
    job: Attack and its numbers.
    epsilon: Radius.
    images: All examples, [N, H, W, C], on the host.
    labels: True classes, int32 [N].
    ranking: Classes by their clean logit, the highest first, the true one left
      out, int32 [N, K - 1].
    mesh: The devices.
    batch_size: Largest batch size.
    program: Search whose program makes the job's steps, and the place of the
      job's loss in it; None: the job's own.
    ahead: Programs that are compiled in threads.
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
    program: tuple[Search[Any], int] | None = None,
    ahead: Ahead | None = None,
  ):
    self._ahead = Ahead(enabled=False) if ahead is None else ahead
    self._search, loss = (job.search, 0) if program is None else program
    # Searches that begin alike share the programs that begin.
    self._beginning = getattr(job.search, "beginning", job.search)
    uniform = getattr(self._beginning, "norm", "") == "linf"
    self._begin = _jitted_begin[uniform]
    self.under_way = 0.0
    self.nonfinite = np.zeros(2, np.int64)
    self._mesh, self._job = mesh, job
    numbers: Any = (
      np.asarray(epsilon, images.dtype),
      np.asarray(job.num_steps, np.int32),
      np.asarray(loss, np.int32),
    )
    settings: Any = SearchSettings(*numbers)
    self._key, self._settings = sharding.put_replicated(mesh, (key, settings))
    self._classifier = classifier
    self._images, self._labels, self._ranking = images, labels, ranking
    self._allowed = sizes(batch_size, mesh.size)
    self._limit = job.num_evaluations

  def prepare(self, pending: int, least: int) -> None:
    """Has the programs of the first batch compiled in threads.

    Nothing is done if the size of that batch is not known yet.

    Args:
      pending: Largest number of runs that there may be to make.
      least: Smallest number.
    """
    size = self._size(pending)
    if not pending or size != self._size(max(least, 1)):
      return
    none, whole = np.zeros(size, int), np.ones(size, bool)
    arguments = self._arguments(none, none)
    shapes = self._begin.eval_shape(*arguments, search=self._beginning)  # type: ignore[attr-defined]
    where = sharding.replicated(self._mesh)
    rows = jax.tree.map(lambda x: placed(x, where), shapes)
    advancing = self._advancing(0, rows, whole)
    add, name = self._ahead.add, self._name
    add(
      name("advance", size),
      lambda: _jitted_advance.ahead(*advancing, search=self._search),  # type: ignore[attr-defined]
    )
    add(
      name("begin", size),
      lambda: self._begin.ahead(*arguments, search=self._beginning),  # type: ignore[attr-defined]
    )
    if pending > size:
      add(
        name("refill", size),
        lambda: _jitted_refill.ahead(self._put(whole), rows, rows),  # type: ignore[attr-defined]
      )

  def _name(self, name: str, size: int) -> tuple[Hashable, ...]:
    """Names one of the programs for batches of a size."""
    search: Any = self._search if name == "advance" else self._beginning
    return name, search, size, id(self._classifier)

  def run(
    self,
    done: np.ndarray,
    robust: np.ndarray,
    *,
    on_fooled: Callable[[np.ndarray, np.ndarray], None],
    on_steps: Callable[[Callable[[], InFlight]], None] = lambda _: None,
    on_failed: Callable[[np.ndarray, np.ndarray], None] | None = None,
    in_flight: InFlight | None = None,
  ) -> None:
    """Runs the job on all examples that are still robust.

    Args:
      done: Runs that need not be made, bool [N, runs]; those made are marked.
      robust: Examples that are still classified correctly, bool [N]. Read again
        in every turn: `on_fooled` removes examples.
      on_fooled: Called with the examples fooled and their images.
      on_steps: Called after every few steps with a function that returns the
        unfinished runs.
      on_failed: Called with the examples of runs that ended without success and
        the images that these return; may remove examples, too.
      in_flight: Unfinished runs to resume; ignored if they do not fit.
    """
    pending = int((~done[robust]).sum())
    if not pending:
      return
    batch = self._resumed(in_flight)
    if batch is None:
      size = self._size(pending)
      batch = _Rows(np.full(size, -1), np.zeros(size, int))
    running = set(zip(batch.examples, batch.runs, strict=True))
    queue = self._queue(done, robust, running)
    batch.release(robust)
    for turn in itertools.count():
      fresh = batch.fill(queue)
      if not batch.active.any():
        return
      fresh = self._shrink(batch, fresh)
      if fresh.any():
        self._load(batch, fresh)
      self._advance(batch, turn)
      self._harvest(batch, done, robust, on_fooled, on_failed)
      on_steps(functools.partial(self._snapshot, batch))

  def _size(self, pending: int) -> int:
    """Size of the first batch for a number of runs."""
    return _best_size(self._allowed, pending, self._limit)

  def _put(self, array: np.ndarray) -> Array:
    return sharding.put_batch(self._mesh, array)

  def _snapshot(self, batch: _Rows) -> InFlight:
    assert batch.device is not None  # noqa: S101 - narrows the type, cannot fail
    state, i = sharding.to_host(self._mesh, batch.device[1:])
    leaves = jax.tree.leaves(state)
    return InFlight(batch.examples.copy(), batch.runs.copy(), i, leaves)

  def _resumed(self, in_flight: InFlight | None) -> _Rows | None:
    """Puts unfinished runs back on the devices; None if they do not fit."""
    if in_flight is None or len(in_flight.examples) not in self._allowed:
      return None
    batch = _Rows(in_flight.examples.copy(), in_flight.runs.copy())
    if not batch.active.any():
      return None
    problem, state, _ = self._load(batch, np.ones(len(batch.runs), bool))
    leaves, structure = jax.tree.flatten(state)
    # States of earlier versions end before the counts, which start at 0.
    stored = [*in_flight.leaves]
    stored += [np.asarray(leaf) for leaf in leaves[len(stored) :]]
    if [x.shape for x in leaves] != [x.shape for x in stored]:
      return None
    leaves = [self._put(leaf) for leaf in stored]
    state = jax.tree.unflatten(structure, leaves)
    batch.device = problem, state, self._put(in_flight.i)
    return batch

  def _queue(
    self,
    done: np.ndarray,
    robust: np.ndarray,
    running: set[tuple[int, int]],
  ) -> Iterator[tuple[int, int]]:
    """Yields the runs still to be made, all examples' first run first."""
    for run in range(self._job.num_runs):
      for example in np.flatnonzero(robust & ~done[:, run]).tolist():
        # The example may have been fooled since the list was made.
        if robust[example] and (example, run) not in running:
          yield example, run

  def _shrink(self, batch: _Rows, fresh: np.ndarray) -> np.ndarray:
    """Moves to a smaller batch where that pays; returns which rows are new."""
    size, num_active = len(batch.examples), int(batch.active.sum())
    smaller = [s for s in self._allowed if num_active <= s < size]
    if batch.device is None or not smaller:
      return fresh
    i = sharding.to_host(self._mesh, batch.device[2])
    remaining = self._limit - int(i[batch.active].min())
    if (size - smaller[-1]) * remaining < _costs().program:
      return fresh
    rows = np.argsort(~batch.active, kind="stable")[: smaller[-1]]
    batch.examples, batch.runs = batch.examples[rows], batch.runs[rows]
    batch.device = _jitted_take(batch.device, self._put(rows))
    return fresh[rows]

  def _load(
    self, batch: _Rows, fresh: np.ndarray
  ) -> tuple[Problem, Any, Array]:
    """Puts the data of new rows on the devices, in their start state."""
    # Free rows get a real image too, as a classifier with batch statistics must
    # not see anything else.
    spare = int(batch.examples[batch.active][0])
    examples = np.where(batch.active, batch.examples, spare)
    arguments, size = self._arguments(examples, batch.runs), len(examples)
    self._ahead.wait(self._name("begin", size))
    begun = self._begin(*arguments, search=self._beginning)
    if batch.device is not None:
      self._ahead.wait(self._name("refill", size))
      begun = _jitted_refill(self._put(fresh), begun, batch.device)
    batch.device = begun
    return begun

  def _arguments(self, examples: np.ndarray, runs: np.ndarray) -> list[Any]:
    """Arguments of the programs that begin runs on examples, int [size]."""
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

  def _advance(self, batch: _Rows, turn: int) -> None:
    """Makes the next few steps of all rows."""
    assert batch.device is not None  # noqa: S101 - narrows the type, cannot fail
    self._ahead.wait(self._name("advance", len(batch.examples)))
    state, i = _jitted_advance(
      *self._advancing(turn, batch.device, batch.active),
      search=self._search,
    )
    batch.device = batch.device[0], state, i

  def _advancing(
    self, turn: int, device: tuple[Problem, Any, Array], active: np.ndarray
  ) -> tuple[Any, ...]:
    """Arguments of the program that makes steps."""
    problem, state, i = device
    return (
      self._classifier,
      self._key,
      np.int32(turn),
      problem,
      self._settings,
      state,
      i,
      self._put(active),
      np.int32(self._limit),
      np.int32(self._job.steps_at_once),
    )

  def _harvest(
    self,
    batch: _Rows,
    done: np.ndarray,
    robust: np.ndarray,
    on_fooled: Callable[[np.ndarray, np.ndarray], None],
    on_failed: Callable[[np.ndarray, np.ndarray], None] | None,
  ) -> None:
    """Takes finished runs, and those of fooled examples, out of their rows."""
    assert batch.device is not None  # noqa: S101 - narrows the type, cannot fail
    _, state, i = batch.device
    i, fooled, *counts = sharding.to_host(
      self._mesh, (i, state.fooled, state.bad_points, state.bad_gradients)
    )
    examples, active = batch.examples, batch.active
    if (active & fooled).any():
      # Several runs may fool the same example at once; the first one counts.
      rows = np.flatnonzero(active & fooled)
      _, first = np.unique(examples[rows], return_index=True)
      rows = rows[first]
      images = sharding.to_host(self._mesh, state.adversarial)
      on_fooled(examples[rows], images[rows])
    failed = active & ~fooled & (i >= self._limit)
    if on_failed is not None and failed.any():
      images = sharding.to_host(self._mesh, state.adversarial)
      on_failed(examples[failed], images[failed])
    over = active & (fooled | (i >= self._limit))
    done[examples[over], batch.runs[over]] = True
    examples[over] = -1
    batch.release(robust)
    self.nonfinite += np.stack(counts)[:, active & ~batch.active].sum(-1)
    self.under_way = float((i[batch.active] / self._limit).sum())
