"""Values of `--config.<field>=<value>`: what ml_collections reads, and more.

A fraction is a number, alone and in a tuple; a tuple needs no quotes around its
words, and None is an empty one. Whatever ml_collections reads has its value.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from atat_jax import models
from atat_jax.process import flag_values


class _Number(flags.FloatParser):
  """Parser of numbers and fractions."""

  def convert(self, argument: Any) -> float:
    """Reads a number.

    Raises:
      ValueError: Something else.
    """
    try:
      return super().convert(argument)
    except (TypeError, ValueError):
      pass
    try:
      return flag_values.number(str(argument))
    except (ValueError, argparse.ArgumentTypeError):
      raise ValueError("allowed: a number, or a fraction as in 8/255") from None


class _Integer(flags.IntegerParser):
  """Parser of integers."""

  def convert(self, argument: Any) -> int:
    """Reads an integer.

    Raises:
      ValueError: Something else.
    """
    try:
      return super().convert(argument)
    except (TypeError, ValueError):
      raise ValueError("allowed: an integer") from None


class _Boolean(flags.BooleanParser):
  """Parser of True and False."""

  def parse(self, argument: Any) -> bool:
    """Reads a Boolean.

    Raises:
      ValueError: Something else.
    """
    try:
      return super().parse(argument)
    except (TypeError, ValueError):
      raise ValueError("allowed: true or false") from None


class _Tuple(tuple_parser.TupleParser):
  """Parser of tuples: (1/255, 0.1), 2,2,2, running,batch, None."""

  def parse(self, argument: Any) -> tuple[Any, ...]:
    """Reads a tuple; one value is a tuple of one.

    Raises:
      ValueError: Something else.
    """
    if isinstance(argument, str):
      try:
        argument = flag_values.literal(argument)
      except ValueError:
        pass
      else:
        several = isinstance(argument, list | set | dict)
        argument = tuple(argument) if several else argument
        if isinstance(argument, str):
          return (argument,)
    try:
      found: tuple[Any, ...] = super().parse(argument)
    except ValueError:
      raise ValueError(
        "allowed: values between commas, as in (0.1,8/255)"
      ) from None
    return found


def own_fields(network: object, given: Iterable[str]) -> dict[str, Any]:
  """Returns fields of a network that no configuration has, with their defaults.

  Args:
    network: Name in `models.MODELS`; any other object has no fields.
    given: Names of fields.

  Returns:
    Those that the network has and a user may set.
  """
  if not isinstance(network, str) or network not in models.MODELS:
    return {}
  kinds = (bool, int, float, str, tuple)
  return {
    field.name: field.default
    for field in dataclasses.fields(models.MODELS[network])
    if field.name in given
    and field.name not in ("num_classes", "mean", "std", "image_size")
    and isinstance(field.default, kinds)
  }


class ConfigParser(flags.ArgumentParser):
  """Parser of --config, which lets in the fields that only some networks have.

  Args:
    parser: Parser of ml_collections, which loads the file.
    words: The command line, whose --config.model.* may name such fields.
  """

  def __init__(self, parser: flags.ArgumentParser, words: Sequence[str]):
    super().__init__()
    self._parser, self._words = parser, words

  def parse(self, path: str) -> Any:
    """Loads a configuration."""
    config = self._parser.parse(path)
    named = re.compile(r"--?(?:no)?config\.model\.(\w+)(?:=(.*))?", re.S)
    found = [match for word in self._words if (match := named.fullmatch(word))]
    if isinstance(config, ConfigDict) and found and "model" in config:
      given = {match[1]: match[2] for match in found}
      own = own_fields(given.get("name") or config.model.get("name"), given)
      with config.unlocked():
        config.model.update(
          {k: v for k, v in own.items() if k not in config.model}
        )
    return config


def register() -> None:
  """Has ml_collections read the values of fields so."""
  parsers = {float: _Number, int: _Integer, bool: _Boolean, tuple: _Tuple}
  for kind, parser in parsers.items():
    config_flags.register_flag_parser_for_type(kind, parser())
