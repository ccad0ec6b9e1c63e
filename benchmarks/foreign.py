"""A step of PGD on a user's own network beside its gradient outside any loop.

  python -m benchmarks.foreign --threads=1 --model resnet-20 resnet-18-half

The networks are written with flax's own layers, whose convolutions attacks
replace on CPU. A third side attacks the network as it is written. All run in
turn; times are the process's CPU time, the first calls left out.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from atat_jax.runs import tables
from benchmarks.support import machine, networks, plain, timing
from benchmarks.support.machine import whole

_STEPS = 10
_KEPT_STEPS = 2  # slow ones


def _sides(network: networks.Network) -> list[Callable[[], Any]]:
  """Returns functions that compute a gradient, and attack in two forms."""
  import jax

  from atat_jax import attacks, losses, models
  from atat_jax.models import convolution

  images, labels = jax.device_put((network.images, network.labels))
  classifier = models.classifier(network.model, network.variables)
  kept = jax.tree_util.Partial(
    convolution.as_written(classifier.func), *classifier.args
  )

  def total(variables: Any, x: jax.Array) -> jax.Array:
    logits = network.model.apply(variables, x)
    return losses.cross_entropy(logits, labels).sum()

  gradient = jax.jit(jax.grad(total, argnums=1))

  def attack(classifier: Any, num_steps: int) -> Any:
    return attacks.pgd(
      jax.random.key(0),
      classifier,
      images,
      labels,
      epsilon=8 / 255,
      step_size=2 / 255,
      num_steps=num_steps,
    )

  return [
    lambda: jax.block_until_ready(gradient(network.variables, images)),
    lambda: jax.block_until_ready(attack(classifier, _STEPS)),
    lambda: jax.block_until_ready(attack(kept, _KEPT_STEPS)),
  ]


def measure(name: str, batch_size: int, *, repeats: int) -> dict[str, Any]:
  """Measures a network.

  Args:
    name: One of `plain.NETWORKS`.
    batch_size: Number of images.
    repeats: Number of timed runs of each side.

  Returns:
    Plain values; seconds of CPU time for a gradient and for a step of PGD,
    and the medians and spreads of ratios within a round.
  """
  sides = _sides(networks.random_network(name, batch_size, seed=0))
  first = []
  for side in sides:
    began = time.process_time()
    side()
    first.append(time.process_time() - began)
  times = timing.run_in_turn(sides, repeats=repeats, clock=time.process_time)
  outside = times[0]
  inside = [t / _STEPS for t in times[1]]
  kept = [t / _KEPT_STEPS for t in times[2]]
  ratios = {
    side: timing.median_and_spread(
      [a / b for a, b in zip(found, outside, strict=True)]
    )
    for side, found in (("inside", inside), ("kept", kept))
  }
  return {
    "name": f"{name}/b{batch_size}",
    "seconds": timing.median_and_spread(inside)[0],
    "seconds_outside": timing.median_and_spread(outside)[0],
    "seconds_kept": timing.median_and_spread(kept)[0],
    "step_to_gradient": ratios["inside"],
    "kept_to_gradient": ratios["kept"],
    "first_seconds": first,
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates results of `measure` in Markdown."""
  lines = [
    [
      row["name"],
      *(
        f"{1e3 * row[side]:.0f}"
        for side in ("seconds_outside", "seconds", "seconds_kept")
      ),
      *(
        "{:.2f} +- {:.2f}".format(*row[side])
        for side in ("step_to_gradient", "kept_to_gradient")
      ),
    ]
    for row in rows
  ]
  head = [
    "network and batch",
    "gradient, CPU ms",
    "PGD step",
    "as written",
    "step / gradient",
    "as written / gradient",
  ]
  return tables.markdown([head, *lines])


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  parser = machine.measurement_parser(__doc__)
  parser.add_argument(
    "--model", nargs="+", choices=list(plain.NETWORKS), default=["resnet-20"]
  )
  parser.add_argument("--batch_size", type=whole, default=36)
  parser.add_argument("--repeats", type=whole, default=7)
  args = parser.parse_args(argv)

  def rows() -> Iterator[dict[str, Any]]:
    for name in args.model:
      yield measure(name, args.batch_size, repeats=args.repeats)

  machine.run(args, rows(), table)


if __name__ == "__main__":
  main()
