"""Cost of published trainings on clusters, from the network's operations.

  python -m benchmarks.clusters

Nothing is run: operations, parameters and BatchNorm layers are counted from the
network's shapes. A step takes as long as its operations at the share of the peak
that was measured on one H200 (docs/performance.md), plus the collectives of
BatchNorm, which wait for each other; the gradient's all-reduce is shown beside
it. Peaks and links are those of the makers' data sheets; prices are a guess of
the order of an hour's list price, to be replaced by one's own (--price).
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from atat_jax.runs import tables
from benchmarks.support import flops, networks

SHARE_OF_PEAK = 0.37
"""Share of WRN-28-10 in bfloat16 with PGD-7 at batch 256 on one H200."""

LATENCY_SECONDS = 20e-6
"""Guess of one small all-reduce; NCCL and ICI have 10 to 30 microseconds."""


class Machine(NamedTuple):
  """Accelerators that train together.

  Attributes:
    name: Name in the table.
    devices: Number of chips.
    peak: Dense bfloat16 operations a second of one.
    link: Bytes a second in one direction out of one.
    memory: Bytes of one.
    price: US dollars of one for an hour, a guess.
  """

  name: str
  devices: int
  peak: float
  link: float
  memory: float
  price: float


MACHINES = (
  Machine("8 x H200", 8, 989e12, 450e9, 141e9, 4.0),
  Machine("TPU v5p-64 (32 chips)", 32, 459e12, 300e9, 95e9, 4.2),
  Machine("TPU v6e-64 (64 chips)", 64, 918e12, 400e9, 32e9, 2.7),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A training.

  Attributes:
    network: Name in `networks.network`.
    source: Publication.
    method: Objective.
    num_steps: Steps of its attack.
    batch_size: Images in a batch.
    images: Images seen in the whole training.
    size: Side of an image.
    num_classes: Number of classes.
  """

  network: str
  source: str
  method: str
  num_steps: int
  batch_size: int
  images: float
  size: int = 32
  num_classes: int = 10


RECIPES = (
  Recipe(
    "wrn-28-10", "Wang et al. 2023, 2400 epochs", "trades", 10, 2048, 2400 * 5e4
  ),
  Recipe(
    "wrn-70-16", "Wang et al. 2023, 2000 epochs", "trades", 10, 1024, 2000 * 5e4
  ),
  Recipe(
    "wrn-94-16", "as WRN-70-16, for its size", "trades", 10, 1024, 2000 * 5e4
  ),
  Recipe(
    "resnet50",
    "Salman et al. 2020, ImageNet, 90 epochs",
    "at",
    3,
    512,
    90 * 1.281167e6,
    224,
    1000,
  ),
)


class Counts(NamedTuple):
  """Size of a network.

  Attributes:
    forward: Operations of one image's forward pass.
    parameters: Number of parameters.
    norms: Number of BatchNorm layers.
    channels: Channels of all of them.
  """

  forward: int
  parameters: int
  norms: int
  channels: int


def count(recipe: Recipe) -> Counts:
  """Counts a network from its shapes; no array is made."""
  import jax
  import jax.numpy as jnp

  from atat_jax import models

  if recipe.num_classes == 10:
    model = networks.network(recipe.network, shortcut="conv")
  else:
    model = models.create(recipe.network, num_classes=recipe.num_classes)
  shape = (recipe.size, recipe.size, 3)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, *shape))
  )
  means = jax.tree.leaves(variables["batch_stats"])[::2]
  sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
  return Counts(
    flops.forward(model, variables, shape),
    sum(sizes),
    len(means),
    sum(leaf.size for leaf in means),
  )


class Step(NamedTuple):
  """Cost of one step on one machine.

  Attributes:
    attack: Operations of the attack, of the whole batch.
    loss: Operations of the rest.
    compute: Seconds of both.
    gradient: Bytes of the gradient.
    reduce: Seconds of its all-reduce.
    norms: Number of all-reduces of BatchNorm.
    norm: Seconds of them.
    pixels: Bytes of the images.
    state: Bytes on a device of weights, momentum, average and gradient.
  """

  attack: float
  loss: float
  compute: float
  gradient: float
  reduce: float
  norms: int
  norm: float
  pixels: float
  state: float

  @property
  def seconds(self) -> float:
    """Seconds of the step."""
    return self.compute + self.reduce + self.norm


def passes(recipe: Recipe) -> tuple[int, int]:
  """Forward passes that attack and loss cost, a gradient counted as one more."""
  from atat_jax import objectives

  number = flops.passes(objectives.create(recipe.method), recipe.num_steps)
  attack = 2 * recipe.num_steps
  return attack, number - attack


def cost(
  recipe: Recipe, counts: Counts, machine: Machine, *, running: bool
) -> Step:
  """Computes the cost of a step.

  Args:
    recipe: The training.
    counts: Size of its network.
    machine: Devices that it runs on.
    running: Whether the attack uses running statistics.
  """
  attack, loss = (
    n * counts.forward * recipe.batch_size for n in passes(recipe)
  )
  rate = SHARE_OF_PEAK * machine.peak * machine.devices
  gradient = 4 * counts.parameters
  # Each layer sums once forward and once backward, mean and variance together.
  norms = 2 * counts.norms * (1 if running else 1 + recipe.num_steps)
  ring = 2 * (machine.devices - 1) / machine.devices
  return Step(
    attack,
    loss,
    (attack + loss) / rate,
    gradient,
    ring * gradient / machine.link,
    norms,
    norms * LATENCY_SECONDS,
    recipe.batch_size * recipe.size**2 * 3,
    4 * gradient,
  )


def steps_table(found: Sequence[tuple[Recipe, Machine, Step]]) -> str:
  """Tabulates the cost of a step in Markdown."""
  rows = [
    [
      "network",
      "machine",
      "attack (TFLOP)",
      "loss (TFLOP)",
      "compute (ms)",
      "gradient (MB)",
      "its all-reduce (ms)",
      "BatchNorm's (number)",
      "(ms)",
      "images (MB)",
      "state (GB)",
    ]
  ]
  for recipe, machine, step in found:
    rows.append(
      [
        f"{recipe.network}, batch {recipe.batch_size}",
        machine.name,
        f"{step.attack / 1e12:.0f}",
        f"{step.loss / 1e12:.0f}",
        f"{1e3 * step.compute:.0f}",
        f"{step.gradient / 1e6:.0f}",
        f"{1e3 * step.reduce:.1f}",
        str(step.norms),
        f"{1e3 * step.norm:.1f}",
        f"{step.pixels / 1e6:.1f}",
        f"{step.state / 1e9:.1f}",
      ]
    )
  return tables.markdown(rows)


def hours(recipe: Recipe, step: Step) -> float:
  """Computes the hours of a training."""
  return math.ceil(recipe.images / recipe.batch_size) * step.seconds / 3600


def recipes_table(found: Sequence[tuple[Recipe, Machine, Step]]) -> str:
  """Tabulates hours and cost of the trainings in Markdown."""
  rows = [["training", "machine", "steps", "s a step", "hours", "US dollars"]]
  for recipe, machine, step in found:
    took = hours(recipe, step)
    rows.append(
      [
        f"{recipe.network}: {recipe.source}",
        machine.name,
        f"{math.ceil(recipe.images / recipe.batch_size):,}",
        f"{step.seconds:.3f}",
        f"{took:.1f}",
        f"{took * machine.devices * machine.price:,.0f}",
      ]
    )
  return tables.markdown(rows)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--price", type=float, help="US dollars of one device for an hour"
  )
  parser.add_argument(
    "--batch_norm",
    choices=("running", "batch"),
    default="running",
    help="statistics in the attack",
  )
  args = parser.parse_args(argv)
  found = []
  for recipe in RECIPES:
    counts = count(recipe)
    for machine in MACHINES:
      if args.price is not None:
        machine = machine._replace(price=args.price)
      running = args.batch_norm == "running"
      found.append(
        (recipe, machine, cost(recipe, counts, machine, running=running))
      )
  print(f"{steps_table(found)}\n\n{recipes_table(found)}")


if __name__ == "__main__":
  main()
