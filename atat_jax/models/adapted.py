"""Networks of other kinds as (module, variables): nnx, Equinox, plain functions.

The module is a linen one, so that attacks, attention and analyses take it like
any other. All arrays of the network become its variables; what is no array (an
activation, a text, a number) is part of the program.
"""

import contextvars
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from atat_jax import checks
from atat_jax.errors import UserError, shown
from atat_jax.models.base import Features
from atat_jax.typing import Array, PyTree, Variables

_ARRAYS = jax.Array | np.ndarray | jax.ShapeDtypeStruct

Call = Callable[..., Any]
"""`call(network, images)` to logits; it may take `train` or the like, too."""


@dataclasses.dataclass(frozen=True)
class _Spec:
  """Shape and dtype of an array; a random key is stored as its data."""

  shape: tuple[int, ...]
  dtype: Any
  key_impl: Any = None

  def placeholder(self) -> Array:
    return jnp.zeros(self.shape, self.dtype)

  def restored(self, stored: Array) -> Array:
    if self.key_impl is None:
      return stored
    return jax.random.wrap_key_data(stored, impl=self.key_impl)


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _spec(leaf: Any) -> _Spec:
  stored = _stored(leaf)
  impl = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
  return _Spec(tuple(stored.shape), jnp.dtype(stored.dtype), impl)


@dataclasses.dataclass(frozen=True)
class _Tree:
  """A pytree without its arrays.

  Attributes:
    structure: Its structure.
    specs: (name, spec) of each array.
    static: All leaves, None in place of the arrays.
    arrays: Which leaves are arrays.
  """

  structure: Any
  specs: tuple[tuple[str, _Spec], ...]
  static: tuple[Any, ...]
  arrays: tuple[bool, ...]

  def filled(self, arrays: Mapping[str, Array]) -> PyTree:
    """Returns the pytree with arrays by their names."""
    given = iter(spec.restored(arrays[name]) for name, spec in self.specs)
    return jax.tree.unflatten(
      self.structure,
      [
        next(given) if is_array else leaf
        for leaf, is_array in zip(self.static, self.arrays, strict=True)
      ],
    )

  def placeholders(self) -> dict[str, Array]:
    """Returns zeros in place of the arrays, by their names."""
    return {name: spec.placeholder() for name, spec in self.specs}


def _split(tree: PyTree) -> tuple[_Tree, dict[str, Array]]:
  """Splits a pytree into its arrays by name and the rest."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  arrays = tuple(isinstance(x, _ARRAYS) for _, x in leaves)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/") or "array": leaf
    for (path, leaf), is_array in zip(leaves, arrays, strict=True)
    if is_array
  }
  static = tuple(
    None if is_array else leaf
    for (_, leaf), is_array in zip(leaves, arrays, strict=True)
  )
  specs = tuple((name, _spec(leaf)) for name, leaf in named.items())
  stored = {name: _stored(leaf) for name, leaf in named.items()}
  return _Tree(structure, specs, static, arrays), stored


def _called(call: Call, network: Any, images: Array, train: bool) -> Any:
  return call(network, images, **checks.mode_arguments(call, train))


class _OfTree(nn.Module):
  """A pytree and the function that applies it."""

  tree: _Tree
  call: Call

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Maps images [B, H, W, C] to logits [B, K]."""
    weights = self.param("weights", lambda _: self.tree.placeholders())
    return _called(self.call, self.tree.filled(weights), images, train)


@dataclasses.dataclass(frozen=True)
class _Pair:
  """Call of two functions with a layer between them."""

  features: Callable[..., Array]
  head: Callable[..., Array]
  takes_weights: bool

  def __call__(self, weights: PyTree, images: Array) -> Array:
    given = (weights,) if self.takes_weights else ()
    tensor = self.features(*given, images)
    shape = getattr(tensor, "shape", None)
    if shape is None or len(shape) not in (3, 4) or shape[0] != len(images):
      what = type(tensor).__name__ if shape is None else f"shape {shape}"
      raise UserError(
        f"features: returns {what} for images {images.shape}; allowed: one"
        " tensor [B, h, w, C], or tokens [B, T, C]"
      )
    return self.head(*given, Features(name="features")(tensor))


class _OfLinen(nn.Module):
  """A linen module that is called in another way."""

  network: nn.Module
  call: Call

  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Maps images [B, H, W, C] to logits [B, K]."""
    return _called(self.call, self.network, images, train)


# Name of an nnx module within the network that is being called, by its id, and
# what makes its output a layer.
_Tapping = tuple[dict[int, str], Callable[[str, Any], Any]]
_tapping: contextvars.ContextVar[_Tapping | None] = contextvars.ContextVar(
  "tapping", default=None
)


@functools.lru_cache(maxsize=256)  # JAX keeps each class for ever
def _tapped_class(kind: type) -> type:
  """Returns a subclass whose outputs are layers while a network is called."""

  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = kind.__call__(self, *args, **kwargs)
    tapping = _tapping.get()
    if tapping is None:
      return output
    names, visit = tapping
    # A transformation of nnx calls copies.
    return visit(names.get(id(self), kind.__name__), output)

  return types.new_class(
    kind.__name__,
    (kind,),
    {},
    lambda body: body.update(__call__=call, __module__=kind.__module__),
  )


@contextmanager
def _layers_of(network: nnx.Module) -> Iterator[None]:
  """Makes layers of the outputs of all submodules of a network of our own."""
  names = {}
  for path, module in nnx.iter_modules(network):
    if path and "__call__" in dir(type(module)):
      names[id(module)] = "/".join(map(str, path))
      object.__setattr__(module, "__class__", _tapped_class(type(module)))
  made: dict[str, Features] = {}

  def visit(name: str, output: Any) -> Any:
    if name not in made:
      made[name] = Features(name=name)
    return made[name](output)

  token = _tapping.set((names, visit))
  try:
    yield
  finally:
    _tapping.reset(token)


class _OfNnx(nn.Module):
  """An nnx module by its graph; training mode is that of the call."""

  graph: Any
  params: _Tree
  statistics: _Tree
  rest: _Tree
  call: Call

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    """Maps images [B, H, W, C] to logits [B, K]."""
    network = nnx.merge(
      self.graph,
      self._filled("params", "weights", self.params),
      self._filled("batch_stats", "statistics", self.statistics),
      self._filled("rest", "state", self.rest),
    )
    network.train() if train else network.eval()
    with _layers_of(network):
      logits = _called(self.call, network, images, train)
    moves = self.statistics.specs and self.is_mutable_collection("batch_stats")
    if moves and not self.is_initializing():
      moved = _split(nnx.state(network, nnx.BatchStat))[1]
      self.put_variable("batch_stats", "statistics", moved)
    return logits

  def _filled(self, collection: str, name: str, tree: _Tree) -> PyTree:
    """Returns a part of the network's state with the arrays that are given."""
    if not tree.specs:  # the network has none
      return tree.filled({})
    return tree.filled(self.variable(collection, name, tree.placeholders).value)


def _plain_call(network: Any, images: Array) -> Any:
  return network(images)


def _call_by_image(network: Any, images: Array) -> Any:
  return jax.vmap(network)(images.transpose(0, 3, 1, 2))


def _is_equinox(network: Any) -> bool:
  return any(
    (kind.__module__ or "").partition(".")[0] == "equinox"
    for kind in type(network).__mro__
  )


def adapt(
  network: Any,
  variables: Variables | None = None,
  *,
  call: Call | None = None,
) -> tuple[nn.Module, Variables]:
  """Makes (module, variables) of a network of another kind.

  The pair holds the network's arrays as they are now; adapt it again after
  training. An nnx module is evaluated in evaluation mode, whatever its mode is.

  Args:
    network: An nnx module, whose submodules are layers for attention; an Equinox
      module or another callable pytree; or a linen module that returns more than
      logits or takes other arguments.
    variables: Variables of a linen module; None for all others.
    call: Function `call(network, images)` of the network and images [B, H, W, C]
      to logits [B, K]; one that also takes `train` (or `deterministic`, ...) is
      told the mode. None: `network(images)`; for Equinox, by its convention, the
      network of each image [C, H, W] by itself.

  Returns:
    A linen module and its variables, for `models.classifier`, `attention` and
    `analyses`.

  Raises:
    UserError: Something that is not callable, a PyTorch module, a linen module
      without variables or call.
  """
  if call is not None and not callable(call):
    raise UserError(
      f"call: {shown(call)}; allowed: call(network, images) to logits"
    )
  checks.refuse_torch("network", network)
  if isinstance(network, nn.Module):
    return _of_linen(network, variables, call)
  if variables is not None:
    raise UserError(
      f"variables: given with a {type(network).__name__}; allowed: None but for"
      " a linen module"
    )
  if isinstance(network, type) or not (callable(network) or call is not None):
    raise UserError(
      f"network: {checks.kind(network)}; allowed: an nnx or Equinox module, a"
      " callable pytree, or a linen module with its variables and call"
    )
  if isinstance(network, nnx.Module):
    return _of_nnx(network, call or _plain_call)
  usual = _call_by_image if _is_equinox(network) else _plain_call
  tree, arrays = _split(network)
  return _OfTree(tree, call or usual), {"params": {"weights": arrays}}


def _of_linen(
  network: nn.Module, variables: Variables | None, call: Call | None
) -> tuple[nn.Module, Variables]:
  if call is None:
    raise UserError(
      "call: None with a linen module; allowed: call(network, images) that"
      " returns its logits (without one it needs no adapting)"
    )
  if not isinstance(variables, Mapping):
    raise UserError(
      f"variables: {shown(variables)}; allowed: the network's collections by name"
    )
  nested = {name: {"network": one} for name, one in variables.items()}
  return _OfLinen(network.clone(parent=None), call), nested


def _of_nnx(network: nnx.Module, call: Call) -> tuple[nn.Module, Variables]:
  graph, *states = nnx.split(network, nnx.Param, nnx.BatchStat, ...)
  (params, weights), (moved, statistics), (rest, state) = map(_split, states)
  variables = {
    "params": {"weights": weights},
    "batch_stats": {"statistics": statistics},
    "rest": {"state": state},
  }
  used = {k: v for k, v in variables.items() if all(v.values())}
  model = _OfNnx(
    graph=graph, params=params, statistics=moved, rest=rest, call=call
  )
  return model, used


def from_functions(
  features: Callable[..., Array],
  head: Callable[..., Array],
  weights: PyTree = None,
) -> tuple[nn.Module, Variables]:
  """Makes (module, variables) of two functions, with a layer between them.

  Args:
    features: Function `features(weights, images)` of images [B, H, W, C] to a
      tensor [B, h, w, C], or to tokens [B, T, C]. It is the layer "features".
    head: Function `head(weights, tensor)` to logits [B, K].
    weights: A pytree with all the arrays, such as an Equinox module; leaves that
      are no arrays are part of the program. None: the functions take one
      argument, features(images) and head(tensor).

  Returns:
    A linen module and its variables, see `adapt`.

  Raises:
    UserError: Something that is not callable.
  """
  for name, function in {"features": features, "head": head}.items():
    if not callable(function):
      raise UserError(
        f"{name}: {checks.kind(function)}; allowed: a function, see"
        " models.from_functions"
      )
  tree, arrays = _split(weights)
  pair = _Pair(features, head, weights is not None)
  return _OfTree(tree, pair), {"params": {"weights": arrays}}
