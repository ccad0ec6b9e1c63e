"""Bad input in bulk: one line that names the argument, never a raw traceback.

Every public function and class is either in `ENTRIES` (public_functions.py)
with the kinds of its arguments, or among the parts that only the package calls.
Each argument is replaced by every value that its kind must refuse
(bad_values.py), the others being right. Nothing is compiled for a refusal.
"""

import collections
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import bad_values
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from bad_values import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_functions import ENTRIES, PARTS, Entry

import atat_jax
from atat_jax import (
  analyses,
  attacks,
  attention,
  config,
  evaluation,
  models,
  objectives,
  optim,
)
from atat_jax.attacks.autoattack import versions
from atat_jax.data import batches
from atat_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
  return World(tmp_path_factory.mktemp("world"))


# --- The table ---------------------------------------------------------------


def _problem(
  entry: Entry, argument: str, label: str, value: Any, right: dict[str, Any]
) -> str | None:
  """What is wrong about how a bad value is answered; None: nothing."""
  where = f"{entry.name}({argument}={label})"
  try:
    entry.function(**{**right, argument: value})
  except UserError as error:
    return _fault(str(error), entry, argument, label, value, where)
  except Exception as error:
    return f"{where}: raw {type(error).__name__}: {str(error)[:200]!r}"
  return f"{where}: accepted"


def _fault(
  message: str,
  entry: Entry,
  argument: str,
  label: str,
  value: Any,
  where: str,
) -> str | None:
  """What is wrong about a message; None: nothing."""
  if not message.isprintable() or len(message) > 2_000:
    return f"{where}: not one short line: {message[:300]!r}"
  if label in bad_values.FILES:  # names the file, and the system's reason
    return None if str(value) in message else f"{where}: {message}"
  names = "|".join(filter(None, [argument, entry.says.get(argument)]))
  if not re.search(rf"\b({names})\b", message):
    return f"{where}: does not name the argument: {message}"
  if ": " not in message or "allowed" not in message:
    return f"{where}: does not say what is allowed: {message}"
  return None


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_bad_value_is_refused_in_one_line(entry, world):
  right = entry.right(world)
  found = [
    problem
    for argument in entry.kinds
    for label, make in entry.values(argument).items()
    if (problem := _problem(entry, argument, label, make(world), right))
  ]
  assert not found, "\n".join(found)


def test_the_table_is_large():
  cases = [
    (entry.name, argument, label)
    for entry in ENTRIES
    for argument in entry.kinds
    for label in entry.values(argument)
  ]
  assert len(set(cases)) == len(cases) > 10_000


def test_every_argument_of_the_public_functions_has_a_kind():
  """But for those that are no values: flags of tests, free keywords."""
  missing = []
  arguments = collections.defaultdict(set)
  for entry in ENTRIES:
    arguments[entry.function] |= set(entry.kinds)
  for function, known in arguments.items():
    for name, parameter in inspect.signature(function).parameters.items():
      free = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
      if not free and name not in known | {"tree", "cache_dir", "needed"}:
        missing.append(f"{function.__module__}.{function.__name__}: {name}")
  assert sorted(missing) == sorted(UNCHECKED)


UNCHECKED = [
  # Checked where they are read.
  "atat_jax.attention.check_layers: names",
  "atat_jax.data.cifar.read_cifar10: data_dir",
  "atat_jax.data.cifar.read_cifar100: data_dir",
  "atat_jax.data.digits.read: data_dir",
  "atat_jax.data.spec: source",
  "atat_jax.explain.load_runs: data_dir",
  # Any pytree.
  "atat_jax.models.adapted.from_functions: weights",
]


# --- Completeness ------------------------------------------------------------


def _public() -> Iterator[tuple[str, Any]]:
  """Public functions and classes of the package, by module and name."""
  walk = pkgutil.walk_packages(atat_jax.__path__, "atat_jax.")
  for module in walk:
    if module.name.endswith("__main__"):
      continue
    found = vars(importlib.import_module(module.name))
    for name, value in found.items():
      own = getattr(value, "__module__", None) == module.name
      if own and not name.startswith("_") and callable(value):
        yield f"{module.name.removeprefix('atat_jax.')}.{name}", value


def _is_record(value: Any) -> bool:
  """Whether a class only holds what a function returns or another checks."""
  if not inspect.isclass(value):
    return False
  made = dataclasses.is_dataclass(value) or hasattr(value, "_fields")
  return (
    (made and "__post_init__" not in vars(value))
    or issubclass(value, Exception)
    or hasattr(value, "__required_keys__")
    or getattr(value, "_is_protocol", False)
  )


def test_every_public_function_is_in_the_table():
  listed = {entry.function for entry in ENTRIES}
  missing = [
    name
    for name, value in _public()
    if value not in listed
    and not _is_record(value)
    and name not in PARTS
    and not any(name.startswith(f"{part}.") for part in PARTS)
  ]
  assert not missing, "give these entries in tests/support/public_functions.py"


def test_the_parts_exist():
  names = [name for name, _ in _public()]
  unknown = [
    part
    for part in PARTS
    if part not in names and not any(n.startswith(f"{part}.") for n in names)
  ]
  assert not unknown


# --- Unusual values that are right -------------------------------------------

RIGHT: dict[str, Callable[[World], Any]] = {
  "a raw key": lambda w: attacks.fgsm(
    **_attack(w) | {"key": jax.random.PRNGKey(0)}
  ),
  "a raw key of numpy": lambda w: attacks.fgsm(
    **_attack(w) | {"key": np.zeros(2, np.uint32)}
  ),
  "images of numpy": lambda w: attacks.fgsm(
    **_attack(w) | {"images": np.asarray(w.images, np.float64)}
  ),
  "nested lists": lambda w: attacks.fgsm(
    **_attack(w) | {"images": np.asarray(w.images).tolist(), "labels": [1, 4]}
  ),
  "labels of one byte": lambda w: attacks.fgsm(
    **_attack(w) | {"labels": np.array([1, 4], np.uint8)}
  ),
  "labels of eight bytes": lambda w: attacks.fgsm(
    **_attack(w) | {"labels": np.array([1, 4], np.int64)}
  ),
  "a radius on the device": lambda w: attacks.fgsm(
    **_attack(w) | {"epsilon": jnp.asarray(0.1)}
  ),
  "a radius of numpy": lambda w: attacks.fgsm(
    **_attack(w) | {"epsilon": np.float32(0.1)}
  ),
  "a radius of no axes": lambda w: attacks.fgsm(
    **_attack(w) | {"epsilon": np.array(0.1)}
  ),
}


def _attack(w: World) -> dict[str, Any]:
  return {
    "key": w.key,
    "classifier": w.classifier,
    "images": w.images,
    "labels": w.labels,
    "epsilon": 0.1,
  }


@pytest.mark.parametrize("case", RIGHT)
def test_unusual_values_that_are_right_give_the_usual_result(case, world):
  usual = attacks.fgsm(**_attack(world))
  np.testing.assert_allclose(RIGHT[case](world), usual, atol=1e-6)


def test_layers_may_be_a_list_and_variables_may_have_more_collections(world):
  arguments = (world.images, world.labels)
  usual = attention.grad_cam(world.model, world.variables, *arguments)
  found = attention.grad_cam(
    world.model,
    {**world.variables, "cache": {"x": jnp.zeros(1)}},
    *arguments,
    layers=["conv"],
  )
  assert usual.keys() == found.keys() == {"conv"}
  np.testing.assert_array_equal(found["conv"], usual["conv"])


def test_integers_of_numpy_are_integers():
  one = batches.train_indices(
    np.int64(3), np.int32(2), num_examples=np.uint8(9), batch_size=np.int8(2)
  )
  np.testing.assert_array_equal(
    one, batches.train_indices(3, 2, num_examples=9, batch_size=2)
  )


# --- Whatever comes ----------------------------------------------------------

JUNK = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.integers(-3, 40),
  st.floats(),
  st.floats(0, 2),
  st.complex_numbers(),
  st.text(max_size=20),
  st.binary(max_size=5),
  st.sampled_from(["linf", "l2", "l1", "cross_entropy", "margin", "dlr"]),
  st.lists(st.integers(0, 5), max_size=3),
  st.lists(st.floats(), max_size=3).map(np.array),
  st.tuples(st.integers(), st.text(max_size=3)),
  st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
  st.integers(-5, 300).map(np.int16),
  st.floats(width=32).map(np.float32),
  st.booleans().map(np.bool_),
  st.just(object()),
)
"""Values of any type; also some that are right."""

_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


def _is_number(x: Any) -> bool:
  if isinstance(x, np.generic | np.ndarray) and x.ndim == 0:
    x = x.item()
  return isinstance(x, int | float) and not isinstance(x, bool)


def _is_integer(x: Any) -> bool:
  return isinstance(x, int | np.integer) and not isinstance(x, bool)


VALID: dict[str, Callable[[Any], bool]] = {
  "positive": lambda x: _is_number(x) and _SMALLEST <= x <= _LARGEST,
  "epsilon": lambda x: _is_number(x) and _SMALLEST <= x <= 1,
  "count": lambda x: _is_integer(x) and 1 <= x < 2**31,
  "odd count": lambda x: _is_integer(x) and 3 <= x < 2**31 and x % 2 == 1,
  "weight": lambda x: _is_number(x) and (x == 0 or 0 < x <= _LARGEST),
  "fraction": lambda x: _is_number(x) and 0 <= x < 1,
  "boolean": lambda x: isinstance(x, bool | np.bool_),
  "seed": lambda x: _is_integer(x) and 0 <= x < 2**31,
}
"""Kind to the rule by which a value is right, written independently."""

CHEAP = {
  optim.make_schedule,
  optim.make_optimizer,
  analyses.FigureSettings,
  evaluation.parse,
  versions.make,
  objectives.create,
}
FUZZED = [
  (entry, argument)
  for entry in ENTRIES
  if entry.function in CHEAP
  for argument, kind in entry.kinds.items()
  if kind in VALID
]


def _check_junk(world: World, data: Any) -> None:
  entry, argument = data.draw(st.sampled_from(FUZZED))
  value = data.draw(JUNK)
  valid = VALID[entry.kinds[argument]](value)
  right = entry.right(world)
  if not valid:
    assert _problem(entry, argument, repr(value), value, right) is None
    return
  try:
    entry.function(**{**right, argument: value})
  except UserError as error:  # for another reason, such as two that exclude
    assert _fault(str(error), entry, argument, "", value, entry.name) is None
    assert repr(value) not in ("0.5", "1"), error


@settings(
  max_examples=400,
  deadline=None,
  database=None,
  suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_whatever_comes_is_refused_in_one_line_or_right(world, data):
  _check_junk(world, data)


@pytest.mark.slow
@settings(
  max_examples=20_000,
  deadline=None,
  database=None,
  suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_whatever_comes_at_length(world, data):
  _check_junk(world, data)


@settings(
  max_examples=300,
  deadline=None,
  database=None,
  suppress_health_check=list(HealthCheck),
)
@given(st.text(max_size=30) | st.from_regex(r"pgd[0-9]*(:[a-z_]+=[0-9a-z.]*)?"))
def test_any_text_is_a_protocol_or_is_refused_in_one_line(text):
  try:
    found = evaluation.parse(text, epsilon=0.1, step_size=0.1)
  except UserError as error:
    assert str(error).isprintable() and "allowed" in str(error)
  else:
    assert found.describe()


# --- Fields of a configuration -----------------------------------------------

BAD_FIELDS = (
  None, 5, -1, 2.5, 1e39, 1e-60, 2**31, 10**30, float("nan"), float("inf"),
  "junk", "a\nb", "", b"x", ("x",), (None,), {}, True, object(),
)  # fmt: skip


def _fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in section.items():
    if hasattr(value, "items"):
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _fits(value: Any, default: Any) -> bool:
  """Whether a bad value could be right for a field, by its type alone."""
  if default is None or isinstance(default, str):
    return value is None or isinstance(value, str)
  if isinstance(default, bool):
    return isinstance(value, bool)
  if isinstance(default, float):  # ml_collections makes 1.0 of True
    return isinstance(value, int | float) and abs(value) < 1e30
  if isinstance(default, int):
    return isinstance(value, int) and not isinstance(value, bool)
  return value == ()


@pytest.mark.parametrize(
  ("method", "step"),
  [
    ("atat", 5),  # each field with every fifth value, in turn
    *(
      pytest.param(method, 1, marks=pytest.mark.slow)
      for method in ("atat", "trades", "tla")
    ),
  ],
)
def test_every_bad_field_of_a_configuration_is_named(method, step):
  base = tiny.load_config("digits", method)
  found = []
  for number, (field, default) in enumerate(_fields(base)):
    *sections, leaf = field.split(".")
    for value in BAD_FIELDS[number % step :: step]:
      made = base.copy_and_resolve_references()
      node = made
      for section in sections:
        node = node[section]
      with node.unlocked(), node.ignore_type():
        node[leaf] = value
      try:
        config.make_plan(made)
      except UserError as error:
        message = str(error)
        if leaf not in message or not message.isprintable():
          found.append(f"{field}={value!r}: {message}")
      except Exception as error:
        found.append(f"{field}={value!r}: raw {type(error).__name__}: {error}")
      else:
        if not _fits(value, default) or math.isinf(_size(value)):
          found.append(f"{field}={value!r}: accepted")
  assert not found, "\n".join(found)


def _size(value: Any) -> float:
  return abs(value) if isinstance(value, float) else 0.0


# --- Networks ----------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_refuses_images_that_it_cannot_take(name):
  model = models.create(name, num_classes=3, mean=(0.5,), std=(0.5,))
  if name == "wide_resnet":
    model = models.create(
      name, depth=8, width=1, normalization="dataset", mean=(0.5,), std=(0.5,)
    )
  with pytest.raises(UserError, match=r"mean: 1 numbers? for 3 channels"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
