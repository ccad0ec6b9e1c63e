"""Growth of the step's time with attack steps, batch, depth, width and devices.

  python -m benchmarks.scaling --out=scaling.json

Varies one number at a time from a base case and fits time = constant + slope *
work by least squares; reports the constant's share of the base case and the
largest relative distance of a point from the line.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from atat_jax.errors import UserError
from atat_jax.runs import tables
from benchmarks import step
from benchmarks.support import machine, timing
from benchmarks.support.machine import whole

BASE = step.Case("wrn-10-1")
SMOKE = step.Case("wrn-8-1", batch_size=4, num_steps=1, size=8)
VALUES: dict[str, tuple[int, ...]] = {
  "num_steps": (1, 2, 4, 7, 14, 28),
  "batch_size": (8, 16, 32, 64, 128),
  "depth": (10, 16, 22, 28),
  "width": (1, 2, 3, 4),
  "num_devices": (1, 2),
}


def case(base: step.Case, axis: str, value: int) -> step.Case:
  """Returns the base case with one number changed."""
  if axis in ("depth", "width"):
    _, depth, width = base.model.split("-")
    numbers = {"depth": depth, "width": width, axis: value}
    return dataclasses.replace(
      base, model=f"wrn-{numbers['depth']}-{numbers['width']}"
    )
  return dataclasses.replace(base, **{axis: value})


def fit(work: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
  """Fits seconds = constant + slope * work.

  Args:
    work: Work at each point, at least two different values.
    seconds: Time at each point.

  Returns:
    "constant", "slope", and "worst": the largest |fit - seconds| / seconds.
  """
  # Weighted by 1 / time, so that short times count as much as long ones.
  times = np.asarray(seconds, np.float64)
  columns = np.stack([np.ones(len(work)), np.asarray(work, np.float64)], 1)
  (constant, slope), *_ = np.linalg.lstsq(
    columns / times[:, None], np.ones(len(times))
  )
  errors = np.abs(columns @ [constant, slope] - times) / times
  return {
    "constant": float(constant),
    "slope": float(slope),
    "worst": float(errors.max()),
  }


def measure(
  base: step.Case, axis: str, values: Sequence[int], repeats: int
) -> dict[str, Any]:
  """Measures a curve along one axis; its points are timed in turn."""
  points = [step.Ours(case(base, axis, value)) for value in values]
  for point in points:
    point()
  times = timing.run_in_turn(points, repeats=repeats)
  summaries = [timing.summary([seconds]) for seconds in times]
  found: dict[str, Any] = {
    "name": axis,
    "values": list(values),
    "seconds": [summary["seconds"] for summary in summaries],
    "spread": [summary["spread"] for summary in summaries],
    "flops": [point.flops()["step"] for point in points],
    "compiling": [
      point.seconds_lowering + point.seconds_compiling for point in points
    ],
  }
  if axis != "num_devices":
    found["fit"] = fit(found["flops"], found["seconds"])
    here = found["seconds"][list(values).index(_value(base, axis))]
    found["constant_share"] = found["fit"]["constant"] / here
  return found


def _value(base: step.Case, axis: str) -> int:
  _, depth, width = base.model.split("-")
  numbers = dataclasses.asdict(base) | {"depth": depth, "width": width}
  return int(numbers[axis])


def table(curves: Sequence[dict[str, Any]]) -> str:
  """Tabulates curves in Markdown, a row per point."""
  rows = []
  for curve in curves:
    for value, seconds, spread, flops, compiling in zip(
      curve["values"],
      curve["seconds"],
      curve["spread"],
      curve["flops"],
      curve["compiling"],
      strict=True,
    ):
      line = curve.get("fit")
      fitted = line and line["constant"] + line["slope"] * flops
      rows.append(
        [
          curve["name"],
          str(value),
          f"{1e3 * seconds:.1f}",
          f"{1e3 * spread:.1f}",
          "-" if line is None else f"{1e3 * fitted:.1f}",
          f"{flops / 1e9:.2f}",
          f"{flops / seconds / 1e9:.0f}",
          f"{compiling:.1f}",
        ]
      )
  header = [
    "axis",
    "value",
    "ms",
    "+-",
    "line (ms)",
    "GFLOP",
    "GFLOP/s",
    "compile (s)",
  ]
  return tables.markdown([header, *rows])


def _line(curve: dict[str, Any]) -> str:
  times = ", ".join(f"{1e3 * seconds:.1f}" for seconds in curve["seconds"])
  return f"{curve['name']}: {times} ms"


def _fits(curves: Sequence[dict[str, Any]]) -> str:
  """Lists the fitted lines in Markdown."""
  return "\n".join(
    f"- {curve['name']}: constant part"
    f" {1e3 * curve['fit']['constant']:.1f} ms"
    f" ({100 * curve['constant_share']:.0f} % of the base case), slope"
    f" {1e12 * curve['fit']['slope']:.1f} ms / GFLOP, furthest from the line"
    f" {100 * curve['fit']['worst']:.0f} %"
    for curve in curves
    if "fit" in curve
  )


def page(curves: Sequence[dict[str, Any]]) -> str:
  """Returns the table of all points, and the fitted lines below it."""
  return f"{table(curves)}\n\n{_fits(curves)}"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("--axis", nargs="+", choices=VALUES, default=list(VALUES))
  add(
    "--values",
    nargs="+",
    type=whole,
    help="values along the one axis that is given",
  )
  add("--repeats", type=whole, default=9)
  add("--smoke", action="store_true", help="tiny base case")
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  import jax

  args = parser().parse_args(argv)
  with machine.plain_errors():
    if args.values and len(args.axis) > 1:
      raise UserError("values: given for several axes; allowed: with one")
  if "num_devices" in args.axis:  # CPU devices share the cores
    jax.config.update("jax_num_cpu_devices", max(VALUES["num_devices"]))

  def measured() -> Iterator[dict[str, Any]]:
    base = SMOKE if args.smoke else BASE
    for axis in args.axis:
      values = sorted({*(args.values or VALUES[axis]), _value(base, axis)})
      if axis == "num_devices":
        values = [v for v in values if v <= jax.device_count()]
      yield measure(base, axis, values, args.repeats)

  machine.run(args, measured(), page, line=_line)


if __name__ == "__main__":
  main()
