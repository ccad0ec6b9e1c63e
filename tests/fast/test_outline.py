"""Steps of a training: how they are grouped, and what comes after which."""

import pathlib

from atat_jax.training.outline import Outline, dispatches


def sizes(*arguments, **keywords):
  """Sizes of the groups, after a check that none overlaps or is left out."""
  found = list(dispatches(*arguments, **keywords))
  starts = [arguments[0] + sum(map(len, found[:i])) for i in range(len(found))]
  assert [numbers.start for numbers in found] == starts
  return list(map(len, found))


def test_groups_end_at_log_lines_validations_and_the_profile():
  assert sizes(0, 5, size=1, multiples=(2,)) == [1] * 5
  assert sizes(0, 20, size=8, multiples=(100,)) == [8, 8, 4]
  # Log lines every 5 steps, validations every 7, a profile of steps 10 and 11.
  found = sizes(3, 16, size=4, multiples=(5, 7), others=(9, 11))
  assert found == [2, 2, 2, 1, 1, 3, 1, 1]
  assert sizes(20, 20, size=4, multiples=(5,)) == []


def test_log_lines_and_validations_come_at_their_intervals_and_at_the_end():
  outline = Outline(
    name="student",
    directory=pathlib.Path("run"),
    batch_size=128,
    attack="pgd10",
    profile_steps=(),
    total=11,
    per_epoch=10,
    per_dispatch=4,
    log_every=5,
    validate_every=4,
  )
  steps = range(1, 12)
  assert [step for step in steps if outline.logs(step)] == [5, 10, 11]
  assert [step for step in steps if outline.validates(step)] == [4, 8, 11]
  ends = [numbers.stop for numbers in outline.groups(0)]
  assert ends == [4, 5, 8, 10, 11]
