"""Compares finished runs: one page, one Markdown table.

python -m atat_jax.report runs/at runs/atat --out comparison
"""

import sys
from collections.abc import Sequence

from atat_jax.process import arguments, commands, stops
from atat_jax.report import write_comparison
from atat_jax.runs import locations

PROGRAM = "python -m atat_jax.report"


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> None:
  """Compares the runs that the command line names.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help.

  Raises:
    UserError: Not a finished run, one clear line.
  """
  flags = arguments.Parser(
    program,
    "RUN [RUN ...] [--out=PATH]",
    description="Compares finished runs: one page, one Markdown table.",
    example="runs/digits --out=comparison",
  )
  flags.add_argument(
    "workdirs", metavar="RUN", nargs="+", help="directories of finished runs"
  )
  flags.add_argument(
    "--out",
    default="comparison",
    help="path of the files, without a suffix (%(default)s)",
  )
  args = flags.parse_args(argv)
  workdirs = [locations.find("workdirs", path) for path in args.workdirs]
  paths = write_comparison(workdirs, locations.find("out", args.out))
  for path in paths:
    sys.stdout.write(f"comparison: {path}\n")
  commands.say_next(f"open {paths[0]}")


if __name__ == "__main__":
  with commands.plain_exits():
    stops.started()
    main()
