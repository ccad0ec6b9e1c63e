"""Fields of a network as a text, which its file of weights carries."""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from atat_jax import models
from atat_jax.errors import UserError, shown
from atat_jax.runs import files

TEXT = "atat_jax"
"""Name of the text among those of a `.safetensors` file."""

# They are how a network computes, not what.
_COMPUTATION = ("dtype", "convolution", "parent", "name")
_SCALARS = (str, int, float, bool, type(None))


class Description(NamedTuple):
  """Network without its weights.

  Attributes:
    name: Name in `models.MODELS`.
    fields: Fields that say what it computes.
  """

  name: str
  fields: dict[str, Any]

  def create(self, **fields: Any) -> nn.Module:
    """Makes the network; given fields precede those of the description.

    Raises:
      UserError: A field that it does not have, or a value out of range.
    """
    return models.create(self.name, **(self.fields | fields))


def _plain(value: Any) -> Any:
  """Returns a field in types that JSON and Python's source text have."""
  if isinstance(value, list | tuple):
    return tuple(map(_plain, value))
  return value.item() if isinstance(value, np.generic) else value


def fields_of(model: nn.Module) -> dict[str, Any]:
  """Returns the fields that say what a network computes.

  Args:
    model: The network.
  """
  found = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
  return {k: _plain(v) for k, v in found.items() if k not in _COMPUTATION}


def describe(model: nn.Module) -> Description:
  """Describes a network of `models.MODELS`.

  Args:
    model: The network.

  Raises:
    UserError: A network of another class.
  """
  for name, kind in models.MODELS.items():
    if type(model) is kind:
      return Description(name, fields_of(model))
  raise UserError(
    f"model: {type(model).__name__}; allowed: {', '.join(models.MODELS)}, see"
    " models.create"
  )


def encode(description: Description) -> str:
  """Writes a description as a text.

  Args:
    description: The description.
  """
  return json.dumps(description._asdict(), allow_nan=False)


def decode(text: str) -> Description:
  """Reads a description.

  Args:
    text: Result of `encode`, or whatever a file of others has in its place.

  Raises:
    UserError: Not a description of a network here.
  """
  found = files.parse_json(text.encode(), "the description")
  match found:
    case {"name": str(name), "fields": dict(fields), **rest} if not rest:
      pass
    case _:
      raise UserError("the description: allowed: a name and fields")
  plain: dict[str, Any] = {}
  for field, value in fields.items():
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(x, _SCALARS) for x in values):
      raise UserError(
        f"the description: {shown(field)}: {shown(value)}; allowed: a number, a"
        " text, or a list of these"
      )
    plain[field] = tuple(value) if isinstance(value, list) else value
  if unknown := set(plain).intersection(_COMPUTATION):
    raise UserError(f"the description: {shown(min(unknown))}; allowed: fields")
  return Description(name, plain)
