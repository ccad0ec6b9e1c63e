"""Goes through a list of commands within a time budget, and resumes.

  python -m benchmarks.run --out=runs/cpu --reference=../auto-attack
  python -m benchmarks.run plan.txt --out=runs/all --budget=3300
  python -m benchmarks.run "at | 600 | python main.py ..." --out=runs/at

A plan is a text file of lines `NAME | SECONDS | COMMAND`; `#` starts a comment
line. Without a plan the published CPU benchmarks run (plans/cpu.txt). Commands
run one after the other in a shell, in the current folder, with this Python as
`python`, the folder of the results as $OUT and --reference as $REFERENCE. Each
is stopped after its seconds, or when the budget ends: SIGTERM, and SIGKILL
--grace seconds later.

The same command resumes: a command that has finished is skipped, one that was
stopped or failed runs again. Under SLURM give the job's time limit, less a
minute, as the budget; SIGTERM stops the runner like the end of the budget.
OUT/run.json holds status, seconds and exit code of each command, OUT/logs their
output. Exit status: 0 when everything is done, 1 when a command failed, 75 when
some remain, 128 + signal when it was stopped.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.runs import files, provenance, tables
from benchmarks.support import machine
from benchmarks.support.machine import number, say

PLANS = pathlib.Path(__file__).resolve().parent / "plans"
REMAINING = 75
"""Exit status when commands remain (EX_TEMPFAIL: try again later)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_POLL = 0.05
"""Seconds between two looks at a running command."""


@dataclasses.dataclass(frozen=True)
class Command:
  """Line of a plan.

  Attributes:
    name: Name of its log and of its entry in the summary.
    seconds: Time limit of one attempt.
    text: Shell command.
  """

  name: str
  seconds: float
  text: str


def parse(text: str, source: str) -> list[Command]:
  """Parses a plan.

  Args:
    text: Lines `NAME | SECONDS | COMMAND`, comments and empty lines.
    source: Name of the plan in messages.

  Returns:
    Its commands.

  Raises:
    UserError: A line of another form.
  """
  found = []
  for line_number, line in enumerate(text.splitlines(), start=1):
    if not line.strip() or line.lstrip().startswith("#"):
      continue
    name, seconds, command = (
      [part.strip() for part in line.split("|", 2)] + ["", ""]
    )[:3]
    try:
      limit = number(seconds)
    except argparse.ArgumentTypeError:
      limit = 0.0
    if not re.fullmatch(r"\w[\w.-]*", name) or not limit or not command:
      raise UserError(
        f"{source}, line {line_number}: {line.strip()!r}; allowed: NAME |"
        " SECONDS | COMMAND"
      )
    found.append(Command(name, limit, command))
  return found


def read_plans(plans: Sequence[str]) -> list[Command]:
  """Reads plan files and single lines.

  Raises:
    UserError: A missing file, a line of another form, or a name twice.
  """
  found: list[Command] = []
  for plan in plans:
    if "|" in plan:
      found += parse(plan, "command")
      continue
    try:
      text = pathlib.Path(plan).read_text(encoding="utf-8")
    except OSError as error:
      raise UserError(f"plan: {error}") from error
    found += parse(text, plan)
  names = [command.name for command in found]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"plan: {name!r} twice; allowed: different names")
  return found


class Runner:
  """Commands of a plan, with what is known of them from earlier calls.

  Args:
    commands: The plan.
    out: Folder of the summary, the logs and, as $OUT, the results.
    grace: Seconds between SIGTERM and SIGKILL.
    environment: Variables for the commands, besides this process's.

  Attributes:
    signum: Signal that told the runner to stop; 0: none.
  """

  def __init__(
    self,
    commands: Sequence[Command],
    out: pathlib.Path,
    *,
    grace: float = 30.0,
    environment: dict[str, str] | None = None,
  ):
    self._commands, self._out, self._grace = commands, out.resolve(), grace
    self.signum = 0
    self._logs = self._out / "logs"
    self._logs.mkdir(parents=True, exist_ok=True)
    self._summary = self._out / "run.json"
    found = files.read_json(self._summary)
    self._records: dict[str, dict[str, Any]] = (
      {} if found is None else found.get("commands", {})
    )
    here = os.path.dirname(sys.executable)
    self._environment = {
      **os.environ,
      "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
      "OUT": str(self._out),
      **(environment or {}),
    }

  def _record_of(self, command: Command) -> dict[str, Any]:
    """Returns the record of exactly this command; empty: there is none."""
    record = self._records.get(command.name, {})
    return record if record.get("command") == command.text else {}

  def is_done(self, command: Command) -> bool:
    """Whether exactly this command has finished before."""
    return self._record_of(command).get("status") == "done"

  def stop(self, signum: int, frame: Any = None) -> None:
    """Stops the running command and starts no other; a signal handler."""
    del frame
    self.signum = signum

  def run(self, budget: float) -> None:
    """Runs the commands that are not done, as far as the budget allows.

    Args:
      budget: Seconds, including the last command's grace; inf: no limit.
    """
    end = time.monotonic() + budget
    for command in self._commands:
      if self.is_done(command):
        say(f"{command.name}: done before")
        continue
      left = end - time.monotonic() - self._grace
      if left <= 0 or self.signum:
        say(f"{command.name}: not started")
        continue
      self._attempt(command, min(command.seconds, left))

  def _attempt(self, command: Command, seconds: float) -> None:
    """Runs a command once and records the outcome."""
    record: dict[str, Any] = {
      "status": "running",
      "command": command.text,
      "seconds": None,
      "exit_code": None,
      "attempts": self._record_of(command).get("attempts", 0) + 1,
      "commit": provenance.commit() or "unknown",
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    self._write(command, record)
    say(f"{command.name}: {command.text}")
    began = time.monotonic()
    status, code = self._call(command, seconds)
    took = round(time.monotonic() - began, 2)
    record |= {"status": status, "seconds": took, "exit_code": code}
    self._write(command, record)
    say(f"{command.name}: {status} after {took:.0f} s")
    if status == "failed":
      print(self._last_lines(command), flush=True)

  def _write(self, command: Command, record: dict[str, Any]) -> None:
    self._records[command.name] = record
    files.write_json(self._summary, {"format": 1, "commands": self._records})

  def _log(self, command: Command) -> pathlib.Path:
    return self._logs / f"{command.name}.log"

  def _call(self, command: Command, seconds: float) -> tuple[str, int]:
    """Runs a command in a process group; returns status and exit code."""
    end = time.monotonic() + seconds
    with self._log(command).open("ab") as log:
      log.write(f"$ {command.text}\n".encode())
      log.flush()
      process = subprocess.Popen(  # noqa: S602 - lines of a file of this project
        command.text,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=self._environment,
        start_new_session=True,
      )
    while process.poll() is None:
      if self.signum or time.monotonic() > end:
        return "stopped", _stop(process, self._grace)
      time.sleep(_POLL)
    code = _stop(process, self._grace)  # processes that it has left behind
    return ("failed" if code else "done"), code

  def _last_lines(self, command: Command) -> str:
    text = self._log(command).read_text(encoding="utf-8", errors="replace")
    return "\n".join(f"  {line[-300:]}" for line in text.splitlines()[-5:])

  def table(self) -> str:
    """Tabulates status, seconds and exit code of all commands in Markdown."""
    rows = [["command", "status", "seconds", "exit code"]]
    for command in self._commands:
      record = self._record_of(command)
      seconds, code = record.get("seconds"), record.get("exit_code")
      rows.append(
        [
          command.name,
          record.get("status", "not started"),
          "-" if seconds is None else f"{seconds:.1f}",
          "-" if code is None else str(code),
        ]
      )
    return tables.markdown(rows)

  def exit_status(self) -> int:
    """Returns 0: all done, 1: one has failed, 75: some remain."""
    if self.signum:
      return 128 + self.signum
    records = [self._record_of(command) for command in self._commands]
    statuses = [record.get("status") for record in records]
    if "failed" in statuses:
      return 1
    return 0 if all(status == "done" for status in statuses) else REMAINING


def _stop(process: subprocess.Popen[bytes], grace: float) -> int:
  """Ends a process group: SIGTERM, then SIGKILL after `grace` seconds.

  Args:
    process: Leader of the group.
    grace: Seconds for saving.

  Returns:
    Exit code of the leader.
  """
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + grace
    while time.monotonic() < end:
      process.poll()  # reaps the leader, which may end before its children
      os.killpg(process.pid, 0)  # raises when the whole group has ended
      time.sleep(_POLL)
    os.killpg(process.pid, signal.SIGKILL)
  return process.wait()


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.parser(__doc__)
  add = made.add_argument
  add(
    "plan",
    nargs="*",
    help="plan file, or a line NAME | SECONDS | COMMAND; default: the CPU"
    " benchmarks",
  )
  add("--out", type=pathlib.Path, required=True, help="folder of the results")
  add(
    "--budget",
    type=number,
    default=float("inf"),
    metavar="SECONDS",
    help="time for everything; default: no limit",
  )
  add(
    "--grace",
    type=number,
    default=30.0,
    metavar="SECONDS",
    help="time that a command has to save after SIGTERM",
  )
  add("--part", nargs="+", metavar="NAME", help="only these commands")
  add("--reference", default="", help="clone of fra31/auto-attack")
  add("--smoke", action="store_true", help="small runs, times mean nothing")
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  args = parser().parse_args(argv)
  default = PLANS / ("smoke.txt" if args.smoke else "cpu.txt")
  with machine.plain_errors():
    commands = read_plans(args.plan or [str(default)])
    for name in args.part or ():
      if name not in [command.name for command in commands]:
        allowed = ", ".join(command.name for command in commands)
        raise UserError(f"part: {name!r}; allowed: {allowed}")
    runner = Runner(
      [c for c in commands if not args.part or c.name in args.part],
      args.out,
      grace=args.grace,
      environment={"REFERENCE": args.reference},
    )
    previous = {s: signal.signal(s, runner.stop) for s in SIGNALS}
    try:
      runner.run(args.budget)
    finally:
      for signum, handler in previous.items():
        signal.signal(signum, handler)
    print(f"\n{runner.table()}\n\nresults: {args.out}")
    if runner.exit_status():
      sys.exit(runner.exit_status())


if __name__ == "__main__":
  main()
