"""Grad-CAM (Selvaraju et al., 2017), Eq. (1) to (3) of the paper.

ATT^c(x) = ReLU(sum_k GAP(d y^c / d A_k) A_k(x)), with the gradient of the
*logit* of class c, per example. A zero is added to the activation A at the tap
and the logits are differentiated with respect to that zero: the backward pass
stops there, so a map of the last tensor costs a dense layer, not a second
network pass. The maps can be differentiated again.

Any linen module works; `models.adapt` and `models.from_functions` make one of a
network of another kind. A layer is named by the path of a submodule:

- "block_2/conv": its output [B, h, w, C];
- "block_2/conv:1", "block_2/conv:2": its outputs, where it is called twice;
- "block_2[0]": the first of several tensors that it returns.

Tokens [B, T, C] of a transformer are taken as the grid of their patches, without
a class token before them.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import batch_norm as bn
from atat_jax import checks, compilation
from atat_jax.attention import taps
from atat_jax.errors import UserError
from atat_jax.typing import Array, BatchNormMode, PyTree, Variables

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


def layers(
  model: nn.Module, variables: Variables, images: Array
) -> dict[str, tuple[int, ...]]:
  """Lists the layers that can be tapped, from the input to the output.

  Args:
    model: A linen module.
    variables: Variables of the model.
    images: [B, H, W, C] in [0, 1]; used for their shape and dtype.

  Returns:
    {name: shape [B, h, w, C]}; the shape of tokens is that of their grid.

  Raises:
    UserError: Not a network, or variables of another one.
  """
  found = taps.listing(model, variables, images, "running").layers
  return {name: layer.shape for name, layer in found.items()}


def layer_names(
  model: nn.Module, variables: Variables, images: Array
) -> tuple[str, ...]:
  """Returns the names of `layers`.

  Raises:
    UserError: Not a network, or variables of another one.
  """
  return tuple(layers(model, variables, images))


def _chosen(
  model: nn.Module,
  variables: Variables,
  images: Array,
  layers: Sequence[str] | None,
  batch_norm: BatchNormMode,
) -> dict[str, taps.Layer]:
  """Layers by name; None: that of the last spatial tensor."""
  listing = taps.listing(model, variables, images, batch_norm)
  if layers is None:
    if listing.refused:
      raise UserError(listing.refused)
    return {listing.default: listing.layers[listing.default]}
  layers = checks.names("layers", layers)
  for layer in layers:
    if layer in listing.others and layer not in listing.layers:
      raise UserError(
        f"layers: {layer!r}, {listing.others[layer]}; allowed:"
        f" {', '.join(listing.layers)}"
      )
  check_layers(layers, listing.layers)
  return {layer: listing.layers[layer] for layer in layers}


def chosen_layers(
  model: nn.Module,
  variables: Variables,
  images: Array,
  layers: Sequence[str] | None,
) -> tuple[str, ...]:
  """Returns the layers that `grad_cam` taps: those given, or the last tensor's.

  Raises:
    UserError: A layer that the model does not have; no layer given, and it is not
      known which tensor is the last.
  """
  return tuple(_chosen(model, variables, images, layers, "running"))


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
  zeros = {
    layer.place: jnp.zeros((), layer.output.dtype) for layer in chosen.values()
  }
  logits, (found, stats) = taps.run(model, variables, images, zeros, batch_norm)
  tensors = {
    name: layer.on_grid(found[layer.place]) for name, layer in chosen.items()
  }
  return logits, tensors, stats


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
  logits, explained, stats, _ = _explained(
    model, variables, images, labels, layers, batch_norm
  )
  return logits, explained, stats


def _explained(
  model: nn.Module,
  variables: Variables,
  images: Array,
  labels: Array,
  layers: Sequence[str] | None,
  batch_norm: BatchNormMode,
) -> tuple[Array, dict[str, Array], PyTree, dict[str, Array]]:
  """Logits, maps, `batch_stats`, and by layer whether no token has a gradient."""
  chosen = _chosen(model, variables, images, layers, batch_norm)
  zeros = {
    layer.place: jnp.zeros_like(layer.output) for layer in chosen.values()
  }
  logits, pullback, (found, stats) = jax.vjp(
    lambda zeros: taps.run(model, variables, images, zeros, batch_norm),
    zeros,
    has_aux=True,
  )
  (gradients,) = pullback(
    jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  )
  explained, silent = {}, {}
  for name, layer in chosen.items():
    tensor = layer.on_grid(found[layer.place])
    gradient = layer.on_grid(gradients[layer.place])
    wide = jnp.promote_types(tensor.dtype, jnp.float32)
    weights = gradient.astype(wide).mean((1, 2))  # Eq. (2)
    weighted = jnp.einsum("bhwc,bc->bhw", tensor.astype(wide), weights)
    explained[name] = jax.nn.relu(weighted)  # Eq. (3)
    if layer.extra:
      silent[name] = (gradient == 0).all()
  return logits, explained, stats, silent


def _maps(
  variables: Variables,
  images: Array,
  labels: Array,
  *,
  model: nn.Module | compilation.Opaque,
  layers: tuple[str, ...] | None,
  batch_norm: BatchNormMode,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
  """Returns maps, how many numbers are not finite, by what they are of, and the
  layers at which no token of a patch has a gradient."""
  logits, maps, _, silent = _explained(
    compilation.unwrap(model), variables, images, labels, layers, batch_norm
  )
  bad = {"variables": variables, "logits": logits} | {
    f"map at {layer}": one for layer, one in maps.items()
  }
  return (
    maps,
    {what: _num_nonfinite(tree) for what, tree in bad.items()},
    silent,
  )


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
    layers: Names of `layers`; None: that of the last tensor [B, h, w, C].
    batch_norm: "running" or "batch".

  Returns:
    {layer: [B, h, w] float32 >= 0}, on the layer's own grid.

  Raises:
    UserError: Unknown layer; no layer given, and it is not known which tensor
      is the last; variables of another network; images or labels of a wrong
      shape, dtype or range; variables, logits or maps that are not finite; a
      layer of tokens on which the logits do not depend.
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
  maps, bad, silent = _jitted_maps(
    variables,
    images,
    labels,
    model=hashable,
    layers=layers,
    batch_norm=batch_norm,
  )
  _refuse_nonfinite(bad, model)
  _refuse_silent(silent)
  return maps


def _refuse_silent(silent: dict[str, Array]) -> None:
  """Raises a `UserError` if the logits depend on no patch at a layer."""
  if any(isinstance(is_zero, jax.core.Tracer) for is_zero in silent.values()):
    return
  for layer, is_zero in jax.device_get(silent).items():
    if is_zero:
      raise UserError(
        f"layers: {layer!r}: the logits depend on no token of a patch there, as"
        " behind the last attention of a network with a class token; allowed: a"
        " layer before it"
      )


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
