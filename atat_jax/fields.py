"""Types of a dataclass's fields, checked against its annotations.

Python checks no annotation: a truthy text passes for a Boolean, and a Boolean
for a number. Numbers must survive the devices as well, which hold float32 and
int32: 1e39 is finite on the host and infinite there, 1e-50 positive and 0.
"""

import dataclasses
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from atat_jax import checks
from atat_jax.errors import UserError, near, shown

T = TypeVar("T")

_INT32 = np.iinfo(np.int32)
_FLOAT32 = float(np.finfo(np.float32).max)
_NUMBERS = (int, float, np.integer, np.floating)


def _problem(kind: Any, value: object, bits: bool) -> str | None:
  """Says which values an annotation allows; None: this one is all right.

  Args:
    kind: The annotation.
    value: The value.
    bits: Whether a number must fit into 32 bits as well.
  """
  if isinstance(value, jax.core.Tracer):
    return None
  origin = typing.get_origin(kind)
  if origin in (types.UnionType, typing.Union):
    found = [_problem(one, value, bits) for one in typing.get_args(kind)]
    known = [one for one in found if one]
    return " or ".join(known) if len(known) == len(found) else None
  if origin is tuple:
    return _tuple_problem(typing.get_args(kind), value, bits)
  if kind is types.NoneType:
    return None if value is None else "None"
  if kind is bool:
    # An array of one Boolean could not be hashed.
    return None if isinstance(value, bool | np.bool_) else "True or False"
  if kind is str or origin is typing.Literal:
    return None if isinstance(value, str) else "text"
  if kind in (int, float):
    return _number_problem(kind, checks.scalar(value), bits)
  return None


def _tuple_problem(
  kinds: tuple[Any, ...], value: object, bits: bool
) -> str | None:
  inner, *rest = kinds
  variable = rest == [Ellipsis]
  each = (
    kinds
    if not variable
    else (inner,) * (len(value) if isinstance(value, tuple) else 0)
  )
  if not isinstance(value, tuple) or len(value) != len(each):
    return f"a tuple of {_named(inner)}" + (
      "" if variable else f", {len(kinds)} of them"
    )
  found = (_problem(k, v, bits) for k, v in zip(each, value, strict=True))
  problem = next((one for one in found if one), None)
  return problem and f"a tuple, each of it {problem}"


def _named(kind: Any) -> str:
  return {int: "integers", float: "numbers", str: "texts"}.get(kind, "values")


def _number_problem(kind: type, value: Any, bits: bool) -> str | None:
  # Without `bits`, a fraction for a size is left to the check of its range.
  wanted = (int, np.integer) if kind is int and bits else _NUMBERS
  if isinstance(value, bool) or not isinstance(value, wanted):
    return "an integer" if kind is int else "a number"
  if not bits:
    return None
  if kind is int:
    if _INT32.min <= value <= _INT32.max:
      return None
    return f"an integer of 32 bits, at most {_INT32.max}"
  size = abs(value) if isinstance(value, int) else abs(float(value))
  if not size <= _FLOAT32:  # a NaN as well
    return f"a finite number of 32 bits, at most {_FLOAT32:.3g} in size"
  if value and not np.float32(value):
    return "0, or a number that is not 0 in 32 bits"
  return None


def check_value(
  name: str, kind: Any, value: object, *, bits: bool = True
) -> None:
  """Checks one value against an annotation.

  Args:
    name: Name of the field, for the message.
    kind: The annotation; other than numbers, Booleans, texts, and tuples and
      unions of them, everything passes.
    value: The value.
    bits: Whether a number must fit into 32 bits as well.

  Raises:
    UserError: A value of another type, or beyond the numbers of 32 bits.
  """
  problem = _problem(kind, value, bits)
  if problem:
    raise UserError(f"{name}: {shown(value)}; allowed: {problem}")


def check_values(
  kind: type[Any], values: Mapping[str, Any], *, bits: bool = True
) -> None:
  """Checks values against the annotations of a dataclass's fields.

  Args:
    kind: A dataclass.
    values: Fields to their values; those that the class does not have are left
      alone.
    bits: Whether numbers must fit into 32 bits as well. A check of the range,
      which knows what is allowed, comes before that.

  Raises:
    UserError: A value of another type, or beyond the numbers of 32 bits.
  """
  for field in dataclasses.fields(kind):
    if field.name in values:
      check_value(field.name, field.type, values[field.name], bits=bits)


def check_names(
  given: Collection[str], known: Iterable[str], required: Iterable[str] = ()
) -> None:
  """Checks that fields exist, and that none is missing.

  Args:
    given: Names that are given.
    known: Names that exist.
    required: Names that must be given.

  Raises:
    UserError: A name that does not exist, or that is missing.
  """
  known = sorted(known)
  for name in given:
    if name not in known:
      raise UserError(
        f"{name}: no such field; allowed: {', '.join(known)}{near(name, known)}"
      )
  for name in required:
    if name not in given:
      raise UserError(f"{name}: missing; allowed: a configuration that has it")


def make(kind: type[T], given: Mapping[str, Any], **others: Any) -> T:
  """Makes a dataclass of given fields, each of which must exist.

  Args:
    kind: The dataclass.
    given: Fields that a user gives.
    **others: Fields that no user gives.

  Returns:
    The instance.

  Raises:
    UserError: A field that is unknown, missing or of another type.
  """
  known = {field.name for field in dataclasses.fields(kind)} - {*others}  # type: ignore[arg-type]
  check_names(given, known, known.intersection(required(kind)))
  check_values(kind, given, bits=False)
  made = kind(**given, **others)
  check_values(kind, given)
  return made


def required(kind: type[Any]) -> list[str]:
  """Returns the names of a dataclass's fields that have no default."""
  return [
    field.name
    for field in dataclasses.fields(kind)
    if field.default is field.default_factory is dataclasses.MISSING
  ]
