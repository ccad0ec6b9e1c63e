"""Errors that a user can fix; commands print them in one line, no traceback."""

import contextlib
from collections.abc import Iterator

_LONGEST_MESSAGE = 50_000


def printable(text: str) -> str:
  """Escapes everything that would not print as itself on one line.

  Names come from files of others: a control sequence in one drives the
  terminal, a line break or a mark of direction forges a message.

  Args:
    text: Any text.

  Returns:
    The text with escapes as in "\\x1b" for what is not printable.
  """
  if text.isprintable():
    return text
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
  )


class UserError(ValueError):
  """Invalid input; the message names the field, its value and what is allowed.

  Args:
    message: One line; what would not print is escaped.
  """

  def __init__(self, message: str) -> None:
    text = str(message)
    if len(text) > _LONGEST_MESSAGE:
      text = f"{text[:_LONGEST_MESSAGE]} ..."
    super().__init__(printable(text))


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
