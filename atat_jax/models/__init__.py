"""Networks: `create` makes one by name, `classifier` wraps it for an attack.

`adapt` and `from_functions` make a module of a network of another kind.

Adding a network is one file and one line in `MODELS`. What its class must be:

- a linen module whose fields all have defaults, among them `num_classes`;
- `__call__(images, *, train=False)`: images [B, H, W, C] in [0, 1], normalised
  inside the network, to float32 logits [B, num_classes];
- with a submodule that returns a tensor [B, h, w, C] for attention to tap; the
  last such tensor is the default (`base.Features` gives a tensor a name).

Everything else is optional. BatchNorm statistics, if any, are in `batch_stats`.
Fields of `config.model` that the class does not have are ignored; `mean` and
`std` are the data set's where `config.model.normalization` is "dataset".
Fields must be hashable and, but for `dtype`, survive JSON (a tuple may become a
list). `base.Network` brings the fields and the layers of the networks here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import batch_norm as bn
from atat_jax import checks, compilation
from atat_jax.errors import UserError, shown
from atat_jax.models.adapted import adapt, from_functions
from atat_jax.models.convnext import ConvNeXt
from atat_jax.models.densenet import DenseNet121
from atat_jax.models.preact_resnet import PreActResNet18
from atat_jax.models.resnet import ResNet18, ResNet50
from atat_jax.models.vgg import VGG16, VGG16BN
from atat_jax.models.vit import ViT
from atat_jax.models.wide_resnet import WideResNet
from atat_jax.models.xcit import XCiT
from atat_jax.typing import Array, BatchNormMode, Variables

__all__ = [
  "MODELS",
  "adapt",
  "batch_norm_of",
  "classifier",
  "create",
  "field_names",
  "from_functions",
  "with_dtype",
  "with_fixed_statistics",
]

MODELS: dict[str, type[nn.Module]] = {
  "wide_resnet": WideResNet,
  "preact_resnet18": PreActResNet18,
  "vgg16": VGG16,
  "vgg16_bn": VGG16BN,
  "resnet18": ResNet18,
  "resnet50": ResNet50,
  "densenet121": DenseNet121,
  "convnext": ConvNeXt,
  "vit": ViT,
  "xcit": XCiT,
}


def field_names(name: str) -> tuple[str, ...]:
  """Returns the fields that `create` takes for a network.

  Raises:
    UserError: No network has this name.
  """
  checks.choice("model", name, MODELS)
  fields = dataclasses.fields(MODELS[name])
  return tuple(f.name for f in fields if f.name not in ("parent", "name"))


def create(name: str, **fields: Any) -> nn.Module:
  """Makes a network.

  Args:
    name: Name in `MODELS`.
    **fields: Fields of that module, e.g. depth=32, width=10.

  Returns:
    A linen module: `model.init(key, images)` gives the variables,
    `model.apply(variables, images, train=False)` the logits.

  Raises:
    UserError: Unknown name or field, or a field's value is out of range.
  """
  known = field_names(name)
  for field in fields:
    checks.choice(f"field of model {name!r}", field, known)
  return MODELS[name](**fields)


@dataclasses.dataclass(frozen=True)
class _Forward:
  """Forward pass that compares by value: new weights do not recompile it."""

  model: nn.Module | compilation.Opaque
  batch_norm: BatchNormMode
  fixed_statistics: bool = False

  def __call__(self, variables: Variables, images: Array) -> Array:
    model = compilation.unwrap(self.model)
    if self.fixed_statistics:
      return bn.apply_fixed(model, variables, images)
    return bn.apply(model, variables, images, batch_norm=self.batch_norm)[0]


def classifier(
  model: nn.Module,
  variables: Variables,
  *,
  batch_norm: BatchNormMode = "running",
  fixed_statistics: bool = False,
) -> jax.tree_util.Partial:
  """Wraps a network and its variables as a function of images alone.

  Args:
    model: A linen module.
    variables: The module's collections. They are the leaves of the returned
      pytree, so that changing weights does not recompile an attack.
    batch_norm: "running", or "batch": the statistics of the batch at hand,
      which are no fixed classifier, and can make attacks fail.
    fixed_statistics: Whether gradients take the batch's statistics as constants
      (`batch_norm.apply_fixed`); the logits are the same. With "batch" only.

  Returns:
    A `jax.tree_util.Partial` from images [B, H, W, C] to logits [B, K].

  Raises:
    UserError: Unknown mode, or fixed statistics that are the running ones.
  """
  checks.module(model)
  checks.instance(
    "variables", variables, Mapping, "the network's collections by name"
  )
  checks.choice("batch_norm", batch_norm, ("running", "batch"))
  checks.boolean("fixed_statistics", fixed_statistics)
  if fixed_statistics and batch_norm != "batch":
    raise UserError(
      f"fixed_statistics: True with batch_norm {batch_norm!r}; allowed: with"
      " 'batch'"
    )
  return jax.tree_util.Partial(
    _Forward(compilation.hashable(model), batch_norm, bool(fixed_statistics)),
    variables,
  )


def _forward(made: Callable[..., Any]) -> _Forward | None:
  """Forward pass of what `classifier` made; None for any other callable."""
  function = compilation.unwrap(getattr(made, "func", None))
  return function if isinstance(function, _Forward) else None


def batch_norm_of(made: Callable[..., Any]) -> BatchNormMode | None:
  """Returns the BatchNorm mode of a classifier.

  Args:
    made: Callable from images to logits.

  Returns:
    "running" or "batch"; None for a callable that `classifier` did not make.
  """
  forward = _forward(made)
  return None if forward is None else forward.batch_norm


def with_fixed_statistics(made: Callable[..., Any]) -> jax.tree_util.Partial:
  """Returns a classifier whose gradients take the statistics as constants.

  Args:
    made: Result of `classifier` with batch_norm="batch".

  Returns:
    The classifier that fixed_statistics=True makes of the same network.

  Raises:
    UserError: Another callable, or one with running statistics.
  """
  forward, whole = _forward(made), compilation.unwrap(made)
  if forward is None or forward.batch_norm != "batch":
    raise UserError(
      "classifier: one without batch statistics that can be held fixed;"
      " allowed: models.classifier(model, variables, batch_norm='batch')"
    )
  fixed = dataclasses.replace(forward, fixed_statistics=True)
  return jax.tree_util.Partial(fixed, *whole.args, **whole.keywords)


def with_dtype(made: Callable[..., Any], dtype: Any) -> jax.tree_util.Partial:
  """Returns a classifier that computes in another dtype, with the same weights.

  Args:
    made: Result of `classifier`, of a network with a field `dtype`.
    dtype: Floating-point dtype of the convolutions, e.g. "bfloat16".

  Returns:
    The classifier that the network with this dtype makes.

  Raises:
    UserError: Another callable, a network without a dtype, or no such dtype.
  """
  forward, whole = _forward(made), compilation.unwrap(made)
  model: Any = forward and compilation.unwrap(forward.model)
  if forward is None or not hasattr(model, "dtype"):
    raise UserError(
      "classifier: one whose dtype cannot be changed; allowed:"
      " models.classifier(model, variables), of a model with a field dtype"
    )
  try:
    changed = model.clone(dtype=jnp.dtype(dtype))
  except TypeError:
    raise UserError(
      f"dtype: {shown(dtype)}; allowed: a floating-point dtype, such as"
      " bfloat16"
    ) from None
  forward = dataclasses.replace(forward, model=compilation.hashable(changed))
  return jax.tree_util.Partial(forward, *whole.args, **whole.keywords)
