"""Networks that the benchmarks measure, and configuration files."""

import dataclasses
import importlib.util
import pathlib
import re
from typing import Any

import numpy as np

from atat_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Network:
  """Flax network with images to attack.

  Attributes:
    name: Name in the tables.
    source: Origin of weights and images, for the JSON.
    model: The module.
    variables: Parameters and running statistics.
    images: float32 [N, H, W, C] in [0, 1].
    labels: int32 [N].
  """

  name: str
  source: str
  model: Any
  variables: Any
  images: np.ndarray
  labels: np.ndarray


def wide_resnet(name: str, **fields: Any) -> Any:
  """Makes the Wide ResNet called "wrn-DEPTH-WIDTH".

  Args:
    name: Name, such as "wrn-16-4".
    **fields: Other fields of the module.

  Returns:
    The flax module.

  Raises:
    UserError: Another name.
  """
  from atat_jax import models

  match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
  if match is None:
    raise UserError(f"model: {name!r}; allowed: wrn-DEPTH-WIDTH")
  depth, width = map(int, match.groups())
  return models.create("wide_resnet", depth=depth, width=width, **fields)


def network(name: str, **fields: Any) -> Any:
  """Makes a network for 10 classes.

  Args:
    name: "wrn-DEPTH-WIDTH", or a name in `models.MODELS`.
    **fields: Other fields of the module.

  Returns:
    The flax module.

  Raises:
    UserError: Unknown name or field.
  """
  from atat_jax import models

  if name.startswith("wrn-"):
    return wide_resnet(name, **fields)
  return models.create(name, num_classes=10, **fields)


def random_network(name: str, num_examples: int, seed: int) -> Network:
  """Makes an untrained network with random images.

  The labels are its own predictions, but for every eighth example.

  Args:
    name: Name, such as "wrn-10-2", or one of `plain.NETWORKS`.
    num_examples: Number of images N.
    seed: Seed for weights and images.

  Returns:
    The network.
  """
  import jax

  from atat_jax import compilation
  from benchmarks.support import plain

  if name in plain.NETWORKS:
    model = plain.PlainResNet(**plain.NETWORKS[name])
  else:
    model = wide_resnet(name)
  generator = np.random.default_rng(seed)
  images = generator.uniform(size=(num_examples, 32, 32, 3)).astype(np.float32)
  init = compilation.jit(model.init, once=True)
  variables = init(jax.random.key(seed), images[:1])
  logits = compilation.jit(model.apply)(variables, images)
  labels = np.array(logits.argmax(-1), np.int32)
  labels[7::8] = (labels[7::8] + 1) % logits.shape[-1]
  return Network(name, "random weights", model, variables, images, labels)


def load_config(path: pathlib.Path) -> Any:
  """Loads a configuration file as a module.

  Raises:
    UserError: No such file.
  """
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or spec.loader is None or not path.exists():
    raise UserError(f"config: {path}; allowed: a configuration file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
