"""Grad-CAM (Selvaraju et al., 2017), Eq. (1) to (3) of the paper.

ATT^c(x) = ReLU(sum_k GAP(d y^c / d A_k) A_k(x)), with the gradient of the
*logit* of class c, per example. A zero is added to the activation A at the tap
and the logits are differentiated with respect to that zero: the backward pass
stops there, so a map of the last tensor costs a dense layer, not a second
network pass. The maps can be differentiated again.

Any linen module works: a layer is named by the path of a submodule whose output
is [B, h, w, C].
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import batch_norm as bn
from atat_jax import checks, compilation
from atat_jax.errors import UserError
from atat_jax.typing import Array, BatchNormMode, PyTree, Variables


@contextmanager
def _outputs(visit: Callable[[str, Any], Any]) -> Iterator[None]:
  """Lets `visit(path, output)` replace the output of any submodule."""
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
    path = "/".join(context.module.path)
    if not visits or context.method_name != "__call__" or not path:
      return output
    return visits[0](path, output)

  try:
    with nn.intercept_methods(interceptor):
      yield
  finally:
    visits.clear()


def _tensors(
  model: nn.Module,
  variables: Variables,
  images: Array,
  batch_norm: BatchNormMode,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Outputs [B, h, w, C] of all submodules, in the order of computation."""
  images = checks.batch(images, "images", ndim=4)
  checks.variables(model, variables, images.shape)
  found: dict[str, jax.ShapeDtypeStruct] = {}

  def visit(path: str, output: Any) -> Any:
    if isinstance(output, jax.Array) and output.ndim == 4:
      if path in found:  # a shared module: its name is ambiguous
        repeated.add(path)
      found.pop(path, None)
      found[path] = jax.ShapeDtypeStruct(output.shape, output.dtype)
    return output

  repeated: set[str] = set()
  try:
    with _outputs(visit):
      jax.eval_shape(
        lambda v, x: bn.apply(model, v, x, batch_norm=batch_norm),
        variables,
        images,
      )
  except flax.errors.FlaxError as error:
    raise UserError(
      f"variables: {str(error).splitlines()[0]}; allowed: the variables of"
      f" {type(model).__name__} for images of shape {images.shape[1:]}"
    ) from None
  return {path: s for path, s in found.items() if path not in repeated}


MAPS = ("grad_cam", "channel_sum")
"""Kinds of maps that are computed from an activation."""


def check_layers(layers: Iterable[str], names: Iterable[str]) -> None:
  """Checks that a network has certain layers.

  Args:
    layers: Names of the layers in J.
    names: Layers of the network, see `layer_names`.

  Raises:
    UserError: A layer that the network does not have.
  """
  names = tuple(names)
  for layer in checks.names("layers", layers):
    if layer not in names:
      raise UserError(f"layers: {layer!r}; allowed: {', '.join(names)}")


def layer_names(
  model: nn.Module, variables: Variables, images: Array
) -> tuple[str, ...]:
  """Returns the layers that can be tapped, from the input to the output.

  Raises:
    UserError: Not a network, or variables of another one.
  """
  return tuple(_tensors(model, variables, images, "running"))


def _chosen(
  model: nn.Module,
  variables: Variables,
  images: Array,
  layers: Sequence[str] | None,
  batch_norm: BatchNormMode,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Outputs of the given layers; None: of the last tensor's layer."""
  tensors = _tensors(model, variables, images, batch_norm)
  if not tensors:
    raise UserError(
      "model: no submodule returns a tensor [B, h, w, C]; Grad-CAM needs one"
    )
  if layers is None:
    layers = (list(tensors)[-1],)
  layers = checks.names("layers", layers)
  check_layers(layers, tensors)
  return {layer: tensors[layer] for layer in layers}


def chosen_layers(
  model: nn.Module,
  variables: Variables,
  images: Array,
  layers: Sequence[str] | None,
) -> tuple[str, ...]:
  """Returns the layers that `grad_cam` taps: those given, or the last tensor's.

  Raises:
    UserError: A layer that the model does not have.
  """
  return tuple(_chosen(model, variables, images, layers, "running"))


def _tapped(
  model: nn.Module,
  variables: Variables,
  images: Array,
  taps: dict[str, Array],
  batch_norm: BatchNormMode,
) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
  """Logits of one pass, with {layer: output + tap} and `batch_stats`."""
  found = {}

  def visit(path: str, output: Any) -> Any:
    if path in taps:
      output = found[path] = output + taps[path]
    return output

  with _outputs(visit):
    logits, stats = bn.apply(model, variables, images, batch_norm=batch_norm)
  return logits, ({layer: found[layer] for layer in taps}, stats)


def activations(
  model: nn.Module,
  variables: Variables,
  images: Array,
  *,
  layers: Sequence[str] | None = None,
  batch_norm: BatchNormMode = "running",
) -> tuple[Array, dict[str, Array], PyTree]:
  """Returns logits and activations of one forward pass. For use inside jit.

  Args:
    model: A linen module.
    variables: Variables of the model.
    images: [B, H, W, C] in [0, 1].
    layers: Names of the layers; None: the last tensor [B, h, w, C].
    batch_norm: "running" or "batch".

  Returns:
    Logits [B, K]; {layer: [B, h, w, C]}; the collection `batch_stats` after the
    pass.

  Raises:
    UserError: A layer that the model does not have.
  """
  chosen = _chosen(model, variables, images, layers, batch_norm)
  taps = {
    layer: jnp.zeros((), output.dtype) for layer, output in chosen.items()
  }
  logits, (found, stats) = _tapped(model, variables, images, taps, batch_norm)
  return logits, found, stats


def channel_sum(tensor: Array) -> Array:
  """Computes sum_c |A_c| (Zagoruyko and Komodakis, 2017, F_sum).

  Args:
    tensor: [B, h, w, C].

  Returns:
    [B, h, w] >= 0, float32 or wider.
  """
  tensor = checks.batch(tensor, "tensor", ndim=4)
  wide = tensor.astype(jnp.promote_types(tensor.dtype, jnp.float32))
  return (wide * jnp.sign(wide)).sum(-1)  # the gradient of jnp.abs at 0 is 1


def forward(
  model: nn.Module,
  variables: Variables,
  images: Array,
  labels: Array,
  *,
  layers: Sequence[str] | None = None,
  batch_norm: BatchNormMode = "running",
  maps: str = "grad_cam",
) -> tuple[Array, dict[str, Array], PyTree]:
  """Returns logits and attention maps of one forward pass. For use inside jit.

  Args:
    model: A linen module.
    variables: Variables of the model.
    images: [B, H, W, C] in [0, 1].
    labels: Classes whose logits are explained, int32 [B].
    layers: Names of the layers in J, Eq. (4); None: the last tensor
      [B, h, w, C].
    batch_norm: "running" or "batch".
    maps: One of `MAPS`; "channel_sum" does not depend on the labels.

  Returns:
    Logits [B, K]; maps {layer: [B, h, w] >= 0}, float32 or wider; the collection
    `batch_stats` after the pass.

  Raises:
    UserError: A layer that the model does not have.
  """
  checks.choice("maps", maps, MAPS)
  images = checks.batch(images, "images", ndim=4)
  labels = checks.classes(labels, images.shape[0])
  if maps == "channel_sum":
    logits, found, stats = activations(
      model, variables, images, layers=layers, batch_norm=batch_norm
    )
    return (
      logits,
      {name: channel_sum(one) for name, one in found.items()},
      stats,
    )
  chosen = _chosen(model, variables, images, layers, batch_norm)
  taps = {layer: jnp.zeros_like(output) for layer, output in chosen.items()}
  logits, pullback, (found, stats) = jax.vjp(
    lambda taps: _tapped(model, variables, images, taps, batch_norm),
    taps,
    has_aux=True,
  )
  (gradients,) = pullback(
    jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  )
  explained = {}
  for layer, tensor in found.items():
    wide = jnp.promote_types(tensor.dtype, jnp.float32)
    weights = gradients[layer].astype(wide).mean((1, 2))  # Eq. (2)
    weighted = jnp.einsum("bhwc,bc->bhw", tensor.astype(wide), weights)
    explained[layer] = jax.nn.relu(weighted)  # Eq. (3)
  return logits, explained, stats


def _maps(
  variables: Variables,
  images: Array,
  labels: Array,
  *,
  model: nn.Module | compilation.Opaque,
  layers: tuple[str, ...] | None,
  batch_norm: BatchNormMode,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns maps, and how many numbers are not finite, by what they are of."""
  logits, maps, _ = forward(
    compilation.unwrap(model),
    variables,
    images,
    labels,
    layers=layers,
    batch_norm=batch_norm,
  )
  bad = {"variables": variables, "logits": logits} | {
    f"map at {layer}": one for layer, one in maps.items()
  }
  return maps, {what: _num_nonfinite(tree) for what, tree in bad.items()}


def _num_nonfinite(tree: PyTree) -> Array:
  counts = [
    (~jnp.isfinite(leaf)).sum()
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  return sum(counts, jnp.zeros((), jnp.int32))


_jitted_maps = compilation.jit(
  _maps, static_argnames=("model", "layers", "batch_norm")
)


def _forward(
  variables: Variables,
  images: Array,
  *,
  model: nn.Module | compilation.Opaque,
  batch_norm: BatchNormMode,
) -> Array:
  network = compilation.unwrap(model)
  return bn.apply(network, variables, images, batch_norm=batch_norm)[0]


# Used for shapes only. Its traces are cached, because tracing a deep network for
# every batch would take longer than computing the maps on an accelerator.
_logits = compilation.jit(_forward, static_argnames=("model", "batch_norm"))


def grad_cam(
  model: nn.Module,
  variables: Variables,
  images: Array,
  labels: Array,
  *,
  layers: Sequence[str] | None = None,
  batch_norm: BatchNormMode = "running",
) -> dict[str, Array]:
  """Computes Grad-CAM maps of the logit of each image's label, Eq. (3).

  Args:
    model: A linen module; `apply(variables, images, train=False)` returns
      logits.
    variables: Variables of the model.
    images: float [B, H, W, C] in [0, 1].
    labels: Integers [B] in [0, K).
    layers: Names of submodules whose outputs are tapped (see `layer_names`);
      None: the last convolutional tensor.
    batch_norm: "running" or "batch".

  Returns:
    {layer: [B, h, w] float32 >= 0}, on the layer's own grid.

  Raises:
    UserError: Unknown layer; variables of another network; images or labels of
      a wrong shape, dtype or range; variables, logits or maps that are not
      finite.
  """
  images = checks.images(images)
  checks.choice("batch_norm", batch_norm, ("running", "batch"))
  checks.variables(model, variables, images.shape)
  hashable = compilation.hashable(model)
  logits = _logits.eval_shape(  # type: ignore[attr-defined]
    variables, images, model=hashable, batch_norm=batch_norm
  )
  labels = checks.labels(labels, images.shape[0], logits.shape[-1])
  layers = None if layers is None else checks.names("layers", layers)
  maps, bad = _jitted_maps(
    variables,
    images,
    labels,
    model=hashable,
    layers=layers,
    batch_norm=batch_norm,
  )
  _refuse_nonfinite(bad, model)
  return maps


def _refuse_nonfinite(bad: dict[str, Array], model: nn.Module) -> None:
  """Raises a `UserError` if a count is not 0; counts inside jit pass."""
  if any(isinstance(count, jax.core.Tracer) for count in bad.values()):
    return
  counts = jax.device_get(bad)
  # The cause before what follows from it.
  for what in dict.fromkeys(["variables", "logits", *counts]):
    if count := counts[what]:
      raise UserError(
        f"{what}: {count:,} numbers of {type(model).__name__} are not finite;"
        " allowed: finite variables, and logits and maps that are"
      )
