"""Flags ratios that have become worse than those of a stored result.

  python -m benchmarks.compare benchmarks/results/step_cpu.json new.json

Looks at ratios to a peer measured in the same run, never at absolute times:
those are the machine's. Exit status 1 where a ratio fell by more than
`--tolerance`, or a stored one was not measured.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

from atat_jax.errors import UserError
from benchmarks.comparison import markdown


def read(path: pathlib.Path) -> dict[str, float]:
  """The ratios of a result file: name to peer / ours.

  Raises:
    UserError: No such file, or without ratios.
  """
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: {error}; allowed: a benchmark's JSON") from error
  ratios = found.get("ratios") if isinstance(found, dict) else None
  if not ratios:
    raise UserError(f"{path}: no ratios; allowed: a result with a peer")
  return ratios


def worse(
  stored: Mapping[str, float], new: Mapping[str, float], tolerance: float
) -> list[str]:
  """Names whose ratio fell by more than the tolerance, or is missing."""
  return [
    name
    for name, ratio in stored.items()
    if name not in new or new[name] < (1 - tolerance) * ratio
  ]


def table(
  stored: Mapping[str, float], new: Mapping[str, float], flagged: Sequence[str]
) -> str:
  """A Markdown table of both, a row a measurement."""
  rows = []
  for name in dict.fromkeys([*stored, *new]):
    a, b = stored.get(name), new.get(name)
    rows.append(
      [
        name,
        "-" if a is None else f"{a:.2f}",
        "-" if b is None else f"{b:.2f}",
        "-" if a is None or b is None else f"{100 * (b / a - 1):+.0f}",
        "worse" if name in flagged else "",
      ]
    )
  header = ["measurement", "stored peer / ours", "new", "change (%)", "flag"]
  return markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("stored", type=pathlib.Path)
  made.add_argument("new", type=pathlib.Path)
  made.add_argument(
    "--tolerance", type=float, default=0.1, help="share that may be lost"
  )
  args = made.parse_args(argv)
  try:
    stored, new = read(args.stored), read(args.new)
  except UserError as error:
    sys.exit(f"error: {error}")
  flagged = worse(stored, new, args.tolerance)
  print(table(stored, new, flagged))
  if flagged:
    sys.exit(f"{len(flagged)} of {len(stored)} ratios are worse")


if __name__ == "__main__":
  main()
