"""Runs the steps of an entry until they are done or its time is over.

  python -m benchmarks.accelerator.drive c --out=DIR --seconds=560

`run.sh` calls it, with data and packages in place. A step that runs when the
time ends gets SIGTERM, saves and goes on at the next call. Steps that a file in
`results/` says are done are not done again. Into --out go <entry>.json, the
log, the pictures and the small files of all runs.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from typing import Any

from atat_jax import report
from atat_jax.errors import UserError
from atat_jax.runs import files
from atat_jax.runs.files import write_json
from atat_jax.training.interrupts import Interrupted, raise_interrupted
from benchmarks.accelerator.entries import ENTRIES, Step
from benchmarks.setting import ROOT, say

RESULTS = ROOT / "benchmarks" / "accelerator" / "results"
LEAST = 60  # seconds in which a step is worth its start
GRACE = 30  # seconds for saving
# Of every run: what says what came of it, and what of it is finished.
KEPT = ("results.json", "finished.json", "config.json", "metrics.jsonl")
LOG_BYTES = 2**20
LIMITS = {"files": 8, "bytes": 16 * 2**20}  # of what comes back

_MACHINE = (
  "import json; from benchmarks import setting;"
  " print(json.dumps(setting.describe([])))"
)


def machine() -> dict[str, Any]:
  """Commit, date and machine, asked in a process that leaves the memory free.

  Raises:
    UserError: JAX does not start.
  """
  asked = subprocess.run(
    [sys.executable, "-c", _MACHINE],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  if asked.returncode:
    raise UserError(f"jax: {asked.stderr.strip().splitlines()[-1]}")
  found = json.loads(asked.stdout.splitlines()[-1])
  return {key: found[key] for key in ("commit", "date", "machine")}


class Driver:
  """The steps of one entry in one folder.

  Args:
    key: Of the entry.
    scratch: Holds a folder for each entry, and stays between calls.
    out: What comes back.
    dry: Whether it is a dry run.
    places: What the placeholders of arguments stand for.
    data_sha256: Of the data.
  """

  def __init__(
    self,
    key: str,
    *,
    scratch: pathlib.Path,
    out: pathlib.Path,
    dry: bool,
    places: dict[str, str],
    data_sha256: str | None,
  ):
    self._key, self._dry, self._out = key, dry, out
    self._entry = ENTRIES[key]
    self._run = scratch / key
    self._places = {**places, "run": os.path.relpath(self._run, ROOT)}
    self._log = self._run / "log.txt"
    self._state = self._run / "state.json"
    self._run.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    self.steps = [s for s in self._entry.steps if not dry or s.dry is not None]
    if not dry:
      self._restore()
    found = files.read_json(self._state)
    self._records: dict[str, Any] = {} if found is None else found["steps"]
    self._results: dict[str, Any] = {} if found is None else found["results"]
    self._data_sha256 = data_sha256

  def _restore(self) -> None:
    """What earlier windows have left in the repository."""
    committed = RESULTS / f"{self._key}.json"
    if committed.exists() and not self._state.exists():
      shutil.copy(committed, self._state)
    folder = RESULTS / self._key
    for path in folder.rglob("*") if folder.is_dir() else ():
      target = self._run / path.relative_to(folder)
      if path.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)

  def _fill(self, text: str) -> str:
    for name, value in self._places.items():
      text = text.replace(f"{{{name}}}", value)
    return text

  def _path(self, text: str) -> pathlib.Path:
    return ROOT / self._fill(text)

  def is_done(self, step: Step) -> bool:
    """Whether nothing is left to do for a step."""
    if self._records.get(step.name, {}).get("status") != "done":
      return False
    later = self.steps[self.steps.index(step) + 1 :]
    needed = step.leaves and not all(map(self.is_done, later))
    return not needed or self._path(step.leaves).exists()

  def run(self, seconds: float) -> bool:
    """Runs what is not done.

    Args:
      seconds: Until the last step is told to stop.

    Returns:
      Whether all steps are done.
    """
    deadline = time.monotonic() + seconds
    about = machine()
    if about["machine"]["backend"] == "cpu" and not self._dry:
      raise UserError("accelerator: none found; --smoke makes a dry run")
    say(f"{self._key}: {about['machine']['device']}, commit {about['commit']}")
    try:
      for step in self.steps:
        if self.is_done(step):
          say(f"{step.name}: done before")
          continue
        left = deadline - time.monotonic()
        if left < (0 if self._dry else LEAST):
          say(f"{step.name}: waits for the next call")
          break
        self._do(step, left, about)
    except Interrupted:
      say("stopped")
    finally:
      self._collect()
    return all(map(self.is_done, self.steps))

  def _do(self, step: Step, seconds: float, about: dict[str, Any]) -> None:
    record = self._records.get(step.name, {})
    if record.get("status") == "done":  # what it left is gone: made again
      marker = self._path(step.leaves).parent / "finished.json"
      marker.unlink(missing_ok=True)
      record = {}
    spent = (
      record.get("seconds", 0.0) if record.get("status") != "failed" else 0
    )
    failures: list[dict[str, Any]] = []
    for way in [step, *([step.instead] if step.instead else [])]:
      command = self._command(way)
      say(f"{step.name}: {command}")
      began = time.monotonic()
      status = self._call(shlex.split(command)[1:], seconds)
      took = time.monotonic() - began
      spent, seconds = spent + took, seconds - took
      say(f"{step.name}: {status} after {spent:.0f} s")
      if status != "failed":
        break
      failures.append({"command": command, "last_lines": self._last_lines()})
      say("\n  ".join(failures[-1]["last_lines"]))
    record = {
      "status": status,
      "seconds": round(spent, 1),
      "command": command,
      "failures": failures,
      **about,
    }
    result = files.read_json(self._path(step.result)) if step.result else None
    if result is not None:
      self._results[step.name] = result
    self._records[step.name] = record
    self._write(self._state)

  def _command(self, step: Step) -> str:
    """As a shell would be given it."""
    dry = (step.dry or ()) if self._dry else ()
    return shlex.join(
      ["python", *(self._fill(part) for part in (*step.arguments, *dry))]
    )

  def _call(self, command: Sequence[str], seconds: float) -> str:
    """Runs a command: "done", "failed" or "stopped"."""
    with self._log.open("ab") as log:
      self._log_start = log.tell()
      process = subprocess.Popen(
        [sys.executable, *command],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": _python_path()},
        start_new_session=True,
      )
      try:
        code = process.wait(seconds)
        return "failed" if code else "done"
      except (subprocess.TimeoutExpired, Interrupted) as error:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(GRACE)
        if isinstance(error, Interrupted):
          raise
        return "stopped"
      finally:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()

  def _last_lines(self) -> list[str]:
    own = self._log.read_bytes()[self._log_start :]
    text = own.decode("utf-8", errors="replace")
    return [line[-300:] for line in text.splitlines()[-5:]]

  def _write(self, path: pathlib.Path, **more: Any) -> None:
    done = all(map(self.is_done, self.steps))
    write_json(
      path,
      {
        "format": 1,
        "entry": self._key,
        "dry": self._dry,
        "status": "done" if done else "partly",
        "data": {"name": self._entry.data, "sha256": self._data_sha256},
        "steps": self._records,
        "results": self._results,
        **more,
      },
    )

  def _collect(self) -> None:
    """Everything that comes back."""
    runs = sorted(path.parent for path in self._run.rglob("results.json"))
    more = {}
    if runs:
      out = self._run / "comparison"
      try:
        paths = report.write_comparison([os.path.relpath(r) for r in runs], out)
        more["comparison"] = files.read_json(paths[-1])
      except UserError as error:  # the numbers of each run come back anyway
        say(f"no comparison: {error}")
      for picture in self._run.glob("comparison_*.png"):
        shutil.copy(picture, self._out / f"{self._key}_{picture.name}")
      with tarfile.open(self._out / f"{self._key}-runs.tar.gz", "w:gz") as tar:
        for path in (run / name for run in runs for name in KEPT):
          if path.exists():
            tar.add(path, path.relative_to(self._run))
    self._write(self._out / f"{self._key}.json", **more)
    if self._log.exists():
      text = self._log.read_bytes()[-LOG_BYTES:]
      (self._out / f"{self._key}.log").write_bytes(text)
    sizes = [path.stat().st_size for path in self._out.iterdir()]
    say(f"out: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")
    if len(sizes) > LIMITS["files"] or max(sizes) > LIMITS["bytes"]:
      say("WARNING: too much to come back")


def _python_path() -> str:
  """The repository first, as for whoever calls from its root."""
  given = os.environ.get("PYTHONPATH")
  return os.pathsep.join([str(ROOT), *([given] if given else [])])


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; ends with 75 where steps are left."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = made.add_argument
  add("entry", choices=ENTRIES)
  add("--scratch", type=pathlib.Path, default=ROOT / "runs" / "accelerator")
  add("--out", type=pathlib.Path, required=True)
  add("--seconds", type=float, default=520.0)
  add("--data", default="", help="decoded copy")
  add("--data_sha256")
  add("--reference", default="", help="the original AutoAttack")
  add("--dry", action="store_true")
  args = made.parse_args(argv)
  signal.signal(signal.SIGTERM, raise_interrupted)
  try:
    driver = Driver(
      args.entry,
      scratch=args.scratch.resolve(),
      out=args.out.resolve(),
      dry=args.dry,
      places={"data": args.data, "reference": args.reference},
      data_sha256=args.data_sha256,
    )
    if not driver.run(args.seconds):
      sys.exit(75)
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
