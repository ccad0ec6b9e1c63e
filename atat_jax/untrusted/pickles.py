"""Interpreter of pickles that makes plain values only.

A pickle is a program: it names functions of the machine that it is read on,
calls them, and sets attributes of the results. Here a name stays a name and a
call a record of it. The standard library splits the program into instructions
(`pickletools.genops`, which runs nothing); of these, the ones that files of
weights and pictures need are carried out on a stack of plain values.

Each instruction costs a bounded time and memory: sharing stays sharing, places
in the memo are keys of a dict, and keys of dicts are no containers.
"""

import pickletools
from collections.abc import Callable
from typing import IO, Any, NamedTuple

LIMIT = 1 << 26
"""Largest program in bytes, 64 MiB."""

_MAX_INSTRUCTIONS = 3_000_000
_LONGEST_LINE = 1 << 20

_CONSTANTS = {
  "NONE": None,
  "NEWTRUE": True,
  "NEWFALSE": False,
  "EMPTY_TUPLE": (),
}
_VALUES = frozenset(
  "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE"
  " BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES"
  " BINBYTES8".split()
)
# Strings of Python 2, which are bytes.
_OLD_STRINGS = frozenset(("STRING", "BINSTRING", "SHORT_BINSTRING"))
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GET = frozenset(("GET", "BINGET", "LONG_BINGET"))


class Named(NamedTuple):
  """Name of a class or function, "module.name"; nothing is imported."""

  name: str


class Stored(NamedTuple):
  """Something that a file keeps outside of its pickle.

  Attributes:
    key: Identity of it, mostly a tuple.
  """

  key: Any


class Call:
  """Call that a pickle asks for and that is not made.

  Attributes:
    name: Name of the class or function.
    args: Arguments.
    state: State that the result would be given; None: none.
    entries: Entries that the result would be given, as a dict is.
  """

  __slots__ = ("args", "entries", "name", "state")

  def __init__(self, name: str, args: tuple[Any, ...]) -> None:
    self.name, self.args = name, args
    self.state: Any = None
    self.entries: dict[Any, Any] = {}


class Program:
  """File that pickles are read from, one after the other.

  Args:
    file: The open file.
    size: Number of bytes that are left in it.
  """

  def __init__(self, file: IO[bytes], size: int) -> None:
    self._file, self._left = file, size

  def _count(self, number: int) -> None:
    self._left -= number
    if self._left < 0:
      raise EOFError("the pickle ends early")

  def read(self, number: int) -> bytes:
    """Reads bytes; a claim beyond the end takes no memory."""
    if number < 0 or number > self._left:
      raise EOFError("the pickle ends early")
    data = self._file.read(number)
    self._count(len(data))
    return data

  def readline(self) -> bytes:
    """Reads a line of at most 1 MiB."""
    line = self._file.readline(_LONGEST_LINE)
    self._count(len(line))
    return line


class _Interpreter:
  def __init__(
    self, check_name: Callable[[str], None], *, text: bool, stored: list[Stored]
  ) -> None:
    self._check_name, self._text, self._stored = check_name, text, stored
    self._stack: list[Any] = []
    self._marks: list[int] = []
    self._memo: dict[int, Any] = {}

  def run(self, program: Program) -> Any:
    count = size = 0
    for opcode, argument, _ in pickletools.genops(program):  # type: ignore[arg-type]
      if opcode.name == "STOP":
        return self._pop()
      count += 1
      size += len(argument) if isinstance(argument, str | bytes) else 8
      if count > _MAX_INSTRUCTIONS or size > LIMIT:
        raise ValueError(
          f"a pickle of more than {_MAX_INSTRUCTIONS} instructions or"
          f" {LIMIT} bytes"
        )
      self._step(opcode.name, argument)
    raise EOFError("the pickle ends early")

  def _pop(self) -> Any:
    if self._marks and len(self._stack) <= self._marks[-1]:
      raise ValueError("the pickle takes more than it has put")
    return self._stack.pop()

  def _pop_mark(self) -> list[Any]:
    start = self._marks.pop()
    found = self._stack[start:]
    del self._stack[start:]
    return found

  def _step(self, name: str, argument: Any) -> None:
    push = self._stack.append
    if name in _VALUES:
      push(argument)
    elif name in _CONSTANTS:
      push(_CONSTANTS[name])
    elif name in _OLD_STRINGS:
      data = argument.encode("latin-1")
      push(data.decode() if self._text else data)
    elif name in _SHORT_TUPLES:
      items = [self._pop() for _ in range(_SHORT_TUPLES[name])]
      push(tuple(reversed(items)))
    elif name in _PUT:
      self._memo[int(argument)] = self._stack[-1]
    elif name in _GET:
      push(self._memo[int(argument)])
    else:
      step = getattr(self, f"_{name.lower()}", None)
      if step is None:
        raise ValueError(f"the pickle has the instruction {name}")
      step(argument)

  # The instructions, by their names in `pickletools`.

  def _proto(self, _: int) -> None:
    pass

  def _frame(self, _: int) -> None:
    pass

  def _memoize(self, _: None) -> None:
    self._memo[len(self._memo)] = self._stack[-1]

  def _mark(self, _: None) -> None:
    self._marks.append(len(self._stack))

  def _dup(self, _: None) -> None:
    self._stack.append(self._stack[-1])

  def _empty_list(self, _: None) -> None:
    self._stack.append([])

  def _empty_dict(self, _: None) -> None:
    self._stack.append({})

  def _tuple(self, _: None) -> None:
    self._stack.append(tuple(self._pop_mark()))

  def _list(self, _: None) -> None:
    self._stack.append(self._pop_mark())

  def _dict(self, _: None) -> None:
    items = self._pop_mark()
    self._stack.append({})
    self._set(items)

  # A set becomes a list: its elements need no hash.

  def _empty_set(self, _: None) -> None:
    self._stack.append([])

  def _additems(self, _: None) -> None:
    self._extend(self._pop_mark())

  def _frozenset(self, _: None) -> None:
    self._stack.append(self._pop_mark())

  def _append(self, _: None) -> None:
    self._extend([self._pop()])

  def _appends(self, _: None) -> None:
    self._extend(self._pop_mark())

  def _extend(self, items: list[Any]) -> None:
    if type(self._stack[-1]) is not list:
      raise ValueError("the pickle appends to something that is no list")
    self._stack[-1].extend(items)

  def _setitem(self, _: None) -> None:
    value, key = self._pop(), self._pop()
    self._set([key, value])

  def _setitems(self, _: None) -> None:
    self._set(self._pop_mark())

  def _set(self, items: list[Any]) -> None:
    target = self._stack[-1]
    if isinstance(target, Call):
      target = target.entries
    if type(target) is not dict:
      raise ValueError("the pickle sets entries of something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
      # Hashing a tuple in a tuple in a tuple ... would overflow the C stack.
      parts = key if type(key) is tuple else (key,)
      if not all(
        isinstance(x, str | bytes | int | float | None) for x in parts
      ):
        raise ValueError("a key of a dict that is neither text nor a number")
      target[key] = value

  def _global(self, names: str) -> None:
    self._name(*names.split(" ", 1))

  def _stack_global(self, _: None) -> None:
    name, module = self._pop(), self._pop()
    self._name(module, name)

  def _name(self, module: str, name: str) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
      raise ValueError("a name that is no text")
    full = f"{module}.{name}"
    self._check_name(full)
    self._stack.append(Named(full))

  def _reduce(self, _: None) -> None:
    args, function = self._pop(), self._pop()
    if not isinstance(function, Named) or type(args) is not tuple:
      raise ValueError("a call of something that is no function")
    self._stack.append(Call(function.name, args))

  _newobj = _reduce  # an object without a call of its __init__

  def _build(self, _: None) -> None:
    state, target = self._pop(), self._stack[-1]
    if not isinstance(target, Call):
      raise ValueError("the pickle sets attributes of a plain value")
    target.state = state

  def _binpersid(self, _: None) -> None:
    self._stored.append(Stored(self._pop()))
    self._stack.append(self._stored[-1])


def load(
  program: Program,
  check_name: Callable[[str], None],
  *,
  text: bool = False,
  stored: list[Stored] | None = None,
) -> Any:
  """Reads one pickle; calls nothing that it names.

  Args:
    program: File that stands at the pickle, and behind it afterwards.
    check_name: Function that raises for every name that the format does not
      need; it gets "module.name".
    text: Whether strings of Python 2 are text in UTF-8; False: bytes.
    stored: List that everything kept outside of the pickle is added to.

  Returns:
    Plain values: None, numbers, text, bytes, tuples, lists (also for sets),
    dicts; and `Named`, `Call` and `Stored` where the pickle has more. They may
    contain each other.

  Raises:
    Exception: A damaged or hostile file raises anything, also what
      `check_name` raises.
  """
  known = [] if stored is None else stored
  return _Interpreter(check_name, text=text, stored=known).run(program)
