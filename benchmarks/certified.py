"""Certified accuracy of a small network beside that under attacks.

  python -m benchmarks.certified --out=certified.json

Trains a network on the digits, a 3 x 3 convolution with stride 2 and four
channels, a dense layer of 32 and one of ten, adversarially by one step along the
sign of the gradient, and certifies (`bounds.crown`) and attacks the first test
images at several epsilons.
"""

import argparse
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

from atat_jax.runs import tables
from benchmarks.support import machine
from benchmarks.support.machine import number, whole

ATTACKS = {"autoattack-fast": "autoattack", "pgd20-margin": "pgd20"}
"""Name of a protocol to the name of its accuracy in a row."""

BATCH_SIZE = 64
LEARNING_RATE = 3e-3


def network() -> Any:
  """Makes the network."""
  from flax import linen as nn

  return nn.Sequential(
    [
      nn.Conv(4, (3, 3), strides=2),
      nn.relu,
      lambda x: x.reshape(len(x), -1),
      nn.Dense(32),
      nn.relu,
      nn.Dense(10),
    ]
  )


def train(split: Any, *, epsilon: float, epochs: int, seed: int) -> Any:
  """Trains the network on adversarial images of one step.

  Args:
    split: Training images, uint8, with labels.
    epsilon: Radius, and length of the step from the clean image.
    epochs: Number of epochs.
    seed: Seed of weights and batches.

  Returns:
    The network as a callable from images to logits.
  """
  import jax
  import jax.numpy as jnp
  import optax

  from atat_jax import compilation, models
  from atat_jax.attacks import projected_gradient
  from atat_jax.data import augment, batches

  model, optimizer = network(), optax.adam(LEARNING_RATE)

  def loss(weights: Any, images: Any, labels: Any) -> Any:
    images, _ = projected_gradient.ascend(
      lambda state, x: (model.apply(weights, x), state),
      (),
      *(images, images, labels),
      epsilon=epsilon,
      step_size=epsilon,
      num_steps=1,
    )
    logits = model.apply(weights, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

  @functools.partial(compilation.jit, once=True)
  def step(weights: Any, state: Any, images: Any, labels: Any) -> Any:
    gradient = jax.grad(lambda *given: loss(*given).mean())(
      weights, augment.to_float(images), labels
    )
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(weights, updates), state

  first = jnp.zeros((1, *split.images.shape[1:]))
  weights = model.init(jax.random.key(seed), first)
  state, size = optimizer.init(weights), len(split.labels)
  for place in range(epochs * (size // BATCH_SIZE)):
    chosen = batches.train_indices(
      seed, place, num_examples=size, batch_size=BATCH_SIZE
    )
    weights, state = step(
      weights, state, split.images[chosen], split.labels[chosen]
    )
  return models.classifier(model, weights)


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  import jax

  from atat_jax import data, evaluation

  dataset = data.load("digits", validation_size=180)
  test = dataset.test.first(args.num_examples)
  classifier = train(
    dataset.train,
    epsilon=args.training_epsilon,
    epochs=args.epochs,
    seed=args.seed,
  )
  for epsilon in args.epsilons:
    began = time.process_time()
    found = evaluation.benchmark(
      jax.random.key(args.seed),
      classifier,
      *test,
      epsilon=epsilon,
      attacks=",".join(ATTACKS),
      certify=True,
    )
    accuracies = {row["attack"]: row["accuracy"] for row in found}
    (certificate,) = found.content["certificates"]
    yield {
      "name": f"epsilon {epsilon:g}",
      "epsilon": epsilon,
      "num_examples": len(test.labels),
      "nominal": accuracies["nominal"],
      "certified": certificate["accuracy"],
      **{name: accuracies[attack] for attack, name in ATTACKS.items()},
      "certified_and_fooled": int(
        found.diagnostics["network_certified"]["value"]
      ),
      "seconds_cpu": time.process_time() - began,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates accuracies (%), from below and from above."""
  lines = [
    [
      *("epsilon", "images", "clean (%)", "certified (%)"),
      *("AutoAttack (fast) leaves (%)", "PGD-20 (margin) leaves (%)"),
      *("certified and fooled", "CPU (s)"),
    ]
  ]
  for row in rows:
    shares = ("nominal", "certified", *ATTACKS.values())
    lines.append(
      [
        f"{row['epsilon']:g}",
        str(row["num_examples"]),
        *(f"{100 * row[name]:.1f}" for name in shares),
        str(row["certified_and_fooled"]),
        f"{row['seconds_cpu']:.0f}",
      ]
    )
  return tables.markdown(lines)


def _line(row: dict[str, Any]) -> str:
  return f"{row['name']}: {row['certified']} <= {row['autoattack']}"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("--training_epsilon", type=number, default=0.1)
  add("--epochs", type=whole, default=60)
  add("--epsilons", type=number, nargs="+", default=[0.02, 0.05, 0.1])
  add("--num_examples", type=whole, default=360, help="default: all")
  add("--seed", type=int, default=0)
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  machine.run(args, _rows(args), table, line=_line)


if __name__ == "__main__":
  main()
