"""Configurations that come with the package, found by name.

In a clone they are in `configs/` beside the package, in a wheel inside it.
"""

import importlib.util
import pathlib
import sys
from typing import Any

import atat_jax
from atat_jax.errors import UserError, near


def folder() -> pathlib.Path:
  """Returns the folder of the configurations."""
  package = pathlib.Path(atat_jax.__file__).resolve().parent
  inside = package / "configs"
  return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
  """Returns the names of the configurations, such as "cifar10"."""
  return sorted(
    path.stem for path in folder().glob("*.py") if path.stem[0] != "_"
  )


def locate(text: str) -> str:
  """Puts the path of a shipped configuration in the place of its name.

  Args:
    text: Value of --config: a name or a path, maybe with a choice behind a
      colon, as in "cifar10:at,fast". A file of that path comes first;
      "configs/cifar10.py" is the shipped one where there is no such file.

  Returns:
    The same with a path.

  Raises:
    UserError: Neither a file nor a name.
  """
  given, colon, choice = text.partition(":")
  path = pathlib.Path(given)
  if given and _exists(path) and not (path.is_dir() and given in names()):
    return text
  name = path.stem if path.suffix == ".py" else given
  if name in names() and given in (name, f"{name}.py", f"configs/{name}.py"):
    return f"{folder() / name}.py{colon}{choice}"
  raise UserError(
    f"--config: {given!r}; allowed: a file, or one of {', '.join(names())}"
    f"{near(name, names())}"
  )


def load(text: str) -> Any:
  """Loads a configuration.

  Args:
    text: See `locate`.

  Returns:
    A ConfigDict, which nothing has been changed in.

  Raises:
    UserError: Neither a file nor a name.
  """
  path, colon, choice = locate(text).partition(":")
  spec = importlib.util.spec_from_file_location("shipped_configuration", path)
  if spec is None or spec.loader is None:
    raise UserError(f"--config: {path!r}; allowed: a Python file")
  module = importlib.util.module_from_spec(spec)
  found = list(sys.path)
  try:
    spec.loader.exec_module(module)  # which looks for its neighbours
  finally:
    sys.path[:] = found
  return module.get_config(*([choice] if colon else []))


def _exists(path: pathlib.Path) -> bool:
  try:
    return path.exists()
  except (OSError, ValueError):  # a name that is too long, a null byte
    return False
