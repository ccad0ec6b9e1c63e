"""Errors that a user can fix; commands print them in one line, no traceback."""

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

_LONGEST = 1_600
"""Most characters of a message."""

_LONGEST_NAME = 100
"""Most characters of a name that is compared with others."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200
_short.maxlist = _short.maxtuple = _short.maxdict = 20
_short.maxset = _short.maxfrozenset = _short.maxarray = _short.maxdeque = 20
_short.maxlevel = 4


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


def one_line(text: str) -> str:
  """Escapes line ends and control characters, and shortens very long texts."""
  if len(text) > _LONGEST:
    half = _LONGEST // 2
    text = f"{text[:half]} ... ({len(text)} characters) ... {text[-half:]}"
  return printable(text)


def shown(value: Any) -> str:
  """Returns a value as a message shows it: short, and in one line.

  An array is shown by its shape and dtype, without moving it.

  Args:
    value: Any object.

  Returns:
    At most a few hundred characters.
  """
  shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
  kind = type(value).__name__
  if isinstance(shape, tuple) and shape and dtype is not None:
    return f"{kind} of shape {shape} and dtype {dtype}"
  try:
    return one_line(_short.repr(value))
  except Exception:  # e.g. an integer of more than 4,300 digits
    return one_line(f"a value of type {kind} that cannot be shown")


def nearest(value: object, known: Iterable[str]) -> str | None:
  """Finds the name that somebody meant who misspelt it.

  Args:
    value: The name that does not exist.
    known: Names that exist.

  Returns:
    The most similar name; None where none is like it.
  """
  if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME:
    return None
  names = {name.lower().replace("-", "_"): name for name in known}
  found = difflib.get_close_matches(
    value.lower().replace("-", "_"), names, 1, cutoff=0.65
  )
  return names[found[0]] if found else None


def near(value: object, known: Iterable[str]) -> str:
  """Says which name may be meant, for the message that refuses another.

  Args:
    value: The name that does not exist.
    known: Names that exist.

  Returns:
    " (did you mean 'pgd'?)", or "" where no name is like it.
  """
  found = nearest(value, known)
  return f" (did you mean {found!r}?)" if found else ""


class UserError(ValueError):
  """Invalid input; the message names the field, its value and what is allowed.

  The message is one line whatever text it is made of.
  """

  def __init__(self, message: object = ""):
    super().__init__(one_line(str(message)))


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
