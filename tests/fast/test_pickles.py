"""The interpreter of pickles against Python's own, on plain values."""

import collections
import io
import pickle
import pickletools
import random

import pytest

from atat_jax.untrusted import pickles

LEAVES = [
  *(None, True, False, 0, 1, -1, 255, 256, 65_536, 2**31, -(2**31), 2**300),
  *(0.0, -1.5, 1e300, float("inf"), "", "a", "\xe4\u2713\n\\", "x" * 300),
  *(b"", b"\0\xff\n", b"y" * 300, "\U0001f600"),
]


def refuse(name):
  raise ValueError(f"it asks for {name}")


def load(content, check=refuse, **options):
  program = pickles.Program(io.BytesIO(content), len(content))
  return pickles.load(program, check, **options)


def value(generator, depth=4):
  """A random plain value, parts of which occur several times."""
  if not depth or generator.random() < 0.3:
    return generator.choice(LEAVES)
  items = [value(generator, depth - 1) for _ in range(generator.randrange(5))]
  items += items[:1]
  match generator.randrange(3):
    case 0:
      return items
    case 1:
      return tuple(items)
  keys = ["k", 3, b"b", ("t", 1), None, 1.5][: len(items)]
  return dict(zip(keys, items, strict=True))


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_of_python(protocol):
  generator, compared = random.Random(protocol), 0
  for _ in range(300):
    wanted = value(generator)
    if _has_calls(pickle.dumps(wanted, protocol)):
      continue  # old protocols write bytes by a call
    compared += 1
    for content in (
      pickle.dumps(wanted, protocol),
      pickletools.optimize(pickle.dumps(wanted, protocol)),
    ):
      assert load(content) == wanted
  assert compared > 100


def _has_calls(content):
  return any(op.name == "REDUCE" for op, _, _ in pickletools.genops(content))


def test_what_is_shared_stays_shared():
  part = ["x"]
  first, second, third = load(pickle.dumps([part, part, {"a": part}]))
  assert first is second is third["a"]


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_are_lists(protocol):
  found = load(pickle.dumps({"a": {1, 2}, "b": frozenset("x")}, protocol))
  assert sorted(found["a"]) == [1, 2] and found["b"] == ["x"]


@pytest.mark.parametrize("protocol", range(6))
def test_names_stay_names_and_calls_are_not_made(protocol):
  content = pickle.dumps(collections.OrderedDict(a=1), protocol)
  asked = []
  found = load(content, asked.append)
  assert asked == ["collections.OrderedDict"]
  assert isinstance(found, pickles.Call)
  assert (found.name, found.entries) == (asked[0], {"a": 1})


def test_several_in_one_file_are_read_one_by_one():
  content = pickle.dumps([1]) + pickle.dumps({"b": 2}) + b"rest"
  file = io.BytesIO(content)
  program = pickles.Program(file, len(content))
  assert pickles.load(program, refuse) == [1]
  assert pickles.load(program, refuse) == {"b": 2}
  assert file.read() == b"rest"
