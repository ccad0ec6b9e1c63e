"""Writes the measured parts of docs/performance.md from result files.

  python -m benchmarks.tables benchmarks/results/cpu docs/performance.md

What stands between `<!-- generated: PART -->` and `<!-- end -->` becomes the
table of PART.json in that folder, with its machine and its command.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from atat_jax.errors import UserError
from benchmarks import attacks, savings, scaling, setting, step

_TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
  "step": step.table,
  "compiling": step.table,
  "gradients": step.gradient_table,
  "attacks": attacks.table,
  "scaling": scaling.page,
  "savings": savings.table,
}


def provenance(found: dict[str, Any]) -> str:
  """Command, commit, machine and versions of a result, in one paragraph."""
  machine = found["machine"]
  return (
    f"`{found['command']}`, commit `{found['commit']}`, {found['date'][:10]},"
    f" {len(machine['cores_used'])} cores, {machine['cpu']}, device"
    f" {machine['device']}, Python {machine['python']}, jax {machine['jax']},"
    f" torch {machine['torch']}."
  )


def generate(page: str, folder: pathlib.Path) -> str:
  """The page with its measured parts.

  Args:
    page: Markdown with markers.
    folder: Of the JSON files.

  Returns:
    The page.

  Raises:
    UserError: An unknown part, or one without a file.
  """

  def part(name: str) -> str:
    path = folder / f"{name}.json"
    try:
      found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise UserError(f"{path}: {error}; run benchmarks.run first") from error
    return f"\n{_TABLES[name](found['rows'])}\n\n{provenance(found)}\n"

  return setting.fill(page, sorted(_TABLES), part)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("results", type=pathlib.Path)
  made.add_argument("page", type=pathlib.Path)
  args = made.parse_args(argv)
  try:
    page = args.page.read_text(encoding="utf-8")
    args.page.write_text(generate(page, args.results), encoding="utf-8")
  except (OSError, UserError) as error:
    sys.exit(f"error: {error}")
  print(f"written: {args.page}")


if __name__ == "__main__":
  main()
