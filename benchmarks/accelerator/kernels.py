"""A profile of the fused step: where the device's time goes, kernel by kernel.

  python -m benchmarks.accelerator.kernels --results=runs/accelerator/a --out=profile.json

Profiles the case that reached the most operations a second among the results of
`benchmarks.step` in that folder.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from atat_jax.errors import UserError
from benchmarks import setting, step
from benchmarks.setting import say, whole

TOP = 10


def best_case(folder: pathlib.Path) -> step.Case:
  """The case with the most operations a second.

  Raises:
    UserError: No measured case in the folder.
  """
  rows = []
  for path in sorted(folder.glob("*.json")):
    found = json.loads(path.read_text(encoding="utf-8"))
    rows += [row for row in found.get("rows", ()) if "seconds" in row]
  if not rows:
    raise UserError(f"results: no measured case in {folder}")
  case = max(rows, key=lambda row: row["flops_per_second"])["case"]
  return step.Case(**{**case, "options": tuple(case["options"])})


def kernel_times(events: Iterable[dict[str, Any]]) -> dict[str, float]:
  """Seconds of each kernel, the longest first.

  Args:
    events: Of a trace in Chrome's format, times in microseconds. On a GPU the
      streams' events count (other tracks tell the same again in other words),
      without one the operations of XLA.
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
  """A Markdown table for each profile."""
  from benchmarks.comparison import markdown

  return "\n\n".join(
    f"{row['name']}, {row['kernels']} kernels,"
    f" {1e3 * row['seconds_per_step']:.1f} ms a step on the device:\n\n"
    + markdown(
      ["kernel", "ms a step", "share (%)"],
      [
        [
          f"`{part['kernel'][:80]}`",
          f"{1e3 * part['seconds']:.2f}",
          f"{100 * part['share']:.1f}",
        ]
        for part in row["top"]
      ],
    )
    for row in rows
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = made.add_argument
  add("--results", type=pathlib.Path, required=True)
  add("--repeats", type=whole, default=3)
  add("--size", type=whole, help="of the images, instead of the case's")
  add("--num_steps", type=whole, help="of the attack, instead of the case's")
  add("--out", type=pathlib.Path, required=True)
  args = made.parse_args(argv)
  try:
    case = best_case(args.results)
    others = {"size": args.size, "num_steps": args.num_steps}
    case = dataclasses.replace(
      case, **{name: value for name, value in others.items() if value}
    )
    cores = setting.start(None, cache=False, torch=False)
    say(f"profile of {case.name}")
    setting.report(
      iter([measure(case, args.repeats)]),
      table,
      cores=cores,
      out=args.out,
      line=lambda row: f"{row['name']}: {row['kernels']} kernels",
    )
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
