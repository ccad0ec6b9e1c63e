"""Attention maps of networks on clean and attacked images, as plain arrays.

All maps are Grad-CAM of the true class, of Eq. (3), whatever a network
predicts: the paper takes "the model's interpretation regarding to the correct
label of the image" (section 1) and the gradients "provided by the true label"
(section 3). So a map under attack says where the evidence for the right answer
still lies, not what speaks for the wrong one.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from atat_jax import attention, checks, compilation, sharding
from atat_jax.evaluation import iterates
from atat_jax.evaluation.networks import Networks, classifiers
from atat_jax.evaluation.protocols import Protocol
from atat_jax.typing import Array, Classifier, Variables

Attacked = Mapping[str, Array]
"""Kind of input, e.g. "adversarial" or "round8", to images [n, H, W, C]."""


def _look(
  variables: Variables,
  images: Array,
  labels: Array,
  *,
  model: nn.Module | compilation.ByIdentity,
  layer: str,
) -> tuple[Array, Array]:
  """Probabilities [n, K] and maps [n, h, w], in one forward pass."""
  logits, maps, _ = attention.forward(
    compilation.unwrap(model), variables, images, labels, layers=(layer,)
  )
  return jax.nn.softmax(logits), maps[layer]


_jitted_look = compilation.jit(_look, static_argnames=("model", "layer"))
_jitted_iterates = compilation.jit(
  iterates.pgd_iterates, static_argnames=("norm", "loss")
)


def tapped_layer(
  model: nn.Module,
  variables: Variables,
  images: np.ndarray,
  layer: str | None,
) -> str:
  """The layer whose map is taken: the one named, or the last tensor's.

  Raises:
    UserError: The network has no such layer.
  """
  layers = None if layer is None else (layer,)
  one = jnp.asarray(images[:1])
  return attention.chosen_layers(model, variables, one, layers)[0]


def attention_maps(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  protocol: Protocol,
  source: str | None = None,
  layer: str | None = None,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Maps of the true class on clean and on attacked images (Fig. 1, 2, 5, 6).

  Args:
    key: Random key of the attacks.
    networks: Name to (module, variables), any number, e.g. teacher and student;
      running statistics.
    images: Float [n, H, W, C] in [0, 1].
    labels: Integers [n]: the true classes.
    protocol: The attack.
    source: The network that the attacked images are made for, the same for all;
      None: each network's own.
    layer: A submodule that all the networks have; None: the last convolutional
      tensor of each.
    mesh: The devices; None: all of them. Each computes everything.

  Returns:
    `networks` [m], `kinds` ("clean", "adversarial"), `images`, `labels`,
    `layer`, `protocol`, and for each network `<name>_adversarial` [n, H, W, C]
    and for kind in clean, adversarial `<name>_<kind>_map` float32 [n, h, w],
    `<name>_<kind>_prediction` [n] and `<name>_<kind>_probability` [n], of the
    predicted class.

  Raises:
    UserError: An argument of a wrong shape, dtype, range or name.
  """
  return _maps(
    networks,
    images,
    labels,
    lambda classifier, x, y: {
      "adversarial": protocol.run(key, classifier, x, y)
    },
    description=f"{protocol.describe()}; running statistics",
    source=source,
    layer=layer,
    mesh=mesh,
  )


def attention_rounds(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  epsilon: float,
  step_size: float,
  rounds: Sequence[int] = (2, 8, 16),
  norm: str = "linf",
  loss: str = "cross_entropy",
  random_start: bool = True,
  source: str | None = None,
  layer: str | None = None,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Maps of the true class as one attack of PGD goes on (Fig. 3).

  The attack runs once for each network; what it has made of the images after
  each of the rounds is kept on the way.

  Args:
    key: Random key of the attacks' start.
    networks: See `attention_maps`.
    images: Float [n, H, W, C] in [0, 1].
    labels: Integers [n]: the true classes.
    epsilon: Radius of the ball, in the unit of the pixels. The paper: 16/255.
    step_size: Length of a step, in the same unit.
    rounds: Numbers of steps, increasing. The clean image, the paper's round 0,
      is always shown; 0 here is the attack's start, which is the clean image
      again without `random_start`.
    norm: "linf", "l2" or "l1".
    loss: What the attack increases, one of `losses.ATTACK_LOSSES`.
    random_start: Whether the attack starts at a random point of the ball or at
      the clean image.
    source: See `attention_maps`.
    layer: See `attention_maps`.
    mesh: See `attention_maps`.

  Returns:
    As `attention_maps`, with the kinds "clean" and, for each k of the rounds,
    "round<k>"; and `rounds` [r].

  Raises:
    UserError: An argument of a wrong shape, dtype, range or name.
  """
  steps = iterates.check_settings(
    rounds=rounds, epsilon=epsilon, step_size=step_size, norm=norm, loss=loss
  )

  def attack(classifier: Classifier, x: Array, y: Array) -> Attacked:
    kept = _jitted_iterates(
      key,
      classifier,
      x,
      y,
      jnp.asarray(steps),
      epsilon=jnp.asarray(epsilon, x.dtype),
      step_size=jnp.asarray(step_size, x.dtype),
      random_start=jnp.asarray(random_start, bool),
      norm=norm,
      loss=loss,
    )
    return {f"round{k}": kept[i] for i, k in enumerate(steps)}

  found = _maps(
    networks,
    images,
    labels,
    attack,
    description=iterates.describe(
      rounds=steps,
      epsilon=epsilon,
      step_size=step_size,
      norm=norm,
      loss=loss,
      random_start=random_start,
    ),
    source=source,
    layer=layer,
    mesh=mesh,
  )
  return found | {"rounds": steps}


def _maps(
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
  named, images, labels, _ = classifiers(networks, images, labels)
  if source is not None:
    checks.choice("source", source, named)
    description += f"; images made for {source}"
  layers = {
    name: tapped_layer(*pair, images, layer) for name, pair in networks.items()
  }
  found = {
    "networks": np.array(list(named)),
    "images": images,
    "labels": labels,
    "layer": np.array(", ".join(dict.fromkeys(layers.values()))),
    "protocol": np.array(description),
  }
  mesh = sharding.make_mesh() if mesh is None else mesh
  x, y = (sharding.put_replicated(mesh, part) for part in (images, labels))
  placed = {
    name: sharding.put_replicated(mesh, classifier)
    for name, classifier in named.items()
  }
  shared = None if source is None else attack(placed[source], x, y)
  for name, (model, _) in networks.items():
    attacked = attack(placed[name], x, y) if shared is None else shared
    inputs = {"clean": x, **attacked}
    found["kinds"] = np.array(list(inputs))
    (variables,) = placed[name].args
    for kind, seen in inputs.items():
      probabilities, maps, seen_on_host = sharding.to_host(
        mesh,
        (
          *_jitted_look(
            variables,
            seen,
            y,
            model=compilation.hashable(model),
            layer=layers[name],
          ),
          seen,
        ),
      )
      if kind != "clean":
        found[f"{name}_{kind}"] = seen_on_host
      found[f"{name}_{kind}_map"] = maps
      found[f"{name}_{kind}_prediction"] = probabilities.argmax(-1)
      found[f"{name}_{kind}_probability"] = probabilities.max(-1)
  return found
