"""Counts how AutoAttack's batches are filled at scale, without a network.

  python -m benchmarks.schedule --num_examples=10000 --batch_size=512 \\
    --clean=0.83 --robust=0.50 --out=schedule.json

The package's own loop fills, shrinks and refills the batches, as it does on an
accelerator; in the place of an attack stands a script of when each example is
fooled. What is counted does not depend on the machine: evaluations needed and
made, turns of the loop (each a round trip to the host), full batches, bytes
moved. The seconds of the host are those of this machine. The rest of the time
is arithmetic: operations of the network over the rate that --tflops names.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from atat_jax.runs import files
from benchmarks.support import machine
from benchmarks.support.machine import number, say, whole

PASSES = {"apgd-ce": 2, "apgd-t": 2, "fab-t": 3, "square": 1}
"""Cost of an evaluation, in forward passes: a gradient by the images costs one
more, and FAB evaluates two points."""

_NEVER = 1e9
_MAX_STEPS = {"apgd-ce": 20, "apgd-t": 50}
_PIXELS = 32 * 32 * 3


class Count(NamedTuple):
  """Work of an attack.

  Attributes:
    needed: Evaluations of examples that were neither fooled nor finished.
    made: Evaluations of rows, those of free and of finished rows included.
    turns: Turns of the loop.
    full: Turns whose batch had no free row.
    loads: Turns that moved images to the device.
    fetches: Turns that moved images to the host.
    seconds: Seconds of the loop on this machine, with next to no arithmetic.
  """

  needed: int
  made: int
  turns: int
  full: int
  loads: int
  fetches: int
  seconds: float

  def moved(self, batch_size: int) -> int:
    """Largest number of bytes moved, for images of CIFAR's size."""
    return (self.loads + self.fetches) * batch_size * _PIXELS * 4


def _script(
  name: str,
  num_runs: int,
  alive: np.ndarray,
  share: float,
  generator: np.random.Generator,
) -> np.ndarray:
  """Draws the step at which each run of each example succeeds, [N, runs]."""
  stops = np.full((len(alive), num_runs), _NEVER, np.float32)
  where = np.flatnonzero(alive)
  count = round(share * len(alive))
  fooled = generator.choice(where, min(count, len(where)), replace=False)
  runs = generator.integers(0, min(3, num_runs), len(fooled))
  most = _MAX_STEPS.get(name, 100)
  stops[fooled, runs] = generator.integers(1, most + 1, len(fooled))
  return stops


def _scripted() -> Any:
  """Makes an attack that succeeds when its script says so."""
  import jax.numpy as jnp

  class State(NamedTuple):
    adversarial: Any
    fooled: Any
    bad_points: Any
    bad_gradients: Any
    stop: Any

  @dataclasses.dataclass(frozen=True)
  class Scripted:
    starts: int

    def num_evaluations(self, num_steps: int) -> int:
      return num_steps + self.starts

    def start(self, problem: Any, settings: Any) -> Any:
      del settings
      none = jnp.zeros_like(problem.labels)
      stop = jnp.take_along_axis(
        problem.images[:, 0, 0, :], problem.targets[:, None], axis=-1
      )
      return State(problem.images, none > 0, none, none, stop[:, 0])

    def step(
      self, classifier: Any, key: Any, problem: Any, settings: Any, *rest: Any
    ) -> Any:
      del classifier, key, problem, settings
      state, i = rest
      return state._replace(fooled=i + 1 >= state.stop)

  return Scripted


@contextmanager
def _counted(found: dict[str, int]) -> Iterator[None]:
  """Counts what the loop does while it is open."""
  from atat_jax.attacks.autoattack import slots

  found.update(dict.fromkeys(Count._fields[:-1], 0))
  advance, load = slots.Slots._advance, slots.Slots._load

  def counting(self: Any, batch: Any, turn: int) -> None:
    active, before = batch.active, np.asarray(batch.device[2])
    advance(self, batch, turn)
    steps = np.where(active, np.asarray(batch.device[2]) - before, 0)
    found["needed"] += int(steps.sum())
    found["made"] += int(steps.max()) * len(steps)
    found["turns"] += 1
    found["full"] += int(active.all())
    found["fetches"] += int(np.asarray(batch.device[1].fooled).any())

  def loading(self: Any, *args: Any) -> Any:
    found["loads"] += 1
    return load(self, *args)

  with (
    mock.patch.object(slots.Slots, "_advance", counting),
    mock.patch.object(slots.Slots, "_load", loading),
    mock.patch.object(slots, "_costs", lambda: slots._ACCELERATOR_COSTS),
  ):
    yield


def count(
  version: str,
  *,
  num_examples: int,
  batch_size: int,
  clean: float,
  robust: float,
  first: float = 0.95,
  seed: int = 0,
) -> dict[str, Count]:
  """Counts the work of each attack of a version.

  Args:
    version: Name of a version.
    num_examples: Number of images.
    batch_size: Rows of a batch.
    clean: Share of the images that are classified correctly.
    robust: Share that stays so.
    first: Share of the fooled images that the first attack fools.
    seed: Seed of the script.

  Returns:
    Attack to its work.
  """
  import jax

  from atat_jax import sharding
  from atat_jax.attacks.autoattack import slots, versions

  generator = np.random.default_rng(seed)
  alive = np.arange(num_examples) < round(clean * num_examples)
  scripted, mesh = _scripted(), sharding.make_mesh(jax.devices()[:1])
  work, shares = {}, [first * (clean - robust), (1 - first) * (clean - robust)]
  for job in versions.make(version, norm="linf", num_classes=10).jobs:
    share = shares.pop(0) if shares else 0.0
    stops = _script(job.name, job.num_runs, alive, share, generator)
    extra = job.num_evaluations - job.num_steps
    done = np.zeros((num_examples, job.num_runs), bool)

    def on_fooled(examples: np.ndarray, _: np.ndarray) -> None:
      alive[examples] = False

    found: dict[str, int] = {}
    with _counted(found):
      made = slots.Slots(
        jax.random.key(seed),
        None,
        dataclasses.replace(job, search=scripted(extra), num_restarts=1),
        epsilon=0.1,
        images=stops[:, None, None, :],
        labels=np.zeros(num_examples, np.int32),
        ranking=np.tile(np.arange(job.num_runs), (num_examples, 1)),
        mesh=mesh,
        batch_size=batch_size,
      )
      began = time.perf_counter()
      made.run(done, alive, on_fooled=on_fooled)
      seconds = time.perf_counter() - began
    work[job.name] = Count(**found, seconds=round(seconds, 3))
  return work


def _operations(model: str) -> int:
  """Counts the operations of a forward pass of one image of CIFAR's size."""
  import jax

  from atat_jax import models
  from benchmarks.support import flops

  made = models.create(model, num_classes=10)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
  variables = jax.eval_shape(made.init, jax.random.key(0), images)
  return flops.forward(made, variables, (32, 32, 3))


def table(
  work: dict[str, Count], batch_size: int, operations: int, tflops: float
) -> str:
  """Writes the work as a table in Markdown, with the time that it would take.

  Args:
    work: Attack to its work.
    batch_size: Rows of a batch.
    operations: Operations of a forward pass of one image.
    tflops: Rate of the device, in 10^12 operations a second.
  """
  lines = [
    "| attack | evaluations needed | rows that work (%) | turns | full batches"
    " (%) | moved (GB) | 10^15 operations | seconds |",
    "| --- | --: | --: | --: | --: | --: | --: | --: |",
  ]
  total = 0.0
  for name, one in work.items():
    made = one.made * PASSES[name] * operations
    seconds = made / (tflops * 1e12)
    total += seconds
    lines.append(
      f"| {name} | {one.needed:,} | {100 * one.needed / one.made:.1f} |"
      f" {one.turns:,} | {100 * one.full / one.turns:.1f} |"
      f" {one.moved(batch_size) / 1e9:.1f} | {made / 1e15:.1f} |"
      f" {seconds:.0f} |"
    )
  turns = sum(one.turns for one in work.values())
  host = 1e3 * sum(one.seconds for one in work.values()) / turns
  lines.append(
    f"\n{total:.0f} s at {tflops:g} TFLOP/s; {turns:,} turns; host and an empty"
    f" program {host:.1f} ms a turn on this machine."
  )
  return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("--version", default="standard", help="version of AutoAttack")
  add(
    "--model", default="preact_resnet18", help="network whose operations count"
  )
  add("--num_examples", type=whole, default=10000)
  add("--batch_size", type=whole, default=512)
  add("--clean", type=number, default=0.83, help="clean accuracy")
  add("--robust", type=number, default=0.5, help="robust accuracy")
  add("--tflops", type=number, default=200.0, help="rate of the device")
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  with machine.plain_errors():
    cores = machine.start(args.threads, cache=False, torch=False)
    work = count(
      args.version,
      num_examples=args.num_examples,
      batch_size=args.batch_size,
      clean=args.clean,
      robust=args.robust,
    )
    operations = _operations(args.model)
    say(table(work, args.batch_size, operations, args.tflops))
    if args.out is not None:
      flags = {k: v for k, v in vars(args).items() if k != "out"}
      files.write_json(
        args.out,
        machine.describe(cores)
        | {"settings": flags, "operations": operations}
        | {"attacks": {name: one._asdict() for name, one in work.items()}},
      )


if __name__ == "__main__":
  main()
