"""Seconds of the first call of an attack in a fresh process, caches off.

  python -m benchmarks.first_call --network convnet wrn-10-1 --out=first_call.json

Every measurement has a process of its own, and the cases take turns. Imports,
weights and images are not counted. On a machine with other work the CPU seconds,
of all threads, say more than those of the clock.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.runs import tables
from benchmarks.support import machine
from benchmarks.support.machine import ROOT, whole

NETWORKS = ("convnet", "wrn-10-1", "wrn-16-4")


def _network(name: str) -> Any:
  """A flax network, the user's own or one of this package."""
  from flax import linen as nn

  from atat_jax import models

  if name != "convnet":
    depth, width = map(int, name.split("-")[1:])
    return models.create("wide_resnet", depth=depth, width=width)

  class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
      del train
      x = nn.relu(nn.Conv(16, (3, 3))(x))
      x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
      return nn.Dense(10)(x.mean((1, 2)))

  return ConvNet()


def measure(network: str, attack: str) -> dict[str, float]:
  """Calls an attack twice.

  Args:
    network: One of `NETWORKS`.
    attack: "fgsm" or "pgd" (10 steps).

  Returns:
    Seconds of the clock and of the CPU for the first call and the second, and
    the number of programs that the first compiled.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  from atat_jax import attacks, models

  jax.config.update("jax_enable_compilation_cache", False)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: (
      compiled.append(seconds)
      if event.endswith("/backend_compile_duration")
      else None
    )
  )
  model = _network(network)
  images = jax.random.uniform(jax.random.key(0), (32, 32, 32, 3))
  labels = jnp.arange(32) % 10
  variables = jax.jit(model.init)(jax.random.key(1), images)
  classifier = models.classifier(model, variables)
  key = jax.random.key(2)
  numbers: dict[str, Any] = {"epsilon": 8 / 255}
  if attack == "pgd":
    numbers |= {"step_size": 2 / 255, "num_steps": 10}
  function = getattr(attacks, attack)
  jax.block_until_ready((variables, images, labels, key))
  compiled.clear()
  found: dict[str, float] = {}
  for call in ("first", "second"):
    began, worked = time.perf_counter(), time.process_time()
    result = function(key, classifier, images, labels, **numbers)
    np.asarray(result)
    found[f"{call} (s)"] = time.perf_counter() - began
    found[f"{call}, CPU (s)"] = time.process_time() - worked
    found.setdefault("programs", len(compiled))
  return found


ATTACKS = ("fgsm", "pgd")
_ONE = (
  "import json, sys; from benchmarks import first_call;"
  " print(json.dumps(first_call.measure(*sys.argv[1:])))"
)


def _in_a_process(network: str, attack: str) -> dict[str, float]:
  done = subprocess.run(  # noqa: S603 - this Python, names from the choices
    [sys.executable, "-c", _ONE, network, attack],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  if done.returncode:
    raise UserError(f"{network} {attack}: {done.stderr.strip()[-500:]}")
  found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
  return found


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  cases = [(n, a) for n in args.network for a in args.attack]
  found: dict[tuple[str, str], list[dict[str, float]]] = {c: [] for c in cases}
  for _ in range(args.repeats):
    for case in cases:
      found[case].append(_in_a_process(*case))
  for (network, attack), calls in found.items():
    numbers = {
      name: statistics.median(call[name] for call in calls) for name in calls[0]
    }
    spread = [call["first, CPU (s)"] for call in calls]
    yield {
      "name": f"{attack}/{network}",
      "repeats": args.repeats,
      "spread": (min(spread), max(spread)),
      **numbers,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates medians, and the range of the first call's CPU seconds."""
  head = ["first call", "CPU (s)", "from", "to", "clock (s)", "programs"]
  lines = [[*head, "second call, CPU (s)"]]
  for row in rows:
    lines.append(
      [
        row["name"],
        f"{row['first, CPU (s)']:.2f}",
        *(f"{end:.2f}" for end in row["spread"]),
        f"{row['first (s)']:.2f}",
        f"{row['programs']:.0f}",
        f"{row['second, CPU (s)']:.3f}",
      ]
    )
  return tables.markdown(lines)


def _line(row: dict[str, Any]) -> str:
  return f"{row['name']}: {row['first, CPU (s)']:.2f} CPU s"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS[:2]))
  add("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
  add("--repeats", type=whole, default=5)
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  machine.run(args, _rows(args), table, line=_line)


if __name__ == "__main__":
  main()
