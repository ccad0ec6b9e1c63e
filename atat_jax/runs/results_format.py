"""The format of `results.json`: which fields it has, and what they may hold.

Fields that this version does not know are free, and most may be missing, as
files of earlier versions lack some. What is there must be of its kind and
range: a page must not show, nor compare, a number that is none.
"""

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from atat_jax.errors import UserError, shown

_MOST = 1e12  # more than any number of images, steps or seconds


class _Kind(NamedTuple):
  """Kind of value that a field may hold.

  Attributes:
    allowed: Its description.
    holds: Whether a value is allowed.
  """

  allowed: str
  holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _number(least: float, most: float = _MOST) -> _Kind:
  limits = f"{least:g} to {most:g}"
  return _Kind(
    f"a number from {limits}",
    lambda value: _is_number(value) and least <= value <= most,
  )


def _integer(least: int) -> _Kind:
  return _Kind(
    f"an integer from {least} to {_MOST:g}",
    lambda value: type(value) is int and least <= value <= _MOST,
  )


def _or_none(kind: _Kind) -> _Kind:
  return _Kind(
    f"{kind.allowed}, or null",
    lambda value: value is None or kind.holds(value),
  )


def _list_of(kind: _Kind) -> _Kind:
  return _Kind(
    f"a list, each {kind.allowed}",
    lambda value: isinstance(value, list) and all(map(kind.holds, value)),
  )


def _named(kind: _Kind) -> _Kind:
  return _Kind(
    f"an object, each entry {kind.allowed}",
    lambda value: (
      isinstance(value, dict) and all(map(kind.holds, value.values()))
    ),
  )


def _object(
  fields: Mapping[str, _Kind], needed: Iterable[str] | None = None
) -> _Kind:
  needed = tuple(fields if needed is None else needed)
  return _Kind(
    f"an object with {', '.join(needed) or 'certain fields'}",
    lambda value: _fault(value, fields, needed) == "",
  )


def _fault(
  value: Any, fields: Mapping[str, _Kind], needed: Iterable[str]
) -> str:
  """Says what is wrong with an object; "" if nothing is."""
  if not isinstance(value, dict):
    return f"{shown(value)}; allowed: an object"
  for name in needed:
    if name not in value:
      return f"no {name}"
  for name, kind in fields.items():
    if name in value and not kind.holds(value[name]):
      return f"{name}: {shown(value[name])}; allowed: {kind.allowed}"
  return ""


_TEXT = _Kind("text", lambda value: isinstance(value, str))
_SHARE = _number(0, 1)
_FREE = _Kind("a number, text, Boolean or null", lambda v: not _is_compound(v))


def _is_compound(value: Any) -> bool:
  return isinstance(value, dict | list)


_DIAGNOSTIC = _object(
  {
    "rule": _TEXT,
    "value": _or_none(_number(-_MOST)),
    "flag": _Kind("true or false", lambda value: isinstance(value, bool)),
    "message": _TEXT,
    "title": _TEXT,
  },
  ("rule", "value", "flag", "message"),
)

_NUMBERS = {
  "step_size": _or_none(_number(0)),
  "num_steps": _or_none(_integer(0)),
  "num_restarts": _or_none(_integer(0)),
  "loss": _or_none(_TEXT),
  "seed": _or_none(_integer(0)),
  "options": _named(_FREE),
}

_ROW = {
  "model": _TEXT,
  "attack": _TEXT,
  "batch_norm": _Kind(
    "running or batch", lambda value: value in ("running", "batch")
  ),
  "norm": _or_none(_TEXT),
  "epsilon": _or_none(_number(0)),
  "num_examples": _integer(1),
  "accuracy": _SHARE,
  "dataset": _TEXT,
  "split": _TEXT,
  **_NUMBERS,
  "batch_size": _or_none(_integer(1)),
  "checkpoint_step": _or_none(_integer(0)),
  "seconds": _or_none(_number(0)),
  "class_accuracy": _or_none(_list_of(_or_none(_SHARE))),
  "nonfinite": _or_none(_integer(0)),
  "nonfinite_points": _or_none(_integer(0)),
  "nonfinite_gradients": _or_none(_integer(0)),
  "attacks": _list_of(
    _object(
      {"attack": _TEXT, "numbers": _TEXT, "accuracy": _SHARE},
      ("attack", "numbers"),
    )
  ),
  "diagnostics": _named(_DIAGNOSTIC),
  "correct": _or_none(_TEXT),
  "worst_of": _or_none(_TEXT),
  "members": _or_none(
    _list_of(_object({"attack": _TEXT, **_NUMBERS}, ("attack",)))
  ),
}
_NEEDED = (
  "model",
  "attack",
  "batch_norm",
  "norm",
  "epsilon",
  "num_examples",
  "accuracy",
)

_CORRUPTED = {
  "model": _TEXT,
  "benchmark": _TEXT,
  "dataset": _TEXT,
  "split": _TEXT,
  "corruption": _TEXT,
  "severity": _Kind(
    "an integer from 1 to 5",
    lambda value: type(value) is int and 1 <= value <= 5,
  ),
  "num_examples": _integer(1),
  "batch_norm": _ROW["batch_norm"],
  "accuracy": _SHARE,
  "images": _or_none(_TEXT),
  "batch_size": _or_none(_integer(1)),
  "seed": _or_none(_integer(0)),
  "checkpoint_step": _or_none(_integer(0)),
  "nonfinite": _or_none(_integer(0)),
  "seconds": _or_none(_number(0)),
}
_CORRUPTED_NEEDED = tuple(_CORRUPTED)[:9]

_SECTION = _Kind("an object", lambda value: isinstance(value, dict))
_CONFIGURATION = {
  "method": _TEXT,
  "seed": _integer(0),
  **dict.fromkeys(
    ("data", "model", "objective", "train", "teacher", "evaluation", "figures"),
    _SECTION,
  ),
}

_RUN = {
  "config": _or_none(_object(_CONFIGURATION, ())),
  "class_names": _or_none(_list_of(_TEXT)),
  "commit": _or_none(_TEXT),
  "command": _or_none(_TEXT),
  "date": _or_none(_TEXT),
  "devices": _list_of(_TEXT),
  "versions": _named(_FREE),
  "num_parameters": _named(_integer(0)),
  "checkpoints": _named(_object({"step": _integer(0), "which": _TEXT})),
}


def configuration_fault(tree: Mapping[str, Any]) -> str:
  """Says what is wrong with the sections of a configuration; "" if nothing is.

  Args:
    tree: Content of `config.json`, or its copy in `results.json`.
  """
  return _fault(tree, _CONFIGURATION, ())


def check(results: object) -> None:
  """Checks the content of a `results.json` that is given to a function.

  Raises:
    UserError: The first fault.
  """
  found = f"{shown(results)}; allowed: an object"
  if isinstance(results, Mapping):
    found = fault(results)
    if not found and results.get("format", 1) != 1:
      found = f"format {shown(results['format'])}"
  if found and "allowed: " not in found:
    found += "; allowed: the content of a results.json"
  if found:
    raise UserError(f"results: {found}")


_CERTIFICATE = {
  "model": _TEXT,
  "method": _TEXT,
  "norm": _TEXT,
  "epsilon": _number(0),
  "num_examples": _integer(1),
  "accuracy": _SHARE,
  "correct": _TEXT,
}


def _certificate_fault(results: Mapping[str, Any]) -> str:
  """Says what is wrong with the certificates; "" if nothing is."""
  found = results.get("certificates", [])
  if not isinstance(found, list):
    return f"certificates: {shown(found)}; allowed: a list"
  for number, one in enumerate(found, 1):
    bad = _fault(one, _CERTIFICATE, _CERTIFICATE) or _correct_fault(one)
    if bad:
      return f"certificate {number}: {bad}"
  return ""


def fault(results: Mapping[str, Any], needed: Iterable[str] = ()) -> str:
  """Says what is wrong with the content of a `results.json`.

  Args:
    results: The object.
    needed: Fields that each row must have besides those that all have.

  Returns:
    The first fault, as "row 3: accuracy: 1.5; allowed: ..."; "" if there is
    none.
  """
  rows = results.get("rows")
  if not isinstance(rows, list):
    return "no list of rows"
  for number, row in enumerate(rows, 1):
    if found := _fault(row, _ROW, (*_NEEDED, *needed)):
      return f"row {number}: {found}"
    if found := _correct_fault(row):
      return f"row {number}: correct: {found}"
  corrupted = results.get("corruptions", [])
  if not isinstance(corrupted, list):
    return "corruptions; allowed: a list"
  for number, row in enumerate(corrupted, 1):
    if found := _fault(row, _CORRUPTED, _CORRUPTED_NEEDED):
      return f"corruptions, row {number}: {found}"
  if found := _fault(results.get("run", {}), _RUN, ()):
    return f"run: {found}"
  if found := _certificate_fault(results):
    return found
  if not _named(_DIAGNOSTIC).holds(results.get("diagnostics", {})):
    return f"diagnostics; allowed: {_named(_DIAGNOSTIC).allowed}"
  return ""


def _correct_fault(row: Mapping[str, Any]) -> str:
  """Says what is wrong with the bits of a row, one an image; "" if nothing is."""
  text, count = row.get("correct"), row["num_examples"]
  if text is None:
    return ""
  size = -(-count // 8)
  try:
    packed = base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError):
    packed = b""
  bits = int.from_bytes(packed, "big")
  unused = 8 * size - count
  if len(packed) != size or bits & ((1 << unused) - 1):
    return f"{shown(text)}; allowed: base64 of {count} bits in {size} bytes"
  share = bits.bit_count() / count
  if abs(share - row["accuracy"]) > 1e-6:
    return (
      f"{bits.bit_count()} of {count} images, accuracy"
      f" {shown(row['accuracy'])}; allowed: the images that make the accuracy"
    )
  return ""
