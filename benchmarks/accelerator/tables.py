"""Writes the queue's table and the tables of its results, never by hand.

  python -m benchmarks.accelerator.tables --from=FOLDER   # what came back
  python -m benchmarks.accelerator.tables                 # the pages again

The first form also copies what a call has brought back (<entry>.json, pictures,
<entry>-runs.tar.gz) into `results/`, from where it is committed. What is between
`<!-- generated: NAME -->` and `<!-- end -->` on the pages is replaced.
"""

import argparse
import pathlib
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.report import layout
from atat_jax.runs import files
from atat_jax.runs.tables import markdown
from benchmarks import setting, step
from benchmarks.accelerator import kernels
from benchmarks.accelerator.entries import ENTRIES

FOLDER = setting.ROOT / "benchmarks" / "accelerator"
RESULTS = FOLDER / "results"
PAGES = (
  FOLDER / "QUEUE.md",
  setting.ROOT / "docs" / "results.md",
  setting.ROOT / "README.md",
)
WAITING = "waiting"
CARRY = "benchmarks/accelerator/carry"

Found = dict[str, Any]


def read(folder: pathlib.Path) -> dict[str, Found]:
  """The results that there are, by entry.

  Raises:
    UserError: A file is of a dry run, or of another entry.
  """
  found = {}
  for key in ENTRIES:
    path = folder / f"{key}.json"
    one = files.read_json(path)
    if one is None:
      continue
    if one["dry"] or one["entry"] != key:
      raise UserError(f"{path}: of a dry run or another entry")
    found[key] = one
  return found


def status(key: str, found: Found | None) -> str:
  """One of the queue's states, in a few words."""
  if found is None:
    return WAITING
  of = [found["steps"].get(step.name, {}) for step in ENTRIES[key].steps]
  number = sum(record.get("status") == "done" for record in of)
  failed = sum(record.get("status") == "failed" for record in of)
  text = "done" if number == len(of) else f"{number} of {len(of)} steps"
  text += f", {failed} failed" if failed else ""
  devices, dates = _places(found)
  return f"{text}; {', '.join(devices)}; {', '.join(dates)}"


def _places(found: Found) -> tuple[list[str], list[str]]:
  """Devices and days of a result."""
  records = found["steps"].values()
  devices = {record["machine"]["device"] for record in records}
  return sorted(devices), sorted({record["date"][:10] for record in records})


def _provenance(key: str, found: Found) -> str:
  devices, dates = _places(found)
  records = found["steps"].values()
  commits = sorted({record["commit"] for record in records})
  versions = sorted({record["machine"]["jax"] for record in records})
  return (
    f"`bash benchmarks/accelerator/run.sh {key}`, commit"
    f" {', '.join(f'`{commit}`' for commit in commits)}, {', '.join(dates)},"
    f" {', '.join(devices)}, jax {', '.join(versions)}. Every step:"
    f" `benchmarks/accelerator/results/{key}.json`."
  )


# --- A table for each kind of result -----------------------------------------


def _steps(found: Found) -> str:
  results = dict(found["results"])
  profile = results.pop("profile", None)
  parts = [step.table([row for one in results.values() for row in one["rows"]])]
  if profile is not None:
    parts.append(kernels.table(profile["rows"]))
  return "\n\n".join(parts)


def _autoattack(found: Found) -> str:
  one = found["results"].get("compare")
  if one is None:
    return _comparison(found)
  lines = [
    [
      "network",
      "images",
      "ours (%)",
      "original (%)",
      "ours (s)",
      "original (s)",
      "original / ours",
    ]
  ]
  for network in one["networks"]:
    ours, reference = network["ours"], network["reference"]
    seconds = [side["seconds_everything"] for side in (ours, reference)]
    lines.append(
      [
        network["network"],
        str(network["num_examples"]),
        *(f"{100 * s['robust_accuracy']:.2f}" for s in (ours, reference)),
        *(f"{s:.0f}" for s in seconds),
        f"{seconds[1] / seconds[0]:.2f}",
      ]
    )
  return markdown(lines)


def _comparison(found: Found) -> str:
  merged = found.get("comparison")
  if merged is None:
    return "No run has been evaluated yet."
  parts = []
  for shown in layout.tables(merged):
    notes = "\n".join(f"- {note}" for note in shown.notes)
    parts += [shown.heading, layout.table_as_markdown(shown), notes]
  return "\n\n".join(parts)


def _fast(found: Found) -> str:
  merged = found.get("comparison", {"runs": [], "rows": []})
  labels = {
    pathlib.PurePath(run["workdir"]).name: run["label"]
    for run in merged["runs"]
  }
  lines = [["recipe", "training (s)", "nominal (%)", "pgd20 (%)"]]
  for name, label in labels.items():
    record = found["steps"].get(f"{name}-train", {})
    accuracies = {
      row["attack"]: row["accuracy"]
      for row in merged["rows"]
      if row["model"] == label and row["batch_norm"] == "running"
    }
    lines.append(
      [
        name,
        f"{record['seconds']:.0f}" if record.get("status") == "done" else "–",
        *(layout.percent(accuracies.get(a)) for a in ("nominal", "pgd20")),
      ]
    )
  return markdown(lines)


_TABLES: dict[str, Callable[[Found], str]] = {
  "a": _steps,
  "b": _autoattack,
  "f": _fast,
}


# --- The parts of the pages --------------------------------------------------


def _carried(key: str) -> str:
  """What a call names in `carry` beside the wheels."""
  data = {"": "", "cifar10": "`cifar10-1`, `cifar10-2`"}
  parts = [data.get(ENTRIES[key].data, f"`{ENTRIES[key].data}-1`")]
  parts += ["`auto-attack`"] if key == "b" else []
  return ", ".join(filter(None, parts)) or "–"


def queue(found: dict[str, Found]) -> str:
  """The queue as a Markdown table."""
  lines = [
    [
      "entry",
      "command",
      "purpose",
      "data",
      "steps",
      "minutes (estimate)",
      "expected",
      "status",
      "result file",
    ]
  ]
  for key, entry in ENTRIES.items():
    lines.append(
      [
        f"{key}. {entry.title}",
        f"`bash benchmarks/accelerator/run.sh {key}`",
        entry.purpose,
        _carried(key),
        str(len(entry.steps)),
        str(entry.minutes),
        entry.expected,
        status(key, found.get(key)),
        f"`results/{key}.json`",
      ]
    )
  return _text_table(lines)


def overview(found: dict[str, Found]) -> str:
  """What is there and what is not, for the README."""
  lines = [["entry", "what", "status"]]
  for key, entry in ENTRIES.items():
    lines.append([key, entry.title, status(key, found.get(key))])
  return _text_table(lines)


def _text_table(lines: Sequence[Sequence[str]]) -> str:
  """Markdown of words, which are too long to be padded; the head first."""
  rule = ["---"] * len(lines[0])
  return "\n".join(
    f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]]
  )


def entry_part(key: str, found: Found | None) -> str:
  """An entry's results, or that there are none."""
  if found is None:
    return f"Status: {WAITING}. Expected: {ENTRIES[key].expected}."
  return "\n\n".join(
    [
      f"Status: {status(key, found)}. Expected: {ENTRIES[key].expected}.",
      _TABLES.get(key, _comparison)(found),
      _provenance(key, found),
    ]
  )


PARTS = ("queue", "accelerator", *(f"accelerator_{key}" for key in ENTRIES))


def generate(page: str, results: pathlib.Path = RESULTS) -> str:
  """A page with its generated parts as the results have them.

  Args:
    page: Markdown with markers; those of other generators stay as they are.
    results: Folder of the result files.

  Returns:
    The page.

  Raises:
    UserError: A result file that is none.
  """
  found = read(results)

  def part(name: str) -> str:
    if name == "queue":
      text = queue(found)
    elif name == "accelerator":
      text = overview(found)
    else:
      key = name.removeprefix("accelerator_")
      text = entry_part(key, found.get(key))
    return f"\n{text}\n"

  return setting.fill(page, PARTS, part)


def take_in(folder: pathlib.Path, results: pathlib.Path = RESULTS) -> list[str]:
  """Copies what a call has brought back to where it is committed.

  Returns:
    The entries.

  Raises:
    UserError: Nothing of the queue in the folder, or of a dry run.
  """
  found = read(folder)
  if not found:
    raise UserError(f"from: no result of the queue in {folder}")
  results.mkdir(parents=True, exist_ok=True)
  for key in found:
    for path in [folder / f"{key}.json", *folder.glob(f"{key}_*.png")]:
      shutil.copy(path, results)
    runs = folder / f"{key}-runs.tar.gz"
    if runs.exists():
      with tarfile.open(runs) as tar:
        tar.extractall(results / key, filter="data")
  return list(found)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("--from", type=pathlib.Path, dest="source")
  args = made.parse_args(argv)
  try:
    if args.source is not None:
      print(f"taken in: {', '.join(take_in(args.source))}")
    for path in PAGES:
      text = generate(path.read_text(encoding="utf-8"))
      files.write_bytes(path, text.encode())
      print(f"written: {path.relative_to(setting.ROOT)}")
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
