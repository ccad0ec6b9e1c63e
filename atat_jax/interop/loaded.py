"""Network with the weights of a file, and what is known about it."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import models
from atat_jax.interop.recognition import Recognized
from atat_jax.typing import Variables


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Network with the weights of a file.

  Attributes:
    name: Name in `models.MODELS`.
    model: The network; it normalises its images itself.
    variables: {"params": ..., "batch_stats": ...}, float32.
    layout: Kind of network and origin of the names in the file, in words.
    normalization: The network's own preparation of its images, in words.
    told: Everything that was recognised, assumed and found, in one line.
    first: Name of the layer that the images enter.
  """

  name: str
  model: nn.Module
  variables: Variables
  layout: str
  normalization: str
  told: str
  first: str = "stem"

  @property
  def classifier(self) -> jax.tree_util.Partial:
    """Classifier of images [B, H, W, C] in [0, 1], as attacks take it."""
    return models.classifier(self.model, self.variables)

  @property
  def num_channels(self) -> int:
    """Number of channels of an image."""
    return self.variables["params"][self.first]["kernel"].shape[2]

  @property
  def image_side(self) -> int:
    """Side in pixels of the images that the network was published for."""
    model: Any = self.model
    if hasattr(model, "image_size"):
      return int(model.image_size)
    small = self.name in ("wide_resnet", "preact_resnet18") or (
      getattr(model, "small_images", False)
      or getattr(model, "patch_size", 16) < 16
    )
    return 32 if small else 224


def normalization_in_words(model: Any) -> str:
  """Returns what a network does to its images first, in words.

  Args:
    model: Network with the fields of `models.base.Network`.
  """
  if model.normalization == "dataset":
    mean, std = (
      ", ".join(f"{x:.4g}" for x in values)
      for values in (model.mean, model.std)
    )
    return f"mean ({mean}), std ({std})"
  return {"none": "none", "per_image": "image by image"}[model.normalization]


def with_channels_reversed(loaded: Loaded) -> Variables:
  """Returns weights for images whose channels are in the opposite order.

  Args:
    loaded: The network.
  """
  params = dict(loaded.variables["params"])
  layer = dict(params[loaded.first])
  layer["kernel"] = jnp.flip(layer["kernel"], 2)
  return {**loaded.variables, "params": params | {loaded.first: layer}}


def _title(found: Recognized, model: Any) -> str:
  """Returns the network in words: "DeepMind's Wide ResNet, 28-10, ..."."""
  if found.name == "wide_resnet":
    size = f"{model.depth}-{model.width}"
  elif hasattr(model, "num_blocks"):
    size = f"{model.num_blocks} blocks of {model.channels} channels"
  else:
    size = f"stages {list(model.stage_sizes)}"
  return f"{found.layout.title}, {size}, {model.num_classes} classes"


def alternatives(path: pathlib.Path, found: Recognized) -> list[Loaded]:
  """Makes a network for each combination of values of the open fields.

  Args:
    path: The file, for the words.
    found: The network that was recognised in it.

  Returns:
    At least one network.
  """
  result = []
  for values in itertools.product(*found.open.values()):
    chosen = dict(zip(found.open, values, strict=True))
    model = models.create(found.name, **found.fields, **chosen)
    assumed = ", ".join(
      f"{name}={getattr(model, name)!r}" for name in (*found.assumed, *chosen)
    )
    normalization = normalization_in_words(model)
    told = (
      f"{path.name}: {_title(found, model)} ({found.name})",
      *found.words,
      f"normalisation {normalization} ({found.source})",
      f"not shown by the file: {assumed}" if assumed else "",
    )
    result.append(
      Loaded(
        name=found.name,
        model=model,
        variables=found.variables,
        layout=found.layout.title,
        normalization=normalization,
        told="; ".join(part for part in told if part),
        first=found.layout.first,
      )
    )
  return result
