"""Fingerprints of callables that hold no state: equal ones compute the same.

A function that refers to an array, to an object whose fields can change or to
a module that is not known has none. It must be traced to see what it computes
(`captures`). Everything else that can be changed from outside, such as the
value of a closure's cell or of a global name, is part of the fingerprint.
"""

import builtins
import dataclasses
import dis
import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

# Packages whose functions compute the same whenever they are called.
_TRUSTED = frozenset(
  "atat_jax collections dataclasses flax functools itertools jax jaxlib math"
  " ml_dtypes numpy operator optax typing".split()
)
_FORBIDDEN = frozenset(
  "__build_class__ __import__ compile eval exec globals input locals open"
  " vars".split()
)
_PLAIN = (type(None), bool, int, str, bytes, type(...))
# Attributes of a class that say nothing about what its instances compute.
_IGNORED = frozenset(
  "__annotate__ __annotate_func__ __annotations__ __annotations_cache__"
  " __dataclass_fields__ __dataclass_params__ __dict__ __doc__"
  " __firstlineno__ __match_args__ __module__ __qualname__"
  " __static_attributes__ __weakref__".split()
)
_GENERATED = frozenset(
  "__eq__ __hash__ __init__ __repr__ _compact_name_scope_methods _parent_ref"
  " _state parent scope".split()
)
# Object in which jax.tree_util.Partial keeps a functools.partial.
_SHIM = "_HashableCallableShim"


class Unknown(Exception):
  """Raised where a value has no fingerprint."""


def _root(value: Any) -> str:
  return str(getattr(value, "__module__", None)).partition(".")[0]


def _is_global(value: Any) -> bool:
  """Whether a value is what its module and name say."""
  module = sys.modules.get(str(getattr(value, "__module__", None)))
  name = getattr(value, "__qualname__", None)
  return isinstance(name, str) and getattr(module, name, None) is value


def _is_generated(value: type) -> bool:
  """Whether a class is a dataclass, as linen modules are, too."""
  return "__dataclass_fields__" in vars(value)


@functools.lru_cache(maxsize=4096)
def _global_names(
  code: types.CodeType,
) -> tuple[tuple[str, str | None], ...] | None:
  """Global names that code reads, and what it looks up in each.

  Returns:
    Pairs of a name and the attribute that is read from it at once, if any;
    None: the code does something to names that cannot be followed.
  """
  found: list[tuple[str, str | None]] = []
  instructions = list(dis.get_instructions(code))
  following = [*instructions[1:], None]
  for now, then in zip(instructions, following, strict=True):
    name = now.opname
    if name.startswith(("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME")):
      return None
    if name.startswith(("IMPORT", "LOAD_BUILD_CLASS")):
      return None
    if name.startswith(("STORE_DEREF", "DELETE_DEREF")):
      if now.argval in code.co_freevars:
        return None
    if name.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR")):
      attribute = None
      if then and then.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
        attribute = str(then.argval)
      found.append((str(now.argval), attribute))
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      inner = _global_names(constant)
      if inner is None:
        return None
      found += inner
  return tuple(dict.fromkeys(found))


class _Reader:
  """Reads one value; what it has met before stands for itself.

  Attributes:
    foreign: Whether something was read that compares otherwise than by its
      fingerprint: a function or class of the user, or a list.
  """

  def __init__(self) -> None:
    self.foreign = False
    self._met: dict[int, int] = {}

  def read(self, value: Any) -> Hashable:
    """Returns the fingerprint, or raises `Unknown`."""
    kind = type(value)
    if kind in _PLAIN:
      return kind, value
    if kind in (float, complex):
      return kind, repr(value)
    if kind in (tuple, frozenset):
      return kind, kind(map(self.read, value))
    if kind in (list, dict):
      self.foreign = True
      items = value.items() if kind is dict else value
      return kind, tuple(map(self.read, items))
    if isinstance(value, np.dtype | enum.Enum):
      return value
    if isinstance(value, types.ModuleType):
      return self._module(value)
    if id(value) in self._met:
      return "met", self._met[id(value)]
    self._met[id(value)] = len(self._met)
    return self._object(value)

  def _module(self, value: types.ModuleType) -> Hashable:
    name = value.__name__
    if name.partition(".")[0] not in _TRUSTED or name == "numpy.random":
      raise Unknown
    return value.__name__

  def _object(self, value: Any) -> Hashable:
    if isinstance(value, types.FunctionType):
      return self._function(value)
    if isinstance(value, types.BuiltinFunctionType):
      if isinstance(value.__self__, types.ModuleType):
        return value
      raise Unknown
    if isinstance(value, type):
      return self._class(value)
    if _root(value) in _TRUSTED and _is_global(value):
      return value  # e.g. jax.nn.relu, which is no plain function
    if _root(value) == "jax" and type(value).__name__ == _SHIM:
      value = value.fun
    if type(value) is functools.partial:
      self.foreign = True
      parts = value.func, value.args, value.keywords
      return "partial", *map(self.read, parts)
    return self._instance(value)

  def _function(self, value: types.FunctionType) -> Hashable:
    trusted = _root(value) in _TRUSTED
    if trusted and _is_global(value):
      return value
    self.foreign = True
    cells = []
    for cell in value.__closure__ or ():
      try:
        cells.append(self.read(cell.cell_contents))
      except ValueError as error:  # an empty cell
        raise Unknown from error
    names = _global_names(value.__code__)
    if names is None:
      raise Unknown
    return (
      value.__code__,
      tuple(cells),
      tuple(self._name(value, *pair) for pair in names),
      self.read(value.__defaults__),
      self.read(value.__kwdefaults__),
      self.read(value.__dict__),  # attributes of the function
    )

  def _name(
    self, function: types.FunctionType, name: str, attribute: str | None
  ) -> Hashable:
    if name in function.__globals__:
      value = function.__globals__[name]
      if value is np and attribute in (None, "random"):
        raise Unknown  # numbers may be drawn while it is traced
      return name, self.read(value)
    if name in _FORBIDDEN or not hasattr(builtins, name):
      raise Unknown
    return name

  def _class(self, value: type) -> Hashable:
    if _root(value) in _TRUSTED or value.__module__ == "builtins":
      return value
    self.foreign = True
    found: list[Hashable] = [value.__qualname__]
    for base in value.__mro__:
      if _root(base) in _TRUSTED or base.__module__ == "builtins":
        found.append(base)
        continue
      for name, member in vars(base).items():
        if name in _IGNORED or (name in _GENERATED and _is_generated(base)):
          continue
        found.append((name, self._member(member)))
    return tuple(found)

  def _member(self, member: Any) -> Hashable:
    if isinstance(member, property):
      parts = member.fget, member.fset, member.fdel
      return "property", tuple(map(self._member, parts))
    if isinstance(member, staticmethod | classmethod):
      return type(member).__name__, self._member(member.__func__)
    if isinstance(member, types.FunctionType):
      return self.read(inspect.unwrap(member))  # linen wraps methods
    return self.read(member)

  def _instance(self, value: Any) -> Hashable:
    """A frozen dataclass or a linen module, by its fields."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    linen = any(
      base.__module__ == "flax.linen.module" and base.__name__ == "Module"
      for base in type(value).__mro__
    )
    if not (linen or (parameters is not None and parameters.frozen)):
      raise Unknown
    if linen and (value.scope is not None or value.parent is not None):
      raise Unknown
    fields = tuple(
      (field.name, self.read(getattr(value, field.name)))
      for field in dataclasses.fields(value)
    )
    return self.read(type(value)), fields


class Keyed:
  """A callable that compares by its fingerprint.

  Args:
    value: The callable.
    key: Its fingerprint.
  """

  def __init__(self, value: Callable[..., Any], key: Hashable):
    self.value, self._key = value, key

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the callable."""
    return self.value(*args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    """Reads an attribute of the callable."""
    if name in ("value", "_key"):  # not made yet
      raise AttributeError(name)
    return getattr(self.value, name)

  def __hash__(self) -> int:
    """Returns the hash of the fingerprint."""
    return hash(self._key)

  def __eq__(self, other: object) -> bool:
    """Returns whether the fingerprints are equal."""
    return isinstance(other, Keyed) and self._key == other._key


def keyed(value: Callable[..., Any]) -> Callable[..., Any] | None:
  """Returns a callable that equals those that compute the same.

  Args:
    value: A callable.

  Returns:
    The callable itself if it compares so, else a `Keyed`; None if what it
    computes is not known without tracing it.
  """
  if isinstance(value, Keyed):
    return value
  reader = _Reader()
  try:
    found = reader.read(value)
    hash(found)
  except (Unknown, TypeError, AttributeError, ValueError, RecursionError):
    return None
  return Keyed(value, found) if reader.foreign else value
