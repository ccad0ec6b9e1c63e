"""Collectives of a compiled program, with the loops that they are in.

Reads the text of XLA's optimised HLO. A combined all-reduce is one instruction
with a tuple of operands.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_KIND = re.compile(rf"\s({'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(
  r"(?:calls|to_apply|condition|body|branch_computations|called_computations)="
  r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "s32": 4, "u32": 4}


class Collective(NamedTuple):
  """One collective of a program.

  Attributes:
    kind: One of `KINDS`.
    loops: Number of loops around it.
    sizes: Bytes of each array in it.
    origin: Names of the operations it was made of (metadata).
  """

  kind: str
  loops: int
  sizes: tuple[int, ...]
  origin: str

  @property
  def size(self) -> int:
    """Bytes of all arrays."""
    return sum(self.sizes)


def find(program: str) -> list[Collective]:
  """Finds the collectives of a program.

  Args:
    program: HLO, as `compiled.as_text()` prints it.
  """
  computations, entry = _computations(program)
  return list(_walk(computations, entry, 0))


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
  found: dict[str, list[str]] = {}
  entry, current = "", None
  for line in program.splitlines():
    head = _HEAD.match(line)
    if head and " = " not in line:
      current = head[2]
      found[current] = []
      if head[1]:
        entry = current
    elif current is not None and (match := _LINE.match(line)):
      found[current].append(match[2])
  return found, entry


def _walk(
  computations: Mapping[str, list[str]], name: str, loops: int
) -> Iterator[Collective]:
  for line in computations.get(name, ()):
    if kind := _KIND.search(line):
      shapes = _SHAPE.findall(line[: kind.start()])
      origin = re.search(r'op_name="([^"]*)"', line)
      yield Collective(
        kind[1],
        loops,
        tuple(_BYTES.get(d, 4) * math.prod(_sides(s)) for d, s in shapes),
        origin[1] if origin else "",
      )
      continue
    body = _BODY.search(line)
    for one, several in _CALLED.findall(line):
      for called in [one] if one else re.findall(r"[\w.\-]+", several):
        inside = body is not None and called == body[1]
        yield from _walk(computations, called, loops + inside)


def _sides(text: str) -> list[int]:
  return [int(side) for side in text.split(",") if side]
