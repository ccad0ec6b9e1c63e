"""Compares finished runs: one page, one Markdown table.

python -m atat_jax.report runs/at runs/atat --out comparison
"""

import argparse
import sys
from collections.abc import Sequence

from atat_jax.process import commands, stops
from atat_jax.report import write_comparison
from atat_jax.runs import locations


def main(argv: Sequence[str] | None = None) -> None:
  """Compares the runs named on the command line."""
  flags = argparse.ArgumentParser(
    prog="python -m atat_jax.report",
    description="Compares finished runs: one page, one Markdown table.",
  )
  flags.add_argument("workdirs", nargs="+", help="directories of finished runs")
  flags.add_argument(
    "--out", default="comparison", help="path of the files, without a suffix"
  )
  args = flags.parse_args(argv)
  workdirs = [locations.find("workdirs", path) for path in args.workdirs]
  for path in write_comparison(workdirs, locations.find("out", args.out)):
    sys.stdout.write(f"comparison: {path}\n")


if __name__ == "__main__":
  with commands.plain_exits():
    stops.started()
    main()
