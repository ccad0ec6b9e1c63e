"""A long run leaves nothing behind: memory, compilations, arrays."""

import leaks
import pytest

SHARE = 0.05
"""Allowed growth, relative to the resident memory after the warm-up."""

SLACK = 4 * leaks.MEGABYTES
"""A few weights that the allocator has not given back yet, in MB."""


def grows(found):
  return found.after > found.before * (1 + SHARE) + SLACK


def check(name, repetitions, compilations):
  found = leaks.measure(leaks.WORK[name], repetitions, compilations)
  assert found.compilations == 0, found
  assert not grows(found), found


@pytest.mark.parametrize("name", ["training", "evaluation"])
def test_a_repetition_leaves_nothing_behind(name, compilations):
  check(name, leaks.WORK[name].seldom, compilations)


@pytest.mark.slow
@pytest.mark.parametrize("name", leaks.WORK)
def test_a_long_run_leaves_nothing_behind(name, compilations):
  check(name, leaks.WORK[name].often, compilations)


def test_a_leak_is_seen(compilations):
  kept = []

  def repeat(number):
    kept.append(leaks.weights(number))
    return kept[-1]

  work = leaks.Work(lambda: repeat, warm_up=1, often=20, seldom=20)
  assert grows(leaks.measure(work, work.often, compilations))
