"""The command `atat-jax`: one program, a command for each kind of work.

`python -m atat_jax.cli` is the same. Nothing heavy is imported until a command
is known, so that the help comes at once.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import atat_jax
from atat_jax.errors import UserError, near
from atat_jax.process import commands, stops

_KEPT = "the same command goes on from what is written"


class Entry(NamedTuple):
  """A command of `atat-jax`.

  Attributes:
    text: Its work, in a few words.
    module: Module whose `main(argv, program=...)` does it.
    needs_jax: Whether it computes, so that the runtime is set up for it.
  """

  text: str
  module: str
  needs_jax: bool = False


MODES = ("run", "train", "evaluate", "figures", "replay")
"""Commands that are modes of `main.py`."""

COMMANDS: dict[str, Entry] = {
  "run": Entry("train, evaluate and report, all of it", "atat_jax.cli.modes"),
  "train": Entry("train only", "atat_jax.cli.modes"),
  "evaluate": Entry("evaluate what is trained", "atat_jax.cli.modes"),
  "figures": Entry("draw the figures of a run again", "atat_jax.cli.modes"),
  "replay": Entry("make one step of a training again", "atat_jax.cli.modes"),
  "attack": Entry("attack a network that is there", "atat_jax.attack", True),
  "explain": Entry("explain networks in pictures", "atat_jax.explain", True),
  "report": Entry("compare finished runs", "atat_jax.report.__main__"),
  "data": Entry("prepare CIFAR, describe other data", "atat_jax.data.prepare"),
  "import": Entry(
    "recognise PyTorch weights, make a checkpoint",
    "atat_jax.cli.importing",
    True,
  ),
  "export": Entry("write a network for PyTorch", "atat_jax.export", True),
  "fields": Entry("list the fields of a configuration", "atat_jax.cli.listing"),
}

_HELP = """\
usage: atat-jax COMMAND [arguments]

Trains, attacks, evaluates honestly and explains robust image classifiers.

{commands}

atat-jax COMMAND --help describes a command, atat-jax --version the version.

example (minutes on two CPU cores, no download):
  atat-jax run --config=digits --workdir=runs/digits
"""


def describe() -> str:
  """Returns the help of `atat-jax`."""
  lines = [f"  {name:<10}{entry.text}" for name, entry in COMMANDS.items()]
  return _HELP.format(commands="\n".join(lines))


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command in this process.

  Args:
    argv: Without the program; None: the command line.

  Raises:
    UserError: No such command, or bad input to it.
    SystemExit: Bad arguments, or the end of a command that has processes.
  """
  name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
  if name in ("-h", "--help", "help"):
    sys.stdout.write(describe())
    return
  if name in ("-V", "--version", "version"):
    sys.stdout.write(f"atat_jax {atat_jax.__version__}\n")
    return
  _run(name, rest)


def _run(name: str, words: Sequence[str]) -> None:
  """Runs a command by its name."""
  if name not in COMMANDS:
    raise UserError(
      f"command: {name!r}; allowed: {', '.join(COMMANDS)}{near(name, COMMANDS)}"
    )
  module = importlib.import_module(COMMANDS[name].module)
  options = {"mode": name} if name in MODES else {}
  module.main(words, program=f"atat-jax {name}", **options)


def start() -> None:
  """Runs the command line as a process of its own, see `process.commands`.

  Raises:
    SystemExit: The end of a command that failed.
  """
  commands.begin("stopped; the same command goes on from here")
  name, *rest = sys.argv[1:] or ["--help"]
  if name in MODES:
    modes = importlib.import_module(COMMANDS[name].module)
    words = [sys.argv[0], *rest]
    modes.start(words, program=f"atat-jax {name}", mode=name)
    return
  with commands.plain_exits(kept=_KEPT):
    if name in COMMANDS and COMMANDS[name].needs_jax:
      runtime = importlib.import_module("atat_jax.runtime")
      runtime.set_up(distributed=False)
    else:
      stops.started()
    main(sys.argv[1:])
