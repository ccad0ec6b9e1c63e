"""Values as users write them: fractions, tuples, and fields with a value."""

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


def literal(text: str) -> Any:
  """Reads a Python literal in which numbers can be fractions: (1/255, 0.1).

  Args:
    text: The text of a flag. Words between commas, as in running,batch, are
      texts.

  Raises:
    ValueError: Anything else.
  """
  try:
    return _value(ast.parse(text.strip(), mode="eval").body)
  except (
    ArithmeticError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
  ) as error:
    raise ValueError(f"{text!r} is no literal") from error


def _value(node: ast.expr) -> Any:
  """Value of a part of an expression."""
  match node:
    case ast.Tuple(elts=parts):
      return tuple(map(_value, parts))
    case ast.List(elts=parts):
      return [_value(part) for part in parts]
    case ast.Name(id=word):
      return word
    case ast.BinOp(left=left, op=ast.Div(), right=right):
      above, below = ast.literal_eval(left), ast.literal_eval(right)
      if isinstance(above, int | float) and isinstance(below, int | float):
        return float(above) / float(below)
      raise ValueError(ast.unparse(node))
  return ast.literal_eval(node)


def assignment(text: str) -> tuple[str, Any]:
  """Reads NAME=VALUE; the value is a literal, or else a text.

  Args:
    text: The text of a flag.

  Returns:
    Name and value.
  """
  name, _, value = text.partition("=")
  try:
    return name, literal(value)
  except ValueError:
    return name, value
