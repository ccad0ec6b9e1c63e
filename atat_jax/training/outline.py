"""Outline of a training: how many steps, and what comes after which."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence


def dispatches(
  start: int,
  total: int,
  *,
  size: int,
  multiples: Sequence[int],
  others: Sequence[int] = (),
) -> Iterator[range]:
  """Groups the steps that one program runs together.

  Args:
    start: Number of steps made before.
    total: Number of steps of the run.
    size: Largest number of steps in a group.
    multiples: Intervals; a group ends at each of their multiples, for log lines
      and validations.
    others: Further ends.

  Yields:
    Numbers of the steps of a group, from 0.
  """
  while start < total:
    ends = [start + size, total]
    ends += [start - start % multiple + multiple for multiple in multiples]
    end = min(ends + [other for other in others if other > start])
    yield range(start, end)
    start = end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
  """Outline of a training: its name, its files and its steps.

  Attributes:
    name: Name of the network, for messages.
    directory: Directory of its files.
    batch_size: Number of images in a batch.
    attack: Validation attack in words.
    profile_steps: First and last step of the profile, from 1; (): no profile.
    total: Number of steps.
    per_epoch: Number of steps in an epoch.
    per_dispatch: Largest number of steps in one program.
    log_every: Number of steps between log lines.
    validate_every: Number of steps between validations.
  """

  name: str
  directory: pathlib.Path
  batch_size: int
  attack: str
  profile_steps: Sequence[int]
  total: int
  per_epoch: int
  per_dispatch: int
  log_every: int
  validate_every: int

  def logs(self, step: int) -> bool:
    """Whether there is a log line after a step, counted from 1."""
    return step % self.log_every == 0 or step == self.total

  def validates(self, step: int) -> bool:
    """Whether there is a validation after a step, counted from 1."""
    return step % self.validate_every == 0 or step == self.total

  def groups(self, start: int, others: Sequence[int] = ()) -> Iterator[range]:
    """Groups the remaining steps as one program runs them.

    Args:
      start: Number of steps made before.
      others: Further steps after which a group ends.

    Returns:
      Iterator of the numbers of the steps of each group, from 0.
    """
    return dispatches(
      start,
      self.total,
      size=self.per_dispatch,
      multiples=(self.log_every, self.validate_every),
      others=others,
    )
