"""Layers that attention taps, in networks of every kind; nothing is compiled."""

import functools

import foreign
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from atat_jax import attention, models
from atat_jax.errors import UserError

SHAPE = (2, 8, 8, 3)
IMAGES = jnp.zeros(SHAPE)


@functools.cache
def _variables(model):
  wanted = {"deterministic": True, "training": False}
  kwargs = {
    name: value
    for name, value in wanted.items()
    if name in type(model).__call__.__annotations__
  }
  return jax.eval_shape(
    lambda key, x: model.init(key, x, **kwargs), jax.random.key(0), IMAGES
  )


def _chosen(model, layers=None):
  return attention.chosen_layers(model, _variables(model), IMAGES, layers)


LAST = {
  "vgg": (foreign.Vgg(), "conv2"),
  "resnet": (foreign.ResNet(), "block2[0]"),
  "densenet": (foreign.DenseNet(), "norm"),
  "convnext": (foreign.ConvNext(), "block2"),
  "gated": (foreign.Gated(), "conv"),
  "heads": (foreign.AttentionPool(), "conv"),
  "twice": (foreign.Twice(), "last:2"),
  "remat": (foreign.Remat(named=True), "features"),
  "scan": (foreign.Scan(named=True), "features"),
  "auxiliary": (foreign.Auxiliary(), "first"),
}


SMALL = {"num_classes": 3, "channels": 8, "num_heads": 2, "hidden": 8}
TRANSFORMERS = {
  "vit": models.create(
    "vit", image_size=8, patch_size=2, num_blocks=2, **SMALL
  ),
  "vit of one block": models.create(
    "vit", image_size=8, patch_size=4, num_blocks=1, **SMALL
  ),
  "vit with a convstem": models.create(
    "vit", image_size=8, patch_size=4, num_blocks=2, conv_stem=(4, 6), **SMALL
  ),
  "xcit": models.create("xcit", patch_size=4, num_blocks=2, **SMALL),
}


class Beside(nn.Module):
  """A transformer, and another path from the images to the logits."""

  other_path: str

  @nn.compact
  def __call__(self, images, *, train=False):
    logits = TRANSFORMERS["vit"].copy(name="vit")(images)
    match self.other_path:
      case "flat":
        other = images.reshape(len(images), -1)
      case "convolution":
        other = nn.Conv(4, (3, 3), name="conv")(images).mean((1, 2))
      case "transformer":
        other = TRANSFORMERS["vit of one block"].copy(name="other")(images)
      case _:
        return logits
    return logits + nn.Dense(3)(other)


class Continued(nn.Module):
  """A grid that is stated to be the last, and then a convolution."""

  @nn.compact
  def __call__(self, images, *, train=False):
    x = nn.Conv(4, (3, 3), name="first")(images)
    x = models.base.Features(tapped_by_default=True, name="grid")(x)
    return nn.Dense(3)(nn.Conv(4, (3, 3), name="last")(x).mean((1, 2)))


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_state_their_grid_without_the_class_token(case):
  model = TRANSFORMERS[case]
  assert _chosen(model) == ("features",)
  (shape,) = {attention.layers(model, _variables(model), IMAGES)["features"]}
  side = 8 // model.patch_size
  assert shape == (2, side, side, 8)
  adapted = models.adapt(
    model, _variables(model), call=lambda network, x: network(x)
  )
  assert attention.chosen_layers(*adapted, IMAGES, None) == (
    "network/features",
  )


def test_a_stated_grid_is_not_taken_where_other_paths_or_layers_count():
  assert _chosen(Beside("")) == ("vit/features",)
  assert _chosen(Continued()) == ("last",)
  for path in ("flat", "convolution", "transformer"):
    with pytest.raises(UserError, match=r"^model: the last .*; allowed: "):
      _chosen(Beside(path))


@pytest.mark.parametrize("case", LAST)
def test_the_default_is_the_last_spatial_tensor(case):
  model, last = LAST[case]
  assert _chosen(model) == (last,)


REFUSED = {
  "a sum": (foreign.SumsAtTheTop(), "'branch', which is one of several paths"),
  "branches": (foreign.Inception(), "'branch3', which is one of several paths"),
  "tokens": (foreign.Vit(), "'patches', and is followed by tokens"),
  "mean of tokens": (foreign.Vit(class_token=False), "followed by tokens"),
  "remat": (foreign.Remat(), "'first', and is followed by .*remat.*block"),
  "scan": (foreign.Scan(), "'first', and is followed by .*scan.*blocks"),
  "raw": (
    foreign.RawConvolution(),
    "'first', and is followed by a convolution",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_default_where_the_last_tensor_has_no_name(case):
  model, reason = REFUSED[case]
  with pytest.raises(UserError, match=f"^model: the last .*{reason}") as error:
    _chosen(model)
  message = str(error.value)
  assert "; allowed: a layer by name, or " in message and "\n" not in message
  first = next(iter(attention.layers(model, _variables(model), IMAGES)))
  assert _chosen(model, (first,)) == (first,)  # by name it is never refused


def test_layers_are_in_order_with_their_shapes():
  model = foreign.ConvNext()
  assert list(attention.layers(model, _variables(model), IMAGES).items()) == [
    ("patches", (2, 4, 4, 4)),
    ("block1/depthwise", (2, 4, 4, 4)),
    ("block1/norm", (2, 4, 4, 4)),
    ("block1/up", (2, 4, 4, 8)),
    ("block1/down", (2, 4, 4, 4)),
    ("block1", (2, 4, 4, 4)),
    ("block2/depthwise", (2, 4, 4, 4)),
    ("block2/norm", (2, 4, 4, 4)),
    ("block2/up", (2, 4, 4, 8)),
    ("block2/down", (2, 4, 4, 4)),
    ("block2", (2, 4, 4, 4)),
  ]


@pytest.mark.parametrize("class_token", [True, False])
def test_tokens_are_the_grid_of_their_patches_and_heads_are_no_layer(
  class_token,
):
  model = foreign.Vit(class_token=class_token)
  layers = attention.layers(model, _variables(model), IMAGES)
  assert list(layers) == [
    "patches",
    *("norm1", "attention1/out", "attention1", "block1"),
    *("norm2", "attention2/out", "attention2", "block2"),
  ]
  assert set(layers.values()) == {(2, 4, 4, 8)}


NO_LAYER = {
  "called twice": (foreign.Twice(), "last", "called 2 times"),
  "in a tuple": (foreign.ResNet(), "block1", "returns several tensors"),
  "in nn.remat": (foreign.Remat(True), "block/conv", "inside nn.remat"),
  "in nn.scan": (foreign.Scan(True), "blocks/conv", "inside nn.remat, nn.scan"),
  "aside": (foreign.Auxiliary(), "aux", "not between the images and"),
}


@pytest.mark.parametrize("case", NO_LAYER)
def test_what_is_no_layer_is_refused_with_the_reason(case):
  model, layer, reason = NO_LAYER[case]
  names = ", ".join(attention.layers(model, _variables(model), IMAGES))
  with pytest.raises(UserError) as error:
    _chosen(model, (layer,))
  message = str(error.value)
  assert message.startswith(f"layers: {layer!r}, {reason}")
  assert message.endswith(f"; allowed: {names}")


def test_layers_of_an_nnx_network_are_its_modules():
  model, variables = models.adapt(foreign.NnxResNet(0))
  assert list(attention.layers(model, variables, IMAGES)) == [
    "stem",
    *("blocks/0/conv", "blocks/0/norm", "blocks/0"),
    *("blocks/1/conv", "blocks/1/norm", "blocks/1"),
  ]
  assert attention.chosen_layers(model, variables, IMAGES, None) == (
    "blocks/1",
  )


def test_an_nnx_module_called_twice_or_under_remat():
  twice, remat = (
    models.adapt(nnx.eval_shape(make))
    for make in (foreign.NnxTwice, foreign.NnxRemat)
  )
  assert attention.chosen_layers(*twice, IMAGES, None) == ("last:2",)
  with pytest.raises(UserError, match=r"'first', and is followed by .*remat"):
    attention.chosen_layers(*remat, IMAGES, None)
