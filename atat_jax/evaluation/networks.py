"""Checks of several networks on the same images."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from atat_jax import checks, models
from atat_jax.attacks import base
from atat_jax.errors import UserError, shown
from atat_jax.typing import Variables

Networks = Mapping[str, tuple[nn.Module, Variables]]
"""Name to (module, variables)."""


def check(networks: Networks, image_shape: tuple[int, ...]) -> None:
  """Checks networks before anything is computed with them.

  Args:
    networks: Name to (module, variables).
    image_shape: Shape [n, H, W, C] of the images that they are to see.

  Raises:
    UserError: None at all, something else than networks by name, or variables
      that are another network's or not finite.
  """
  what = "one or more names, each with (module, variables)"
  if not isinstance(networks, Mapping) or not networks:
    raise UserError(f"networks: {shown(networks)}; allowed: {what}")
  for name, pair in networks.items():
    if not isinstance(name, str) or not name:
      raise UserError(f"networks: name {shown(name)}; allowed: {what}")
    place = f"networks[{name!r}]"
    if not isinstance(pair, tuple | list) or len(pair) != 2:
      raise UserError(f"{place}: {shown(pair)}; allowed: (module, variables)")
    checks.module(pair[0], place)
    checks.variables(*pair, image_shape, place)
    checks.finite(place, pair[1])


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
  images = checks.host("images", images)
  checks.inspect_images(images)
  check(networks, images.shape)
  found = {name: models.classifier(*pair) for name, pair in networks.items()}
  for classifier in found.values():
    _, images, labels, num_classes = base.on_host(classifier, images, labels)
  return found, images, labels, num_classes
