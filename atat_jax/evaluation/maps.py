"""Attention maps of networks on clean and attacked images, as plain arrays."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import linen as nn

from atat_jax import attention, compilation, models
from atat_jax.evaluation.protocols import Protocol
from atat_jax.typing import Array, Classifier, Variables


def _softmax(classifier: Classifier, images: Array) -> Array:
  return jax.nn.softmax(classifier(images))


_probabilities = compilation.jit(_softmax)


def attention_maps(
  key: Array,
  networks: Mapping[str, tuple[nn.Module, Variables]],
  images: Array,
  labels: Array,
  *,
  protocol: Protocol,
) -> dict[str, np.ndarray]:
  """Grad-CAM of the true class, on clean images and under each network's attack.

  Args:
    key: Random key of the attacks.
    networks: Name to (module, variables), e.g. teacher and student; running
      statistics.
    images: [n, H, W, C] in [0, 1].
    labels: int32 [n].
    protocol: The attack, made for each network by itself.

  Returns:
    `images`, `labels`, `layer`, `protocol`, and for each network
    `<name>_adversarial` [n, H, W, C] and for kind in clean, adversarial
    `<name>_<kind>_map` [n, h, w], `<name>_<kind>_prediction` [n] and
    `<name>_<kind>_probability` [n].
  """
  found = {
    "images": np.asarray(images),
    "labels": np.asarray(labels),
    "protocol": np.array(f"{protocol.describe()}; running statistics"),
  }
  for name, (model, variables) in networks.items():
    classifier = models.classifier(model, variables)
    adversarial = protocol.run(key, classifier, images, labels)
    found[f"{name}_adversarial"] = np.asarray(adversarial)
    for kind, inputs in (("clean", images), ("adversarial", adversarial)):
      ((layer, maps),) = attention.grad_cam(
        model, variables, inputs, labels
      ).items()
      probabilities = np.asarray(_probabilities(classifier, inputs))
      found["layer"] = np.array(layer)
      found[f"{name}_{kind}_map"] = np.asarray(maps)
      found[f"{name}_{kind}_prediction"] = probabilities.argmax(-1)
      found[f"{name}_{kind}_probability"] = probabilities.max(-1)
  return found
