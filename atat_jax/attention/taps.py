"""Layers of a network: which tensors can be tapped, and which comes last.

A layer is the output of a linen submodule at one of its calls. The network is
traced once with a mark on each such output; the traced program then says which
of them lie between the images and the logits, and what comes after the last.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.extend.core import get_opaque_trace_state

from atat_jax import batch_norm as bn
from atat_jax import checks
from atat_jax.errors import UserError
from atat_jax.typing import Array, BatchNormMode, PyTree, Variables

_MARK = "atat_jax.attention:"
_MOST_EXTRA_TOKENS = 8
"""Largest number of tokens before those of the patches: class, registers."""


class Place(NamedTuple):
  """Tensor among the outputs of a network's submodules.

  Attributes:
    path: Names of the submodule and of those that it is in.
    call: Number of the call, from 1.
    key: Place in an output of several tensors, such as "[0]"; "": the output.
  """

  path: str
  call: int
  key: str


@dataclasses.dataclass(frozen=True)
class Layer:
  """A tensor that can be tapped.

  Attributes:
    place: Submodule, call and place in its output.
    output: Shape and dtype: [B, h, w, C], or tokens [B, T, C].
    grid: Height and width, (h, w).
    extra: Number of tokens that come before the h w tokens of the grid.
  """

  place: Place
  output: jax.ShapeDtypeStruct
  grid: tuple[int, int]
  extra: int = 0

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape [B, h, w, C]."""
    return (self.output.shape[0], *self.grid, self.output.shape[-1])

  @property
  def of_tokens(self) -> bool:
    """Whether the output is [B, T, C]."""
    return len(self.output.shape) == 3

  def on_grid(self, tensor: Array) -> Array:
    """Returns an output as [B, h, w, C], without the extra tokens."""
    if not self.of_tokens:
      return tensor
    return tensor[:, self.extra :].reshape(len(tensor), *self.grid, -1)


@dataclasses.dataclass(frozen=True)
class Listing:
  """Layers of a network, from the input to the output.

  Attributes:
    layers: Name to layer.
    default: Name of the last spatial tensor's layer; "": there is none.
    refused: Reason that there is none, and the remedy.
    others: Name of what is no layer to the reason.
  """

  layers: dict[str, Layer]
  default: str
  refused: str
  others: dict[str, str]


@contextmanager
def _outputs(visit: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
  """Lets `visit(module, output)` replace the output of any submodule."""
  # Under `python -O` flax does not take an interceptor off again (0.12 pops it
  # in an assert): one whose block has ended must do nothing.
  visits = [visit]

  def interceptor(
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
  ) -> Any:
    output = call(*args, **kwargs)
    module = context.module
    if not visits or context.method_name != "__call__" or not module.path:
      return output
    return visits[0](module, output)

  try:
    with nn.intercept_methods(interceptor):
      yield
  finally:
    visits.clear()


class _Visitor:
  """Counts the calls of each submodule, and visits the arrays they return.

  What is computed inside a transformation (nn.remat, nn.scan, nn.jit) is not
  visited: its arrays must not be seen outside.

  Attributes:
    calls: Path of a submodule to the number of its calls.
    order: Place of a tensor to the number of calls that had ended by then.
    inside: (path, shape) of what is inside a transformation, with the number of
      calls before.
  """

  def __init__(self, visit: Callable[[Place, nn.Module, Array], Array]):
    self.calls: collections.Counter[str] = collections.Counter()
    self.order: dict[Place, int] = {}
    self.inside: list[tuple[str, tuple[int, ...], int]] = []
    self._visit = visit
    self._state = get_opaque_trace_state(convention="flax")

  def __call__(self, module: nn.Module, output: Any) -> Any:
    """Returns the output with what `visit` puts in place of its arrays."""
    path = "/".join(module.path)
    leaves, tree = jax.tree_util.tree_flatten_with_path(output)
    if get_opaque_trace_state(convention="flax") != self._state:
      seen = self.calls.total()
      self.inside += [(path, np.shape(leaf), seen) for _, leaf in leaves]
      return output
    self.calls[path] += 1
    new = []
    for key, leaf in leaves:
      place = Place(path, self.calls[path], jax.tree_util.keystr(key))
      self.order[place] = self.calls.total()
      is_array = isinstance(leaf, jax.Array)
      new.append(self._visit(place, module, leaf) if is_array else leaf)
    if all(a is b for a, (_, b) in zip(new, leaves, strict=True)):
      return output
    return jax.tree.unflatten(tree, new)

  def name(self, place: Place) -> str:
    """Names a place: the call is numbered where there are several."""
    several = self.calls[place.path] > 1
    return f"{place.path}{f':{place.call}' if several else ''}{place.key}"


def run(
  model: nn.Module,
  variables: Variables,
  images: Array,
  taps: dict[Place, Array],
  batch_norm: BatchNormMode,
) -> tuple[Array, tuple[dict[Place, Array], PyTree]]:
  """Makes one pass in which taps are added to outputs.

  Args:
    model: A linen module.
    variables: Variables of the model.
    images: [B, H, W, C] in [0, 1].
    taps: Place to an array that is added to the tensor there.
    batch_norm: "running" or "batch".

  Returns:
    Logits [B, K]; {place: tensor + tap}; `batch_stats` after the pass.
  """
  found: dict[Place, Array] = {}

  def visit(place: Place, module: nn.Module, tensor: Array) -> Array:
    del module
    if place in taps:
      tensor = found[place] = tensor + taps[place]
    return tensor

  with _outputs(_Visitor(visit)):
    logits, stats = bn.apply(model, variables, images, batch_norm=batch_norm)
  return logits, ({place: found[place] for place in taps}, stats)


def listing(
  model: nn.Module,
  variables: Variables,
  images: Array,
  batch_norm: BatchNormMode,
) -> Listing:
  """Lists the layers of a network; nothing is computed.

  Args:
    model: A linen module.
    variables: Variables of the model, or their shapes.
    images: [B, H, W, C], or their shape.
    batch_norm: "running" or "batch".

  Raises:
    UserError: Not a network, or variables of another one.
  """
  images = checks.batch(images, "images", ndim=4)
  checks.variables(model, variables, images.shape)
  marked: list[tuple[Place, jax.ShapeDtypeStruct]] = []
  stated: set[Place] = set()
  visitors: list[_Visitor] = []

  def mark(place: Place, module: nn.Module, tensor: Array) -> Array:
    if not _may_be_spatial(module, tensor, images.shape[0]):
      return tensor
    shape = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
    marked.append((place, shape))
    if getattr(module, "tapped_by_default", False) is True:
      stated.add(place)
    return checkpoint_name(tensor, f"{_MARK}{len(marked) - 1}")

  def logits(variables: Variables, images: Array) -> Array:
    visitors.append(_Visitor(mark))
    with _outputs(visitors[-1]):
      return bn.apply(model, variables, images, batch_norm=batch_norm)[0]

  try:
    closed = jax.make_jaxpr(logits)(variables, images)
  except flax.errors.FlaxError as error:
    raise UserError(
      f"variables: {str(error).splitlines()[0]}; allowed: the variables of"
      f" {type(model).__name__} for images of shape {images.shape[1:]}"
    ) from None
  flow = _Flow(closed.jaxpr)
  return _sorted_out(visitors[-1], marked, stated, flow, images.shape)


def _may_be_spatial(module: nn.Module, tensor: Array, size: int) -> bool:
  """Whether a tensor may be [B, h, w, C] or tokens [B, T, C] by its shape."""
  if tensor.ndim not in (3, 4) or tensor.shape[0] != size:
    return False
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    return False
  # One that makes several axes of the channels makes heads of attention.
  return not isinstance(module, nn.DenseGeneral) or np.size(module.features) < 2


class _Flow:
  """Dependencies in a traced program from images to logits.

  The equations at the top are looked at as wholes: all that one returns depends
  on all that it takes.

  Args:
    jaxpr: Program whose last argument is the images.
  """

  def __init__(self, jaxpr: core.Jaxpr):
    self._eqns = jaxpr.eqns
    self._images = jaxpr.invars[-1]
    self._logits = _variables(jaxpr.outvars)
    self._marks = {
      int(eqn.params["name"].removeprefix(_MARK)): eqn
      for eqn in jaxpr.eqns
      if eqn.primitive.name == "name"
      and str(eqn.params["name"]).startswith(_MARK)
    }
    needed = set(self._logits)
    for eqn in reversed(self._eqns):
      if needed.intersection(eqn.outvars):
        needed.update(_variables(eqn.invars))
    self._needed = needed
    self._seen = self._reached(self._images)

  def _reached(self, start: Any, without: Any = None) -> set[Any]:
    reached = {start}
    for eqn in self._eqns:
      if eqn is not without and reached.intersection(_variables(eqn.invars)):
        reached.update(eqn.outvars)
    return reached

  def between(self, mark: int) -> bool:
    """Whether a marked tensor depends on the images, and the logits on it."""
    variable = self._marks[mark].outvars[0]
    return variable in self._seen and variable in self._needed

  def is_cut(self, mark: int) -> bool:
    """Whether all that the logits know of the images goes through a tensor."""
    reached = self._reached(self._images, without=self._marks[mark])
    return not reached.intersection(self._logits)

  def reads_tokens(self, mark: int, earlier: Iterable[int]) -> bool:
    """Whether only tokens go past a grid, on a path from an earlier one.

    All that the logits know of the images goes through one of the two, and no
    convolution or grid is beside the path between them.

    Args:
      mark: Mark of the grid.
      earlier: Marks of the other tensors [B, h, w, C].
    """
    needed = set(self._marks[mark].outvars)
    for eqn in reversed(self._eqns):
      if needed.intersection(eqn.outvars):
        needed.update(_variables(eqn.invars))
    beside = [
      eqn
      for eqn in self._eqns
      if _convolves(eqn) and not needed.intersection(eqn.outvars)
    ]
    beside += [
      self._marks[one]
      for one in earlier
      if not needed.intersection(self._marks[one].outvars)
    ]
    used = self._seen & self._needed
    if any(used.intersection(eqn.outvars) for eqn in beside):
      return False
    return any(self.is_cut(one) for one in (mark, *earlier))

  def convolves_after(self, mark: int) -> bool:
    """Whether a convolution lies between a tensor and the logits."""
    reached = self._reached(self._marks[mark].outvars[0])
    return any(
      reached.intersection(_variables(eqn.invars))
      and self._needed.intersection(eqn.outvars)
      and _convolves(eqn)
      for eqn in self._eqns
    )


def _variables(atoms: Iterable[Any]) -> list[Any]:
  return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _convolves(eqn: Any) -> bool:
  """Whether an equation convolves to more than a single pixel."""
  if eqn.primitive.name == "conv_general_dilated":
    spec = eqn.params["dimension_numbers"].out_spec
    return any(eqn.outvars[0].aval.shape[axis] > 1 for axis in spec[2:])
  kinds = core.Jaxpr | core.ClosedJaxpr
  inner = jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda x: isinstance(x, kinds)
  )
  return any(
    _convolves(one)
    for part in inner
    if isinstance(part, kinds)
    for one in part.eqns
  )


def _sorted_out(
  visitor: _Visitor,
  marked: list[tuple[Place, jax.ShapeDtypeStruct]],
  stated: set[Place],
  flow: _Flow,
  image_shape: tuple[int, ...],
) -> Listing:
  """Tells layers from other tensors, and finds the last of them."""
  layers: dict[str, Layer] = {}
  marks: dict[str, int] = {}
  others = {
    path: "inside nn.remat, nn.scan, nn.jit or another transformation, where it"
    " cannot be tapped"
    for path, _, _ in visitor.inside
  }
  grid = None
  for mark, (place, output) in enumerate(marked):
    name = visitor.name(place)
    if not flow.between(mark):
      others[name] = "not between the images and the logits"
      continue
    layer = _layer(place, output, grid, image_shape)
    if layer is None:
      others[name] = f"tokens {list(output.shape)}, which make no grid"
      continue
    layers[name], marks[name] = layer, mark
    if not layer.of_tokens and _keeps_proportions(layer.grid, image_shape):
      grid = layer.grid
  for path, count in visitor.calls.items():
    names = [n for n, layer in layers.items() if layer.place.path == path]
    if count > 1 and names:
      others[path] = f"called {count} times"
    elif path not in layers and names:
      others[path] = "returns several tensors"
  last, reason = _last(layers, marks, stated, flow, visitor, image_shape)
  return Listing(layers, last, reason, others)


def _layer(
  place: Place,
  output: jax.ShapeDtypeStruct,
  grid: tuple[int, int] | None,
  image_shape: tuple[int, ...],
) -> Layer | None:
  """Returns a tensor as a layer; None: tokens that make no grid."""
  if len(output.shape) == 4:
    return Layer(place, output, output.shape[1:3])
  count = output.shape[1]
  if grid is not None:
    extra = count - grid[0] * grid[1]
    if 0 <= extra <= _MOST_EXTRA_TOKENS and grid[0] * grid[1] > 1:
      return Layer(place, output, grid, extra)
    return None
  _, height, width, _ = image_shape
  for extra in (0, 1):
    rows = round(((count - extra) * height / width) ** 0.5)
    if rows > 1 and (count - extra) % rows == 0:
      found = rows, (count - extra) // rows
      if found[0] * width == found[1] * height:
        return Layer(place, output, found, extra)
  return None


def _keeps_proportions(
  grid: tuple[int, int], image_shape: tuple[int, ...]
) -> bool:
  """Whether height and width of a tensor are in the images' proportions.

  Strides round, and convolutions without padding take a few pixels off: this is
  allowed for where the images are no squares. Axes that are something else, such
  as heads and tokens of attention, do not keep the proportions.
  """
  (h, w), (_, height, width, _) = grid, image_shape
  slack = 0 if height == width else 3 * max(height, width)
  return abs(h * width - w * height) <= slack


_NAME_IT = (
  "a layer by name, or the tensor passed through models.base.Features(name=...)"
)


def _last(
  layers: dict[str, Layer],
  marks: dict[str, int],
  stated: set[Place],
  flow: _Flow,
  visitor: _Visitor,
  image_shape: tuple[int, ...],
) -> tuple[str, str]:
  """Returns the name of the last spatial tensor, or why none is known."""
  spatial = {n: layer for n, layer in layers.items() if not layer.of_tokens}
  tokens = [n for n, layer in layers.items() if layer.of_tokens]
  inside = [path for path, shape, _ in visitor.inside if len(shape) > 2]
  if not spatial:
    missing = "model: no submodule returns a tensor [B, h, w, C]"
    if tokens:
      return "", f"{missing}, but tokens; allowed: their layer: {_few(tokens)}"
    hidden = f" outside{_where(inside)}" if inside else ""
    return "", (
      f"{missing}{hidden}; allowed: a network with one, such as models.from_functions("
      "features, head, weights) makes of two functions"
    )
  # A single pixel (gates, or what follows the pooling) makes no map.
  large = [n for n, layer in spatial.items() if max(layer.grid) > 1]
  last = (large or list(spatial))[-1]
  after = list(layers)[list(layers).index(last) + 1 :]
  found = f"the last tensor [B, h, w, C] of a submodule is that of {last!r}"
  is_stated = spatial[last].place in stated and flow.reads_tokens(
    marks[last], [marks[n] for n in large if n != last]
  )
  reason = ""
  if not _keeps_proportions(spatial[last].grid, image_shape):
    reason = (
      f"whose shape {spatial[last].shape} is not in the proportions of the"
      f" images, {image_shape}"
    )
  elif not is_stated and (later := [n for n in after if n in tokens]):
    reason = f"and is followed by tokens [B, T, C], at {_few(later)}"
  elif later := _later(visitor, spatial[last]):
    reason = f"and is followed by others inside{_where(later)}"
  elif flow.convolves_after(marks[last]):
    reason = "and is followed by a convolution that no submodule returns"
  elif not is_stated and not flow.is_cut(marks[last]):
    reason = (
      "which is one of several paths from the images to the logits, as before a"
      " sum or a concatenation that no submodule returns"
    )
  if reason:
    return "", f"model: {found}, {reason}; allowed: {_NAME_IT}"
  return last, ""


def _later(visitor: _Visitor, layer: Layer) -> list[str]:
  """Paths inside transformations whose tensors come after a layer."""
  before = visitor.order[layer.place]
  return [
    path
    for path, shape, seen in visitor.inside
    if len(shape) > 2 and seen >= before
  ]


def _where(inside: list[str]) -> str:
  return f" nn.remat, nn.scan or another transformation ({_few(inside)})"


def _few(names: Iterable[str]) -> str:
  """Names the last few of several."""
  different = list(dict.fromkeys(names))
  return ", ".join([*(["..."] if len(different) > 3 else []), *different[-3:]])
