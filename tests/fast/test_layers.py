"""Dependencies point down only, and foreign libraries stay in their place."""

import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "atat_jax"

# From the bottom up; the numbers are the layers of the design. A module imports
# from rows above its own only. A new module or package must be given its place.
LAYERS = (
  "errors typing",  # ground
  "process",  # of a command
  "untrusted",  # files of others
  "runs",  # a working directory on disk
  "checks",
  "sharding",
  "rng fields compilation metrics",
  "batch_norm",
  "losses attention optim data models",
  "interop",
  "attacks",  # attack
  "bounds",
  "objectives",  # method
  "state",
  "checkpoints",
  "training",  # step
  "steps evaluation",  # judge
  "drawing runtime",  # show
  "analyses",
  "figures",
  "plan",
  "config",
  "report",
  "train",  # modes
  "evaluate",
  "trial",
  "pipeline explain attack export",
  "cli",  # commands
)
RANKS = {name: rank for rank, row in enumerate(LAYERS) for name in row.split()}

# Who may import what. Everything that is not named here is free.
PLACES = {
  "ml_collections": ("cli", "config", "pipeline"),
  "orbax": ("checkpoints",),
  "tensorflow_datasets": ("data",),
  "sklearn": ("data",),
  "PIL": ("data",),
  "matplotlib": ("drawing", "figures"),
  "tensorboardX": ("training",),
  "safetensors": ("interop",),
  "pickletools": ("untrusted",),
  "pickle": (),  # it runs what a file says
  "marshal": (),
  "shelve": (),
  "absl": ("cli", "data", "runtime"),
  "grain": ("data",),
  "tensorflow": ("interop",),
  "torch": (),
  "equinox": (),
  "clu": (),
  "haiku": (),
}

MODULES = sorted(PACKAGE.rglob("*.py"))
SHARDING = str(PACKAGE / "sharding.py")


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


def test_every_module_has_its_place():
  found = {_top(name) for name in NAMES if name != "atat_jax"}
  assert not found - set(RANKS), "give these a row in LAYERS"
  assert {"attacks", "steps", "train"} <= found  # the search finds things


def test_dependencies_point_down():
  wrong = []
  for path in MODULES:
    name = _name(path)
    for imported in _imports(path):
      if imported.split(".")[0] != "atat_jax" or imported == "atat_jax":
        continue
      if name == "atat_jax":
        wrong.append(f"{name} imports {imported}")
        continue
      own, other = _top(name), _top(imported)
      if own != other and RANKS[other] >= RANKS[own]:
        wrong.append(f"{name} imports {imported}, which is not below it")
  assert not wrong


def test_libraries_stay_in_their_place():
  wrong = [
    f"{name} imports {imported}"
    for path in MODULES
    for name in [_name(path)]
    for own in ["" if name == "atat_jax" else _top(name)]
    for imported in _imports(path)
    if own not in PLACES.get(imported.split(".")[0], (own,))
  ]
  assert not wrong


def test_no_test_and_no_script_needs_tensorflow():
  scripts = [ROOT / "main.py", *ROOT.glob("configs/*.py")]
  assert len(scripts) > 1
  for path in [*scripts, *ROOT.glob("tests/**/*.py")]:
    libraries = {imported.split(".")[0] for imported in _imports(path)}
    assert not libraries & {"tensorflow", "clu"}, path


def _makes_a_mesh(node: ast.AST) -> bool:
  makers = {"NamedSharding", "PartitionSpec", "P", "set_mesh", "shard_map"}
  makers |= {"Mesh", "make_mesh", "pmap"}
  match node:
    case ast.Call(func=ast.Attribute(attr=attr, value=value)):
      return attr in makers and ast.unparse(value).split(".")[0] == "jax"
    case ast.Call(func=ast.Name(id=called)):
      return called in makers
  return False


def test_only_sharding_knows_the_mesh():
  makers = [
    f"{path}:{node.lineno}: {ast.unparse(node)}"
    for path in MODULES
    for node in ast.walk(_tree(path))
    if isinstance(node, ast.Call) and _makes_a_mesh(node)
  ]
  others = [line for line in makers if not line.startswith(SHARDING)]
  assert makers and not others


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


def _undocumented(path: pathlib.Path) -> Iterator[str]:
  """Public names of a module without docstring or types."""
  tree = _tree(path)
  if not ast.get_docstring(tree):
    yield f"{path}: no docstring"
  for name, function in _public_functions(tree):
    where = f"{path}:{function.lineno}: {name}"
    if not ast.get_docstring(function):
      yield f"{where}: no docstring"
    if function.returns is None:
      yield f"{where}: no return type"
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    for argument in named:
      if argument.arg not in ("self", "cls") and argument.annotation is None:
        yield f"{where}: {argument.arg} has no type"
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      if not ast.get_docstring(node):
        yield f"{path}: {node.name} has no docstring"


def test_public_functions_are_documented_and_typed():
  assert not [line for path in MODULES for line in _undocumented(path)]
