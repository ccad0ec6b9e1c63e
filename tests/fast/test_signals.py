"""Signals as requests to stop: in a training, and in a whole process."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from atat_jax.process import stops
from atat_jax.training.interrupts import SIGNALS, Interrupt, Interrupted


@pytest.fixture(params=SIGNALS, ids=lambda signum: signum.name)
def signum(request):
  """A signal whose handler, outside the context, notes that it was called."""
  called = []
  previous = signal.signal(request.param, lambda *_: called.append(True))
  yield request.param, called
  signal.signal(request.param, previous)


def test_the_first_signal_only_asks(signum):
  signum, called = signum
  with Interrupt() as interrupt:
    assert interrupt.signum == 0
    os.kill(os.getpid(), signum)
    assert interrupt.signum == signum
    assert not called
    os.kill(os.getpid(), signum)  # the second is for whoever comes next
    assert called


def test_handlers_come_back_after_an_error(signum):
  signum, called = signum
  with pytest.raises(ZeroDivisionError), Interrupt():
    raise ZeroDivisionError
  os.kill(os.getpid(), signum)
  assert called


def test_an_interrupt_is_no_ordinary_exception():
  """Code that catches exceptions must not swallow it."""
  assert issubclass(Interrupted, KeyboardInterrupt)
  assert not issubclass(Interrupted, Exception)


def test_outside_the_main_thread_it_is_inert():
  found = []

  def work():
    with Interrupt() as interrupt:
      found.append(interrupt.signum)

  before = [signal.getsignal(number) for number in SIGNALS]
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [0]
  assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_library_is_not_watched():
  assert not stops.watching()
  stops.check()
  with stops.hold():
    assert stops.requested() == 0


# --- A process that is watched -----------------------------------------------

_WAIT = "import time; time.sleep(250)"


def run(body, *, grace=5.0):
  """Runs code in a process that is watched; returns its status and stderr."""
  code = f"""
import os, signal, sys
from atat_jax.process import commands, stops
commands.begin("stopped; here")
stops.GRACE_SECONDS = {grace}
def kill(signum): os.kill(os.getpid(), signum)
with commands.plain_exits():
{textwrap.indent(textwrap.dedent(body), "  ")}
"""
  # Whatever this session ignores, as under nohup.
  listening = ["env", "--default-signal=INT,TERM,HUP"]
  made = subprocess.run(
    [*listening, sys.executable, "-c", code],
    capture_output=True,
    text=True,
    timeout=200,
  )
  return made.returncode, made.stderr


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_a_process_that_begins_ends_at_once(signum):
  status, errors = run(f"kill({int(signum)}); {_WAIT}")
  assert (status, errors) == (128 + signum, "\nstopped; here\n")


def test_a_request_is_met_at_a_safe_point():
  status, errors = run(
    """
    stops.started()
    kill(signal.SIGTERM)
    try:
      while True: stops.check()
    finally:
      print("tidied up", file=sys.stderr)
    """
  )
  assert (status, errors) == (143, "tidied up\n\nstopped; here\n")


def test_a_request_without_a_safe_point_is_met_soon():
  """As in a compilation, and where exceptions of handlers are lost."""
  status, errors = run(
    f"""
    stops.started()
    class Finalizer:
      def __del__(self): kill(signal.SIGINT)
    Finalizer()
    {_WAIT}
    """,
    grace=0.2,
  )
  assert (status, errors) == (130, "\nstopped; here\n")


def test_what_holds_a_state_is_given_time_to_save_it():
  status, errors = run(
    """
    import time
    stops.started()
    with stops.hold():
      kill(signal.SIGINT)
      time.sleep(1)  # many times the grace
      stops.check()
      print("saved", file=sys.stderr)
    stops.check()
    """,
    grace=0.1,
  )
  assert (status, errors) == (130, "saved\n\nstopped; here\n")


def test_a_second_request_ends_even_a_holder_at_once():
  status, errors = run(
    f"""
    import time
    stops.started()
    with stops.hold():
      kill(signal.SIGINT)
      time.sleep(0.5)
      kill(signal.SIGTERM)
      {_WAIT}
    """
  )
  assert (status, errors) == (130, "\nstopped; here\n")


def test_one_request_that_is_delivered_twice_is_one():
  """`timeout` and `srun` signal a process and its group."""
  status, errors = run(
    """
    import time
    stops.started()
    with stops.hold():
      kill(signal.SIGTERM)
      kill(signal.SIGTERM)
      time.sleep(0.5)
      print("saved", file=sys.stderr)
    stops.check()
    """
  )
  assert (status, errors) == (143, "saved\n\nstopped; here\n")


def test_a_request_after_the_work_does_not_change_its_status():
  status, errors = run("stops.started()\nstops.finish(0)\nkill(2); " + _WAIT)
  assert (status, errors) == (0, "")
