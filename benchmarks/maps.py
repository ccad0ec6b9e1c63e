"""Cost of attention maps relative to forward passes.

  python -m benchmarks.maps --model wrn-16-4 --num_examples=512 --out=maps.json
  python -m benchmarks.maps --model wrn-32-10 --num_examples=10000 \\
    --batch_size=250 --out=maps.json
  python -m benchmarks.maps --smoke

Times `attention.grad_cam` with its checks, at the last convolutional tensor,
and the same network's logits of the same images, in turn. Maps should cost at
most 1.1 times as much. `--smoke` is a small run whose times mean nothing.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from atat_jax.runs import tables
from benchmarks.support import machine, networks, timing
from benchmarks.support.machine import whole

LIMIT = 1.1
"""Largest ratio of times, maps over forward passes, that is acceptable."""


def sides(
  network: networks.Network, num_batches: int
) -> tuple[Callable[[], None], Callable[[], None]]:
  """Returns functions that compute maps and logits of the same images.

  Args:
    network: Network and one batch of images.
    num_batches: Number of times that the batch is processed.

  Returns:
    Functions that return when their work is done.
  """
  import jax
  import jax.numpy as jnp

  from atat_jax import attention, compilation, models

  variables = jax.device_put(network.variables)
  images, labels = jnp.asarray(network.images), jnp.asarray(network.labels)
  classifier = models.classifier(network.model, variables)
  forward = compilation.jit(lambda classifier, x: classifier(x))

  def maps() -> None:
    jax.block_until_ready(
      [
        attention.grad_cam(network.model, variables, images, labels)
        for _ in range(num_batches)
      ]
    )

  def logits() -> None:
    jax.block_until_ready(
      [forward(classifier, images) for _ in range(num_batches)]
    )

  return maps, logits


def measure(
  name: str, *, num_examples: int, batch_size: int, repeats: int
) -> dict[str, Any]:
  """Measures a network with random weights.

  Args:
    name: Name of the network, such as "wrn-16-4".
    num_examples: Number of maps, rounded up to whole batches.
    batch_size: Images per batch.
    repeats: Number of timed runs of each side.

  Returns:
    Plain values; the peer is the forward pass, "cost" maps over forward passes.
  """
  network = networks.random_network(name, batch_size, 0)
  num_batches = -(-num_examples // batch_size)
  both = sides(network, num_batches)
  for side in both:
    side()
  found = timing.summary(timing.run_in_turn(both, repeats=repeats))
  return {
    "name": f"maps/{name}",
    **found,
    "num_maps": num_batches * batch_size,
    "batch_size": batch_size,
    "cost": 1 / found["ratio"],
    "limit": LIMIT,
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates results of `measure` in Markdown, a row per network."""
  lines = [
    [
      row["name"],
      f"{row['num_maps']:,}",
      f"{row['peer_seconds']:.3g}",
      f"{row['seconds']:.3g}",
      f"{row['cost']:.2f}",
      f"{row['limit']:.2f}",
    ]
    for row in rows
  ]
  header = [
    "network",
    "images",
    "forward passes (s)",
    "maps (s)",
    "maps / forward",
    "limit",
  ]
  return tables.markdown([header, *lines])


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("--model", nargs="+", default=["wrn-16-4"], metavar="wrn-DEPTH-WIDTH")
  add("--num_examples", type=whole, default=512)
  add("--batch_size", type=whole, default=64)
  add("--repeats", type=whole, default=7)
  add("--smoke", action="store_true", help="small run, times mean nothing")
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  if args.smoke:
    args.model, args.repeats = ["wrn-8-1"], 1
    args.num_examples, args.batch_size = 4, 2
  rows = (
    measure(
      model,
      num_examples=args.num_examples,
      batch_size=args.batch_size,
      repeats=args.repeats,
    )
    for model in args.model
  )
  machine.run(args, rows, table)


if __name__ == "__main__":
  main()
