"""The wide ResNet against PyTorch, known parameter counts and its description."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quick import jit

from atat_jax import batch_norm, models

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


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_forward_pass_equals_pytorch(
  shortcut, padding, make_variables, twin, x64
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

  @jit
  def forward(variables, images):
    return tuple(
      batch_norm.apply(model, variables, images, batch_norm=mode)
      for mode in ("running", "batch")
    )

  for train, (logits, stats) in enumerate(forward(variables, images)):
    expected = twin.wide_resnet(
      model,
      twin.tree(variables["params"]),
      twin.tree(variables["batch_stats"]),
      twin.torch.tensor(images),
      train=bool(train),
    )
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-10)
    jax.tree.map(
      lambda ours, theirs: np.testing.assert_allclose(
        ours, theirs.numpy(), rtol=1e-10
      ),
      dict(stats),
      dict(expected.stats) if train else twin.tree(variables["batch_stats"]),
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
