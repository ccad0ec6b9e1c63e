"""Attention maps of several networks on clean and attacked images, as arrays.

All maps are Grad-CAM of the true class, of Eq. (3), whatever a network
predicts: the paper takes "the model's interpretation regarding to the correct
label of the image" (section 1) and the gradients "provided by the true label"
(section 3). So a map under attack says where the evidence for the right answer
still lies, not what speaks for the wrong one.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from atat_jax import attention, checks, compilation, sharding
from atat_jax.attacks import nonfinite
from atat_jax.data import batches
from atat_jax.evaluation.networks import (
  Networks,
  classifiers,
  devices,
  refuse_nonfinite,
)
from atat_jax.typing import Array, Classifier, Variables

Attacked = Mapping[str, Array]
"""Kind of input, e.g. "adversarial" or "round8", to images [n, H, W, C]."""


def _view(
  variables: Variables,
  images: Array,
  labels: Array,
  *,
  model: nn.Module | compilation.Opaque,
  layer: str,
) -> tuple[Array, Array]:
  """Returns probabilities [n, K] and maps [n, h, w], in one forward pass.

  The probabilities are not finite where one of the logits is not.
  """
  logits, maps, _ = attention.forward(
    compilation.unwrap(model), variables, images, labels, layers=(layer,)
  )
  usable = nonfinite.usable(logits)[:, None]
  probabilities = jnp.where(usable, jax.nn.softmax(logits), jnp.nan)
  return probabilities, maps[layer]


_jitted_view = compilation.jit(_view, static_argnames=("model", "layer"))


def tapped_layer(
  model: nn.Module,
  variables: Variables,
  images: np.ndarray,
  layer: str | None,
) -> str:
  """Returns the layer whose map is taken: the one named, or the last tensor's.

  Raises:
    UserError: The network has no such layer.
  """
  one = jnp.asarray(images[:1])
  if layer is not None:
    names = attention.layer_names(model, variables, one)
    checks.choice("layer", layer, names)
    return layer
  return attention.chosen_layers(model, variables, one, None)[0]


def tapped_layers(
  networks: Networks, images: np.ndarray, layer: str | None
) -> dict[str, str]:
  """Returns each network's layer; see `tapped_layer`."""
  return {
    name: tapped_layer(*pair, images, layer) for name, pair in networks.items()
  }


def attention_views(
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  attack: Callable[[Classifier, Array, Array], Attacked],
  *,
  description: str,
  source: str | None,
  layer: str | None,
  mesh: Mesh | None,
) -> dict[str, np.ndarray]:
  """Returns maps and predictions on clean images and on those of an attack.

  Args:
    networks: Name to (module, variables), any number; running statistics.
    images: Float [n, H, W, C] in [0, 1].
    labels: Integers [n]: the true classes.
    attack: (classifier, images, labels) to attacked images by kind.
    description: The attack in words.
    source: See `analyses.attention_maps`, as the following.
    layer: Layer of the maps.
    mesh: The devices.

  Returns:
    The arrays of `analyses.attention_maps`.

  Raises:
    UserError: An argument of a wrong shape, dtype, range or name; logits or
      maps that are not finite.
  """
  named, images, labels, _ = classifiers(networks, images, labels)
  if source is not None:
    checks.choice("source", source, named)
    description += f"; images made for {source}"
  layers = tapped_layers(networks, images, layer)
  found = {"images": images, "labels": labels}
  found |= _facts(list(named), layers, description)
  mesh = devices(mesh)
  x, y = (sharding.put_replicated(mesh, part) for part in (images, labels))
  placed = {k: sharding.put_replicated(mesh, c) for k, c in named.items()}

  def view(name: str, kind: str, seen: Array) -> dict[str, np.ndarray]:
    model = compilation.hashable(networks[name][0])
    (variables,) = placed[name].args
    views = _jitted_view(variables, seen, y, model=model, layer=layers[name])
    named = _named(name, kind, *sharding.to_host(mesh, views))
    batches.tell(len(images), len(images))
    return named

  for name in named:  # before any attack: they may be refused
    found |= view(name, "clean", x)
  shared = None if source is None else attack(placed[source], x, y)
  for name in named:
    attacked = attack(placed[name], x, y) if shared is None else shared
    found["kinds"] = np.array(["clean", *attacked])
    for kind, seen in attacked.items():
      found |= view(name, kind, seen)
      found[f"{name}_{kind}"] = sharding.to_host(mesh, seen)
  return found


def _facts(
  names: list[str], layers: Mapping[str, str], description: str
) -> dict[str, np.ndarray]:
  """Returns the texts that a file has besides its maps."""
  return {
    "networks": np.array(names),
    "layer": np.array(", ".join(dict.fromkeys(layers.values()))),
    "protocol": np.array(description),
  }


def _named(
  network: str, kind: str, probabilities: np.ndarray, maps: np.ndarray
) -> dict[str, np.ndarray]:
  """Names the arrays of one network and kind of input, all finite."""
  usable = np.isfinite(probabilities).all(-1)
  refuse_nonfinite(network, "images' logits", usable)
  refuse_nonfinite(network, "numbers of the maps", maps)
  return {
    f"{network}_{kind}_map": maps,
    f"{network}_{kind}_prediction": probabilities.argmax(-1),
    f"{network}_{kind}_probability": probabilities.max(-1),
  }
