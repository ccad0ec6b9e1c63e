"""Writes the measured parts of docs/performance.md from result files.

  python -m benchmarks.tables

The text between `<!-- generated: PART -->` and `<!-- end -->` becomes the table
of that part's result file, with command, commit and machine. Results of
uncommitted code are refused.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.runs import files
from benchmarks import (
  attacks,
  first_call,
  kernels,
  maps,
  precision,
  savings,
  scaling,
  step,
  traffic,
)
from benchmarks.support import comparison, machine

RESULTS = machine.ROOT / "benchmarks" / "results"
PAGE = machine.ROOT / "docs" / "performance.md"

_MARKED = re.compile(
  r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL
)

Found = dict[str, Any]


def _of_rows(
  table: Callable[[Sequence[dict[str, Any]]], str],
) -> Callable[[Found], str]:
  return lambda found: table(found["rows"])


def _autoattack(found: Found) -> str:
  networks = [comparison.Comparison.from_json(n) for n in found["networks"]]
  return "\n\n".join(
    [
      comparison.parity_table(networks),
      comparison.attack_table(networks),
      comparison.speed_table(networks),
    ]
  )


_CPU: dict[str, Callable[[Found], str]] = {
  "step": _of_rows(step.table),
  "compiling": _of_rows(step.table),
  "gradients": _of_rows(step.gradient_table),
  "attacks": _of_rows(attacks.table),
  "scaling": _of_rows(scaling.page),
  "savings": _of_rows(savings.table),
  "maps": _of_rows(maps.table),
  "first_call": _of_rows(first_call.table),
  "traffic": _of_rows(traffic.table),
  "precision": _of_rows(precision.table),
}
PARTS: dict[str, tuple[str, Callable[[Found], str]]] = {
  **{name: (f"cpu/{name}.json", table) for name, table in _CPU.items()},
  "h200_step": ("h200/step_wrn28_10_at.json", _of_rows(step.table)),
  "h200_peer": ("h200/step_wrn28_10_at_peer.json", _of_rows(step.table)),
  "h200_profile": ("h200/profile_wrn28_10_at.json", _of_rows(kernels.table)),
  "h200_autoattack": ("h200/autoattack_wrn16_4_at.json", _autoattack),
}
"""Result file and table of each part."""


def provenance(found: Found) -> str:
  """Describes command, commit, machine and versions in one paragraph."""
  machine = found["machine"]
  return (
    f"`{found['command']}`, commit `{found['commit']}`, {found['date'][:10]},"
    f" {len(machine['cores_used'])} cores, {machine['cpu']}, device"
    f" {machine['device']}, Python {machine['python']}, jax {machine['jax']},"
    f" torch {machine['torch']}."
  )


def read(path: pathlib.Path) -> Found:
  """Reads a result file.

  Raises:
    UserError: No such file, or a result of uncommitted code.
  """
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: {error}; run benchmarks.run first") from error
  if not machine.is_committed(found["commit"]):
    raise UserError(
      f"{path}: commit {found['commit']}; allowed: results of committed code"
    )
  return found


def fill(
  page: str, names: Iterable[str], write_part: Callable[[str], str]
) -> str:
  """Replaces the text between a page's markers.

  Args:
    page: Markdown; `<!-- generated: NAME -->` and `<!-- end -->` are markers.
    names: Known names.
    write_part: Function from a name to its text, without the last line break.

  Returns:
    The new text of the page.

  Raises:
    UserError: A marker with another name.
  """
  known = list(names)

  def part(match: re.Match[str]) -> str:
    if match["name"] not in known:
      raise UserError(
        f"generated: {match['name']!r}; allowed: {', '.join(known)}"
      )
    return f"{match[1]}{write_part(match['name'])}\n{match[3]}"

  return _MARKED.sub(part, page)


def generate(page: str, results: pathlib.Path) -> str:
  """Writes a page's measured parts; a part without a file says so.

  Args:
    page: Markdown with markers.
    results: Folder of the result files.

  Returns:
    The new text of the page.

  Raises:
    UserError: An unknown part, or one whose file is not valid.
  """

  def part(name: str) -> str:
    path, table = PARTS[name]
    if not (results / path).exists():
      return (
        "\nNot measured with committed code yet: `python -m benchmarks.run"
        f" --part {name} --out=FOLDER` measures it.\n"
      )
    found = read(results / path)
    return f"\n{table(found)}\n\n{provenance(found)}\n"

  return fill(page, sorted(PARTS), part)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = machine.parser(__doc__)
  made.add_argument("--results", type=pathlib.Path, default=RESULTS)
  made.add_argument("--page", type=pathlib.Path, default=PAGE)
  args = made.parse_args(argv)
  with machine.plain_errors():
    try:
      page = args.page.read_text(encoding="utf-8")
    except OSError as error:
      raise UserError(f"page: {error}") from error
    files.write_text(args.page, generate(page, args.results))
  print(f"written: {args.page}")


if __name__ == "__main__":
  main()
