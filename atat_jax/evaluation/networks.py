"""Checks of several networks on the same images."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from atat_jax import checks, models, sharding
from atat_jax.attacks import base
from atat_jax.errors import UserError, shown
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
  images = checks.array(images, "images")
  checks.inspect_images(images)
  check_networks(networks, images.shape)
  found = {name: models.classifier(*pair) for name, pair in networks.items()}
  for classifier in found.values():
    _, images, labels, num_classes = base.on_host(classifier, images, labels)
  return found, images, labels, num_classes


def check_networks(networks: Any, image_shape: tuple[int, ...]) -> None:
  """Checks that networks are named, and have finite variables of their own.

  Args:
    networks: Name to (module, variables).
    image_shape: Shape [n, H, W, C] of the images that they are to see.

  Raises:
    UserError: Anything else; the message names the network.
  """
  allowed = "{name: (module, variables)}, one or more"
  checks.instance("networks", networks, Mapping, allowed)
  if not networks:
    raise UserError(f"networks: none; allowed: {allowed}")
  for name, pair in networks.items():
    if not isinstance(name, str) or not name:
      raise UserError(f"networks: name {name!r}; allowed: {allowed}")
    if not isinstance(pair, tuple | list) or len(pair) != 2:
      raise UserError(f"networks[{name!r}]: {shown(pair)}; allowed: {allowed}")
    model, variables = pair
    checks.module(model, f"networks[{name!r}]")
    checks.variables(model, variables, image_shape, f"networks[{name!r}]")
    checks.finite(f"networks[{name!r}]", variables)


def devices(mesh: Mesh | None) -> Mesh:
  """Checks the devices of a computation; None stands for all of them.

  Raises:
    UserError: Something else than a mesh.
  """
  return sharding.mesh_or_all(mesh)


def refuse_nonfinite(name: str, what: str, array: np.ndarray) -> None:
  """Refuses results that are not finite, which no picture would show.

  Args:
    name: Name of the network.
    what: Name of the numbers, in the plural.
    array: Results, or bool: which of them are finite.

  Raises:
    UserError: Numbers that are not finite, with the network and their count.
  """
  finite = array if array.dtype == bool else np.isfinite(array)
  bad = finite.size - np.count_nonzero(finite)
  if bad:
    raise UserError(
      f"networks[{name!r}]: {bad:,} of {finite.size:,} {what} are not finite;"
      " allowed: a network whose outputs on these images are"
    )
