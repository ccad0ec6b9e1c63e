"""Errors that a user can fix; commands print them in one line, no traceback."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
  """Invalid input; the message names the field, its value and what is allowed."""


class TrainingDivergedError(UserError):
  """A loss term or a gradient is no longer finite."""


class DamagedFileError(UserError):
  """A file is not what was written; the message names the file."""


class NonFiniteWarning(UserWarning):
  """Logits, losses or gradients were not finite; they were left out."""


@contextlib.contextmanager
def in_section(name: str) -> Iterator[None]:
  """Puts the name of a section before the field that a `UserError` names.

  Args:
    name: Name of the section, as in "train" for "train.batch_size".
  """
  try:
    yield
  except UserError as error:
    raise UserError(f"{name}.{error}") from None
