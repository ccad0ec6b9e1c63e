"""Signal handlers that turn Ctrl-C and SIGTERM into a request to stop."""

import os
import signal
import threading

import pytest

from atat_jax.training.interrupts import (
  SIGNALS,
  Interrupt,
  Interrupted,
  raise_interrupted,
)


@pytest.fixture(params=SIGNALS, ids=lambda signum: signum.name)
def signum(request):
  """A signal that raises outside the context, as `main.py` sets it up."""
  previous = signal.signal(request.param, raise_interrupted)
  yield request.param
  signal.signal(request.param, previous)


def test_the_first_signal_only_asks(signum):
  with Interrupt() as interrupt:
    assert interrupt.signum == 0
    os.kill(os.getpid(), signum)
    assert interrupt.signum == signum
  assert signal.getsignal(signum) is raise_interrupted


def test_the_second_signal_ends_it(signum):
  with pytest.raises(Interrupted) as stopped, Interrupt() as interrupt:
    os.kill(os.getpid(), signum)
    assert interrupt.signum == signum
    os.kill(os.getpid(), signum)
  assert stopped.value.signum == signum
  # Code that catches exceptions must not swallow it.
  assert isinstance(stopped.value, KeyboardInterrupt)
  assert not isinstance(stopped.value, Exception)


def test_handlers_come_back_after_an_error(signum):
  with pytest.raises(ZeroDivisionError), Interrupt():
    raise ZeroDivisionError
  assert signal.getsignal(signum) is raise_interrupted


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
