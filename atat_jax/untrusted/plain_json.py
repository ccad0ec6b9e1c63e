"""JSON that can be neither deep nor ambiguous."""

import json
import pathlib
from typing import Any

from atat_jax.errors import UserError
from atat_jax.untrusted import regular

LIMIT = 1 << 26
"""Largest JSON file in bytes, 64 MiB."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a key occurs twice")
  return found


def parse(text: str | bytes, where: object) -> Any:
  """Parses JSON.

  Args:
    text: The JSON text, as bytes in UTF-8.
    where: Place of the text, for the message.

  Returns:
    The value.

  Raises:
    UserError: Not JSON, nested too deeply, or a key occurs twice.
  """
  try:
    return json.loads(text, object_pairs_hook=_unique)
  except RecursionError:
    raise UserError(f"{where} is not valid JSON: nested too deeply") from None
  except ValueError as error:  # also undecodable text and endless integers
    raise UserError(f"{where} is not valid JSON: {error}") from None


def read(path: pathlib.Path | str) -> Any:
  """Reads a JSON file of at most 64 MiB.

  Raises:
    UserError: No regular file, a larger one, or no JSON (see `parse`).
    OSError: The file cannot be read.
  """
  return parse(regular.read_bytes(path, LIMIT), path)
