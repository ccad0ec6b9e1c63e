"""Programs that are compiled in threads: found, left alone, never waited for."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from atat_jax import compilation, sharding
from atat_jax.compilation import ahead as threads
from atat_jax.compilation.ahead import Ahead


@pytest.fixture
def two_threads(monkeypatch):
  monkeypatch.setattr(threads, "_MOST_THREADS", 2)
  monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.fixture
def one_thread(monkeypatch):
  monkeypatch.setattr(threads, "_MOST_THREADS", 1)


def test_programs_compile_side_by_side(two_threads):
  meeting = threading.Barrier(2, timeout=20)
  done = []

  def compile_program():
    meeting.wait()  # broken unless two threads are here at once
    done.append(threading.get_ident())

  with Ahead() as ahead:
    for name in "ab":
      ahead.add(name, lambda: compile_program)
    while len(done) < 2 and not meeting.broken:
      time.sleep(0.01)
  assert len(set(done)) == 2


def test_tracing_stays_in_the_callers_thread():
  traced = []
  with Ahead() as ahead:
    ahead.add("a", lambda: traced.append(threading.get_ident()) or int)
  assert traced == [threading.get_ident()]


@pytest.mark.parametrize("where", ["while it is traced", "in the thread"])
def test_a_failure_is_left_to_the_call(where, capfd):
  began = threading.Event()

  def failing():
    began.set()
    raise RuntimeError("planted")

  with Ahead() as ahead:
    ahead.add("a", failing if where != "in the thread" else lambda: failing)
    assert began.wait(20)
    ahead.wait("a")  # whoever needs the program calls it, and sees the error
  assert capfd.readouterr() == ("", "")


def test_a_program_is_compiled_once_by_whoever_comes_first(one_thread):
  busy, free, compiled = threading.Event(), threading.Event(), []

  def first():
    busy.set()
    free.wait(20)
    compiled.append("first")

  with Ahead() as ahead:
    ahead.add("first", lambda: first)
    ahead.add("first", lambda: pytest.fail)  # added before
    ahead.add("second", lambda: lambda: compiled.append("second"))
    assert busy.wait(20)
    for _ in range(2):  # not begun: the caller compiles it, and asks again
      ahead.wait("second")
    ahead.wait("never added")
    free.set()
    ahead.wait("first")
    assert compiled == ["first"]
    ahead.add("third", lambda: lambda: compiled.append("third"))
    while len(compiled) < 2:
      time.sleep(0.01)
  assert compiled == ["first", "third"]


def test_leaving_waits_for_nothing_and_drops_the_rest(one_thread):
  busy, free, compiled = threading.Event(), threading.Event(), []
  with Ahead() as ahead:
    ahead.add("first", lambda: lambda: (busy.set(), free.wait(20)))
    ahead.add("second", lambda: lambda: compiled.append("second"))
    assert busy.wait(20)
  assert not free.is_set()  # left while the first program compiles
  free.set()
  threads._finish()
  assert not compiled and not threads._threads


def test_an_interrupt_ends_the_wait():
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  free = threading.Event()
  began = time.monotonic()
  with pytest.raises(KeyboardInterrupt), Ahead() as ahead:
    ahead.add("a", lambda: lambda: free.wait(20))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    while not ahead._tasks["a"].begun:
      time.sleep(0.01)
    ahead.wait("a")
  signal.signal(signal.SIGINT, before)
  assert time.monotonic() - began < 10
  free.set()


def test_without_threads_nothing_is_traced():
  with Ahead(enabled=False) as ahead:
    ahead.add("a", lambda: pytest.fail("traced"))
    ahead.wait("a")


def _captures(weights):
  return lambda x: x * weights


@pytest.mark.parametrize("kind", ["an array", "a callable that captures"])
def test_a_call_finds_the_program(kind, compilations):
  mesh = sharding.make_mesh(jax.devices()[:1])
  x = sharding.put_replicated(mesh, np.arange(3, dtype=np.float32))
  weights = sharding.put_replicated(mesh, np.arange(2, 5, dtype=np.float32))
  shape = threads.placed(x, sharding.replicated(mesh))
  if kind == "an array":
    function = compilation.jit(lambda w, x: w * x - 5)
    first = weights
  else:
    function = compilation.jit(lambda f, x: f(x) - 5)
    first = compilation.hashable(_captures(weights))
  with Ahead() as ahead:
    ahead.add("program", lambda: function.ahead(first, shape))
    while not ahead._tasks["program"].begun:
      time.sleep(0.01)  # a thread has begun
    ahead.wait("program")
  before = compilations()
  result = function(first, x)
  assert compilations() == before
  np.testing.assert_array_equal(result, np.arange(3) * (np.arange(3) + 2.0) - 5)


@pytest.mark.slow
def test_an_interrupted_process_ends_with_its_threads():
  """Its exit status is that of the interrupt, whatever a thread is at."""
  code = """
import jax, jax.numpy as jnp
from atat_jax import compilation, sharding
from atat_jax.compilation.ahead import Ahead
def deep(x):
  for n in range(400):
    x = jnp.sin(x) @ x + n
  return x
function = compilation.jit(deep)
with Ahead() as ahead:
  ahead.add("deep", lambda: function.ahead(jnp.ones((8, 8))))
  raise KeyboardInterrupt
"""
  found = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, timeout=120, check=False
  )
  assert found.returncode == -signal.SIGINT, found.stderr
