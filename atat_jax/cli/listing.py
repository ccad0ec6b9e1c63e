"""Every field of a configuration: default, meaning and allowed values.

The defaults are a configuration's, the meanings those in the docstrings of the
classes that hold the fields, and the allowed values what the plan says when it
refuses others: nothing is written twice.
"""

import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from atat_jax import analyses, config, models, objectives, plan
from atat_jax.cli import field_values, shipped
from atat_jax.errors import UserError, near
from atat_jax.process import arguments, commands

PROGRAM = "python -m atat_jax.cli fields"

# Values that few fields take; the first that is refused tells what is allowed.
_WRONG: dict[type, tuple[Any, ...]] = {
  int: (-1,),
  float: (-1.0, float("nan")),
  str: ("?",),
  type(None): ("?", 1),
  tuple: ((-1,), ("?",)),
}


class Field(NamedTuple):
  """A field of a configuration.

  Attributes:
    name: Dotted name.
    default: Its value in the configuration.
    meaning: Its meaning, in a sentence.
    allowed: Allowed values, in words.
  """

  name: str
  default: Any
  meaning: str
  allowed: str


def fields(made: ConfigDict, only: Sequence[str] | None = None) -> list[Field]:
  """Describes the fields of a configuration.

  Args:
    made: A configuration that is valid.
    only: Dotted names of the fields that are described; None: all.

  Returns:
    The fields, in the order of the configuration.
  """
  meanings = _meanings(made)
  return [
    Field(name, value, meanings.get(name, ""), _allowed(made, name, value))
    for name, value in _leaves(made)
    if only is None or name in only
  ]


def entries(
  tree: Mapping[str, Any] | ConfigDict, path: str = ""
) -> Iterator[tuple[str, Any]]:
  """Yields the sections and fields of a configuration, by their dotted names.

  Args:
    tree: The configuration or a section of it.
    path: Name of the section with a dot behind it; "": all of it.
  """
  for name, value in tree.items():
    yield path + name, value
    if isinstance(value, ConfigDict | Mapping):
      yield from entries(value, f"{path}{name}.")


def _leaves(made: ConfigDict) -> list[tuple[str, Any]]:
  """Fields of a configuration, without its sections."""
  return [
    (name, value)
    for name, value in entries(made)
    if not isinstance(value, ConfigDict | Mapping)
  ]


def _meanings(made: ConfigDict) -> dict[str, str]:
  """Meaning of each field, by its dotted name."""
  classes: dict[str, type] = {
    "data": plan.DataPlan,
    "model": models.MODELS[made.model.name],
    "objective": objectives.OBJECTIVES[made.method],
    "train": plan.StagePlan,
    "teacher": plan.StagePlan,
    "evaluation": plan.EvaluationPlan,
    "figures": analyses.FigureSettings,
  }
  found = {
    f"{section}.{name}": text
    for section, kind in classes.items()
    for name, text in _attributes(kind).items()
  }
  return found | config.MEANINGS


def _attributes(kind: type) -> dict[str, str]:
  """Reads the descriptions in the docstrings of a class and its bases."""
  found: dict[str, str] = {}
  for base in reversed(kind.__mro__):
    _, _, section = (base.__doc__ or "").partition("Attributes:\n")
    for match in re.finditer(
      r"^    (\w+(?:, \w+)*): (.*(?:\n      .*)*)", section, re.M
    ):
      text = " ".join(match[2].split())
      found |= dict.fromkeys(match[1].split(", "), text)
  return found


def _allowed(made: ConfigDict, name: str, value: Any) -> str:
  """Asks the plan which values a field may have."""
  if isinstance(value, bool):
    return "true, false"
  found = []
  for wrong in _WRONG[type(value)]:
    try:
      config.make_plan(_changed(made, name, wrong))
    except UserError as error:
      field, _, allowed = str(error).partition("; allowed: ")
      if field.startswith(f"{name}: ") and allowed:
        found.append(allowed)
  # A wrong type says less than a wrong value.
  better = [text for text in found if "each of it" not in text]
  return (better or found or ["text"])[0]


def _changed(made: ConfigDict, name: str, value: Any) -> ConfigDict:
  """Copies a configuration with one value that its type would not let in."""
  copy = made.copy_and_resolve_references()
  *sections, field = name.split(".")
  place = copy
  for section in sections:
    place = place[section]
  with place.unlocked(), place.ignore_type():
    place[field] = value
  return copy


def shown(value: Any) -> str:
  """Writes a value as it can be given: 8/255, (0.5,0.75), pgd20.

  Args:
    value: Value of a field.
  """
  if isinstance(value, tuple):
    inner = ",".join(map(shown, value))
    return f"({inner},)" if len(value) == 1 else f"({inner})"
  if isinstance(value, float) and value != round(value, 3):
    levels = round(255 * value, 6)
    if levels / 255 == value:
      return f"{levels:g}/255"
  return str(value)


def _chosen(names: Sequence[str], text: str) -> list[str]:
  """Fields that a text names: from their start, or else anywhere in them."""
  chosen = [name for name in names if name.startswith(text)]
  chosen = chosen or [name for name in names if text in name]
  if not chosen:
    raise UserError(
      f"field: {text!r}; allowed: the name or a part of the name of a field"
      f"{near(text, names)}"
    )
  return chosen


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> None:
  """Prints the fields that the command line names.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help.

  Raises:
    UserError: No such field or configuration.
  """
  flags = arguments.Parser(
    program,
    "[FIELD] [--config=NAME[:METHOD[,RECIPE]]]",
    description="Lists the fields of a configuration: default, meaning, allowed"
    " values.",
    example="train.epsilon",
  )
  flags.add_argument(
    "field", nargs="?", default="", metavar="FIELD", help="name, or part of one"
  )
  flags.add_argument(
    "--config",
    default="default:atat",
    help="configuration whose values are shown (%(default)s)",
  )
  flags.add_argument(
    "--model",
    help="network whose fields are shown; default: the configuration's",
  )
  args = flags.parse_args(argv)
  try:
    made = shipped.load(args.config)
  except ValueError as error:
    raise UserError(str(error)) from None
  if args.model is not None:
    _take_network(made, args.model)
  names = [name for name, _ in _leaves(made)]
  for field in fields(made, _chosen(names, args.field)):
    sys.stdout.write(_describe(field))
  commands.say_next(
    "change one by --config.FIELD=VALUE; the fields of another method: --config"
    "=default:trades"
  )


def _take_network(made: ConfigDict, name: str) -> None:
  """Puts a network with all of its fields into a configuration."""
  known = models.field_names(name)
  with made.unlocked():
    kept = {k: v for k, v in made.model.items() if k in (*known, "name")}
    own = field_values.own_fields(name, known)
    made.model = ConfigDict(own | kept | {"name": name})


def _describe(field: Field) -> str:
  lines = [f"{field.name} = {shown(field.default)}"]
  for text in (field.meaning, f"allowed: {field.allowed}"):
    lines += textwrap.wrap(
      text, 78, initial_indent="    ", subsequent_indent="    "
    )
  return "\n".join(lines) + "\n"
