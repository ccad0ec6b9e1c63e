"""Work that a long run repeats; what each repetition leaves behind.

    PYTHONPATH=.:tests/support python tests/reliability/leaks.py

repeats everything as often as a long run does and prints memory and
compilations; `test_memory.py` does so within the tests.
"""

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import callables
import jax
import jax.numpy as jnp
import minimal
import numpy as np

from atat_jax import (
  attacks,
  attention,
  evaluation,
  objectives,
  optim,
  sharding,
  state,
  steps,
)
from atat_jax.analyses import curvature, landscape
from atat_jax.data.base import Split

KEY = jax.random.key(0)
MEGABYTES = 16
SHAPE = (4, 4, 2)
SIZE = 32
NUM_CLASSES = 4
EPSILON = 0.05

_generator = np.random.default_rng(0)
_images = _generator.uniform(0.2, 0.8, (16, *SHAPE)).astype(np.float32)
_labels = np.arange(16, dtype=np.int32) % NUM_CLASSES
_bulk = np.zeros((MEGABYTES * 2**18 // NUM_CLASSES, NUM_CLASSES), np.float32)


@dataclasses.dataclass(frozen=True)
class Work:
  """Something that is repeated.

  Attributes:
    start: Prepares it; returns a function of the number of the repetition.
    warm_up: Repetitions that may compile and fill caches.
    often: Repetitions of a long run.
    seldom: Repetitions of a short test.
  """

  start: Callable[[], Callable[[int], object]]
  warm_up: int
  often: int
  seldom: int


def weights(number: int) -> jax.Array:
  """Weights of 16 MB, which nobody else has."""
  _bulk[:SIZE] = np.random.default_rng(number).normal(size=(SIZE, NUM_CLASSES))
  return jnp.array(_bulk)


def _attacks() -> Callable[[int], object]:
  kinds = list(callables.KINDS.values())
  x, y = jnp.asarray(_images[:4]), jnp.asarray(_labels[:4])

  def repeat(number: int) -> object:
    classifier, change = kinds[number % len(kinds)](weights(2 * number))
    numbers = {"epsilon": EPSILON, "step_size": 0.02, "num_steps": 2}
    attacks.pgd(KEY, classifier, x, y, **numbers)
    other = change(weights(2 * number + 1))
    return attacks.pgd(KEY, other, x, y, **numbers)

  return repeat


def _network() -> tuple[Any, Any]:
  model = minimal.Network(NUM_CLASSES)
  return model, jax.jit(model.init)(KEY, _images[:1])


def _training() -> Callable[[int], object]:
  model, variables = _network()
  objective = objectives.create("at", epsilon=0.05, step_size=0.03, num_steps=1)
  optimizer = optim.make_optimizer(
    optim.make_schedule(
      "piecewise", learning_rate=0.01, total_steps=10_000, boundaries=(1,)
    ),
    weight_decay=0.01,
  )
  mesh = sharding.make_mesh(jax.devices()[:1])
  current = state.create(
    model,
    optimizer,
    KEY,
    jnp.asarray(_images[:1]),
    metric_names=steps.metric_names(objective),
    term_names=steps.term_names(objective),
    initial=variables,
  )
  current = sharding.put_replicated(mesh, jax.tree.map(jnp.copy, current))
  pixels = (255 * _images).astype(np.uint8)
  data = sharding.put_replicated(mesh, Split(pixels, _labels))
  step = steps.make_train_step(
    model, objective, optimizer, mesh=mesh, num_classes=NUM_CLASSES
  )

  def repeat(number: int) -> object:
    nonlocal current
    indices = (np.arange(8, dtype=np.int32) + number) % len(_labels)
    current = step(current, None, data, sharding.put_batch(mesh, indices))
    return current.step

  return repeat


def _evaluation() -> Callable[[int], object]:
  """One batch a repetition, with a classifier of its own."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  pixels = (255 * _images).astype(np.uint8)
  data = sharding.put_replicated(mesh, Split(pixels, _labels))
  protocol = evaluation.parse("pgd2", epsilon=EPSILON, step_size=0.02)

  def repeat(number: int) -> object:
    own = weights(number)
    return evaluation.accuracy(
      KEY,
      lambda images: callables.formula(own, images),
      data,
      protocol=protocol,
      batch_size=16,
      mesh=mesh,
    )

  return repeat


def _autoattack() -> Callable[[int], object]:
  def repeat(number: int) -> object:
    # How many runs are left, and so which batch sizes, depends on the weights.
    own = weights(number % 5)
    return attacks.autoattack(
      KEY,
      lambda images: callables.formula(own, images),
      _images[:8],
      _labels[:8],
      epsilon=EPSILON,
      version=["apgd-ce", "square"],
      options={"apgd-ce": {"num_steps": 2}, "square": {"num_queries": 5}},
      mesh=sharding.make_mesh(jax.devices()[:1]),
      progress=False,
    )

  return repeat


def _explanations() -> Callable[[int], object]:
  _, variables = _network()
  x, y = jnp.asarray(_images), jnp.asarray(_labels)

  def repeat(number: int) -> object:
    scaled = jax.tree.map(lambda leaf: leaf * (1 + number / 1000), variables)
    return attention.grad_cam(minimal.Network(NUM_CLASSES), scaled, x, y)

  return repeat


def _analyses() -> Callable[[int], object]:
  _, variables = _network()

  def repeat(number: int) -> object:
    scaled = jax.tree.map(lambda leaf: leaf * (1 + number / 1000), variables)
    networks = {"one": (minimal.Network(NUM_CLASSES), scaled)}
    data = _images[:2], _labels[:2]
    landscape.loss_landscape(KEY, networks, *data, radius=0.1, num_points=3)
    return curvature.loss_curvature(KEY, networks, *data, num_iterations=2)

  return repeat


WORK = {
  "attacks": Work(_attacks, len(callables.KINDS), 150, 27),
  "training": Work(_training, 20, 2000, 200),
  "evaluation": Work(_evaluation, 5, 200, 40),
  "autoattack": Work(_autoattack, 5, 50, 6),
  "explanations": Work(_explanations, 5, 300, 40),
  "analyses": Work(_analyses, 3, 60, 5),
}


BLOCKS = 5
"""Equal parts of a measurement, after each of which memory is read."""

LIMIT = MEGABYTES / 2
"""Growth in a typical block that is a leak, in MB; half of one copy."""


class _Allocations(ctypes.Structure):
  """Answer of glibc's mallinfo2."""

  _fields_ = tuple(
    (name, ctypes.c_size_t)
    for name in (
      *("arena", "ordblks", "smblks", "hblks", "mapped"),
      *("usmblks", "fsmblks", "used", "fordblks", "keepcost"),
    )
  )


def allocated() -> float:
  """Returns what is allocated in this process in MB.

  Resident memory tells less: threads keep up to 64 MB each that new arrays fill
  unseen, and the kernel takes pages of files and of zeros as it likes. Small
  objects of Python, which are not glibc's, count as 64 bytes.
  """
  gc.collect()
  ask = ctypes.CDLL("libc.so.6").mallinfo2
  ask.restype = _Allocations
  found = ask()
  small = 64 * sys.getallocatedblocks()
  return (found.used + found.mapped + small) / 2**20


@contextlib.contextmanager
def nothing_older_dies() -> Iterator[None]:
  """Keeps what exists: its death would hide a leak, its search takes long."""
  gc.collect()
  gc.freeze()
  older = jax.live_arrays()
  try:
    yield
  finally:
    older.clear()
    gc.unfreeze()


@dataclasses.dataclass(frozen=True)
class Growth:
  """What repetitions left behind.

  Attributes:
    memory: Allocated memory after the warm-up and after each block, in MB.
    compilations: Programs compiled after the warm-up.
    seconds: Duration of the repetitions after the warm-up.
  """

  memory: tuple[float, ...]
  compilations: int
  seconds: float

  @property
  def typical(self) -> float:
    """Median growth of a block in MB; no single event of the process moves it.

    What earlier work frees, and a cache that is filled once, are such events.
    """
    return statistics.median(
      after - before for before, after in itertools.pairwise(self.memory)
    )

  @property
  def leaks(self) -> bool:
    """Whether memory grows with the repetitions."""
    return self.typical > LIMIT


def measure(
  work: Work, repetitions: int, compiled: Callable[[], int]
) -> Growth:
  """Repeats work and measures what is left behind.

  Args:
    work: Work to repeat.
    repetitions: Repetitions after the warm-up, at least one a block.
    compiled: Function that returns the number of compilations so far.

  Returns:
    Memory and compilations.
  """
  repeat = work.start()
  for number in range(work.warm_up):
    jax.block_until_ready(repeat(number))
  ends = [work.warm_up + repetitions * i // BLOCKS for i in range(BLOCKS + 1)]
  with nothing_older_dies():
    memory, compilations = [allocated()], compiled()
    began = time.perf_counter()
    for numbers in itertools.starmap(range, itertools.pairwise(ends)):
      for number in numbers:
        jax.block_until_ready(repeat(number))
      memory.append(allocated())
    seconds = time.perf_counter() - began
  return Growth(tuple(memory), compiled() - compilations, seconds)


def main() -> int:
  """Repeats everything as often as a long run does; 1 if something grows."""
  compiled: list[str] = []

  def count(event: str, _: float, **__: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(count)
  bad = False
  for name, work in WORK.items():
    found = measure(work, work.often, lambda: len(compiled))
    bad |= found.leaks or found.compilations > 0
    print(
      f"{name:<12} {work.often:>5} times, {found.seconds:6.1f} s:"
      f" {found.memory[0]:6.0f} MB -> {found.memory[-1]:6.0f} MB,"
      f" {found.typical:+.1f} MB a block,"
      f" {found.compilations} compilations",
      flush=True,
    )
  return int(bad)


if __name__ == "__main__":
  sys.exit(main())
