"""Callables of unknown content, whose arrays become arguments of a program.

`jax.jit` treats what a function captures as a constant: it is never read again,
and the program keeps it alive. Here such a callable is traced anew at every
entry (JAX's own tracing caches are passed by). All arrays in the traced program
become its arguments, and what remains is compared with the programs at hand:
new weights compile nothing, another Python value or branch does, and no array
is kept once the call is over.
"""

import contextlib
import dataclasses
import random
import traceback
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import get_opaque_trace_state
from jax.sharding import Mesh, NamedSharding

from atat_jax import sharding
from atat_jax.compilation import fingerprints, programs
from atat_jax.errors import UserError
from atat_jax.typing import Array, PyTree

# JAX's trace state outside any transformation. It differs inside jit, grad and
# vmap, even where only values that a function closes over are traced.
_TOP_LEVEL = get_opaque_trace_state(convention="flax")


def at_top_level() -> bool:
  """Returns whether this runs outside any transformation of JAX."""
  return get_opaque_trace_state(convention="flax") == _TOP_LEVEL


def _is_array(value: Any) -> bool:
  return isinstance(value, jax.Array | np.ndarray | np.generic)


def _is_argument(value: Any) -> bool:
  return _is_array(value) or isinstance(value, int | float | complex)


def _own(value: Any) -> Any:
  """A constant as an array that nobody else can change."""
  if isinstance(value, jax.Array):
    return value
  with jax.ensure_compile_time_eval():  # also inside a trace of this module
    return jax.device_put(np.array(value))  # numpy's may be changed in place


Check = Callable[[tuple[Any, ...], Any], None]
"""Function that refuses a callable by the shapes of its arguments and result."""


class _Session:
  """One callable during one entry: how to rebuild it, and its programs.

  A session equals only itself, so that nothing is ever found again that was
  compiled or traced for another one.
  """

  def __init__(self, function: Callable[..., Any], check: Check | None):
    self._check = check
    leaves, self._tree = jax.tree.flatten(function)
    # Numbers are arguments where all leaves can be, as for jax.jit.
    numbers = all(map(_is_argument, leaves))
    self._dynamic = [numbers or _is_array(leaf) for leaf in leaves]
    self._static = [
      None if dynamic else leaf
      for leaf, dynamic in zip(leaves, self._dynamic, strict=True)
    ]
    self.leaves: list[Any] = [
      leaf
      for leaf, dynamic in zip(leaves, self._dynamic, strict=True)
      if dynamic
    ]
    self.programs: dict[Hashable, Any] = {}
    self._forward: dict[Hashable, Any] = {}
    self._depth = 0
    self.reference = weakref.ref(self)

  def combine(self, leaves: Sequence[Any]) -> Callable[..., Any]:
    """Returns the callable, its arrays replaced."""
    given = iter(leaves)
    return jax.tree.unflatten(
      self._tree,
      [
        next(given) if dynamic else static
        for dynamic, static in zip(self._dynamic, self._static, strict=True)
      ],
    )

  @contextlib.contextmanager
  def own_trace(self) -> Iterator[None]:
    """Marks a trace in which nothing but the session's arguments is traced."""
    self._depth += 1
    try:
      yield
    finally:
      self._depth -= 1

  def call(self, leaves: Sequence[Any], args: tuple[Any, ...]) -> Any:
    """Calls the callable; in a trace of this module through a trace of it."""
    if not self._depth:
      return self.combine(leaves)(*args)
    avals = jax.tree.map(programs.aval, (list(leaves), args))
    flat, tree = jax.tree.flatten(avals)
    key = tree, tuple(map(programs.signature, flat))
    if key not in self._forward:
      self._forward[key] = self._trace(avals)
    if self._forward[key] is None:
      return self.combine(leaves)(*args)
    jaxpr, consts, out_tree = self._forward[key]
    out = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(
      *jax.tree.leaves((list(leaves), args))
    )
    return jax.tree.unflatten(out_tree, out)

  def _trace(self, avals: tuple[list[Any], tuple[Any, ...]]) -> Any:
    def function(leaves: list[Any], args: tuple[Any, ...]) -> Any:
      return self.combine(leaves)(*args)

    try:
      with _no_draws():
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*avals)
    except UserError:
      raise
    except Exception as error:
      raise UserError(reason(error)) from error
    if self._check is not None:
      self._check(avals[1], shapes)
    if programs.has_open_rules(closed):
      return None  # to be called in the trace that differentiates it
    consts = list(map(_own, closed.consts))
    return closed.jaxpr, consts, jax.tree.structure(shapes)


def reason(error: Exception) -> str:
  """Says in one line why a classifier cannot be used.

  Args:
    error: The exception of a call inside jit.

  Returns:
    The message of a `UserError`.
  """
  text = next(iter(str(error).strip().splitlines()), "")
  text = text.partition(" (https://")[0]  # flax's pages about its errors
  concrete = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
  )
  if isinstance(error, concrete):
    text = "it needs the values of the images as numpy or Python does"
  text = text if len(text) <= 200 else text[:200] + "..."
  return (
    f"classifier: {type(error).__name__}: {text}; allowed: a function that JAX"
    f" can trace, from images [B, H, W, C] to logits [B, K]{_remedy(error)}"
  )


_REMEDIES = {
  "TracerArrayConversionError": (
    "a PyTorch network is loaded by interop.load_torch or converted by torch2jax"
  ),
  "ScopeCollectionNotFound": (
    "a linen network needs all its collections, {'params': ..., 'batch_stats':"
    " ...}, as model.init returns them"
  ),
  "ScopeParamNotFoundError": "a linen network needs the variables of its own",
  "ScopeParamShapeError": (
    "a linen network needs images of the shape for which it was initialised,"
    " channels last"
  ),
  "TraceContextError": (
    "an nnx network must be in evaluation mode, network.eval(), as it must not"
    " change itself"
  ),
}


def _remedy(error: Exception) -> str:
  """Names what helps against an exception of a network's library; "": nothing."""
  found = _REMEDIES.get(type(error).__name__, "")
  if isinstance(error, TypeError) and "required" in str(error):
    found = (
      "arguments besides the images are bound in a lambda, or for a network by"
      " models.adapt(network, variables, call=...)"
    )
  modules = {
    str(frame.f_globals.get("__name__")).partition(".")[0]
    for frame, _ in traceback.walk_tb(error.__traceback__)
  }
  if "equinox" in modules:
    found = (
      "an Equinox network takes one image [C, H, W]: models.classifier("
      "*models.adapt(network)), or jax.vmap of it"
    )
  return f" ({found})" if found else ""


def _generators() -> Hashable:
  """State of the generators that every function can draw from."""
  state: Any = np.random.get_state()  # noqa: NPY002
  return state[1].tobytes(), state[2:], random.getstate()


@contextlib.contextmanager
def _no_draws() -> Iterator[None]:
  """Refuses functions that draw random numbers while they are traced."""
  before = _generators()
  yield
  if _generators() != before:
    raise UserError(
      "classifier: draws from numpy.random or random, whose numbers would be"
      " fixed in the compiled program; allowed: attacks.Randomized(function)"
      " with function(key, images), which draws by jax.random"
    )


@jax.tree_util.register_pytree_node_class
class Opaque:
  """Callable that is traced anew at every entry; made there, from any callable.

  Its leaves are the arrays of a callable that is a pytree.

  Args:
    function: Any callable.
    check: Called with the shapes of arguments and result after every trace.
  """

  def __init__(self, function: Callable[..., Any], check: Check | None = None):
    self._session = _Session(function, check)
    self._leaves = self._session.leaves

  def __call__(self, *args: Any) -> Any:
    """Calls the function."""
    return self._session.call(self._leaves, args)

  @property
  def value(self) -> Any:
    """The callable that is wrapped."""
    return self._session.combine(self._leaves)

  @property
  def func(self) -> Any:
    """Function of a wrapped `Partial`; None otherwise."""
    return getattr(self.value, "func", None)

  @property
  def session(self) -> _Session:
    """State that copies of this object share."""
    return self._session

  def tree_flatten(self) -> tuple[list[Any], "weakref.ref[_Session]"]:
    """Returns the arrays and what is compared by identity.

    JAX keeps the structures of pytrees in caches, hence the weak reference.
    """
    return self._leaves, self._session.reference

  @classmethod
  def tree_unflatten(
    cls, reference: "weakref.ref[_Session]", leaves: Sequence[Any]
  ) -> "Opaque":
    """Puts other arrays in place of its own."""
    made, session = object.__new__(cls), reference()
    if session is None:  # the caller has another copy
      raise RuntimeError("a callable was rebuilt after its last copy was gone")
    made._session, made._leaves = session, list(leaves)
    return made


def argument(value: Callable[..., Any], check: Check | None = None) -> Any:
  """Turns a callable into one that a compiled program takes as an argument.

  Args:
    value: Any callable, a pytree or not.
    check: Called with the shapes of arguments and result of what must be traced
      to see what it computes.

  Returns:
    A pytree. It is the callable itself where its arrays are leaves and the rest
    compares by what it computes, as for `models.classifier`.
  """
  if isinstance(value, Opaque):
    return value
  if type(value) is jax.tree_util.Partial:
    function = fingerprints.keyed(value.func)
    leaves = jax.tree.leaves(value)
    if function is None or not all(map(_is_argument, leaves)):
      return Opaque(value, check)
    if function is value.func:
      return value
    return jax.tree_util.Partial(function, *value.args, **value.keywords)
  if _is_own_node(value):
    node: Any = value
    parts = {
      field.name: argument(getattr(node, field.name), check)
      for field in dataclasses.fields(node)
      if callable(getattr(node, field.name))
    }
    return dataclasses.replace(node, **parts)
  if jax.tree_util.all_leaves([value]):
    function = fingerprints.keyed(value)
    if function is not None:
      return jax.tree_util.Partial(function)
  return Opaque(value, check)


def _is_own_node(value: Any) -> bool:
  """Whether a value is a dataclass of this package that is a pytree."""
  return (
    type(value).__module__.partition(".")[0] == "atat_jax"
    and dataclasses.is_dataclass(value)
    and not jax.tree_util.all_leaves([value])
  )


def find(tree: PyTree) -> list[Opaque]:
  """Returns all opaque callables in a pytree."""
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Opaque))
  return [leaf for leaf in leaves if isinstance(leaf, Opaque)]


def _mesh(leaves: Sequence[Any]) -> Mesh | None:
  """Several devices on which arguments are, or None."""
  for leaf in leaves:
    placed = getattr(leaf, "sharding", None)
    if isinstance(placed, NamedSharding) and len(placed.device_set) > 1:
      return placed.mesh  # type: ignore[return-value]
  return None


def call(
  function: Callable[..., Any],
  arguments: dict[str, Any],
  donated: Collection[str],
  *,
  name: Hashable | None,
  options: dict[str, Any],
) -> Any:
  """Runs a function some of whose arguments, or itself, capture arrays.

  Args:
    function: Function of a dictionary of arguments; the rest is static.
    arguments: Arguments that are traced.
    donated: Names of those whose memory may be reused.
    name: The static part, by which the opaque callables among the arguments find
      a program that was traced for them before; None: trace it anew.
    options: Compiler options.

  Returns:
    The result of the function.
  """
  if not at_top_level():
    return jax.jit(lambda arguments: function(arguments))(arguments)
  program, given, out_tree = _program(
    function, arguments, donated, name, options
  )
  return jax.tree.unflatten(out_tree, program(*given))


def lower(
  function: Callable[..., Any],
  arguments: dict[str, Any],
  donated: Collection[str],
  *,
  name: Hashable | None,
  options: dict[str, Any],
) -> Any:
  """Traces and lowers what `call` with these arguments, or their shapes, runs.

  Args:
    function: Function of a dictionary of arguments; the rest is static.
    arguments: Arguments, or for arrays among them their `jax.ShapeDtypeStruct`.
    donated: Names of those whose memory may be reused.
    name: The static part, see `call`.
    options: Compiler options.

  Returns:
    The program, whose method `compile` has the next `call` find it compiled.
  """
  program, given, _ = _program(function, arguments, donated, name, options)
  return program.lower(*given)


def _program(
  function: Callable[..., Any],
  arguments: dict[str, Any],
  donated: Collection[str],
  name: Hashable | None,
  options: dict[str, Any],
) -> tuple[Any, tuple[Any, ...], Any]:
  """Returns a program, what to call it with, and its result's structure."""
  sessions = [opaque.session for opaque in find(arguments)]
  given = {key: arguments[key] for key in arguments if key in donated}
  kept = {key: arguments[key] for key in arguments if key not in donated}
  flat_given, flat_kept = jax.tree.leaves(given), jax.tree.leaves(kept)
  flat = [*flat_given, *flat_kept]
  mesh = _mesh(flat)
  key = name, tuple(programs.signature(jax.typeof(x)) for x in flat), mesh
  keeps = name is not None and len(sessions) == 1
  found = sessions[0].programs.get(key) if keeps else None
  if found is None:
    found = _traced(function, sessions, given, kept, mesh, options)
    if keeps:
      sessions[0].programs[key] = found
  compiled, arrays, out_tree = found
  return compiled, (arrays, flat_given, flat_kept), out_tree


def shapes(
  function: Callable[..., Any],
  arguments: dict[str, Any],
  *,
  name: Hashable | None,
) -> Any:
  """Returns the shapes of `call`'s result without computing it."""
  sessions = [opaque.session for opaque in find(arguments)]
  if not at_top_level():
    sessions = []
  keeps = name is not None and len(sessions) == 1
  flat, _ = jax.tree.flatten(arguments)
  key = "shapes", name, tuple(programs.signature(jax.typeof(x)) for x in flat)
  if keeps and key in sessions[0].programs:
    return sessions[0].programs[key]
  with _own_traces(sessions):
    found = jax.eval_shape(lambda arguments: function(arguments), arguments)
  if keeps:
    sessions[0].programs[key] = found
  return found


@contextlib.contextmanager
def _own_traces(sessions: Sequence[_Session]) -> Iterator[None]:
  with contextlib.ExitStack() as stack:
    for session in sessions:
      stack.enter_context(session.own_trace())
    yield


def _traced(
  function: Callable[..., Any],
  sessions: Sequence[_Session],
  donated: dict[str, Any],
  kept: dict[str, Any],
  mesh: Mesh | None,
  options: dict[str, Any],
) -> tuple[Callable[..., list[Any]], list[Array], Any]:
  """Traces a function; returns its program, arrays and result's structure."""

  def fresh(donated: dict[str, Any], kept: dict[str, Any]) -> Any:
    return function(donated | kept)

  with _own_traces(sessions):
    closed, shapes = jax.make_jaxpr(fresh, return_shape=True)(donated, kept)
  out_tree = jax.tree.structure(shapes)
  reading = programs.Reading()
  structure = reading.closed(closed)
  num_donated = len(jax.tree.leaves(donated))
  key = structure, num_donated, tuple(sorted(options.items()))
  compiled = programs.compiled(
    programs.Skeleton(key, closed, reading, num_donated, options)
  )
  arrays = list(map(_own, reading.arrays))
  if mesh is not None:
    arrays = sharding.put_replicated(mesh, arrays)
  return compiled, arrays, out_tree
