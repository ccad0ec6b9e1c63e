"""Roll call of the processes of a job, and word of those that have gone.

JAX joins processes by its coordination service, which aborts a process from C++
where another does not come or goes: no name, no handler, and a callback in
Python cannot be given (its argument has no conversion in jaxlib 0.10). So the
processes meet here first, on the coordinator's own port, before JAX listens
there. Whoever is missing can be named, and whoever was started with other
arguments refused, rather than hang in the first collective.

The connections stay. The kernel closes that of a killed process at once, and
keepalive finds a host that is gone within `LOST_SECONDS`; process 0 tells the
others. Word of a request to stop goes the same way. JAX's heartbeats remain
behind this, for a process that is alive and does nothing.

Messages are JSON, one a line.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from atat_jax.errors import UserError
from atat_jax.process.job import Member

LOST_SECONDS = 30
"""Longest time in which a host that is gone is noticed."""

_MARK = "atat_jax 1"
_LONGEST = 1 << 20
_RETRY_SECONDS = 0.2
_FREE_SECONDS = _LATER_SECONDS = 5.0

Message = dict[str, Any]


class _Line:
  """Connection to another process.

  Args:
    connection: The socket.
  """

  def __init__(self, connection: socket.socket):
    self._socket, self._rest = connection, b""
    self.hello: Message = {}
    self.left = False
    connection.settimeout(5.0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
      ("TCP_KEEPIDLE", LOST_SECONDS // 3),
      ("TCP_KEEPINTVL", LOST_SECONDS // 6),
      ("TCP_KEEPCNT", 4),
      ("TCP_USER_TIMEOUT", 1000 * LOST_SECONDS),
    ):
      if hasattr(socket, name):  # not on every system
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def fileno(self) -> int:
    """Descriptor, for selectors."""
    return self._socket.fileno()

  @property
  def number(self) -> int:
    """Number of the process at the other end."""
    return int(self.hello["process"])

  def who(self) -> str:
    """Names the process at the other end."""
    return f"process {self.number} on {self.hello['host']}"

  def send(self, message: Message) -> None:
    """Sends a message; one that does not arrive is noticed when reading."""
    with contextlib.suppress(OSError):
      self._socket.sendall(json.dumps(message).encode() + b"\n")

  def read(self) -> list[Message] | None:
    """Reads the messages that are there; None: the other end has closed."""
    try:
      found = self._socket.recv(1 << 16)
    except (TimeoutError, InterruptedError):
      return []
    except OSError:
      return None
    lines = (self._rest + found).split(b"\n")
    self._rest = lines.pop()
    if not found or len(self._rest) > _LONGEST:
      return None
    try:
      messages = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):  # not one of ours
      return None
    return messages if all(isinstance(m, dict) for m in messages) else None

  def hang_up(self) -> None:
    """Ends the connection, which whoever reads from it notices."""
    self.left = True
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)

  def close(self) -> None:
    """Closes the connection."""
    self._socket.close()


class Peers:
  """Other processes of the job, after a roll call.

  Args:
    place: Place of this process.
    same: Name to what all processes must have in common, as JSON.
    seconds: Longest time to wait for the others.
    tell: Function that writes a line for a person who waits.

  Raises:
    UserError: A process has not come, or does not fit; the message names it.
  """

  def __init__(
    self,
    place: Member,
    same: Mapping[str, Any],
    *,
    seconds: float,
    tell: Callable[[str], object] = lambda line: None,
  ):
    self._place, self._tell, self._seconds = place, tell, seconds
    self._deadline = time.monotonic() + seconds
    self._hello: Message = {
      "mark": _MARK,
      "process": place.process_id,
      "num_processes": place.num_processes,
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "same": dict(same),
    }
    self._lines: list[_Line] = []
    self._on_stop: Callable[[int], object] = lambda signum: None
    self._on_gone: Callable[[str, bool], object] = lambda line, leader: None
    self._lock = threading.Lock()
    self._ended = False
    self._came: set[int] = set()
    try:
      if place.process_id == 0:
        self._gather()
      else:
        self._lines = [self._join()]
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Closes the connections; no thread watches them any more."""
    for line in self._lines:
      line.close()

  # --- Roll call, process 0 --------------------------------------------------

  def _gather(self) -> None:
    """Waits until all others have come."""
    new: list[_Line] = []
    told = time.monotonic()
    with _listen(self._place) as listener:
      while self._missing():
        now = time.monotonic()
        if now >= self._deadline:
          self._give_up(new)
        if now - told > min(15.0, self._seconds / 3):
          told = now
          self._tell(self._describe_missing())
        lines = [listener, *new, *self._lines]
        for one in _readable(lines, _RETRY_SECONDS):
          if isinstance(one, _Line):
            self._hear(one, new)
            continue
          with contextlib.suppress(OSError):
            new.append(_Line(listener.accept()[0]))
      for line in new:
        line.close()
    for line in self._lines:
      line.send({"go": True})

  def _missing(self) -> list[int]:
    here = {0, *(line.number for line in self._lines)}
    return [n for n in range(self._place.num_processes) if n not in here]

  def _hear(self, line: _Line, new: list[_Line]) -> None:
    """Hears what a process says that has come, or that it has gone again."""
    messages = line.read()
    if line in self._lines:
      if messages is None:
        self._lines.remove(line)
        line.close()
      return
    if messages == []:
      return
    new.remove(line)
    hello = messages[0] if messages else {}
    if not _is_hello(hello):
      line.close()
      return
    line.hello = hello
    refusal = self._refusal(hello)
    if refusal:
      line.send({"refused": refusal})
      line.close()
      return
    self._lines.append(line)
    self._came.add(line.number)
    for other in self._lines:
      other.send({"missing": _listed(self._missing())})

  def _refusal(self, hello: Message) -> str:
    """Says why a process does not fit; "" if it does."""
    number = self._place.num_processes
    if hello["num_processes"] != number:
      return (
        f"num_processes: {hello['num_processes']}; allowed: {number}, as process"
        f" 0 on {self._hello['host']} has it"
      )
    for other in [self._hello, *(line.hello for line in self._lines)]:
      if hello["process"] == other["process"]:
        return (
          f"process_id: {hello['process']}; allowed: each once, and process"
          f" {other['pid']} on {other['host']} has it"
        )
    for name, value in self._hello["same"].items():
      if hello["same"].get(name) != value:
        return (
          f"{name}: {_difference(hello['same'].get(name), value)}; allowed: the"
          f" same in all processes"
        )
    return ""

  def _describe_missing(self) -> str:
    hosts = [self._hello, *(line.hello for line in self._lines)]
    here = ", ".join(f"{one['process']} on {one['host']}" for one in hosts[:8])
    return (
      f"waiting for {_listed(self._missing())} of"
      f" {self._place.num_processes} at {self._place.address}; here: {here}"
      + (", ..." if len(hosts) > 8 else "")
    )

  def _give_up(self, new: list[_Line]) -> None:
    """Ends the wait for all."""
    absent = self._missing()
    # Some may have waited for their whole time before.
    never = [number for number in absent if number not in self._came]
    missing = _listed(never or absent)
    for line in self._lines:
      line.send({"failed": missing})
    for line in new:
      line.close()
    raise self._absent(missing)

  def _absent(self, missing: str) -> UserError:
    return UserError(
      f"num_processes: {self._place.num_processes}, but {missing} did not come"
      f" to {self._place.address} within {self._seconds:g} s; allowed: all"
      " started within that time, with this address (--wait_seconds waits"
      " longer)"
    )

  # --- Roll call, the others -------------------------------------------------

  def _join(self) -> _Line:
    """Comes to process 0 and waits for its word."""
    reason, told = "", time.monotonic()
    while time.monotonic() < self._deadline:
      try:
        line = _Line(_connect(self._place))
      except OSError as error:
        reason = error.strerror or str(error)
        if time.monotonic() - told > min(15.0, self._seconds / 3):
          told = time.monotonic()
          self._tell(
            f"waiting for process 0 at {self._place.address}: {reason}"
          )
      else:
        try:
          if self._admitted(line):
            line.hello = {"process": 0, "host": self._place.host}
            return line
        except BaseException:
          line.close()
          raise
        line.close()
        reason = "its connection was closed"
      time.sleep(_RETRY_SECONDS)
    raise UserError(
      f"coordinator_address: {self._place.address}: process 0 of"
      f" {self._place.num_processes} did not answer process"
      f" {self._place.process_id} there within {self._seconds:g} s ({reason});"
      " allowed: host and port of a process 0 that was started, too"
    )

  def _admitted(self, line: _Line) -> bool:
    """Waits for the word of process 0; False: it is not there any more."""
    line.send(self._hello)
    missing = ""
    # Process 0, which may have begun later, has the better list.
    while time.monotonic() < self._deadline + _LATER_SECONDS:
      ready = _readable([line], _RETRY_SECONDS)
      messages = line.read() if ready else []
      if messages is None:
        return False
      for message in messages:
        if "refused" in message:
          raise UserError(message["refused"])
        if "failed" in message:
          raise self._absent(str(message["failed"]))
        if "go" in message:
          return True
        missing = str(message.get("missing", missing))
    if missing:
      raise self._absent(missing)
    return False

  # --- Afterwards ------------------------------------------------------------

  def watch(
    self,
    *,
    on_stop: Callable[[int], object],
    on_gone: Callable[[str, bool], object],
  ) -> None:
    """Begins to listen to the others, in a thread.

    Args:
      on_stop: Function of the signal that another process got.
      on_gone: Function of a line about a process that has ended before its
        time, and whether that is process 0.
    """
    self._on_stop, self._on_gone = on_stop, on_gone
    threading.Thread(target=self._run, name="peers", daemon=True).start()

  def _run(self) -> None:
    while lines := [line for line in self._lines if not line.left]:
      for line in _readable(lines):
        messages = line.read()
        for message in messages or ():
          self._handle(line, message)
        if messages is None:
          if not line.left:
            self._gone(line.who(), line, leader=self._place.process_id != 0)
          line.left = True

  def _handle(self, line: _Line, message: Message) -> None:
    if "stop" in message:
      self._forward(message, besides=line)
      self._on_stop(int(message["stop"]))
    elif "bye" in message:
      line.left = True
    elif "gone" in message:
      self._gone(str(message["gone"]), line, leader=False)

  def _gone(self, who: str, besides: _Line, *, leader: bool) -> None:
    if self._ended:
      return
    self._forward({"gone": who}, besides=besides)
    self._on_gone(
      f"error: {who}, of {self._place.num_processes}, has ended or cannot be"
      " reached; what was saved is kept, and the same command in all processes"
      " goes on from there",
      leader,
    )

  def _forward(self, message: Message, besides: _Line | None) -> None:
    """Sends a message to the others; by way of process 0."""
    with self._lock:
      for line in self._lines:
        if line is not besides and not line.left:
          line.send(message)

  def hang_up(self) -> None:
    """Ends the connections, as the end of this process does."""
    for line in self._lines:
      line.hang_up()

  def stop(self, signum: int) -> None:
    """Tells the others of a request to stop."""
    self._forward({"stop": signum}, besides=None)

  def leave(self, *, failed: bool) -> None:
    """Tells the others that this process ends, and whether before its time."""
    self._ended = True
    who = f"process {self._place.process_id} on {self._hello['host']}"
    self._forward({"gone": who} if failed else {"bye": True}, besides=None)


def _readable(lines: Sequence[Any], seconds: float | None = None) -> list[Any]:
  """Waits until something can be read.

  Args:
    lines: Sockets and lines, any number; `select` itself takes no more than
      about a thousand.
    seconds: Longest time to wait; None: as long as it takes.

  Returns:
    Those of which something can be read.
  """
  with selectors.DefaultSelector() as waiting:
    for line in lines:
      waiting.register(line, selectors.EVENT_READ)
    return [key.fileobj for key, _ in waiting.select(seconds)]


def _is_hello(message: Message) -> bool:
  return (
    message.get("mark") == _MARK
    and all(
      type(message.get(name)) is int
      for name in ("process", "num_processes", "pid")
    )
    and isinstance(message.get("host"), str)
    and isinstance(message.get("same"), dict)
  )


def _difference(value: Any, wanted: Any) -> str:
  """Names where two values differ."""
  if isinstance(value, list) and isinstance(wanted, list):
    ours = [one for one in value if one not in wanted]
    theirs = [one for one in wanted if one not in value]
    if ours or theirs:
      return f"{' '.join(ours) or 'nothing'}, and process 0 has" + (
        f" {' '.join(theirs)}" if theirs else " not"
      )
  return f"{value}, and process 0 has {wanted}"


def _listed(numbers: Iterable[int]) -> str:
  """Names processes: "process 1", or "processes 1, 3 to 7"."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  texts = [f"{a}" if a == b else f"{a} to {b}" for a, b in runs]
  plural = len(runs) > 1 or any(a != b for a, b in runs)
  return f"process{'es' if plural else ''} {', '.join(texts)}"


def _listen(place: Member) -> socket.socket:
  """Opens the coordinator's port.

  Raises:
    UserError: The system refuses.
  """
  both = socket.has_dualstack_ipv6()
  deadline = time.monotonic() + _FREE_SECONDS
  while True:
    try:
      return socket.create_server(
        ("", place.port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        backlog=min(place.num_processes, 4096),
        dualstack_ipv6=both,
      )
    except OSError as error:
      # The process 0 of a job that is started again may not quite have ended.
      if time.monotonic() < deadline and error.errno == errno.EADDRINUSE:
        time.sleep(_RETRY_SECONDS)
        continue
      raise UserError(
        f"coordinator_address: {place.address}:"
        f" {os.strerror(error.errno or errno.EIO)}; allowed: a port that is"
        " free on the host of process 0"
      ) from None


def _connect(place: Member) -> socket.socket:
  found = socket.create_connection((place.host, place.port), timeout=5.0)
  # Where nobody listens on a port for outgoing connections, a socket may reach
  # itself.
  if found.getsockname() == found.getpeername():
    found.close()
    raise ConnectionRefusedError(0, "Connection refused")
  return found
