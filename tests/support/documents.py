"""Documents as text: blocks of code, and commands as their own parsers read them.

A command is checked by the code that would run it, up to the end of its parsing:
`main.py` by its flags and the plan that they make, everything else by argparse.
"""

import argparse
import importlib
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, NamedTuple

import pytest

from atat_jax import cli, config
from atat_jax.cli import modes
from atat_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = {
  str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
  for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
  for path in sorted(ROOT.glob(pattern))
}

# Programs of others, whose flags are their own affair.
FOREIGN = {
  *("[", "export", "for", "done", "scontrol"),
  *("git", "kubectl", "mkdocs", "mypy", "pip", "ruff", "sed"),
}


class Block(NamedTuple):
  """A block of code in a document.

  Attributes:
    document: Path of the document.
    line: Its number in the document, from 1.
    code: Its text.
  """

  document: str
  line: int
  code: str


def blocks(document: str, language: str) -> list[Block]:
  """Blocks of a language; those inside a list are moved to the left.

  Args:
    document: Path of the document, a key of `DOCUMENTS`.
    language: Word behind the fence; "" for none.
  """
  text = DOCUMENTS[document]
  return [
    Block(
      document,
      text.count("\n", 0, match.start()) + 2,
      textwrap.dedent(match[3]),
    )
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S)
    if match[2] == language
  ]


def prose(text: str) -> str:
  """The text of a document without its blocks."""
  return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)


# --- Splitting ---------------------------------------------------------------


def split(script: str) -> list[list[str]]:
  """Splits a script into the words of its commands, variables replaced.

  Args:
    script: Lines of bash without control structures but `for`.
  """
  script = re.sub(r"\\\n\s*", " ", script)
  script = re.sub(r"(^|\s)#.*$", "", script, flags=re.M)
  reader = shlex.shlex(script, posix=True, punctuation_chars=";|&\n")
  reader.whitespace, reader.commenters = " \t\r", ""
  reader.whitespace_split = True
  found: list[list[str]] = [[]]
  variables: dict[str, str] = {}
  for word in reader:
    if word and set(word) <= set(";|&\n"):
      found.append([])
    elif re.match(r"[A-Z_]+=", word) and not found[-1]:
      name, _, variables[name] = word.partition("=")
    elif word.startswith("$") and word[1:] in variables:
      found[-1] += variables[word[1:]].split()
    elif word != "do" or found[-1]:
      found[-1].append(word)
  return [words for words in found if words]


def commands() -> Iterator[tuple[str, list[str]]]:
  """Place and words of each command in the documents and docstrings."""
  for name, text in DOCUMENTS.items():
    for block in blocks(name, "bash"):
      for words in split(block.code):
        yield f"{name}, line {block.line}", words
    # The provenance of a number names the command of its own commit.
    text = re.sub(
      r"^`python [^`]*`,\s+commit `.*$", "", prose(text), flags=re.M
    )
    for line in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
      if re.match(r"(\S*python3?|atat-jax|pytest) \S+", line):
        yield name, shlex.split(line)
  for folder in ("atat_jax", "benchmarks", "configs", "launch", "notebooks"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      head = (
        path.read_text(encoding="utf-8").split('"""')[1].replace("\\\\", "\\")
      )
      lines = re.sub(r"\\\n\s*", " ", head)
      for line in re.findall(r"^ +((?:python|atat-jax) .*)$", lines, re.M):
        yield str(path.relative_to(ROOT)), split(line)[0]


# --- Parsing -----------------------------------------------------------------


class _Read(Exception):
  """A command line was read to its end."""


@contextmanager
def _reading_only(own: Mapping[str, pathlib.Path]) -> Iterator[None]:
  """Ends whatever reads a command line as soon as it is read."""
  read = argparse.ArgumentParser.parse_args
  make_plan = config.make_plan

  def planned(made: Any) -> Any:
    kind = made.data.name.partition(":")[0]
    if kind in own:
      made.data.dir = str(own[kind])
    if "depth" in made.model and made.model.name == "wide_resnet":
      # Tracing takes as long as a network is deep; 32 is refused where 8 is.
      made.model.depth = 6 + made.model.depth % 6
    return make_plan(made)

  def parse_args(self: Any, *args: Any, **kwargs: Any) -> Any:
    read(self, *args, **kwargs)
    raise _Read

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    patch.setattr(config, "make_plan", planned)
    yield


def fault(words: Sequence[str], own: Mapping[str, pathlib.Path]) -> str | None:
  """Says what is wrong with a command; None: its parser reads it.

  Args:
    words: The command and its arguments.
    own: Kind of own data ("npz", "folder") to data that are there, which stand
      for those that a plan would look for.
  """
  errors = StringIO()
  try:
    with _reading_only(own), redirect_stderr(errors):
      return _fault(list(words))
  except _Read:
    return None
  except SystemExit as end:
    text = str(end.code or "") if isinstance(end.code, str) else ""
    return (text or errors.getvalue() or "the command line is not read").strip()
  except (UserError, ValueError) as error:
    return str(error)


def _fault(words: list[str]) -> str | None:
  program = words[0].removeprefix(".venv/bin/")
  if program == "taskset":  # its flag, its cores, and the command
    return _fault(words[3:])
  if program == "sbatch":  # its flags, a script of launch/ and its arguments
    script = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
    return _fault(words[script:])
  if program in FOREIGN:
    return None
  if program.startswith("launch/"):
    return _launched(program, words[1:])
  if program == "pytest":
    return _pytest(words[1:])
  if program == "atat-jax":
    return _command(words[1:])
  if program not in ("python", "python3"):
    return f"{program}: no program that is known"
  return _python(words[1:])


def _python(words: list[str]) -> str | None:
  """Reads the command line of `python`."""
  if words[0] in ("-c", "-W"):
    return None
  if words[0] == "-m":
    module, rest = words[1], words[2:]
    if module in ("venv", "pip"):
      return None
    if module == "pytest":
      return _pytest(rest)
  elif not (ROOT / words[0]).is_file():
    return f"{words[0]}: no such file"
  elif words[0] == "main.py":
    return _modes(words[1:], "run")
  elif words[0].startswith("notebooks/"):
    return None
  else:
    module, rest = words[0].removesuffix(".py").replace("/", "."), words[1:]
  if module == "atat_jax.cli":
    return _command(rest)
  if module.startswith(("launch.", "tests.")):
    path = ROOT / (module.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    _main_flags(rest)
  else:
    found = _module(module)
  if not rest:
    return None  # named, not called
  found.main(rest)
  return "its main reads no command line"


def _module(name: str) -> Any:
  """Imports the module that `python -m` runs."""
  found = importlib.import_module(name)
  if not hasattr(found, "main"):
    found = importlib.import_module(f"{name}.__main__")
  return found


def _command(words: list[str]) -> str | None:
  """Reads the command line of `atat-jax`."""
  if words[0].startswith("-"):
    return None
  name, *rest = words
  if name not in cli.COMMANDS:
    return f"atat-jax {name}: no such command"
  if not rest:
    return None  # named, not called
  if name in cli.MODES:
    return _modes(rest, name)
  _module(cli.COMMANDS[name].module).main(rest, program=f"atat-jax {name}")
  return "its main reads no command line"


def _modes(words: list[str], mode: str) -> str | None:
  """Reads the command line of `main.py`, and makes the plan."""
  shown = {"--config=...": "--config=digits", "--workdir=...": "--workdir=w"}
  # The package of a store need not be there.
  words = [shown.get(x, x).replace("gs://", "/") for x in words]
  if not words or any(x.endswith("=...") or "help" in x for x in words):
    return None
  config.make_plan(modes.parse(words, mode=mode).config)
  return None


def _main_flags(words: list[str]) -> None:
  """Reads what follows `--`, the arguments of `main.py`."""
  if "--" in words:
    wrong = _modes(words[words.index("--") + 1 :], "run")
    if wrong:
      raise ValueError(wrong)


def _launched(script: str, words: list[str]) -> str | None:
  """Has a launch script print what it would do."""
  if script.endswith(".sbatch"):
    return _modes(words, "run")
  _main_flags(words)
  done = subprocess.run(
    ["bash", ROOT / script, "--dry_run", *words],
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stderr if done.returncode else None


def _pytest(words: list[str]) -> str | None:
  """Finds the files that pytest is asked to run."""
  paths = [word.partition("::")[0] for word in words if word.startswith("test")]
  missing = [path for path in paths if not (ROOT / path).exists()]
  return f"{missing[0]}: no such file" if missing else None
