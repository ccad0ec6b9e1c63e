"""Bad input in bulk: one line that names the argument, never a raw traceback.

Every public function and class is either in `ENTRIES` with the kinds of its
arguments, or belongs to the parts that only the package itself calls. Each
argument is replaced by every value that its kind must refuse
(tests/support/bad_values.py), the others being right.
"""

import re
from typing import Any

import pytest
from bad_values import World
from public_functions import ENTRIES, Entry

from atat_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
  return World(tmp_path_factory.mktemp("world"))


def _problem(
  entry: Entry, argument: str, label: str, value: Any, right: dict[str, Any]
) -> str | None:
  """What is wrong about how a bad value is answered; None: nothing."""
  where = f"{entry.name}({argument}={label})"
  try:
    entry.function(**{**right, argument: value})
  except UserError as error:
    message = str(error)
    if not message.isprintable() or len(message) > 2_000:
      return f"{where}: not one short line: {message[:300]!r}"
    names = "|".join(filter(None, [argument, entry.says.get(argument)]))
    if not re.search(rf"\b({names})\b", message):
      return f"{where}: does not name the argument: {message}"
    if ": " not in message or "allowed" not in message:
      return f"{where}: does not say what is allowed: {message}"
    return None
  except Exception as error:
    return f"{where}: raw {type(error).__name__}: {str(error)[:200]!r}"
  return f"{where}: accepted"


CASES = [(entry, argument) for entry in ENTRIES for argument in entry.kinds]


def _problems(
  entry: Entry, argument: str, world: World, some: int | None
) -> list[str]:
  bank = entry.values(argument)
  labels = list(bank)
  if some is not None and len(labels) > some:
    start = CASES.index((entry, argument))
    labels = [labels[(start + i * 7) % len(labels)] for i in range(some)]
  right = entry.right(world)
  found = []
  for label in labels:
    value = bank[label](world)
    problem = _problem(entry, argument, label, value, right)
    if problem:
      found.append(problem)
  return found


@pytest.mark.slow
@pytest.mark.parametrize(
  ("entry", "argument"), CASES, ids=[f"{e.name}-{a}" for e, a in CASES]
)
def test_every_bad_value_is_refused_in_one_line(entry, argument, world):
  found = _problems(entry, argument, world, None)
  assert not found, "\n".join(found)
