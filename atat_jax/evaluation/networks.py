"""Checks of several networks on the same images."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from atat_jax import models
from atat_jax.attacks import base
from atat_jax.errors import UserError
from atat_jax.typing import Variables

Networks = Mapping[str, tuple[nn.Module, Variables]]
"""Name to (module, variables)."""


def classifiers(
  networks: Networks, images: Any, labels: Any
) -> tuple[dict[str, jax.tree_util.Partial], np.ndarray, np.ndarray, int]:
  """Checks networks and images; makes classifiers with running statistics.

  Args:
    networks: Name to (module, variables); at least one.
    images: Float [n, H, W, C] in [0, 1].
    labels: Integers [n] in [0, K).

  Returns:
    Name to classifier, float32 images and int32 labels on the host, and K.

  Raises:
    UserError: An argument that is not allowed, by name.
  """
  if not networks:
    raise UserError("networks: none; allowed: one or more")
  found = {name: models.classifier(*pair) for name, pair in networks.items()}
  for classifier in found.values():
    _, images, labels, num_classes = base.on_host(classifier, images, labels)
  return found, images, labels, num_classes
