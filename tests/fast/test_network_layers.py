"""Layers that attention taps, in networks of every kind; nothing is compiled."""

import functools

import foreign
import jax
import jax.numpy as jnp
import pytest
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
