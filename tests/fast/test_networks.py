"""Fields, images and parts of the networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit

from atat_jax import batch_norm, checkpoints, models
from atat_jax.errors import UserError
from atat_jax.models import base, wide_resnet


def test_standardization_equals_tensorflows_formula(x64):
  pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 6, 3))
  pixels[2:] = 77  # constant: the deviation is floored at 1/sqrt(90) = 0.1054
  pixels[3, 0, 0, 0] = 78  # deviation 0.1048
  pixels[4, 0, 0, :2] = 78  # deviation 0.1474
  expected = []
  for image in pixels.astype(np.float64):  # tf.image.per_image_standardization
    deviation = max(image.std(), 1 / math.sqrt(image.size))
    expected.append((image - image.mean()) / deviation)
  images = pixels / 255
  np.testing.assert_allclose(
    jit(base.standardize_images)(jnp.asarray(images)), expected, atol=1e-9
  )
  np.testing.assert_allclose(
    jit(base.standardize_images)(jnp.asarray(images[:2], jnp.float32)),
    expected[:2],
    atol=1e-5,
  )


def test_standardization_has_a_finite_gradient_at_a_constant_image():
  images = jnp.full((1, 4, 4, 1), 0.3, jnp.float32)
  weights = jnp.arange(16.0).reshape(images.shape)
  gradient = jit(
    jax.grad(lambda x: (base.standardize_images(x) * weights).sum())
  )(images)
  # Below the floor the deviation does not depend on the image.
  expected = (weights - weights.mean()) * 255 * 4
  np.testing.assert_allclose(gradient, expected, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_average_pool_equals_flax(stride):
  x = np.random.default_rng(0).normal(size=(2, 6, 12, 3)).astype(np.float32)
  np.testing.assert_allclose(
    jit(wide_resnet.average_pool, static_argnums=1)(x, stride),
    nn.avg_pool(x, (stride, stride), (stride, stride)),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ("fields", "parts"),
  [
    (dict(depth=30), ["depth", "30", "6n + 2"]),
    (dict(depth=2), ["depth", "2", "6n + 2"]),
    (dict(width=0), ["width", "0", "> 0"]),
    (dict(width=1.5), ["width", "1.5", "integer"]),
    (dict(num_classes=-1), ["num_classes", "-1", "> 0"]),
    (dict(stem_channels=0), ["stem_channels", "0", "> 0"]),
    (dict(activation="tanh"), ["activation", "'tanh'", "leaky_relu, relu"]),
    (dict(shortcut="none"), ["shortcut", "'none'", "conv, pad"]),
    (dict(padding="valid"), ["padding", "'valid'", "same, symmetric"]),
    (dict(convolution="fft"), ["convolution", "'fft'", "auto, canonical, xla"]),
    (
      dict(normalization="batch"),
      ["normalization", "'batch'", "dataset, none, per_image"],
    ),
    (dict(normalization="dataset"), ["mean", "std", "missing"]),
    (dict(strides=(1, 2)), ["strides", "(1, 2)", "three"]),
    (dict(strides=(1, 0, 2)), ["strides", "(1, 0, 2)", ">= 1"]),
    (dict(wdith=10), ["wide_resnet", "'wdith'", "width"]),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_fields_are_named(fields, parts):
  with pytest.raises(UserError) as error:
    models.create("wide_resnet", **fields)
  message = str(error.value)
  assert all(part in message for part in parts), message
  assert "\n" not in message


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"depth": 8.0}, "depth: 8.0"),
    ({"depth": "8"}, "depth: '8'"),
    ({"batch_norm_momentum": 1.5}, "batch_norm_momentum: 1.5"),
    ({"batch_norm_epsilon": -1e-3}, "batch_norm_epsilon: -0.001"),
    ({"negative_slope": math.nan}, "negative_slope: nan"),
    ({"mean": (0.5,), "std": (0.0,)}, "std: "),
    ({"strides": (1, 1.5, 2)}, "strides: "),
  ],
)
def test_fields_out_of_range_are_named(fields, named):
  with pytest.raises(UserError, match=named):
    models.create("wide_resnet", normalization="dataset", **fields)


@pytest.mark.parametrize(
  ("name", "fields", "named"),
  [
    ("vgg16", dict(stage_sizes=(2, 0)), r"stage_sizes: \(2, 0\)"),
    ("vgg16", dict(stage_channels=(4, 4)), r"stage_channels: \(4, 4\)"),
    ("vgg16", dict(hidden=0), "hidden: 0"),
    ("resnet18", dict(stage_sizes=()), r"stage_sizes: \(\)"),
    ("resnet50", dict(base_channels=1.5), r"base_channels: 1\.5"),
    ("densenet121", dict(growth=-1), "growth: -1"),
    ("densenet121", dict(stage_sizes=(1, "2")), "stage_sizes: "),
    ("preact_resnet18", dict(base_channels=0), "base_channels: 0"),
    ("resnet18", dict(depth=18), "field of model 'resnet18': 'depth'"),
    ("preact_resnet18", dict(family="jax"), "family: 'jax'; .*deepmind"),
    ("resnet50", dict(inner_width=0), "inner_width: 0"),
    ("resnet50", dict(small_images=1), "small_images: 1"),
    ("convnext", dict(stage_sizes=(1,)), "as many as stage_sizes has, 1"),
    ("convnext", dict(conv_stem=(4, 0)), r"conv_stem: \(4, 0\)"),
    ("vit", dict(patch_size=15), "patch_size: 15; .*image_size, 224"),
    ("vit", dict(num_heads=5), "num_heads: 5; allowed: divisors .*768"),
    ("vit", dict(conv_stem=(4, 4)), "conv_stem: .*halve 16 pixels"),
    ("xcit", dict(patch_size=3), "patch_size: 3; allowed: 1, 2, 4, 8, 16"),
    ("xcit", dict(num_heads=7), "num_heads: 7; allowed: divisors .*384"),
  ],
)
def test_bad_fields_of_other_networks_are_named(name, fields, named):
  with pytest.raises(UserError, match=named):
    models.create(name, **fields)


@pytest.mark.parametrize(
  ("fields", "shape", "named"),
  [
    ({"strides": (1, 2, 2)}, (1, 9, 9, 1), r"strides: 2 on \(9, 9\)"),
    (
      {"normalization": "dataset", "mean": (0.5,), "std": (0.2,)},
      (1, 8, 8, 3),
      "mean: 1 numbers for 3 channels",
    ),
  ],
)
def test_images_that_do_not_fit_are_named(fields, shape, named):
  model = models.create("wide_resnet", depth=8, width=1, **fields)
  with pytest.raises(UserError, match=named):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
  ("name", "fields", "least"),
  [
    ("vgg16", dict(stage_sizes=(1, 1, 1, 1, 1)), 32),
    ("densenet121", dict(stage_sizes=(1, 1, 1, 1)), 29),
    ("convnext", dict(stage_sizes=(1, 1), stage_channels=(2, 2)), 8),
  ],
)
def test_images_that_are_too_small_are_named(name, fields, least):
  model = models.create(name, **fields)

  def init(side):
    images = jnp.zeros((1, 40, side, 3))
    return jax.eval_shape(model.init, jax.random.key(0), images)

  with pytest.raises(UserError, match=rf"images: 40x{least - 1} pixels"):
    init(least - 1)
  init(least)


def test_images_of_another_size_than_the_positions_are_named():
  model = models.create("vit", image_size=16, patch_size=8, num_blocks=1)
  images = jnp.zeros((1, 16, 24, 3))
  with pytest.raises(UserError, match="images: 16x24 pixels; allowed: 16x16"):
    jax.eval_shape(model.init, jax.random.key(0), images)


def test_unknown_names_are_refused(wrn):
  with pytest.raises(UserError, match=r"model: 'resnet'; allowed: .*resnet18"):
    models.create("resnet")
  with pytest.raises(UserError, match="batch_norm: 'eval'; allowed: batch, r"):
    models.classifier(wrn.model, wrn.variables, batch_norm="eval")
  with pytest.raises(UserError, match="batch_norm: 'eval'; allowed: batch, r"):
    batch_norm.apply(wrn.model, wrn.variables, wrn.images, batch_norm="eval")


def test_a_checkpoint_of_an_older_version_has_the_defaults_of_new_fields():
  """A field that is added to a network must mean by default what was before."""
  model = models.create("preact_resnet18")
  wanted = checkpoints.model_spec("preact_resnet18", model, (8, 8, 3))
  old = {**wanted, "fields": dict(wanted["fields"])}
  del old["fields"]["family"], old["fields"]["final_batch_norm"]
  checkpoints._check_same_model(old, wanted, "runs/old")
  other = models.create("preact_resnet18", final_batch_norm=False)
  other = checkpoints.model_spec("preact_resnet18", other, (8, 8, 3))
  with pytest.raises(UserError, match=r"final_batch_norm: False, but .* True"):
    checkpoints._check_same_model(old, other, "runs/old")
