"""Places of processes in a job, and the roll call, without JAX."""

import socket
import threading
import time

import pytest

from atat_jax.errors import UserError
from atat_jax.process import job, peers

FULL = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}


def find(flags=None, ask=None, **environment):
  given = {"environment": environment}
  return job.find(flags or {}, ask or (lambda: (None, None, None)), **given)


def test_variables_name_the_place_on_plain_hosts():
  assert find(**FULL) == job.Member("10.0.0.1:8476", 4, 3)


def test_flags_win_over_variables():
  flags = {"process_id": "0", "num_processes": 2, "coordinator_address": None}
  assert find(flags, **FULL) == job.Member("10.0.0.1:8476", 2, 0)


def test_a_cluster_is_asked_for_what_is_missing_and_no_more():
  def never():
    raise AssertionError

  assert find(ask=never, **FULL).num_processes == 4
  found = find(ask=lambda: ("[fe80::1]:99", 8, 7), JAX_PROCESS_ID=" 2 ")
  assert found == job.Member("[fe80::1]:99", 8, 2)
  assert (found.host, found.port) == ("fe80::1", 99)


@pytest.mark.parametrize(
  ("variable", "value"),
  [
    *(("JAX_PROCESS_ID", v) for v in ("4", "-1", "1.0", "one", "0x1", "¹")),
    *(("JAX_NUM_PROCESSES", v) for v in ("0", "-2", "two", "1e3", "9" * 30)),
    *(
      ("JAX_COORDINATOR_ADDRESS", v)
      for v in (
        "localhost",
        "localhost:",
        ":1234",
        "localhost:0",
        "localhost:65536",
        "localhost:x",
        "tcp://localhost:1234",
        "::1:1234",
        "a b:1234",
        "a:1234/b",
      )
    ),
  ],
)
def test_a_bad_variable_is_named(variable, value):
  with pytest.raises(UserError, match=f"^{variable}: .*; allowed: ") as caught:
    find(**(FULL | {variable: value}))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", job.VARIABLES)
def test_a_bad_flag_and_a_missing_value_are_named(flag):
  with pytest.raises(UserError, match=f"^{flag}: '?bad'?; allowed: "):
    find({flag: "bad"}, **FULL)
  left = {k: v for k, v in FULL.items() if k != job.VARIABLES[flag]}
  with pytest.raises(UserError, match=f"^{flag}: missing; allowed: "):
    find(**left)
  left[job.VARIABLES[flag]] = ""  # an unset variable of a shell
  with pytest.raises(UserError, match=f"^{flag}: missing; allowed: "):
    find(**left)


def test_no_job_at_all_is_said_with_the_ways_to_one():
  with pytest.raises(UserError, match=r"^distributed: no job found; allowed: "):
    find()


@pytest.mark.parametrize("seconds", [0, -1, 86_401, 1.5, "50"])
def test_a_bad_wait_is_refused(seconds):
  with pytest.raises(UserError, match=r"^wait_seconds: "):
    job.check_seconds(seconds)


# --- Roll call ----------------------------------------------------------------


def free_port():
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


class Call:
  """Processes of a roll call, as threads."""

  def __init__(self, size, *, seconds=10.0):
    self.address = f"localhost:{free_port()}"
    self.size, self.seconds = size, seconds
    self.found, self._threads = {}, []

  def start(self, number, *, size=None, name=None, seconds=None, **same):
    place = job.Member(self.address, size or self.size, number)
    same = same or {"arguments": ["--config=a"]}

    def work():
      try:
        self.found[name or number] = peers.Peers(
          place, same, seconds=seconds or self.seconds
        )
      except UserError as error:
        self.found[name or number] = str(error)

    self._threads.append(threading.Thread(target=work))
    self._threads[-1].start()

  def close(self):
    """Ends the processes: their threads read that the others have closed."""
    found = [one for one in self.found.values() if isinstance(one, peers.Peers)]
    for one in found:
      one.leave(failed=False)
      one.hang_up()
    for thread in threading.enumerate():
      if thread.name == "peers":
        thread.join(5)
    for one in found:
      one.close()

  def join(self):
    for thread in self._threads:
      thread.join(30)
      assert not thread.is_alive()
    return self.found


@pytest.fixture
def make_call():
  made = []

  def make(*args, **kwargs):
    made.append(Call(*args, **kwargs))
    return made[-1]

  yield make
  for call in made:
    call.close()


def test_processes_meet_whatever_their_order_and_leave_the_port(make_call):
  call = make_call(4)
  for number in (3, 1, 0, 2):
    call.start(number)
  found = call.join()
  assert all(isinstance(found[n], peers.Peers) for n in range(4)), found
  # The port is JAX's now, while the connections stay.
  socket.create_server(("", int(call.address.split(":")[1]))).close()


def test_missing_processes_are_named_to_all(make_call):
  call = make_call(8, seconds=2.0)
  for number in (0, 2, 6):
    call.start(number)
  began = time.monotonic()
  found = call.join()
  assert time.monotonic() - began < 10
  for number in (0, 2, 6):
    assert found[number].startswith(
      "num_processes: 8, but processes 1, 3 to 5, 7 did not come"
    ), found


def test_process_0_that_is_missing_is_named(make_call):
  call = make_call(2, seconds=1.5)
  call.start(1)
  assert "process 0 of 2 did not answer process 1" in call.join()[1]


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"size": 2}, "num_processes: 2; allowed: 3"),
    ({"arguments": ["--config=b"]}, "arguments: --config=b, and process 0 has"),
    ({"jax": "9"}, "arguments: None, and process 0 has"),
  ],
)
def test_a_process_that_does_not_fit_is_refused_alone(make_call, change, match):
  call = make_call(3, seconds=3.0)
  call.start(0)
  call.start(1, name="odd", **change)
  deadline = time.monotonic() + 10
  while "odd" not in call.found and time.monotonic() < deadline:
    time.sleep(0.01)
  call.start(1)
  call.start(2)
  found = call.join()
  assert found["odd"].startswith(match)
  assert isinstance(found[0], peers.Peers), "a refused process ends the others"


def test_two_processes_of_one_number_do_not_both_join(make_call):
  call = make_call(2, seconds=2.0)
  call.start(1)
  call.start(1, name="twin")
  time.sleep(0.2)
  call.start(0)
  found = call.join()
  texts = [x for x in found.values() if isinstance(x, str)]
  # The other one came first, and the job has begun when the twin asks.
  assert len(texts) == 1 and (
    "process_id: 1; allowed: each once" in texts[0]
    or "closed" in texts[0]
    or "did not answer" in texts[0]
  ), found


def test_strangers_on_the_port_disturb_nothing(make_call):
  call = make_call(2)
  call.start(0)
  port = int(call.address.split(":")[1])
  strangers = []
  for text in (
    b"GET / HTTP/1.1\r\n\r\n",
    b"[1]\n",
    b'{"mark": 1}\n',
    b"\xff\n",
  ):
    for _ in range(50):
      try:
        strangers.append(socket.create_connection(("localhost", port)))
        break
      except OSError:
        time.sleep(0.05)
    strangers[-1].sendall(text)
  call.start(1)
  found = call.join()
  assert all(isinstance(found[n], peers.Peers) for n in range(2)), found
  for stranger in strangers:
    stranger.close()


def test_a_port_that_is_taken_is_named(monkeypatch):
  monkeypatch.setattr(peers, "_FREE_SECONDS", 0.1)
  with socket.create_server(("", 0)) as server:
    place = job.Member(f"localhost:{server.getsockname()[1]}", 2, 0)
    with pytest.raises(UserError, match=r"^coordinator_address: .* in use; "):
      peers.Peers(place, {}, seconds=1)


@pytest.fixture
def three(make_call):
  """Three processes that have met, and what each hears."""
  call = make_call(3)
  for number in range(3):
    call.start(number)
  found = call.join()
  heard = {number: [] for number in range(3)}
  for number in range(3):
    found[number].watch(
      on_stop=lambda signum, n=number: heard[n].append(signum),
      on_gone=lambda line, leader, n=number: heard[n].append((line, leader)),
    )
  return found, heard


def wait_for(condition):
  deadline = time.monotonic() + 5
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert condition()


@pytest.mark.parametrize("number", range(3))
def test_a_request_to_one_reaches_the_others_once(three, number):
  found, heard = three
  found[number].stop(15)
  others = [n for n in range(3) if n != number]
  wait_for(lambda: all(heard[n] == [15] for n in others))
  time.sleep(0.1)
  assert heard == {n: [15] * (n != number) for n in range(3)}


@pytest.mark.parametrize("number", range(3))
def test_a_process_that_dies_is_named_to_the_others(three, number):
  found, heard = three
  found[number].hang_up()
  others = [n for n in range(3) if n != number]
  wait_for(lambda: all(heard[n] for n in others))
  for n in others:
    line, leader = heard[n][0]
    assert f"process {number} on " in line and leader == (number == 0)


def test_processes_that_have_finished_are_not_taken_for_dead(three):
  found, heard = three
  for number in (2, 0, 1):
    found[number].leave(failed=False)
    found[number].hang_up()
    time.sleep(0.05)
  assert heard == {0: [], 1: [], 2: []}


def test_a_failure_is_told_at_once(three):
  found, heard = three
  found[1].leave(failed=True)
  wait_for(lambda: heard[0] and heard[2])
  assert all("process 1 on " in heard[n][0][0] for n in (0, 2))


def test_a_job_may_have_more_processes_than_select_takes():
  ours, theirs = socket.socketpair()
  with ours, theirs:
    many = [ours.dup() for _ in range(1100)]
    try:
      assert many[-1].fileno() > 1024
      theirs.sendall(b"word")
      assert peers._readable([many[-1]], 5.0) == [many[-1]]
      assert many[-1].recv(9) == b"word"
      assert peers._readable(many, 0.0) == []
    finally:
      for one in many:
        one.close()
