"""Jobs of several processes, started by `launch/local_cluster.py`."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import quick

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launch" / "local_cluster.py"


class Job:
  """A launcher at work, in a session of its own.

  Args:
    arguments: Arguments of main.py.
    log: File for everything that it and its processes say.
    options: Options of the launcher.
  """

  def __init__(
    self, arguments: list[str], log: pathlib.Path, *options: str
  ) -> None:
    self.log = log
    self._file = log.open("w")
    self.process = subprocess.Popen(
      [sys.executable, str(LAUNCHER), *options, "--", *arguments],
      cwd=ROOT,
      env={**os.environ, "XLA_FLAGS": quick.flags()},
      stdout=self._file,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )

  @property
  def text(self) -> str:
    """Everything that was said so far."""
    return self.log.read_text(errors="replace")

  def pids(self) -> dict[int, int]:
    """Number of each process of the last start to its process id."""
    found = re.findall(r"local_cluster: process (\d+) is (\d+)", self.text)
    return {int(number): int(pid) for number, pid in found}

  def statuses(self) -> list[list[int]]:
    """Exit statuses of the processes, for each start that has ended."""
    return [
      [int(status) for status in line.split(", ")]
      for line in re.findall(r"local_cluster: statuses (.+)", self.text)
    ]

  def wait(self, seconds: float = 1800) -> int:
    """Waits for the end; returns the exit status."""
    try:
      return self.process.wait(seconds)
    finally:
      self.close()

  def close(self) -> None:
    """Ends what is left of it."""
    if self.process.poll() is None:
      for pid in self.pids().values():
        try:
          os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
          pass
      self.process.kill()
      self.process.wait()
    self._file.close()

  def until(self, condition: Any, seconds: float = 300) -> None:
    """Waits until a condition holds, while the job is at work."""
    deadline = time.monotonic() + seconds
    while not condition():
      assert self.process.poll() is None, self.text
      assert time.monotonic() < deadline, self.text
      time.sleep(0.02)


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of `metrics.jsonl` without the speed."""
  path = workdir / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  for line in lines:
    line.pop("images_per_second", None)
    line.pop("input_wait", None)
  return lines
