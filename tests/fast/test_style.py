"""Language of docstrings and comments, and the size and names of things.

A description is a noun phrase that stands alone, a docstring starts with a
verb or names the thing; see CONTRIBUTING.md.
"""

import ast
import collections
import importlib
import io
import pathlib
import pkgutil
import re
import tokenize
import types
from collections.abc import Iterator

import pytest

import atat_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(
  path
  for pattern in (
    "*.py",
    "atat_jax/**/*.py",
    "configs/*.py",
    "benchmarks/**/*.py",
    "launch/*.py",
    "tests/support/*.py",
  )
  for path in ROOT.glob(pattern)
)
MODULES = [path for path in FILES if path.is_relative_to(ROOT / "atat_jax")]

# Openings that make half a sentence of a description.
HALVES = "Of What Who Whose How As Where With From In".split()
SECTIONS = "Args Arguments Attributes Returns Yields Raises".split()

# One formula each, which would not be clearer in two parts.
LONG_FUNCTIONS: dict[str, int] = {}
LONGEST = 60


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
  """Line and text of every docstring, also those of constants."""
  for node in ast.walk(tree):
    for child in ast.iter_child_nodes(node):
      if (
        isinstance(child, ast.Expr)
        and isinstance(child.value, ast.Constant)
        and isinstance(child.value.value, str)
      ):
        yield child.lineno, child.value.value


def _openings(text: str) -> Iterator[str]:
  """First words of a docstring and of the descriptions in its sections."""
  yield text.strip().split(maxsplit=1)[0] if text.strip() else ""
  section = indent = None
  for line in text.splitlines():
    depth = len(line) - len(line.lstrip())
    heading = re.fullmatch(rf"\s*({'|'.join(SECTIONS)}):", line)
    if heading:
      section, indent = heading[1], None
      continue
    if section is None or not line.strip():
      continue
    indent = depth if indent is None else indent
    if depth < indent:
      section = None
    elif depth == indent:
      named = re.match(r"\s*[\w*.`, ]+?(?: \([^)]*\))?: +(\S+)", line)
      if named:
        yield named[1]
      elif section in ("Returns", "Yields"):
        yield line.split()[0]
        section = None


def _problems(text: str) -> list[str]:
  """Half sentences in the docstrings and comments of a source text."""
  found = []
  for line, docstring in _docstrings(ast.parse(text)):
    found += [
      f"line {line}: a description opens with {word!r}"
      for word in _openings(docstring)
      if word in HALVES
    ]
  last = 0
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type != tokenize.COMMENT:
      continue
    line, before = token.start[0], last
    last = line
    # A line that goes on with the comment above may open with anything.
    goes_on = before == line - 1 and token.line.lstrip().startswith("#")
    if not goes_on and re.match(r"(?i)#+ (of|what|whose)\b", token.string):
      found.append(f"line {line}: {token.string}")
  return found


def test_descriptions_stand_alone():
  found = {
    str(path.relative_to(ROOT)): problems
    for path in FILES
    if (problems := _problems(path.read_text(encoding="utf-8")))
  }
  assert not found


@pytest.mark.parametrize(
  "text",
  [
    '"""What a module has."""',
    'def f(x):\n  """Adds.\n\n  Args:\n    x: Of the sum.\n  """',
    'class A:\n  """A thing.\n\n  Attributes:\n    x (int): Whose it is.\n  """',
    'def f():\n  """Adds.\n\n  Returns:\n    What was added.\n  """',
    "x = 1  # of the sum",
    '"""A module."""\nX = 1\n"""Of all sums."""',
  ],
)
def test_the_lint_sees_half_sentences(text):
  assert _problems(text)
  whole = re.sub(r"(?i)\b(what|whose|of)\b", "Number", text)
  assert not _problems(whole)


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
  for node in ast.iter_child_nodes(tree):
    name = getattr(node, "name", "")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      assert node.end_lineno is not None
      yield prefix + name, node.end_lineno - node.lineno + 1
    yield from _functions(node, f"{prefix}{name}." if name else prefix)


def test_functions_are_short():
  long = {
    f"{path.relative_to(ROOT)}: {name}": lines
    for path in FILES
    for name, lines in _functions(ast.parse(path.read_text(encoding="utf-8")))
    if lines > LONG_FUNCTIONS.get(f"{path.stem}.{name}", LONGEST)
  }
  assert not long


def test_no_two_classes_share_a_name():
  places = collections.defaultdict(list)
  for path in MODULES:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
      if isinstance(node, ast.ClassDef):
        places[node.name].append(str(path.relative_to(ROOT)))
  shared = {name: found for name, found in places.items() if len(found) > 1}
  assert not shared


def test_no_function_hides_the_module_of_its_name():
  hidden = [
    info.name
    for info in pkgutil.walk_packages(atat_jax.__path__, "atat_jax.")
    for package, _, name in [info.name.rpartition(".")]
    if not isinstance(
      getattr(importlib.import_module(package), name, atat_jax),
      types.ModuleType,
    )
  ]
  # The public contract has the function, the layout the package of its parts.
  assert hidden == ["atat_jax.attacks.autoattack"]


def test_the_root_of_the_package_is_small():
  root = [p.stem for p in MODULES if p.parent.name == "atat_jax"]
  assert len(root) <= 23, sorted(root)
