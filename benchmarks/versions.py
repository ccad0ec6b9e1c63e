"""Cheaper forms of an attack beside the whole one, image by image.

  python -m benchmarks.versions --workdir=runs/at --num_examples=200 \\
    --epsilon=0.2 --step_size=0.05 --out=versions.json

The first attack is the one that the others are compared with. CPU seconds include
compilation, which a first run in the process has.
"""

import argparse
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from atat_jax.runs import tables
from benchmarks import precision
from benchmarks.support import machine

ATTACKS = (
  "autoattack-fast",
  "autoattack-quick",
  "autoattack-fast:screening=bfloat16",
)


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  subject = precision.load(args, args.workdir)
  whole = None
  for attack in args.attacks:
    began = time.process_time()
    correct = subject.correct(args, attack)
    seconds = time.process_time() - began
    whole = correct if whole is None else whole
    yield {
      "name": f"{attack}/n{len(correct)}",
      "data": subject.data,
      "epsilon": args.epsilon,
      "accuracy": float(correct.mean()),
      "robust_here_only": int((correct & ~whole).sum()),
      "robust_there_only": int((whole & ~correct).sum()),
      "seconds_cpu": seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Tabulates accuracies (%) and the images on which the first disagrees."""
  lines = [
    ["attack", "robust (%)", "here only", "first only", "CPU (s), cold"],
    *(
      [
        row["name"],
        f"{100 * row['accuracy']:.2f}",
        str(row["robust_here_only"]),
        str(row["robust_there_only"]),
        f"{row['seconds_cpu']:.0f}",
      ]
      for row in rows
    ),
  ]
  return tables.markdown(lines)


def _line(row: dict[str, Any]) -> str:
  return f"{row['name']}: {row['accuracy']}, {row['seconds_cpu']:.0f} CPU s"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  made.add_argument(
    "--workdir", type=pathlib.Path, required=True, help="run directory"
  )
  precision.add_subject_flags(made)
  made.add_argument(
    "--attacks", nargs="+", default=list(ATTACKS), help="names of protocols"
  )
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  machine.run(args, _rows(args), table, line=_line)


if __name__ == "__main__":
  main()
