"""Checks of arguments: one clear error, before any compilation.

Values are checked where they are concrete; inside jit only shapes and dtypes
can be. Nothing that is passed here moves an array off its device but the checks
of its values, which wait for one small transfer: they belong at the public
entries, not in loops.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Iterable, KeysView, Mapping, Sequence, ValuesView
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from atat_jax.errors import UserError, near, shown
from atat_jax.runs import wording
from atat_jax.typing import Array, PyTree, Variables

LARGEST_INTEGER = 2**31 - 1
"""Largest int32, as integers are on a device."""

_TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)


def _concrete(x: object) -> bool:
  return not isinstance(x, jax.core.Tracer)


# Values of any kind.


def array(value: Any, name: str) -> Array | np.ndarray:
  """Checks that a value is an array of numbers, and returns it as one.

  Args:
    value: A jax or numpy array, returned as it is; a number, a nested list, or
      another library's array, which becomes a numpy array in its own width.
    name: Name of the argument.

  Raises:
    UserError: Text, None, a ragged list, objects, a deleted array.
  """
  if isinstance(value, jax.Array):
    if _concrete(value) and value.is_deleted():
      raise UserError(
        f"{name}: a deleted array (donated to another function);"
        " allowed: an array of numbers"
      )
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
      raise UserError(f"{name}: {shown(value)}; allowed: an array of numbers")
    return value
  try:
    if any(not _concrete(leaf) for leaf in jax.tree.leaves(value)):
      return jnp.asarray(value)
    made = np.asarray(value)
  except Exception as error:  # whatever __array__ raises
    raise UserError(
      f"{name}: {shown(value)}; allowed: an array of numbers ({error})"
    ) from None
  number = jnp.issubdtype(made.dtype, np.number) or made.dtype == bool
  if not number or isinstance(value, np.ma.MaskedArray):
    what = "a masked array" if number else shown(value)
    raise UserError(f"{name}: {what}; allowed: an array of numbers")
  return made


def host(name: str, value: Any) -> np.ndarray:
  """Checks that a value is an array of numbers, and returns it on the host."""
  found = array(value, name)
  if not _concrete(found):
    raise UserError(f"{name}: traced; allowed: outside jit, a known array")
  return np.asarray(found)


def instance(
  name: str, value: object, types: type | tuple[type, ...], allowed: str
) -> None:
  """Checks that a value is of certain types, which `allowed` describes."""
  if not isinstance(value, types):
    raise UserError(f"{name}: {shown(value)}; allowed: {allowed}")


def sequence(
  name: str, value: Any, of: str = "values", *, empty: bool = False
) -> tuple[Any, ...]:
  """Checks that a value is a sequence of several things, and returns a tuple.

  Args:
    name: Name of the argument.
    value: A tuple, list, range, or array of one dimension; not a text, whose
      letters would be taken one by one.
    of: Name of the things, for the message.
    empty: Whether there may be none.

  Raises:
    UserError: Anything else, or none where one is needed.
  """
  several = isinstance(value, Sequence | KeysView | ValuesView)
  if isinstance(value, str | bytes | bytearray):
    several = False
  if isinstance(value, np.ndarray | jax.Array) and _concrete(value):
    several = value.ndim == 1
  least = "" if empty else "one or more "
  if not several or (not empty and len(value) == 0):
    raise UserError(
      f"{name}: {shown(value)}; allowed: a sequence of {least}{of}"
    )
  return tuple(value)


def names(name: str, value: Any, *, empty: bool = False) -> tuple[str, ...]:
  """Checks that a value is a sequence of names, and returns a tuple.

  Raises:
    UserError: One text in place of several, or anything else than texts.
  """
  if isinstance(value, str):
    raise UserError(
      f"{name}: {shown(value)}; allowed: a sequence of names, such as"
      f" ({shown(value)},)"
    )
  found = sequence(name, value, "names", empty=empty)
  for one in found:
    instance(name, one, str, "a sequence of names")
  return found


def numbers(
  name: str,
  value: Any,
  least: float = 0,
  *,
  integers: bool = False,
  increasing: bool = False,
  empty: bool = False,
) -> tuple[Any, ...]:
  """Checks that a value is a sequence of numbers, and returns a tuple.

  Args:
    name: Name of the argument.
    value: A tuple, list, range, or array of one dimension.
    least: Smallest number allowed.
    integers: Whether the numbers must be integers.
    increasing: Whether each must be larger than the one before.
    empty: Whether there may be none.

  Raises:
    UserError: Anything else.
  """
  what = f"{'integers' if integers else 'numbers'} >= {least:g}"
  if increasing:
    what = f"increasing {what}"
  found = tuple(scalar(x) for x in sequence(name, value, what, empty=empty))
  try:
    for one in found:
      if integers:
        integer(name, one, int(least))
      else:
        number(name, one, least)
    wrong = increasing and any(a >= b for a, b in itertools.pairwise(found))
  except UserError:
    wrong = True
  if wrong:
    raise UserError(f"{name}: {shown(found)}; allowed: {what}")
  return found


def choice(name: str, value: object, allowed: Iterable[str]) -> None:
  """Checks that a value is one of the allowed names."""
  allowed = sorted(allowed)
  if not isinstance(value, str) or value not in allowed:
    raise UserError(
      f"{name}: {shown(value)}; allowed: {', '.join(allowed)}"
      f"{near(value, allowed)}"
    )


def boolean(name: str, value: object) -> None:
  """Checks that a value is True or False, and not merely true; traced pass."""
  if isinstance(value, jax.core.Tracer):
    if value.shape or value.dtype != bool:
      raise UserError(
        f"{name}: a traced {value.dtype} of shape {value.shape}; allowed: True"
        " or False"
      )
    return
  instance(name, value, bool | np.bool_, "True or False")  # type: ignore[arg-type]


def key(value: Any, name: str = "key") -> Array:
  """Checks that a value is one random key, and returns it.

  Args:
    value: Key of `jax.random.key`, or a raw one of `jax.random.PRNGKey`: uint32
      [2] with JAX's default generator. May be traced.
    name: Name of the argument.

  Raises:
    UserError: A number, an array of keys, or anything else.
  """
  if isinstance(value, jax.Array | np.ndarray):
    typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if typed and value.shape == ():
      return value  # type: ignore[return-value]
    if value.dtype == np.uint32 and value.shape == _raw_key_shape():
      return value  # type: ignore[return-value]
  raise UserError(
    f"{name}: {shown(value)}; allowed: one random key, such as"
    " jax.random.key(0)"
  )


@functools.cache
def _raw_key_shape() -> tuple[int, ...]:
  """Shape of a raw key of JAX's default generator."""
  key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  return key.shape


# Numbers.


def scalar(value: Any) -> Any:
  """Returns a concrete array of no dimension as a Python number."""
  if isinstance(value, jax.Array | np.ndarray | np.generic) and value.ndim == 0:
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
      return value  # a key
    return value.item()
  return value


def _traced(name: str, value: object, allowed: str) -> bool:
  """Checks the shape of a traced value; its number cannot be looked at."""
  if not isinstance(value, jax.core.Tracer):
    return False
  if value.shape:
    raise UserError(f"{name}: {shown(value)}; allowed: {allowed}")
  return True


def integer(
  name: str, value: object, least: int = 0, most: int = LARGEST_INTEGER
) -> None:
  """Checks that a value is an integer within limits; traced values pass.

  Args:
    name: Name of the argument.
    value: A Python or numpy integer, or an integer array of no dimension.
    least: Smallest integer allowed.
    most: Largest integer allowed; by default what fits into an int32.

  Raises:
    UserError: Anything else, Booleans among them.
  """
  start = f"an integer > {least - 1}" if least > 0 else f"an integer >= {least}"
  if _traced(name, value, start):
    return
  number = scalar(value)
  ok = isinstance(number, int) and not isinstance(number, bool)
  if not ok or number < least:
    raise UserError(f"{name}: {shown(number)}; allowed: {start}")
  if number > most:
    raise UserError(f"{name}: {shown(number)}; allowed: {least} to {most}")


_positive_integer = functools.partial(integer, least=1)


def count(name: str, value: Any, least: int = 1) -> int:
  """Checks an integer that is part of a program, and returns a Python one.

  Args:
    name: Name of the argument.
    value: A Python or numpy integer.
    least: Smallest integer allowed.

  Raises:
    UserError: Anything else, traced values and Booleans among them.
  """
  if isinstance(value, jax.Array):
    found = shown(value) if _concrete(value) else "a traced value"
    raise UserError(
      f"{name}: {found}; allowed: a Python integer, as it is part of the"
      " program"
    )
  integer(name, value, least)
  return int(scalar(value))


def number(
  name: str,
  value: object,
  least: float = -math.inf,
  most: float = math.inf,
  *,
  above: bool = False,
) -> None:
  """Checks that a value is a number within limits; traced values pass.

  Args:
    name: Name of the argument.
    value: A Python or numpy number, or an array of no dimension.
    least: Smallest number allowed.
    most: Largest number allowed.
    above: Whether the number must be larger than `least`.

  Raises:
    UserError: Anything else: a Boolean, a number that is not finite, or one
      that is infinite in float32, or 0 there though it must be larger.
  """
  limits = "a number" if math.isinf(least) else f"a number >= {least:g}"
  if above:
    limits = f"a number > {least:g}"
  if not math.isinf(most):
    limits = f"a number from {least:g} to {most:g}"
    if above:
      limits = f"a number > {least:g} and <= {most:g}"
  if _traced(name, value, limits):
    return
  found = scalar(value)
  ok = isinstance(found, int | float) and not isinstance(found, bool)
  if not (
    ok
    and (found > least if above else found >= least)
    and -math.inf < found < math.inf
    and found <= most
  ):
    raise UserError(f"{name}: {shown(found)}; allowed: {limits}")
  if abs(found) > _HUGE or (above and found - least < _TINY):
    raise UserError(
      f"{name}: {shown(found)}; allowed: {limits} in float32, whose range is"
      f" {_TINY:.2g} to {_HUGE:.2g}"
    )


def positive(name: str, value: object, *, integer: bool = False) -> None:
  """Checks that a value is a finite number > 0; traced values pass."""
  if integer:
    _positive_integer(name, value)
  else:
    number(name, value, 0, above=True)


def not_negative(name: str, value: object) -> None:
  """Checks that a value is a finite number >= 0; traced values pass."""
  number(name, value, 0)


def fraction(name: str, value: object) -> None:
  """Checks that a value is a number in [0, 1); traced values pass."""
  try:
    number(name, value, 0, 1)
    wrong = _concrete(value) and value == 1
  except UserError:
    wrong = True
  if wrong:
    raise UserError(f"{name}: {shown(value)}; allowed: [0, 1)")


def epsilon(value: object, norm: str, name: str = "epsilon") -> None:
  """Checks that a radius is > 0 and, for linf, at most 1, a pixel's range."""
  positive(name, value)
  if norm == "linf" and _concrete(value) and float(value) > 1:  # type: ignore[arg-type]
    raise UserError(
      f"{name}: {shown(scalar(value))}; allowed: at most 1 for linf, as pixels"
      " are in [0, 1] (8/255 is 0.0314)"
    )


# Images, labels, variables.


@jax.jit
def _extremes(x: Array) -> Array:
  return jnp.stack([x.min(), x.max()])


def _range(x: Array | np.ndarray) -> tuple[Any, Any]:
  """Smallest and largest number, in the array's own dtype."""
  found = None if _on_host(x) else _extremes(x)
  if found is None or isinstance(found, jax.core.Tracer):
    host = np.asarray(x)  # where numpy reads it, or a constant inside jit
    return host.min(), host.max()
  low, high = np.asarray(found)  # one transfer
  return low, high


def _channels_first(shape: tuple[int, ...]) -> bool:
  """Whether images are of one or three rows, and square otherwise."""
  _, channels, height, width = shape
  return channels in (1, 3) and height == width >= 8


def inspect_images(x: Array | np.ndarray, name: str = "images") -> None:
  """Checks [B, H, W, C] floating-point images in [0, 1] without moving them."""
  x = array(x, name)
  if x.ndim != 4 or 0 in x.shape:
    raise UserError(
      f"{name}: shape {x.shape}; allowed: [B, H, W, C], not empty"
    )
  if _channels_first(x.shape):
    raise UserError(
      f"{name}: shape {x.shape}, which looks like [B, C, H, W]; allowed:"
      " [B, H, W, C]: images.transpose(0, 2, 3, 1), and for a network that takes"
      " them otherwise lambda x: network(x.transpose(0, 3, 1, 2))"
    )
  # JAX has no floating point wider than float64.
  if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 8:
    raise UserError(
      f"{name}: dtype {x.dtype}; allowed: floating point in [0, 1]"
      " (uint8 pixels: divide by 255)"
    )
  if _concrete(x):
    low, high = _range(x)
    if not (low >= 0 and high <= 1):  # also refuses NaN
      # The numbers of their own dtype print all digits that tell them from 1.
      # !s: a numpy number formatted otherwise is widened to float64 first.
      raise UserError(f"{name}: values in [{low!s}, {high!s}]; allowed: [0, 1]")


def inspect_labels(
  x: Array | np.ndarray,
  batch_size: int,
  num_classes: int,
  name: str = "labels",
) -> None:
  """Checks integer labels [B] in [0, num_classes) without moving them."""
  x = classes(x, batch_size, name)  # type: ignore[arg-type]
  if _concrete(x):
    low, high = (int(value) for value in _range(x))
    if low < 0 or high >= num_classes:
      raise UserError(
        f"{name}: values in [{low}, {high}]; allowed: 0 to {num_classes - 1}"
      )


def images(x: Array, name: str = "images") -> Array:
  """Checks [B, H, W, C] floating-point images in [0, 1] and returns them."""
  x = array(x, name)  # type: ignore[assignment]
  inspect_images(x, name)
  return jnp.asarray(x)


def labels(
  x: Array, batch_size: int, num_classes: int, name: str = "labels"
) -> Array:
  """Checks integer labels [B] in [0, num_classes) and returns them as int32."""
  x = array(x, name)  # type: ignore[assignment]
  inspect_labels(x, batch_size, num_classes, name)  # in their own width
  return jnp.asarray(x).astype(jnp.int32)


def batch(x: Array, name: str, ndim: int | None = None) -> Array:
  """Checks a floating-point batch [B, ...] by shape and dtype; returns it.

  For losses and other functions inside jit: no value is looked at.

  Args:
    x: The array, not empty.
    name: Name of the argument.
    ndim: Number of axes; None: one or more.

  Raises:
    UserError: Another shape or dtype.
  """
  found = x if isinstance(x, jax.ShapeDtypeStruct) else array(x, name)
  wanted = {None: "[B, ...]", 2: "[B, K]", 4: "[B, H, W, C]"}[ndim]
  wrong = found.ndim < 1 if ndim is None else found.ndim != ndim
  if wrong or 0 in found.shape:
    raise UserError(
      f"{name}: shape {found.shape}; allowed: {wanted}, not empty"
    )
  if not jnp.issubdtype(found.dtype, jnp.floating):
    raise UserError(f"{name}: dtype {found.dtype}; allowed: floating point")
  return found  # type: ignore[return-value]


def classes(x: Array, batch_size: int, name: str = "labels") -> Array:
  """Checks integer classes [B] by shape and dtype alone; returns them."""
  found = array(x, name)
  if found.shape != (batch_size,):
    raise UserError(
      f"{name}: shape {found.shape}; allowed: [{batch_size}], one per image"
    )
  if not jnp.issubdtype(found.dtype, jnp.integer):
    raise UserError(f"{name}: dtype {found.dtype}; allowed: integers")
  return found  # type: ignore[return-value]


def mask(x: Array, batch_size: int, name: str = "mask") -> Array:
  """Checks Booleans [B] by shape and dtype alone; returns them."""
  found = array(x, name)
  if found.shape != (batch_size,) or found.dtype != bool:
    raise UserError(
      f"{name}: {found.dtype} of shape {found.shape}; allowed: bool"
      f" [{batch_size}], one per image"
    )
  return found  # type: ignore[return-value]


@jax.jit
def _num_nonfinite(x: Array) -> Array:
  return (~jnp.isfinite(x)).sum()


def _on_host(x: Any) -> bool:
  """Whether numpy reads an array where it lies."""
  return not isinstance(x, jax.Array) or (
    x.is_fully_addressable and {d.platform for d in x.devices()} == {"cpu"}
  )


def _path(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _arrays(tree: PyTree, name: str) -> dict[str, Any]:
  """Leaves of a tree by their paths; each must be an array or a number."""
  found: dict[str, Any] = {}
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda x: x is None
  )
  for path, leaf in leaves:
    where = f"{name}: {_path(path)}" if path else name
    if jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.extended):
      continue  # a random key
    if isinstance(leaf, jax.ShapeDtypeStruct):
      found[_path(path)] = leaf
    else:
      found[_path(path)] = array(leaf, where)
  return found


def finite(name: str, tree: PyTree) -> None:
  """Checks that all numbers of a tree of arrays are finite; traced ones pass.

  Counted where the arrays lie; one transfer.

  Args:
    name: Name of the argument.
    tree: Arrays and numbers.

  Raises:
    UserError: Number of entries that are not finite, and path of the first
      array that has any.
  """
  counts: dict[str, Any] = {}
  for path, leaf in _arrays(tree, name).items():
    if not _concrete(leaf) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
      continue
    if _on_host(leaf):
      host = np.asarray(leaf)
      counts[path] = host.size - np.count_nonzero(np.isfinite(host))
    else:
      counts[path] = _num_nonfinite(leaf)
  if any(not _concrete(value) for value in counts.values()):
    return  # constants inside jit
  counts = jax.device_get(counts)
  bad = {path: int(value) for path, value in counts.items() if value}
  if bad:
    first = next(iter(bad))
    where = f", the first in {first}" if first else ""
    raise UserError(
      f"{name}: {wording.plural(sum(bad.values()), 'number')} not finite"
      f"{where}; allowed: finite numbers"
    )


_EVALUATION = {
  "train": False,
  "training": False,
  "is_training": False,
  "deterministic": True,
  "use_running_average": True,
  "inference": True,
}
"""Arguments by which a network is told its mode, with those of evaluation."""


def mode_arguments(function: Any, train: bool) -> dict[str, bool]:
  """Returns the arguments that tell a function its mode, of those it takes.

  Args:
    function: A function, or an instance whose class has `__call__`.
    train: Whether the mode is training.

  Returns:
    E.g. {"train": True}, or {"deterministic": False}.
  """
  if isinstance(function, nn.Module):
    function = type(function).__call__
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError):
    return {}
  return {
    name: value != train
    for name, value in _EVALUATION.items()
    if name in parameters
  }


def kind(value: object) -> str:
  """Says what a value is that is no function or network: its class."""
  if isinstance(value, type):
    return f"the class {value.__name__}, not an instance"
  return type(value).__name__


def _library(value: object) -> str:
  """Names the library of a network's class or of a base of it."""
  known = {"torch", "equinox", "flax", "haiku", "keras"}
  for base in type(value).__mro__:
    library, _, rest = base.__module__.partition(".")
    if library in known:
      return "flax.nnx" if (library, rest[:3]) == ("flax", "nnx") else library
  return ""


def refuse_torch(name: str, value: object) -> None:
  """Refuses a PyTorch module, which JAX cannot differentiate."""
  if _library(value) == "torch":
    raise UserError(
      f"{name}: a PyTorch {type(value).__name__}; allowed: what JAX can trace:"
      " load its weights into a network here (interop.load_torch), or convert it"
      " (torch2jax)"
    )


def module(value: object, name: str = "model") -> None:
  """Checks that a value is a network, an instance of a flax.linen module.

  Raises:
    UserError: Anything else; for a network of another kind with the remedy.
  """
  refuse_torch(name, value)
  if not isinstance(value, nn.Module) and callable(value):
    of = {"flax.nnx": "an nnx module ", "equinox": "an Equinox module "}
    what = of.get(_library(value), "") + kind(value)
    raise UserError(
      f"{name}: {what}; allowed: a flax.linen module; model, variables ="
      " models.adapt(network) makes one of a network of another kind, and"
      " models.from_functions one of two functions"
    )
  instance(name, value, nn.Module, "a flax.linen module, see models.create")


def _made(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
  """Shapes and dtypes of a network's variables, by their paths."""
  images = jax.ShapeDtypeStruct(shape, np.float32)
  kwargs: Any = mode_arguments(model, train=False)
  made = jax.eval_shape(
    lambda key, x: model.init(key, x, **kwargs), jax.random.key(0), images
  )
  return _arrays(meta.unbox(made), "model")


@functools.lru_cache(maxsize=32)
def _made_once(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
  return _made(model, shape)


def _expected(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
  try:
    try:
      hash(model)
    except TypeError:
      return _made(model, shape)
    return _made_once(model, shape)
  except UserError:
    raise
  except Exception as error:  # whatever a network raises
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    if isinstance(error, TypeError) and "argument" in reason:
      raise UserError(
        f"model: {reason}; allowed: __call__(images), with no other argument that"
        f" is required but {' or '.join(_EVALUATION)}; models.adapt(model,"
        " variables, call=...) calls it in another way"
      ) from None
    raise UserError(
      f"model: {type(model).__name__} cannot take images of shape {shape}:"
      f" {reason}; allowed: images that the network is made for"
    ) from None


def variables(
  model: nn.Module,
  variables: Variables,
  image_shape: Sequence[int],
  name: str = "variables",
) -> None:
  """Checks that variables are those of a network, by shapes and dtypes.

  Args:
    model: A linen module.
    variables: Its collections. Those that the network does not have are free.
    image_shape: Shape [B, H, W, C] of the images, or [H, W, C] of one.
    name: Name of the argument.

  Raises:
    UserError: Not a network, or variables of another one; the first leaf that
      differs is named.
  """
  module(model)
  instance(
    name,
    variables,
    Mapping,
    "collections of the network's arrays, {'params': ..., ...}",
  )
  one = (1, *image_shape[-3:])
  expected = _expected(model, tuple(int(n) for n in one))
  collections = {path.split("/")[0] for path in expected}
  given = _arrays(
    meta.unbox({k: v for k, v in variables.items() if k in collections}), name
  )
  what = f"the variables of {type(model).__name__} for images {list(one[1:])}"
  if variables and not collections.intersection(variables):
    what += ", {'params': params, ...} as model.init returns them"
  for path, wanted in expected.items():
    if path not in given:
      raise UserError(f"{name}: no {path}; allowed: {what}")
    found = given[path]
    if found.shape != wanted.shape:
      raise UserError(
        f"{name}: {path} has shape {found.shape}; allowed: {wanted.shape}, as"
        f" in {what}"
      )
    if jnp.issubdtype(wanted.dtype, jnp.floating) and not jnp.issubdtype(
      found.dtype, jnp.floating
    ):
      raise UserError(
        f"{name}: {path} has dtype {found.dtype}; allowed: {wanted.dtype}"
      )
  for path in given:
    if path not in expected:
      raise UserError(
        f"{name}: {path}, which the network does not have; allowed: {what}"
      )
