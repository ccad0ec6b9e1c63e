"""Profile of the fused train step: device time, kernel by kernel.

  python -m benchmarks.kernels --model=wrn-28-10 --dtype=bfloat16 \\
    --batch_size=256 --method=at --out=profile.json

Takes the flags of `benchmarks.step` that choose measurements.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from atat_jax.runs import tables
from benchmarks import step
from benchmarks.support import machine
from benchmarks.support.machine import whole

TOP = 10
"""Number of kernels that are listed."""


def kernel_times(events: Iterable[dict[str, Any]]) -> dict[str, float]:
  """Sums up the seconds of each kernel.

  Args:
    events: Events of a trace in Chrome's format, times in microseconds. On a
      GPU the streams' events count (other tracks show the same work under other
      names), on CPU the operations of XLA.

  Returns:
    {kernel: seconds}, the longest first.
  """
  found = list(events)
  names: dict[tuple[str, Any, Any], str] = {}
  for event in found:
    if event.get("ph") == "M" and event.get("name") in (
      "process_name",
      "thread_name",
    ):
      thread = event.get("tid") if event["name"] == "thread_name" else None
      names[event["name"], event["pid"], thread] = event["args"]["name"]

  def on_stream(event: dict[str, Any]) -> bool:
    process = names.get(("process_name", event["pid"], None), "")
    thread = names.get(("thread_name", event["pid"], event.get("tid")), "")
    return "/device:GPU" in process and thread.startswith("Stream")

  timed = [event for event in found if event.get("ph") == "X"]
  kernels = [event for event in timed if on_stream(event)] or [
    event for event in timed if "hlo_op" in event.get("args", {})
  ]
  seconds: collections.Counter[str] = collections.Counter()
  for event in kernels:
    seconds[event["name"]] += event["dur"] / 1e6
  return dict(seconds.most_common())


def measure(case: step.Case, repeats: int) -> dict[str, Any]:
  """Profiles `repeats` steps of a case."""
  import jax

  ours = step.Ours(case)
  for _ in range(2):
    ours()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(repeats):
        ours()
    events = []
    for path in pathlib.Path(folder).rglob("*.trace.json.gz"):
      with gzip.open(path, "rt", encoding="utf-8") as file:
        events += json.load(file)["traceEvents"]
  times = kernel_times(events)
  total = sum(times.values())
  return {
    "name": case.name,
    "case": dataclasses.asdict(case),
    "steps": repeats,
    "seconds_per_step": total / repeats,
    "kernels": len(times),
    "top": [
      {"kernel": name, "seconds": seconds / repeats, "share": seconds / total}
      for name, seconds in list(times.items())[:TOP]
    ],
  }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates each profile in Markdown."""
  return "\n\n".join(
    f"{row['name']}, {row['kernels']} kernels,"
    f" {1e3 * row['seconds_per_step']:.1f} ms per step on the device:\n\n"
    + tables.markdown(
      [
        ["kernel", "ms per step", "share (%)"],
        *(
          [
            f"`{part['kernel'][:80]}`",
            f"{1e3 * part['seconds']:.2f}",
            f"{100 * part['share']:.1f}",
          ]
          for part in row["top"]
        ),
      ],
      align="lrr",
    )
    for row in rows
  )


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  step.add_case_flags(made)
  made.add_argument("--repeats", type=whole, default=3)
  return made


def _line(row: dict[str, Any]) -> str:
  return f"{row['name']}: {row['kernels']} kernels"


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  rows = (measure(case, args.repeats) for case in step.cases(args))
  machine.run(args, rows, table, line=_line)


if __name__ == "__main__":
  main()
