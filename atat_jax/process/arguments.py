"""Arguments of the commands: help on one screen, errors on one line."""

import argparse
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from atat_jax.errors import near, one_line
from atat_jax.process import flag_values


class _Format(argparse.RawDescriptionHelpFormatter):
  """Flags by their names alone, one line each where the text fits."""

  def __init__(self, prog: str, **options: Any):
    super().__init__(prog, max_help_position=20, width=80, **options)

  def start_section(self, heading: str | None) -> None:
    """Begins a group without its heading."""
    super().start_section(argparse.SUPPRESS if heading else heading)

  def _format_action_invocation(self, action: argparse.Action) -> str:
    if not action.option_strings:
      return str(action.metavar or action.dest)
    several = " ..." if action.nargs in ("+", "*") else ""
    return action.option_strings[0] + several


class Parser(argparse.ArgumentParser):
  """Parser whose help is short and whose errors are one line.

  Args:
    program: Command as it is typed, such as "atat-jax attack".
    usage: Arguments in brief, behind the program.
    description: Purpose of the command, in a sentence.
    example: Arguments of a command that works, behind the program.
  """

  def __init__(
    self, program: str, usage: str, *, description: str, example: str
  ):
    super().__init__(
      prog=program,
      usage=f"{program} {usage}",
      description=description,
      epilog=f"example:\n  {program} {example}",
      formatter_class=_Format,
      add_help=False,
    )
    self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

  def add_weights(self) -> None:
    """Adds the flags that say how a file of weights is read."""
    self.add_argument("--entry", help="entry of the weights file to take")
    self.add_argument(
      "--field",
      action="append",
      type=flag_values.assignment,
      default=[],
      metavar="NAME=VALUE",
      help="NAME=VALUE of the network that the file does not show",
    )

  def error(self, message: str) -> NoReturn:
    """Ends the process with one line and status 2.

    Args:
      message: Message of argparse.
    """
    self.exit(
      2, f"error: {one_line(self._helped(message))}; see {self.prog} --help\n"
    )

  def _helped(self, message: str) -> str:
    """Adds the name that may be meant to the message of a misspelt one."""
    wrong = re.match(r"unrecognized arguments: (-[^\s=]+)", message)
    if wrong:
      flags = self._option_string_actions
      return f"{message}{near(wrong[1], _long(flags))}"
    return message


def _long(flags: Iterable[str]) -> list[str]:
  return [flag for flag in flags if flag.startswith("--")]
