"""Networks: `create` one by name, wrap it as a classifier with `classifier`.

Adding a network is one file and one line in `MODELS`.
"""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from atat_jax import batch_norm as bn
from atat_jax import checks, compilation
from atat_jax.models.densenet import DenseNet121
from atat_jax.models.preact_resnet import PreActResNet18
from atat_jax.models.resnet import ResNet18, ResNet50
from atat_jax.models.vgg import VGG16, VGG16BN
from atat_jax.models.wide_resnet import WideResNet
from atat_jax.typing import Array, BatchNormMode, Variables

MODELS: dict[str, type[nn.Module]] = {
  "wide_resnet": WideResNet,
  "preact_resnet18": PreActResNet18,
  "vgg16": VGG16,
  "vgg16_bn": VGG16BN,
  "resnet18": ResNet18,
  "resnet50": ResNet50,
  "densenet121": DenseNet121,
}


def field_names(name: str) -> tuple[str, ...]:
  """The fields that `create` takes for a network.

  Raises:
    UserError: No network has this name.
  """
  checks.choice("model", name, MODELS)
  fields = dataclasses.fields(MODELS[name])
  return tuple(f.name for f in fields if f.name not in ("parent", "name"))


def create(name: str, **fields: Any) -> nn.Module:
  """Makes a network.

  Args:
    name: One of `MODELS`.
    **fields: Fields of that module, e.g. depth=32, width=10.

  Returns:
    A linen module: `model.init(key, images)` gives the variables,
    `model.apply(variables, images, train=False)` the logits.

  Raises:
    UserError: Unknown name or field, or a value that makes no network.
  """
  known = field_names(name)
  for field in fields:
    checks.choice(f"field of model {name!r}", field, known)
  return MODELS[name](**fields)


@dataclasses.dataclass(frozen=True)
class _Forward:
  """Compares by value, so that new weights find the compiled program."""

  model: nn.Module | compilation.ByIdentity
  batch_norm: BatchNormMode

  def __call__(self, variables: Variables, images: Array) -> Array:
    model = compilation.unwrap(self.model)
    return bn.apply(model, variables, images, batch_norm=self.batch_norm)[0]


def classifier(
  model: nn.Module,
  variables: Variables,
  *,
  batch_norm: BatchNormMode = "running",
) -> jax.tree_util.Partial:
  """A callable from images [B, H, W, C] to logits [B, K], itself a pytree.

  Args:
    model: A linen module.
    variables: Its collections; they are the leaves of the pytree, so that
      changing weights does not recompile an attack.
    batch_norm: "running", or "batch": the statistics of the batch at hand,
      which can overstate robustness.

  Returns:
    A `jax.tree_util.Partial`.

  Raises:
    UserError: Unknown mode.
  """
  checks.choice("batch_norm", batch_norm, ("running", "batch"))
  return jax.tree_util.Partial(
    _Forward(compilation.hashable(model), batch_norm), variables
  )
