"""Values of flags: fractions, and fields with a value."""

import argparse
import ast
from typing import Any


def number(text: str) -> float:
  """Reads a number or a fraction, as in 8/255.

  Args:
    text: The text of a flag.

  Raises:
    ArgumentTypeError: A fraction of nothing.
    ValueError: Neither.
  """
  above, _, below = text.partition("/")
  if float(below or 1) == 0:
    raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number, or 8/255")
  return float(above) / float(below or 1)


def assignment(text: str) -> tuple[str, Any]:
  """Reads NAME=VALUE; the value is a Python literal, or else a text.

  Args:
    text: The text of a flag.

  Returns:
    Name and value.
  """
  name, _, value = text.partition("=")
  try:
    return name, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return name, value
