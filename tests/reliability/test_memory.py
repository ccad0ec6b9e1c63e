"""A long run leaves nothing behind: memory, compilations, arrays."""

import leaks
import pytest

# Of the resident memory after the warm-up; beyond it, a few arrays of 16 MB.
SHARE = 0.05


def check(name, repetitions, compilations):
  found = leaks.measure(leaks.WORK[name], repetitions, compilations)
  assert found.compilations == 0, found
  assert found.share < SHARE, found


@pytest.mark.parametrize("name", leaks.WORK)
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

  work = leaks.Work(lambda: repeat, warm_up=1, often=5, seldom=5)
  assert leaks.measure(work, work.often, compilations).share > SHARE
