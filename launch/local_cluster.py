"""Runs main.py in several processes of this machine, each with own devices.

  python launch/local_cluster.py --num_processes=2 --devices=4 -- \\
    --config=configs/digits.py:at --workdir=runs/digits

What comes after `--` goes to main.py. The platform `cpu` makes as many devices
a process as asked for; `gpu` gives each process so many GPUs of its own. A
process that is killed or preempted ends the others, and all start again from
the last checkpoint, up to `--max_restarts` times. An error that starting again
would not mend, status 1 in all of them, is not tried again.
"""

import argparse
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Devices of one process wait for each other that long before XLA aborts it.
_CPU_FLAGS = (
  "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
  "--xla_cpu_collective_timeout_seconds=1200",
)
_GPU_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)
# After a bad end the others notice by themselves, unless they still wait for it.
_OTHERS_ASKED_SECONDS, _OTHERS_KILLED_SECONDS = 15, 90
_POLL_SECONDS = 0.1


class Worker(NamedTuple):
  """One process to start.

  Attributes:
    environment: Variables beside those of this process.
    command: Program and arguments.
  """

  environment: dict[str, str]
  command: list[str]

  def describe(self) -> str:
    """Returns the command as it can be pasted into a shell."""
    variables = [f"{k}={shlex.quote(v)}" for k, v in self.environment.items()]
    return " ".join([*variables, shlex.join(self.command)])


def workers(
  arguments: Sequence[str],
  *,
  num_processes: int,
  devices: int,
  platform: str,
  port: int,
  environment: Mapping[str, str] = os.environ,
) -> list[Worker]:
  """Makes the processes of a job.

  Args:
    arguments: Arguments of main.py.
    num_processes: Number of processes.
    devices: Number of devices a process.
    platform: "cpu" or "gpu".
    port: Port of the coordinator.
    environment: Variables of this process, whose XLA_FLAGS are kept.
  """
  flags = _CPU_FLAGS if platform == "cpu" else _GPU_FLAGS
  given = environment.get("XLA_FLAGS", "").split()
  shared = {
    "XLA_FLAGS": " ".join([*given, *(f for f in flags if f not in given)]),
    "JAX_COMPILATION_CACHE_DIR": environment.get(
      "JAX_COMPILATION_CACHE_DIR", ""
    )
    or _cache(environment),
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(num_processes),
  }
  found = []
  for number in range(num_processes):
    own = {"JAX_PROCESS_ID": str(number)}
    if platform == "cpu":
      own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    else:
      gpus = range(number * devices, (number + 1) * devices)
      own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    command = [sys.executable, "-u", str(ROOT / "main.py"), "--distributed"]
    found.append(Worker(shared | own, [*command, *arguments]))
  return found


def _cache(environment: Mapping[str, str]) -> str:
  """Returns the folder of compiled programs that main.py takes by itself."""
  home = environment.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
  return str(pathlib.Path(home).expanduser() / "atat_jax" / "compiled")


def free_port() -> int:
  """Finds a port that nobody listens on."""
  with socket.create_server(("", 0)) as server:
    return int(server.getsockname()[1])


class Cluster:
  """Processes of a job, started and watched.

  Args:
    made: The processes.
  """

  def __init__(self, made: Sequence[Worker]):
    self._processes = [self._start(n, one) for n, one in enumerate(made)]
    self.unasked: list[int] = []
    """Statuses of those that ended before the others were ended from here."""

  def _start(self, number: int, worker: Worker) -> subprocess.Popen[str]:
    stream: Any = None if number == 0 else subprocess.PIPE
    process = subprocess.Popen(  # noqa: S603 - this interpreter, main.py
      worker.command,
      env={**os.environ, **worker.environment},
      stdin=subprocess.DEVNULL,
      stdout=stream,
      stderr=subprocess.STDOUT if number else None,
      text=True,
      errors="backslashreplace",
      # Ctrl-C comes to them by way of this process, once.
      start_new_session=True,
    )
    _say(f"process {number} is {process.pid}")
    if number:
      threading.Thread(
        target=_copy, args=(number, process), name=f"output {number}"
      ).start()
    return process

  def signal(self, signum: int) -> None:
    """Sends a signal to all processes that live."""
    for process in self._processes:
      if process.poll() is None:
        process.send_signal(signum)

  def wait(self) -> list[int]:
    """Waits for the end of all; those that outlive a bad end are ended.

    Returns:
      Their statuses, a negative signal for one that was killed.
    """
    bad: float | None = None
    due = [
      (_OTHERS_ASKED_SECONDS, signal.SIGTERM),
      (_OTHERS_KILLED_SECONDS, signal.SIGKILL),
    ]
    while None in (statuses := [p.poll() for p in self._processes]):
      ended = [status for status in statuses if status is not None]
      now = time.monotonic()
      if bad is None and any(ended):
        bad = now
      if bad is not None and due and now > bad + due[0][0]:
        _, signum = due.pop(0)
        self.unasked = self.unasked or ended
        _say(f"{signum.name} to what has not ended {now - bad:.0f} s later")
        self.signal(signum)
      time.sleep(_POLL_SECONDS)
    final = [process.returncode for process in self._processes]
    self.unasked = self.unasked or final
    return final


def _copy(number: int, process: subprocess.Popen[str]) -> None:
  """Writes what a process says, with its number before each line."""
  assert process.stdout is not None  # noqa: S101 - narrows the type
  with process.stdout as lines:
    for line in lines:
      sys.stderr.write(f"[{number}] {line}")
      sys.stderr.flush()


def _say(line: str) -> None:
  sys.stderr.write(f"local_cluster: {line}\n")
  sys.stderr.flush()


def _starts_again(statuses: Sequence[int]) -> bool:
  """Whether a signal ended a process, so that the same command goes on."""
  return any(status < 0 or status >= 128 for status in statuses)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
  """Runs the job to its end.

  Args:
    options: Options of the command.
    arguments: Arguments of main.py.

  Returns:
    Exit status: 0, or that of the first process that failed.
  """
  asked: list[int] = []
  current: list[Cluster] = []

  def stop(signum: int, frame: FrameType | None) -> None:
    del frame
    asked.append(signum)
    for cluster in current:
      cluster.signal(signum)

  before = {
    signum: signal.signal(signum, stop)
    for signum in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    return _run(options, arguments, asked, current)
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)


def _run(
  options: argparse.Namespace,
  arguments: Sequence[str],
  asked: list[int],
  current: list[Cluster],
) -> int:
  """Starts the processes until they have finished.

  Args:
    options: Options of the command.
    arguments: Arguments of main.py.
    asked: Signals that this process got; filled elsewhere.
    current: The processes that signals go to; filled here.
  """
  statuses: list[int] = []
  for restart in range(options.max_restarts + 1):
    made = _workers(options, arguments)
    current[:] = [Cluster(made)]
    if asked:  # while they were started
      current[0].signal(asked[0])
    statuses = current[0].wait()
    _say(f"statuses {', '.join(map(str, statuses))}")
    again = _starts_again(current[0].unasked) and not asked
    if not again or restart == options.max_restarts:
      break
    _say(f"restart {restart + 1} of {options.max_restarts}")
  failed = [status for status in statuses if status]
  return 0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0]


def _workers(
  options: argparse.Namespace, arguments: Sequence[str]
) -> list[Worker]:
  """Makes the processes that the options ask for."""
  return workers(
    arguments,
    num_processes=options.num_processes,
    devices=options.devices,
    platform=options.platform,
    port=options.port or free_port(),
  )


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    description=str(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--num_processes", type=int, default=2)
  parser.add_argument(
    "--devices", type=int, default=1, help="devices a process"
  )
  parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--max_restarts", type=int, default=0)
  parser.add_argument(
    "--port", type=int, default=0, help="of the coordinator; 0: a free one"
  )
  parser.add_argument(
    "--dry_run", action="store_true", help="print each worker's command"
  )
  own, rest = list(argv), []
  if "--" in own:
    at = own.index("--")
    own, rest = own[:at], own[at + 1 :]
  options = parser.parse_args(own)
  for name, low, high in (
    ("num_processes", 1, 1024),
    ("devices", 1, 1024),
    ("max_restarts", 0, 1_000_000),
    ("port", 0, 65_535),
  ):
    value = getattr(options, name)
    if not low <= value <= high:
      parser.error(f"{name}: {value}; allowed: {low} to {high}")
  if not rest:
    parser.error("arguments of main.py are missing; they come after --")
  return options, rest


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns its exit status."""
  options, arguments = _parse(argv)
  if options.dry_run:
    made = _workers(options, arguments)
    sys.stdout.writelines(f"{worker.describe()}\n" for worker in made)
    return 0
  return run(options, arguments)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
