"""A long run leaves nothing behind: memory, compilations, arrays."""

import leaks
import pytest


def check(name, repetitions, compilations):
  found = leaks.measure(leaks.WORK[name], repetitions, compilations)
  assert found.compilations == 0, found
  assert not found.leaks, found


@pytest.mark.parametrize("name", ["training", "evaluation"])
def test_a_repetition_leaves_nothing_behind(name, compilations):
  check(name, leaks.WORK[name].seldom, compilations)


@pytest.mark.slow
@pytest.mark.parametrize("name", leaks.WORK)
def test_a_long_run_leaves_nothing_behind(name, compilations):
  check(name, leaks.WORK[name].often, compilations)


def measured(repeat, compilations):
  work = leaks.Work(lambda: repeat, warm_up=1, often=20, seldom=20)
  return leaks.measure(work, work.often, compilations)


def block(megabytes):
  return bytearray(b"\1") * (megabytes * 2**20)


@pytest.mark.parametrize(
  "make",
  [leaks.weights, lambda _: block(leaks.MEGABYTES)],
  ids=["arrays", "other memory"],
)
def test_a_leak_is_seen(make, compilations):
  kept = []

  def repeat(number):
    kept.append(make(number))
    return kept[-1]

  found = measured(repeat, compilations)
  assert found.leaks, found


def test_memory_that_something_else_frees_hides_no_leak(compilations):
  kept, older = [], [block(12 * leaks.MEGABYTES)]

  def repeat(number):
    kept.append(leaks.weights(number))
    if number == 10:
      older.clear()

  found = measured(repeat, compilations)
  assert found.leaks, found


def test_memory_that_is_filled_once_is_no_leak(compilations):
  kept = []

  def repeat(number):
    if number == 10:
      kept.append(block(8 * leaks.MEGABYTES))

  found = measured(repeat, compilations)
  assert not found.leaks, found
