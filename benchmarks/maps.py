"""Attention maps of a network against its forward passes.

  python -m benchmarks.maps --model wrn-16-4 --num_examples=512 --out=maps.json
  python -m benchmarks.maps --model wrn-32-10 --num_examples=10000 \\
    --batch_size=250 --out=maps.json
  python -m benchmarks.maps --smoke

Maps by `attention.grad_cam`, with its checks, at the last convolutional tensor,
and the logits of the same images by the same network, in turn. Maps may cost
1.1 times the forward passes. `--smoke` is small, only to see that it runs.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from atat_jax.errors import UserError
from benchmarks import setting, timing
from benchmarks.setting import whole

LIMIT = 1.1
"""Of the time of maps over that of forward passes."""


def sides(
  network: setting.Network, num_batches: int
) -> tuple[Callable[[], None], Callable[[], None]]:
  """Maps and logits of a batch, `num_batches` times.

  Args:
    network: With the images of the batch.
    num_batches: How often.

  Returns:
    Functions that return when all of it is done.
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
    name: Such as "wrn-16-4".
    num_examples: Maps, in batches; rounded up to whole ones.
    batch_size: Images at a time.
    repeats: Timed runs of each side.

  Returns:
    Plain values; the peer is the forward pass, "cost" maps over forward passes.
  """
  network = setting.random_network(name, batch_size, 0)
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
  """A Markdown table, a row a network."""
  from benchmarks.comparison import markdown

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
  return markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = made.add_argument
  add("--model", nargs="+", default=["wrn-16-4"], metavar="wrn-DEPTH-WIDTH")
  add("--num_examples", type=whole, default=512)
  add("--batch_size", type=whole, default=64)
  add("--repeats", type=whole, default=7)
  add("--threads", type=whole, help="cores; default: all allowed")
  add("--smoke", action="store_true", help="small, only to see that it runs")
  add("--out", type=pathlib.Path, help="JSON file for all of it")
  args = made.parse_args(argv)
  if args.smoke:
    args.model, args.repeats = ["wrn-8-1"], 1
    args.num_examples, args.batch_size = 4, 2

  def measured() -> Iterator[dict[str, Any]]:
    for model in args.model:
      yield measure(
        model,
        num_examples=args.num_examples,
        batch_size=args.batch_size,
        repeats=args.repeats,
      )

  try:
    cores = setting.start(args.threads, cache=False, torch=False)
    setting.report(measured(), table, cores=cores, out=args.out)
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
