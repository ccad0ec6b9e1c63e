"""Place of this process in a job of several: who it is and where they meet.

Flags come first, then the variables `JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; whatever neither gives is asked of the
cluster (SLURM, Open MPI, a TPU pod), by whoever calls.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping

from atat_jax.errors import UserError, shown

VARIABLES = {
  "coordinator_address": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
"""Flag to the environment variable that stands for it."""

MOST_PROCESSES = 100_000
"""Largest number of processes of a job."""

MOST_SECONDS = 86_400
"""Longest wait for the other processes."""

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")

Found = tuple[str | None, int | None, int | None]
"""Address, number of processes and process as a cluster knows them, or None."""


@dataclasses.dataclass(frozen=True)
class Member:
  """Place of a process in a job.

  Attributes:
    address: Host and port of process 0, "host:port".
    num_processes: Number of processes.
    process_id: Number of this one, from 0.
  """

  address: str
  num_processes: int
  process_id: int

  @property
  def host(self) -> str:
    """Host of process 0, without the brackets of an IPv6 address."""
    return self.address.rpartition(":")[0].strip("[]")

  @property
  def port(self) -> int:
    """Port on which process 0 listens."""
    return int(self.address.rpartition(":")[2])


def check_seconds(seconds: object) -> None:
  """Checks how long a process waits for the others.

  Raises:
    UserError: Not a number of seconds from 1 to a day.
  """
  if not isinstance(seconds, int) or not 1 <= seconds <= MOST_SECONDS:
    raise UserError(
      f"wait_seconds: {shown(seconds)}; allowed: 1 to {MOST_SECONDS}"
    )


def find(
  flags: Mapping[str, object],
  ask: Callable[[], Found] = lambda: (None, None, None),
  environment: Mapping[str, str] = os.environ,
) -> Member:
  """Finds the place of this process.

  Args:
    flags: Name to value of the flags in `VARIABLES`, None where one is not given.
    ask: Function that asks the cluster; called only if something is missing.
    environment: Environment variables.

  Raises:
    UserError: A value that is not allowed, or missing; the message names it as
      the user gave it.
  """
  given, names = {}, {}
  for flag, variable in VARIABLES.items():
    given[flag], names[flag] = flags.get(flag), flag
    # As an unset variable of a shell reads: JAX_PROCESS_ID=$RANK.
    if given[flag] is None and environment.get(variable, "").strip():
      given[flag], names[flag] = environment[variable].strip(), variable
  if None in given.values():
    asked = dict(zip(VARIABLES, ask(), strict=True))
    given = {k: asked[k] if v is None else v for k, v in given.items()}
  _refuse_missing(given)
  number = _integer(
    names["num_processes"], given["num_processes"], 1, MOST_PROCESSES
  )
  return Member(
    _address(names["coordinator_address"], given["coordinator_address"]),
    number,
    _integer(names["process_id"], given["process_id"], 0, number - 1),
  )


def _refuse_missing(given: Mapping[str, object]) -> None:
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(VARIABLES):
    raise UserError(
      "distributed: no job found; allowed: under SLURM, Open MPI or on a TPU"
      f" pod, or with {', '.join(VARIABLES.values())} or the flags"
      f" {', '.join(f'--{name}' for name in VARIABLES)}"
    )
  if missing:
    raise UserError(
      f"{missing[0]}: missing; allowed: the flag --{missing[0]} or the variable"
      f" {VARIABLES[missing[0]]}, beside the other two"
    )


def _integer(name: str, value: object, low: int, high: int) -> int:
  text = str(value)
  known = re.fullmatch(r"[0-9]{1,9}", text) and not isinstance(value, bool)
  if not known or not low <= int(text) <= high:
    raise UserError(
      f"{name}: {shown(value)}; allowed: {low}"
      + (f" to {high}" if high > low else ", as there is one process")
    )
  return int(text)


def _address(name: str, value: object) -> str:
  found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
  if not found or not 1 <= int(found[2]) <= 65_535:
    raise UserError(
      f"{name}: {shown(value)}; allowed: host:port of process 0, such as"
      " 10.0.0.1:8476, with a port from 1 to 65535"
    )
  return found[0]
