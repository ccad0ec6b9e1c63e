"""Time and memory that each optimisation of the train step saves.

  python -m benchmarks.savings --model wrn-16-4 --out=savings.json

The step with and without it run in turn; the ratio is without / with. Where the
package has no switch, the slow variant is implemented here.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from atat_jax.runs import tables
from benchmarks import step
from benchmarks.support import machine, timing
from benchmarks.support.machine import whole

Side = Callable[[], None]


def _steps(
  with_it: step.Case, without: step.Case
) -> tuple[step.Ours, step.Ours]:
  return step.Ours(with_it), step.Ours(without)


def _option(base: step.Case, name: str, value: Any) -> step.Case:
  return dataclasses.replace(base, options=(*base.options, (name, value)))


def _images_only(base: step.Case) -> tuple[step.Ours, step.Ours]:
  """Makes a step whose attack differentiates the parameters, too."""
  import jax
  import jax.numpy as jnp

  from atat_jax import batch_norm, losses
  from atat_jax.attacks import projected_gradient
  from atat_jax.objectives import adversarial

  def attack(
    self: Any, key: Any, model: Any, variables: Any, batch: Any
  ) -> adversarial.InnerAttackResult:
    def loss(params: Any, x: Any, stats: Any) -> Any:
      logits, _ = batch_norm.apply(
        model,
        {"params": params, "batch_stats": stats},
        x,
        batch_norm=self.attack_batch_norm,
      )
      return losses.cross_entropy(logits, batch.labels).sum()

    def body(_: Any, carry: Any) -> Any:
      x, _ = carry
      weights, gradient = jax.grad(loss, (0, 1))(
        variables["params"], x, variables["batch_stats"]
      )
      x = x + self.step_size * jnp.sign(gradient)
      low, high = batch.images - self.epsilon, batch.images + self.epsilon
      return jnp.clip(jnp.clip(x, low, high), 0, 1), weights

    start = projected_gradient.random_start(
      key, batch.images, epsilon=self.epsilon
    )
    x, weights = jax.lax.fori_loop(
      0, self.num_steps, body, (start, variables["params"])
    )
    # Used in a way that the compiler cannot remove.
    used = sum(jnp.nan_to_num(w).sum() for w in jax.tree.leaves(weights))
    return adversarial.InnerAttackResult(x + 0 * used, variables["batch_stats"])

  ours = step.Ours(base)
  with mock.patch.object(adversarial.InnerAttack, "attack", attack):
    return ours, step.Ours(base)


def _head_only(base: step.Case) -> tuple[Side, Side]:
  """Computes logits and maps; the other side differentiates to the images."""
  import jax

  from atat_jax import attention, batch_norm, compilation

  ours = step.Ours(dataclasses.replace(base, method="standard"))
  images = ours.pixels.astype("float32") / 255

  def maps(variables: Any, images: Any, labels: Any) -> Any:
    return attention.forward(ours.model, variables, images, labels)[:2]

  def through(variables: Any, images: Any, labels: Any) -> Any:
    def chosen(x: Any) -> Any:
      logits, _ = batch_norm.apply(ours.model, variables, x)
      return logits[jax.numpy.arange(len(labels)), labels].sum()

    return maps(variables, images, labels), jax.grad(chosen)(images)

  def side(function: Any) -> Side:
    run = compilation.jit(function)
    return lambda: jax.block_until_ready(
      run(ours.variables, images, ours.labels)
    )

  return side(maps), side(through)


SAVINGS: dict[str, Callable[[step.Case], tuple[Side, Side]]] = {
  "attack: gradient of the images only": _images_only,
  "maps: through the head only": _head_only,
  "attack: running statistics": lambda base: _steps(
    _option(
      _option(base, "attack_batch_norm", "running"),
      "attack_moves_statistics",
      False,
    ),
    base,
  ),
  "four steps a dispatch": lambda base: _steps(
    dataclasses.replace(base, steps_per_dispatch=4), base
  ),
  "rematerialisation": lambda base: _steps(
    _option(base, "train.remat", True), base
  ),
  "convolutions of this backend": lambda base: _steps(
    base, _option(base, "model.convolution", "xla")
  ),
}


def measure(name: str, base: step.Case, *, repeats: int) -> dict[str, Any]:
  """Measures the step with and without an optimisation.

  Args:
    name: Name of the optimisation, in `SAVINGS`.
    base: Measurement that both sides derive from.
    repeats: Number of timed runs of each side.

  Returns:
    Plain values; seconds per train step, or per batch of maps.
  """
  sides = SAVINGS[name](base)
  for side in sides:
    side()
  per_step = []
  for side, seconds in zip(
    sides, timing.run_in_turn(sides, repeats=repeats), strict=True
  ):
    count = side.case.steps_per_dispatch if isinstance(side, step.Ours) else 1
    per_step.append([t / count for t in seconds])
  memory = [
    side.memory()["planned_temporary"] if isinstance(side, step.Ours) else None
    for side in sides
  ]
  return {
    "name": f"{name}/{base.name}",
    **timing.summary(per_step),
    "memory": memory[0],
    "peer_memory": memory[1],
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates results of `measure` in Markdown, a row per optimisation."""

  def megabytes(memory: int | None) -> str:
    return "-" if memory is None else f"{memory / 1e6:.0f}"

  lines = [
    [
      row["name"],
      f"{1e3 * row['seconds']:.1f}",
      f"{1e3 * row['peer_seconds']:.1f}",
      f"{row['ratio']:.2f}",
      f"{row['ratio_spread']:.2f}",
      megabytes(row["memory"]),
      megabytes(row["peer_memory"]),
    ]
    for row in rows
  ]
  header = [
    "with",
    "ms",
    "without (ms)",
    "without / with",
    "+-",
    "MB",
    "without (MB)",
  ]
  return tables.markdown([header, *lines])


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("--model", nargs="+", default=["wrn-10-1"], metavar="wrn-DEPTH-WIDTH")
  add("--saving", nargs="+", default=list(SAVINGS), choices=SAVINGS)
  add("--batch_size", type=whole, default=32)
  add("--repeats", type=whole, default=5)
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  rows = (
    measure(
      name, step.Case(model, batch_size=args.batch_size), repeats=args.repeats
    )
    for model in args.model
    for name in args.saving
  )
  machine.run(args, rows, table)


if __name__ == "__main__":
  main()
