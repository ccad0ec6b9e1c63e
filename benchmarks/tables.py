"""Writes the measured parts of some pages of docs/ from result files.

  python -m benchmarks.tables

Every part knows its page. The text between `<!-- generated: PART -->` and
`<!-- end -->` becomes the table of that part's result file, with command, commit
and machine. Results of uncommitted code are refused.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from atat_jax.errors import UserError
from atat_jax.runs import files, wording
from benchmarks import (
  attacks,
  certified,
  first_call,
  kernels,
  maps,
  precision,
  recipes,
  savings,
  scaling,
  step,
  traffic,
  versions,
)
from benchmarks.support import comparison, machine

RESULTS = machine.ROOT / "benchmarks" / "results"
DOCS = machine.ROOT / "docs"

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


class Part(NamedTuple):
  """Measured part of a page.

  Attributes:
    page: Name of the page in docs/.
    file: Its results, in the folder of result files.
    table: Function from a result file's content to Markdown.
    is_told: Whether command, commit and machine stand below; not where another
      part shows the same file.
  """

  page: str
  file: str
  table: Callable[[Found], str]
  is_told: bool = True


def _on_cpu(
  page: str, **made: Callable[[Sequence[dict[str, Any]]], str]
) -> dict[str, Part]:
  return {
    name: Part(page, f"cpu/{name}.json", _of_rows(table))
    for name, table in made.items()
  }


PARTS: dict[str, Part] = {
  **_on_cpu(
    "performance.md",
    step=step.table,
    compiling=step.table,
    gradients=step.gradient_table,
    attacks=attacks.table,
    scaling=scaling.page,
    savings=savings.table,
    maps=maps.table,
    first_call=first_call.table,
    traffic=traffic.table,
    precision=precision.table,
    precision_digits=precision.table,
  ),
  **{
    f"h200_{name}": Part("performance.md", f"h200/{file}.json", table)
    for name, file, table in (
      ("step", "step_wrn28_10_at", _of_rows(step.table)),
      ("peer", "step_wrn28_10_at_peer", _of_rows(step.table)),
      ("profile", "profile_wrn28_10_at", _of_rows(kernels.table)),
      ("autoattack", "autoattack_wrn16_4_at", _autoattack),
    )
  },
  **_on_cpu("autoattack.md", versions=versions.table),
  **_on_cpu("evaluating.md", certified=certified.table),
  **_on_cpu("training.md", recipes=recipes.table),
  "recipes_averages": Part(
    "training.md",
    "cpu/recipes.json",
    _of_rows(recipes.averages_table),
    is_told=False,
  ),
}
"""Name in a marker to the part."""


def provenance(found: Found) -> str:
  """Describes command, commit, machine and versions in one paragraph."""
  machine = found["machine"]
  missing = found.get("missing", ())
  stopped = f" Stopped before {', '.join(missing)}." if missing else ""
  return (
    f"`{found['command']}`, commit `{found['commit']}`, {found['date'][:10]},"
    f" {wording.plural(len(machine['cores_used']), 'core')}, {machine['cpu']},"
    " device"
    f" {machine['device']}, Python {machine['python']}, jax {machine['jax']},"
    f" torch {machine['torch']}.{stopped}"
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


def generate(text: str, page: str, results: pathlib.Path) -> str:
  """Writes a page's measured parts; a part without a file says so.

  Args:
    text: Markdown with markers.
    page: Name of the page in docs/.
    results: Folder of the result files.

  Returns:
    The new text of the page.

  Raises:
    UserError: A part that is unknown or of another page, or one whose file is
      not valid.
  """

  def part(name: str) -> str:
    _, file, table, is_told = PARTS[name]
    path = results / file
    if not path.exists():
      return "\nNot measured with committed code yet.\n"
    found = read(path)
    told = f"\n{provenance(found)}\n" if is_told else ""
    return f"\n{table(found)}\n{told}"

  return fill(text, parts(page), part)


def parts(page: str) -> list[str]:
  """Returns the names of a page's parts."""
  return sorted(name for name, part in PARTS.items() if part.page == page)


PAGES = tuple(dict.fromkeys(part.page for part in PARTS.values()))
"""Names of the pages, in docs/, that have measured parts."""


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = machine.parser(__doc__)
  made.add_argument("--results", type=pathlib.Path, default=RESULTS)
  made.add_argument("--docs", type=pathlib.Path, default=DOCS)
  args = made.parse_args(argv)
  with machine.plain_errors():
    for page in PAGES:
      path = args.docs / page
      try:
        text = path.read_text(encoding="utf-8")
      except OSError as error:
        raise UserError(f"docs: {error}") from error
      files.write_text(path, generate(text, page, args.results))
      print(f"written: {path}")


if __name__ == "__main__":
  main()
