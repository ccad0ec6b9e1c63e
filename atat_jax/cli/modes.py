"""The commands that train and evaluate: `main.py`, and `atat-jax run`.

Flags only; the work is in `atat_jax/pipeline.py`.
"""

import pathlib
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from atat_jax import pipeline, runtime
from atat_jax.cli import field_values, listing, shipped
from atat_jax.errors import UserError, near
from atat_jax.objectives import OBJECTIVES
from atat_jax.process import commands, job
from atat_jax.runs import files, locations

_HELP = """\
usage: {program} --config=NAME[:METHOD[,RECIPE]] --workdir=DIR [flags]

{description}

  --config         {names}
  --workdir        directory for everything that the run writes; the same
                   command goes on from what it holds
  --config.FIELD=VALUE
                   changes a field: 8/255, (0.1,0.2), true, None. All fields,
                   their defaults and allowed values: atat-jax fields [FIELD]
  --mode           part of the work: {modes}
                   (default: {mode})
  --step           step of the training that --mode=replay makes again, from 1
  --deterministic  make the numbers of a GPU repeat; slower
  --distributed    join the other processes of a pod, cluster or job
                   (docs/scaling.md); on plain hosts with --process_id,
                   --num_processes, --coordinator_address=HOST:PORT;
                   --wait_seconds=50 for the others
  --help_fields    as atat-jax fields; --helpfull: the flags of absl

example (minutes on two CPU cores, no download):
  {program} --config=digits --workdir=runs/digits{more}
"""

_DESCRIPTIONS = {
  "run": "Trains, evaluates, draws and reports; what is finished stays as it is.",
  "train": "Trains what is not trained yet.",
  "evaluate": "Evaluates the trained networks; rows that are there stay.",
  "figures": "Draws figures and page again from the files of a run.",
  "replay": "Makes one step of a training again, and says what happened in it.",
}

_HELP_FLAGS = ("-h", "-help", "--help", "-?", "--?", "--helpshort")


class Request(NamedTuple):
  """A command line of `main.py`, read.

  Attributes:
    mode: One of `pipeline.MODES`.
    config: The configuration.
    workdir: Working directory.
    step: Step that is made again, or None.
    distributed: Whether to join other processes.
    deterministic: Whether the numbers of a GPU repeat.
    coordinator_address: Host and port of process 0, or None.
    num_processes: Number of processes as text, or None.
    process_id: Number of this process as text, or None.
    wait_seconds: Longest wait for the other processes.
  """

  mode: str
  config: ConfigDict
  workdir: pathlib.Path
  step: int | None
  distributed: bool
  deterministic: bool
  coordinator_address: str | None = None
  num_processes: str | None = None
  process_id: str | None = None
  wait_seconds: int = 50


def describe(program: str, mode: str) -> str:
  """Returns the help of a command, on one screen.

  Args:
    program: Command as it is typed.
    mode: Its mode where no flag says another one.
  """
  names = (
    f"{', '.join(shipped.names())}; or the path of a file. METHOD:"
    f" {', '.join(OBJECTIVES)}, or a setting such as atat_mixture. RECIPE of"
    " cifar10 and cifar100: paper, modern, fast"
  )
  return _HELP.format(
    program=program,
    mode=mode,
    description=_DESCRIPTIONS[mode],
    names=f"\n{' ' * 19}".join(textwrap.wrap(names, 61)),
    modes=", ".join(pipeline.MODES),
    more=" --step=7" if mode == "replay" else "",
  )


def _define(values: flags.FlagValues, mode: str, argv: list[str]) -> None:
  """Defines the flags of `main.py`."""
  field_values.register()
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration, e.g. configs/cifar10.py:atat.",
    flag_values=values,
    lock_config=True,
    sys_argv=argv,
  )
  flag = values["config"]
  flag.parser = field_values.ConfigParser(flag.parser, argv)
  more: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string("workdir", None, "Directory of the run.", **more)
  flags.DEFINE_integer("step", None, "Step that replay makes.", **more)
  flags.DEFINE_bool("distributed", False, "Join other processes.", **more)
  for name in job.VARIABLES:
    flags.DEFINE_string(name, None, "Place in the job.", **more)
  flags.DEFINE_integer("wait_seconds", 50, "Wait for the others.", **more)
  flags.DEFINE_bool("deterministic", False, "Repeatable on a GPU.", **more)
  flags.DEFINE_enum("mode", mode, pipeline.MODES, "Part of the work.", **more)


def _located(argv: Sequence[str]) -> list[str]:
  """Puts the paths of shipped configurations in the place of their names."""
  words = list(argv)
  for number, word in enumerate(words):
    if word == "--":
      break
    if match := re.fullmatch(r"(--?config=)(.*)", word, re.S):
      words[number] = match[1] + shipped.locate(match[2])
    elif word in ("--config", "-config") and number + 1 < len(words):
      words[number + 1] = shipped.locate(words[number + 1])
  return words


def parse(argv: Sequence[str], *, mode: str = "run") -> Request:
  """Reads a command line.

  Args:
    argv: The arguments, without the program.
    mode: Mode where no flag says another one.

  Raises:
    UserError: An argument that is wrong, one line.
  """
  words = ["main.py", *_located(argv)]
  values = flags.FlagValues()
  _define(values, mode, words)
  values.append_flag_values(flags.FLAGS)  # those of absl
  try:
    with warnings.catch_warnings():  # ml_collections loads files as of old
      warnings.filterwarnings("ignore", r"the load_module\(\) method is")
      rest = values(words)
    if len(rest) > 1:
      raise flags.Error(f"unknown argument {rest[1]!r}; flags begin with --")
    found: dict[str, Any] = {x: values[x].value for x in Request._fields}
    for name in ("config", "workdir"):
      if found[name] is None:
        raise flags.Error(f"--{name} is missing")
    workdir = locations.find("--workdir", str(found["workdir"]))
    found["config"].items()  # a file that could not be read fails only here
  except UserError:
    raise
  except (flags.Error, OSError) as error:
    lines = [line for line in str(error).splitlines() if line.strip()]
    raise UserError(_plain(lines[-1].strip())) from None
  except Exception as error:
    wrong = _unknown_field(words) if _is_of_fields(error) else None
    raise UserError(wrong or f"--config {_reason(error)}") from None
  finally:
    flags.FLAGS.mark_as_parsed()
  return Request(**found | {"workdir": workdir})


def _plain(text: str) -> str:
  """Puts absl's message on a value of a field as all others are put."""
  match = re.fullmatch(r"flag --(config\.\S+?)=(.*): (allowed: .*)", text, re.S)
  if match:
    return f"{match[1]}: {match[2]!r}; {match[3]}"
  if match := re.fullmatch(r"flag --mode=(.*): value should be .*", text, re.S):
    modes = pipeline.MODES
    return (
      f"--mode: {match[1]!r}; allowed: {', '.join(modes)}"
      f"{near(match[1], modes)}"
    )
  return re.sub(r"^[\w.]*Error: (?=.*; allowed: )", "", text)


def _is_of_fields(error: Exception) -> bool:
  """Whether ml_collections has not found a field."""
  # Those that Python raises itself know the name that is missing.
  place = traceback.extract_tb(error.__traceback__)[-1]
  return (
    isinstance(error, AttributeError | KeyError | IndexError | TypeError)
    and "ml_collections" in place.filename
    and getattr(error, "name", None) is None
  )


def _unknown_field(words: Sequence[str]) -> str | None:
  """Names the first field on a command line that the configuration lacks."""
  texts = [
    words[number + 1] if not match[1] else match[2]
    for number, word in enumerate(words)
    if (match := re.fullmatch(r"--?config(=(.*))?", word, re.S))
  ]
  if not texts:  # in a --flagfile
    return None
  known = dict(listing.entries(shipped.load(texts[-1])))
  sections = {"", *(name for name in known if "." not in name)}
  for word in words:
    match = re.match(r"--?(?:no)?config\.([^=]*)", word)
    if match and match[1] not in known:
      section = match[1].rpartition(".")[0]
      section = section if section in sections else ""
      inside = [x for x in known if x.rpartition(".")[0] == section]
      meant = near(match[1], known) or near(match[1], inside)
      listed = ", ".join(x.rpartition(".")[2] for x in inside)
      return (
        f"config.{match[1]}: no such field; allowed: {listed}{meant};"
        " atat-jax fields describes them"
      )
  return None


def _reason(error: Exception) -> str:
  """Puts an error in reading the configuration on one line."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  inner = error.args[0] if error.args else ""
  text = inner.args[0] if isinstance(inner, Exception) else inner
  text = " ".join(str(text).split())
  if _is_of_fields(error) and isinstance(error, AttributeError | KeyError):
    return f"has no field {text}"
  where = f"{place.filename}, line {place.lineno}"
  if isinstance(error, SyntaxError):
    where = f"{error.filename}, line {error.lineno}"
  return f"cannot be read: {type(error).__name__}: {text} ({where})"


def _common(arguments: Sequence[str]) -> list[str]:
  """Returns the arguments without those that each process has of its own."""
  own = {*job.VARIABLES, "wait_seconds"}
  kept, skips = [], False
  for argument in arguments:
    name, equals, _ = argument.lstrip("-").partition("=")
    is_own = argument.startswith("-") and name in own
    if not skips and not is_own:
      kept.append(argument)
    skips = not skips and is_own and not equals
  return kept


def work(request: Request) -> None:
  """Sets the runtime up, runs the mode, and says where to look next.

  Args:
    request: The command line.

  Raises:
    SystemExit: An error from outside, one line, or a signal.
  """
  workdir = request.workdir
  kept = (
    f"what {workdir} holds is kept, and the same command goes on from there"
  )
  with runtime.plain_exits(workdir, kept):
    runtime.set_up(
      distributed=request.distributed,
      deterministic=request.deterministic,
      place={name: getattr(request, name) for name in job.VARIABLES},
      wait_seconds=request.wait_seconds,
      arguments=_common(sys.argv[1:]),
    )
    pipeline.run(request.mode, request.config, workdir, step=request.step)
    if jax.process_index() == 0:
      commands.say_next(_next(request))


def _next(request: Request) -> str:
  """Says where to look after a mode."""
  workdir = request.workdir
  return {
    "run": f"open {workdir / files.REPORT}; more figures: atat-jax explain"
    f" {workdir}",
    "train": "evaluate it: atat-jax evaluate with the same flags",
    "evaluate": "figures and page: atat-jax figures with the same flags",
    "figures": f"open {workdir / files.REPORT}",
    "replay": "the file above has the batch, the loss of each example and what"
    " was not finite in each array",
  }[request.mode]


def _helps(words: Sequence[str], program: str, mode: str) -> bool:
  """Prints the help that a command line asks for; returns whether it does."""
  if any(word in _HELP_FLAGS for word in words):
    sys.stdout.write(describe(program, mode))
    return True
  for word in words:
    if match := re.fullmatch(r"--?help_fields(?:=(.*))?", word, re.S):
      listing.main([match[1]] if match[1] else [])
      return True
  return False


def main(
  argv: Sequence[str] | None = None,
  *,
  program: str = "python main.py",
  mode: str = "run",
) -> None:
  """Runs the command line in this process.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help.
    mode: Mode where no flag says another one.

  Raises:
    UserError: Bad input, one clear line.
  """
  words = sys.argv[1:] if argv is None else list(argv)
  if _helps(words, program, mode):
    return
  work(parse(words, mode=mode))


def start(
  argv: Sequence[str], *, program: str = "python main.py", mode: str = "run"
) -> None:
  """Runs the command line as a process of absl; `main` without that.

  Args:
    argv: The command line, the program first.
    program: Command as it is typed, for the help.
    mode: Mode where no flag says another one.

  Raises:
    SystemExit: The end.
  """
  read: list[Request] = []

  def parser(words: Sequence[str]) -> list[str]:
    try:
      if _helps(words[1:], program, mode):
        sys.exit(0)
      read.append(parse(words[1:], mode=mode))
    except UserError as error:
      sys.exit(f"error: {error}")
    return list(words[:1])

  app.run(lambda _: work(read[0]), argv=list(argv), flags_parser=parser)
