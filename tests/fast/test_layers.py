"""Dependencies point down only, and foreign libraries stay in their place."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "atat_jax"

# From the bottom up; the numbers are the layers of the design. A module imports
# from rows above its own only. A new module or package must be given its place.
LAYERS = (
  "errors typing",  # ground
  "runs",  # a working directory on disk
  "rng checks compilation sharding metrics",
  "batch_norm",
  "losses attention optim data models",
  "interop",
  "attacks",  # attack
  "objectives",  # method
  "state",
  "training",  # step
  "steps checkpoints evaluation",  # judge
  "drawing runtime",  # show
  "analyses",
  "figures",
  "plan",
  "config",
  "findings",
  "report",
  "train",  # modes
  "evaluate",
  "pipeline explain",
)
RANKS = {name: rank for rank, row in enumerate(LAYERS) for name in row.split()}

# Who may import what. Everything that is not named here is free.
PLACES = {
  "ml_collections": ("config", "train", "evaluate", "report", "pipeline"),
  "orbax": ("checkpoints",),
  "tensorflow_datasets": ("data",),
  "sklearn": ("data",),
  "PIL": ("data",),
  "matplotlib": ("drawing", "figures"),
  "tensorboardX": ("training",),
  "absl": ("runtime",),
  "tensorflow": (),
  "torch": (),
  "clu": (),
  "haiku": (),
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: pathlib.Path) -> str:
  """atat_jax/data/base.py -> atat_jax.data.base."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {_name(path): path for path in MODULES}


def _top(name: str) -> str:
  """atat_jax.data.base -> data."""
  return name.split(".")[1]


def _tree(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path: pathlib.Path) -> Iterator[str]:
  """Names of all modules imported, at the top or inside functions."""
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: a relative import"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in NAMES else str(node.module)


every_module = pytest.mark.parametrize(
  "path", MODULES, ids=lambda path: _name(path)
)


def test_every_module_has_its_place():
  found = {_top(name) for name in NAMES if name != "atat_jax"}
  assert not found - set(RANKS), "give these a row in LAYERS"
  assert {"attacks", "steps", "train"} <= found  # the search finds things


@every_module
def test_dependencies_point_down(path):
  name = _name(path)
  if name == "atat_jax":
    assert not [i for i in _imports(path) if i.startswith("atat_jax")]
    return
  for imported in _imports(path):
    if imported.split(".")[0] != "atat_jax" or imported == "atat_jax":
      continue
    own, other = _top(name), _top(imported)
    assert own == other or RANKS[other] < RANKS[own], (
      f"{name} imports {imported}, which is not below it"
    )


@every_module
def test_libraries_stay_in_their_place(path):
  name = _name(path)
  own = "" if name == "atat_jax" else _top(name)
  for imported in _imports(path):
    library = imported.split(".")[0]
    assert own in PLACES.get(library, (own,)), f"{name} imports {imported}"


def test_no_test_and_no_script_needs_tensorflow():
  scripts = [ROOT / "main.py", *ROOT.glob("configs/*.py")]
  assert len(scripts) > 1
  for path in [*scripts, *ROOT.glob("tests/*.py")]:
    libraries = {imported.split(".")[0] for imported in _imports(path)}
    assert not libraries & {"tensorflow", "clu"}, path


@every_module
def test_only_sharding_knows_the_mesh(path):
  if _name(path) == "atat_jax.sharding":
    return
  makers = {"NamedSharding", "PartitionSpec", "P", "set_mesh", "shard_map"}
  for node in ast.walk(_tree(path)):
    match node:
      case ast.Call(func=ast.Attribute(attr=attr, value=value)):
        of_jax = ast.unparse(value).split(".")[0] == "jax"
        wrong = of_jax and attr in makers | {"Mesh", "make_mesh", "pmap"}
      case ast.Call(func=ast.Name(id=called)):
        wrong = called in makers | {"Mesh", "make_mesh", "pmap"}
      case _:
        continue
    assert not wrong, f"{path}:{node.lineno}: {ast.unparse(node)}"


def _public_functions(
  tree: ast.Module,
) -> Iterator[tuple[str, ast.FunctionDef]]:
  """Functions and methods that a user may call."""
  scopes = [("", tree)]
  while scopes:
    prefix, scope = scopes.pop()
    for node in scope.body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        scopes.append((f"{node.name}.", node))
      elif isinstance(node, ast.FunctionDef):
        if not node.name.startswith("_") or node.name == "__call__":
          yield prefix + node.name, node


@every_module
def test_public_functions_are_documented_and_typed(path):
  tree = _tree(path)
  assert ast.get_docstring(tree), f"{path}: no docstring"
  for name, function in _public_functions(tree):
    where = f"{path}:{function.lineno}: {name}"
    assert ast.get_docstring(function), f"{where} has no docstring"
    assert function.returns is not None, f"{where}: no return type"
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    for argument in named:
      if argument.arg not in ("self", "cls"):
        assert argument.annotation is not None, f"{where}: {argument.arg}"
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
