"""Memory and time of a training step, method by method, relative to `at`.

  python benchmarks/costs.py --out=docs/results/costs.json

Trains each method for a few steps with the usual training code, in a temporary
directory. Memory is XLA's own count for the compiled step (arguments, results
and scratch space, less what they share); every step after the first is timed.
The methods take several turns, so that a slow minute of the machine affects all
of them. The machine should have nothing else to do.
"""

import contextlib
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

if __name__ == "__main__" and not __package__:  # run as a script
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from atat_jax import runtime, sharding, steps, train
from atat_jax.config import make_plan
from atat_jax.runs import files, provenance, tables
from benchmarks import methods
from benchmarks.support import machine

REFERENCE = "at"


class MeasuredStep:
  """Train step that measures its memory and times.

  Args:
    step: Jitted train step.

  Attributes:
    compile_seconds: Seconds to trace and compile the step.
    memory_bytes: Memory of the compiled step on one device.
    seconds: Seconds of every step after the first.
  """

  def __init__(self, step: Callable[..., Any]):
    self._step = step
    self._compiled: Any = None
    self.compile_seconds, self.memory_bytes = 0.0, 0
    self.seconds: list[float] = []

  def __call__(self, *args: Any) -> Any:
    """Makes a step; the first call compiles."""
    first = self._compiled is None
    if first:
      began = time.perf_counter()
      self._compiled = self._step.lower(*args).compile()  # type: ignore[attr-defined]
      self.compile_seconds = time.perf_counter() - began
      found = self._compiled.memory_analysis()
      self.memory_bytes = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
      )
    began = time.perf_counter()
    result = jax.block_until_ready(self._compiled(*args))
    if not first:
      self.seconds.append(time.perf_counter() - began)
    return result


@contextlib.contextmanager
def measured() -> Iterator[list[MeasuredStep]]:
  """Replaces every train step made within the context by a measured one."""
  made: list[MeasuredStep] = []
  original = steps.make_train_step

  def make(*args: Any, **kwargs: Any) -> MeasuredStep:
    made.append(MeasuredStep(original(*args, **kwargs)))
    return made[-1]

  steps.make_train_step = make
  try:
    yield made
  finally:
    steps.make_train_step = original


def measure(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains in an empty `workdir`; returns a step's time and memory."""
  plan = make_plan(config)
  dataset = plan.data.load()
  with measured() as made:
    train.train(plan, workdir, dataset, sharding.make_mesh())
  step = made[-1]
  return {
    "method": config.method,
    "num_steps": len(step.seconds),
    "compile_seconds": step.compile_seconds,
    "memory_bytes": step.memory_bytes,
    "seconds_per_step": statistics.median(step.seconds),
  }


def merge(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Merges a method's turns into one row, with the median time.

  The compilation time is that of the first turn: later ones find the program in
  the cache.
  """
  times = [turn["seconds_per_step"] for turn in turns]
  return turns[0] | {
    "num_steps": sum(turn["num_steps"] for turn in turns),
    "seconds_per_step": statistics.median(times),
    "lowest_and_highest": [min(times), max(times)],
  }


def as_markdown(rows: list[dict[str, Any]]) -> str:
  """Tabulates rows in Markdown, relative to `REFERENCE` if it is among them."""
  reference = next((r for r in rows if r["method"] == REFERENCE), None)

  def relative(row: dict[str, Any], field: str) -> str:
    return "–" if reference is None else f"{row[field] / reference[field]:.2f}"

  head = [
    "method",
    "ms a step",
    "lowest to highest turn",
    f"time relative to {REFERENCE}",
    "memory (MiB)",
    f"memory relative to {REFERENCE}",
    "compiling (s)",
  ]
  return tables.markdown(
    [
      head,
      *(
        [
          row["method"],
          f"{1000 * row['seconds_per_step']:.1f}",
          " to ".join(f"{1000 * t:.1f}" for t in row["lowest_and_highest"]),
          relative(row, "seconds_per_step"),
          f"{row['memory_bytes'] / 2**20:.1f}",
          relative(row, "memory_bytes"),
          f"{row['compile_seconds']:.1f}",
        ]
        for row in rows
      ),
    ]
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Measures the methods and writes the results."""
  flags = machine.parser(__doc__)
  methods.add_config_flags(flags)
  flags.add_argument("--epochs", type=int, default=2)
  flags.add_argument("--turns", type=int, default=5)
  flags.add_argument("--out", type=pathlib.Path, required=True)
  args = flags.parse_args(argv)
  machine.check_out(args.out)
  turns: dict[str, list[dict[str, Any]]] = {}
  for _ in range(args.turns):
    with tempfile.TemporaryDirectory() as directory:
      args.workdir, args.seeds = pathlib.Path(directory), [0]
      args.attacks, args.running_attacks = "nominal", ""
      for run in methods.make_runs(args):
        config = run.configs[0]
        config.train.num_epochs = args.epochs
        config.train.validate_every_epochs = float(args.epochs)
        row = measure(config, run.workdir)
        turns.setdefault(row["method"], []).append(row)
  rows = [merge(turns_of_method) for turns_of_method in turns.values()]
  found = provenance.record(
    [device.device_kind for device in jax.devices()],
    batch_size=config.train.batch_size,
    rows=rows,
  )
  files.write_json(args.out, found)
  sys.stdout.write(f"{as_markdown(rows)}\nresults: {args.out}\n")


if __name__ == "__main__":
  runtime.set_up(distributed=False)
  with machine.plain_errors(), tempfile.TemporaryDirectory() as empty:
    # An empty cache, because compilation is measured, too.
    jax.config.update("jax_compilation_cache_dir", empty)
    main()
