"""Bytes that a train step moves on a GPU, compiled without one.

  pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION \\
    nvidia-cuda-nvcc-cu12
  JAX_PLATFORMS=cpu python -m benchmarks.traffic --model=wrn-28-10 --method=at \\
    --dtype=bfloat16 --batch_size=256 --statistics batch running \\
    --out=traffic.json

VERSION is that of jax; no driver is needed. XLA compiles for a GPU of which it
has the description only (`targets/`). Counted are the operands and results of
every kernel, times the iterations of its loop: what goes through the memory
where nothing stays in a cache. Convolutions are chosen without timing
(`xla_gpu_autotune_level=0`).
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.runs import tables
from benchmarks import step
from benchmarks.support import machine, networks

TARGETS = pathlib.Path(__file__).parent / "targets"

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(
  r"^\s*(?:ROOT )?%([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$"
)
_BODY = re.compile(r"body=%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:to_apply|branch_computations=\{?|calls)=?%([\w.\-]+)")
_NOTHING = {
  "after-all",
  "bitcast",
  "constant",
  "get-tuple-element",
  "parameter",
  "tuple",
}
"""Instructions that move nothing."""

KINDS = {"kInput": "reductions", "kLoop": "elementwise", "kCustom": "products"}
"""Kind of a fusion to its name in the table."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Kernel of a compiled program.

  Attributes:
    name: Name of the instruction.
    kind: Value of `KINDS`, "convolutions" or the operation.
    size: Bytes of its operands and results.
    times: Number of times that it runs.
  """

  name: str
  kind: str
  size: int
  times: int


def num_bytes(shape: str) -> int:
  """Adds up the bytes of all arrays in the text of a shape."""
  total = 0
  for dtype, sides in _ARRAY.findall(shape):
    count = 1
    for side in filter(None, sides.split(",")):
      count *= int(side)
    total += count * _BYTES.get(dtype, 0)
  return total


def _kind(operation: str, rest: str) -> str:
  if operation == "fusion":
    found = re.search(r"kind=(\w+)", rest)
    return KINDS.get(found[1] if found else "", "other fusions")
  if operation == "custom-call":
    return "convolutions" if "__cudnn$conv" in rest else "other calls"
  return operation


def kernels(text: str) -> list[Kernel]:
  """Lists the kernels of a compiled program.

  Args:
    text: Program as `compiled.as_text()` writes it. A loop whose number of
      iterations it does not say counts once.

  Returns:
    The kernels, in their order; those of a loop once, with their `times`.
  """
  computations: dict[str, list[tuple[str, ...]]] = {}
  entry = current = ""
  for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
    if head := _COMPUTATION.match(line):
      current = head[2]
      computations[current] = []
      entry = current if head[1] else entry
    elif current and (found := _LINE.match(line)):
      computations[current].append(found.groups())

  def listed(name: str, times: int) -> Iterator[Kernel]:
    shapes = {line[0]: line[1] for line in computations[name]}
    for result, shape, operation, rest in computations[name]:
      if operation == "while":
        trips = _TRIPS.search(rest)
        (body,) = _BODY.findall(rest)
        yield from listed(body, times * int(trips[1] if trips else 1))
      elif operation in ("call", "conditional"):
        for called in _CALLED.findall(rest):
          yield from listed(called, times)
      elif operation not in _NOTHING:
        names = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        operands = " ".join(shapes.get(one, "") for one in names)
        size = num_bytes(f"{shape} {operands}")
        yield Kernel(result, _kind(operation, rest), size, times)

  return list(listed(entry, 1))


def _attack(case: step.Case, statistics: str) -> dict[str, Any]:
  if case.method == "standard":
    return {}
  fields = {"attack_batch_norm": statistics, "num_steps": case.num_steps}
  if statistics == "running":
    fields["attack_moves_statistics"] = False
  return step.ATTACK | fields


def compiled(case: step.Case, statistics: str, target: str) -> str:
  """Compiles a train step for a GPU by its description; returns the program."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  from atat_jax import objectives, optim, sharding, state, steps
  from atat_jax.data.base import Split

  topology = topologies.get_topology_desc(
    "", platform="cuda", topology="1x1x1", target_config=target
  )
  mesh = sharding.make_mesh(topology.devices[:1])
  objective = objectives.create(case.method, **_attack(case, statistics))
  model = networks.network(
    case.model, dtype=jnp.dtype(case.dtype), convolution="xla"
  )
  optimizer = optim.make_optimizer(lambda _: 0.1)
  shape = (case.size, case.size, 3)
  key, images = jax.random.key(0), jnp.zeros((1, *shape))
  build = functools.partial(
    state.build,
    model=model,
    optimizer=optimizer,
    metric_names=steps.metric_names(objective),
    term_names=steps.term_names(objective),
    averages=False,
    guarded=False,
  )
  made, teacher = jax.eval_shape(
    lambda: (build(key, images, None), model.init(key, images))
  )
  indices = jax.ShapeDtypeStruct((case.batch_size,), jnp.int32)
  pixels = jax.ShapeDtypeStruct((case.batch_size, *shape), jnp.uint8)
  teacher = teacher if objective.needs_teacher else None
  arguments = made, teacher, Split(pixels, indices), indices
  replicated = sharding.replicated(mesh)
  train_step = functools.partial(
    steps.train_step,
    model=model,
    objective=objective,
    optimizer=optimizer,
    mesh=mesh,
    num_classes=10,
  )
  lowered = jax.jit(
    train_step, donate_argnums=0, out_shardings=replicated
  ).lower(
    *jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
      arguments,
    )
  )
  options = {"xla_gpu_autotune_level": 0}
  return str(lowered.compile(compiler_options=options).as_text())


def measure(case: step.Case, statistics: str, target: str) -> dict[str, Any]:
  """Counts kernels, launches and bytes of a case, by kind."""
  sizes: collections.Counter[str] = collections.Counter()
  launches: collections.Counter[str] = collections.Counter()
  found = kernels(compiled(case, statistics, target))
  for kernel in found:
    sizes[kernel.kind] += kernel.size * kernel.times
    launches[kernel.kind] += kernel.times
  return {
    "name": f"{case.name}/{statistics}",
    "case": dataclasses.asdict(case),
    "kernels": len(found),
    "launches": dict(launches),
    "bytes": dict(sizes.most_common()),
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates gigabytes and launches by kind in Markdown, a row each."""
  kinds = list(dict.fromkeys(kind for row in rows for kind in row["bytes"]))
  lines = [["step", "launches", "GB", *(f"{kind} (GB)" for kind in kinds)]]
  for row in rows:
    parts = [row["bytes"].get(kind, 0) for kind in kinds]
    lines.append(
      [
        row["name"],
        str(sum(row["launches"].values())),
        *(f"{size / 1e9:.2f}" for size in (sum(parts), *parts)),
      ]
    )
  return tables.markdown(lines)


def _line(row: dict[str, Any]) -> str:
  total = sum(row["bytes"].values())
  return f"{row['name']}: {row['kernels']} kernels, {total / 1e9:.2f} GB"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  step.add_case_flags(made)
  made.add_argument(
    "--statistics",
    nargs="+",
    choices=("batch", "running"),
    default=["batch"],
    help="BatchNorm's statistics in the attack",
  )
  made.add_argument(
    "--target", default="h200", help="description of the GPU, in targets/"
  )
  return made


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  path = TARGETS / f"{args.target}.txt"
  if not path.is_file():
    known = ", ".join(sorted(one.stem for one in TARGETS.glob("*.txt")))
    raise UserError(f"target: {args.target!r}; allowed: {known}")
  for case in step.cases(args):
    for name in ("num_devices", "steps_per_dispatch"):
      if getattr(case, name) != 1:
        raise UserError(f"{name}: {getattr(case, name)}; allowed: 1")
    for statistics in args.statistics:
      yield measure(case, statistics, path.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  machine.run(args, _rows(args), table, line=_line)


if __name__ == "__main__":
  main()
