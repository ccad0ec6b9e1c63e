"""Flags ratios that are worse than those of a stored result.

  python -m benchmarks.compare benchmarks/results/cpu/attacks.json new.json

Compares ratios to a peer measured in the same run, never absolute times, which
depend on the machine. Exit status 1 where a ratio fell by more than
`--tolerance`, or a stored one was not measured.
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

from atat_jax.errors import UserError
from atat_jax.runs import tables
from benchmarks.support import machine


def read(path: pathlib.Path) -> dict[str, float]:
  """Reads the ratios of a result file: {name: peer / ours}.

  Raises:
    UserError: No such file, or no ratios in it.
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
  """Returns the names whose ratio fell by too much, or is missing."""
  return [
    name
    for name, ratio in stored.items()
    if name not in new or new[name] < (1 - tolerance) * ratio
  ]


def table(
  stored: Mapping[str, float], new: Mapping[str, float], flagged: Sequence[str]
) -> str:
  """Tabulates both in Markdown, a row per measurement."""
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
  return tables.markdown([header, *rows])


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = machine.parser(__doc__)
  made.add_argument("stored", type=pathlib.Path)
  made.add_argument("new", type=pathlib.Path)
  made.add_argument(
    "--tolerance", type=float, default=0.1, help="acceptable relative loss"
  )
  args = made.parse_args(argv)
  with machine.plain_errors():
    stored, new = read(args.stored), read(args.new)
  flagged = worse(stored, new, args.tolerance)
  print(table(stored, new, flagged))
  if flagged:
    sys.exit(f"{len(flagged)} of {len(stored)} ratios are worse")


if __name__ == "__main__":
  main()
