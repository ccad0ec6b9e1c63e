"""The network against PyTorch, known parameter counts and its description."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from atat_jax import batch_norm, models
from atat_jax.errors import UserError
from atat_jax.models import base, wide_resnet

# Compiling is most of the time that these tests take, running none of it.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

TINY = dict(depth=8, width=1, strides=(1, 1, 2), stem_channels=4)


def _count(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
  """Number of parameters by name of the layer."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros(shape))
  return {
    name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layer))
    for name, layer in shapes["params"].items()
  }


@pytest.mark.parametrize(
  ("depth", "width", "expected"), [(28, 10, 36_479_194), (34, 10, 46_160_474)]
)
def test_parameter_count_of_the_usual_networks(depth, width, expected):
  model = models.create(
    "wide_resnet", depth=depth, width=width, shortcut="conv"
  )
  assert sum(_count(model, (1, 32, 32, 3)).values()) == expected


def test_parameter_count_of_the_papers_network():
  # Filters 16, 160, 320, 640; five units a group; each unit has a norm before
  # each of its two convolutions; pooled, zero-padded shortcuts have no weights.
  convolutions, norms = 9 * 3 * 16, 0
  channels = 16
  for features in (160, 320, 640):
    for _ in range(5):
      convolutions += 9 * channels * features + 9 * features * features
      norms += 2 * channels + 2 * features
      channels = features
  norms += 2 * channels
  count = _count(models.create("wide_resnet"), (1, 32, 32, 3))
  conv_names = [name for name in count if "conv" in name or name == "stem"]
  assert sum(count[name] for name in conv_names) == convolutions
  assert count["head"] == 640 * 10 + 10
  assert sum(count.values()) == convolutions + norms + 640 * 10 + 10


@pytest.mark.parametrize("train", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_forward_pass_equals_pytorch(
  shortcut, padding, train, make_variables, twin, x64
):
  # 14 layers: units that neither widen nor stride are there too. 10 is odd
  # after the first stride, so that "same" pads one side only at the second.
  model = models.create(
    "wide_resnet",
    depth=14,
    width=2,
    num_classes=5,
    stem_channels=4,
    strides=(1, 2, 1) if shortcut == "pad" else (1, 2, 2),
    shortcut=shortcut,
    padding=padding,
    dtype=jnp.float64,
  )
  images = np.random.default_rng(0).uniform(size=(3, 10, 10, 3))
  variables = make_variables(model, images, dtype=np.float64)
  logits, moved = jit(
    lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats"])
  )(variables, images)
  expected = twin.wide_resnet(
    model,
    twin.tree(variables["params"]),
    twin.tree(variables["batch_stats"]),
    twin.torch.tensor(images),
    train=train,
  )
  assert logits.dtype == np.float64
  np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-10)
  if train:
    jax.tree.map(
      lambda ours, theirs: np.testing.assert_allclose(
        ours, theirs.numpy(), rtol=1e-10
      ),
      dict(moved["batch_stats"]),
      expected.stats,
    )


@pytest.mark.parametrize(
  "fields",
  [
    dict(activation="relu", normalization="none"),
    dict(
      activation="silu",
      normalization="dataset",
      mean=(0.1, 0.5, 0.3),
      std=(0.2, 0.4, 0.3),
    ),
    dict(negative_slope=0.3, batch_norm_epsilon=1e-5),
  ],
  ids=["relu", "silu", "slope"],
)
def test_fields_that_change_the_function_equal_pytorch(
  fields, make_variables, twin
):
  model = models.create("wide_resnet", **TINY, **fields)
  images = np.random.default_rng(0).uniform(size=(3, 6, 6, 3))
  images = images.astype(np.float32)
  variables = make_variables(model, images)
  logits = jit(model.apply)(variables, images)
  expected = twin.wide_resnet(
    model,
    twin.tree(variables["params"]),
    twin.tree(variables["batch_stats"]),
    twin.torch.tensor(images),
    train=False,
  )
  np.testing.assert_allclose(
    logits, expected.logits.numpy(), rtol=1e-5, atol=1e-5
  )


def test_running_statistics_decay_by_the_momentum(wrn):
  stem = wrn.variables["params"]["stem"]["kernel"]
  images = np.asarray(wrn.images, np.float64)
  for momentum in (0.9, 0.6):
    model = wrn.model.clone(batch_norm_momentum=momentum, normalization="none")
    _, moved = jit(
      lambda v, x, model=model: batch_norm.apply(
        model, v, x, batch_norm="batch"
      )
    )(wrn.variables, wrn.images)
    # The first norm sees the stem's output: 3x3 windows of a zero frame.
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h = sum(
      padded[:, i : i + 8, j : j + 8] @ np.asarray(stem[i, j], np.float64)
      for i in range(3)
      for j in range(3)
    )
    old = wrn.variables["batch_stats"]["stage1_unit1_bn1"]
    new = moved["stage1_unit1_bn1"]
    for name, batch in (("mean", h.mean((0, 1, 2))), ("var", h.var((0, 1, 2)))):
      np.testing.assert_allclose(
        new[name],
        momentum * np.asarray(old[name]) + (1 - momentum) * batch,
        rtol=1e-5,
        atol=1e-6,
      )


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
    base.standardize_images(jnp.asarray(images)), expected, atol=1e-9
  )
  np.testing.assert_allclose(
    base.standardize_images(jnp.asarray(images[:2], jnp.float32)),
    expected[:2],
    atol=1e-5,
  )


def test_standardization_has_a_finite_gradient_at_a_constant_image():
  images = jnp.full((1, 4, 4, 1), 0.3, jnp.float32)
  weights = jnp.arange(16.0).reshape(images.shape)
  gradient = jax.grad(lambda x: (base.standardize_images(x) * weights).sum())(
    images
  )
  # Below the floor the deviation does not depend on the image.
  expected = (weights - weights.mean()) * 255 * 4
  np.testing.assert_allclose(gradient, expected, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_average_pool_equals_flax(stride):
  x = np.random.default_rng(0).normal(size=(2, 6, 12, 3)).astype(np.float32)
  np.testing.assert_allclose(
    wide_resnet.average_pool(jnp.asarray(x), stride),
    nn.avg_pool(x, (stride, stride), (stride, stride)),
    rtol=1e-5,
    atol=1e-6,
  )


def test_initial_values_follow_the_released_code():
  model = models.create(
    "wide_resnet", depth=8, width=4, num_classes=50, shortcut="conv"
  )
  images = jnp.zeros((1, 4, 4, 3))
  params = jit(model.init)(jax.random.key(0), images)["params"]
  for name, layer in params.items():
    if name.endswith(("conv1", "conv2", "shortcut", "stem")):
      kernel = np.asarray(layer["kernel"])
      size, features = kernel.shape[0], kernel.shape[-1]
      std = math.sqrt(2 / (size * size * features))
      tolerance = 5 / math.sqrt(2 * kernel.size)  # five standard errors
      assert abs(kernel.std() / std - 1) < tolerance, name
      assert abs(kernel.mean()) < 5 * std / math.sqrt(kernel.size), name
      # Normal, not truncated: the fourth moment of a normal is 3.
      if kernel.size > 10_000:
        assert abs((kernel**4).mean() / std**4 - 3) < 0.3, name
    elif "bn" in name:
      assert (layer["scale"] == 1).all() and (layer["bias"] == 0).all(), name
  head = np.asarray(params["head"]["kernel"])
  bound = math.sqrt(3 / head.shape[0])  # uniform unit scaling
  assert np.abs(head).max() <= bound and np.abs(head).max() > 0.99 * bound
  assert abs(head.std() * math.sqrt(head.shape[0]) - 1) < 0.05
  assert (params["head"]["bias"] == 0).all()


def test_bfloat16_keeps_weights_statistics_and_logits_in_float32(wrn):
  model = wrn.model.clone(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(model.init, jax.random.key(0), wrn.images)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}

  logits, moved = jit(
    lambda v, x: batch_norm.apply(model, v, x, batch_norm="batch")
  )(wrn.variables, wrn.images)
  exact, exact_moved = jit(
    lambda v, x: batch_norm.apply(wrn.model, v, x, batch_norm="batch")
  )(wrn.variables, wrn.images)
  assert logits.dtype == np.float32
  assert {leaf.dtype.name for leaf in jax.tree.leaves(moved)} == {"float32"}
  # Computed in 8 bits of mantissa: near, and not the same.
  error = np.abs(logits - exact).max()
  assert 1e-5 < error < 0.1 * np.abs(exact).max()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), moved, exact_moved
  )


def test_running_statistics_classify_an_image_by_itself(wrn):
  def logits(images, mode):
    classifier = models.classifier(wrn.model, wrn.variables, batch_norm=mode)
    return jit(lambda images: classifier(images))(images)

  alone = wrn.images[:2]
  np.testing.assert_allclose(
    logits(wrn.images, "running")[:2], logits(alone, "running"), atol=1e-5
  )
  assert (
    np.abs(logits(wrn.images, "batch")[:2] - logits(alone, "batch")).max()
    > 1e-2
  )


def test_classifier_is_a_pytree_of_the_weights(wrn):
  classifier = models.classifier(wrn.model, wrn.variables)
  leaves = jax.tree.leaves(classifier)
  assert all(
    a is b for a, b in zip(leaves, jax.tree.leaves(wrn.variables), strict=True)
  )
  other = models.classifier(
    wrn.model.clone(), jax.tree.map(lambda x: x * 2, wrn.variables)
  )
  assert jax.tree.structure(classifier) == jax.tree.structure(other)
  batch = models.classifier(wrn.model, wrn.variables, batch_norm="batch")
  assert jax.tree.structure(classifier) != jax.tree.structure(batch)
  ours, plain = jit(lambda c, v, x: (c(x), wrn.model.apply(v, x, train=False)))(
    classifier, wrn.variables, wrn.images
  )
  np.testing.assert_allclose(ours, plain, atol=1e-6)


def test_running_mode_leaves_the_statistics(wrn):
  stats = jit(lambda v, x: batch_norm.apply(wrn.model, v, x)[1])(
    wrn.variables, wrn.images
  )
  jax.tree.map(
    np.testing.assert_array_equal, stats, wrn.variables["batch_stats"]
  )


def test_a_network_without_batch_norm_or_train_argument():
  model = nn.Dense(3)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 2)))
  for mode in ("running", "batch"):
    logits, stats = batch_norm.apply(
      model, variables, jnp.ones((4, 2)), batch_norm=mode
    )
    assert logits.shape == (4, 3) and not stats


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_keeps_the_contract(name):
  """Named fields with defaults, batch statistics, float32 logits."""
  model = models.create(name, num_classes=7)
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  collections = {"params"} if name == "vgg16" else {"params", "batch_stats"}
  assert set(variables) == collections
  for mode in ("running", "batch"):
    logits, stats = jax.eval_shape(
      lambda v, x, mode=mode: batch_norm.apply(model, v, x, batch_norm=mode),
      variables,
      images,
    )
    assert logits.shape == (2, 7) and logits.dtype == np.float32
    assert jax.tree.structure(stats) == jax.tree.structure(
      variables.get("batch_stats", {})
    )
  assert hash(model) == hash(models.create(name, num_classes=7))


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


def test_unknown_names_are_refused(wrn):
  with pytest.raises(UserError, match=r"model: 'resnet'; allowed: .*resnet18"):
    models.create("resnet")
  with pytest.raises(UserError, match="batch_norm: 'eval'; allowed: batch, r"):
    models.classifier(wrn.model, wrn.variables, batch_norm="eval")
  with pytest.raises(UserError, match="batch_norm: 'eval'; allowed: batch, r"):
    batch_norm.apply(wrn.model, wrn.variables, wrn.images, batch_norm="eval")


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
