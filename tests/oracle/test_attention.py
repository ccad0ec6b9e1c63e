"""Grad-CAM against formulas by hand, finite differences and PyTorch."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import linen as nn

from atat_jax import attention
from atat_jax.errors import UserError

INNER = ("stage1_unit1", "stage2_unit1")


def _maps(example, layers=None, batch_norm="running"):
  """`attention.forward`'s maps, compiled quickly."""

  @quick.jit
  def maps(variables, images):
    return attention.forward(
      example.model,
      variables,
      images,
      example.labels,
      layers=layers,
      batch_norm=batch_norm,
    )[1]

  return maps(example.variables, example.images)


def _activations(example, name: str, *, train: bool = False) -> np.ndarray:
  """The output of a module, by flax's own means."""

  @quick.jit
  def capture(variables, images):
    return example.model.apply(
      variables,
      images,
      train=train,
      capture_intermediates=lambda module, _: module.name == name,
      mutable=["intermediates", "batch_stats"],
    )[1]

  collections = capture(example.variables, example.images)
  return np.asarray(collections["intermediates"][name]["__call__"][0])


def _map(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Eq. (3): [B, h, w, C] and [B, C] to [B, h, w]."""
  summed = (activations * weights[:, None, None, :]).sum(-1)
  return np.maximum(summed, 0)


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_last_tensor_equals_the_formula(mode, wrn, x64):
  example = wrn.astype(np.float64)
  activations = _activations(example, "features", train=mode == "batch")
  kernel = np.asarray(example.variables["params"]["head"]["kernel"])
  # Pooling and a dense layer: the gradient is W[:, y] / (h w) everywhere.
  weights = kernel[:, np.asarray(example.labels)].T
  expected = _map(activations, weights / np.prod(activations.shape[1:3]))
  maps = _maps(example, batch_norm=mode)
  assert list(maps) == ["features"] and maps["features"].dtype == np.float64
  assert expected.shape == maps["features"].shape == (8, 4, 4)
  assert 0.1 < (expected > 0).mean() < 0.9  # the ReLU does something
  np.testing.assert_allclose(maps["features"], expected, rtol=1e-10, atol=1e-12)


def test_inner_layers_equal_finite_differences_of_a_pytorch_twin(
  wrn, twin, x64
):
  example = wrn.astype(np.float64)
  maps = _maps(example, layers=INNER)
  params = twin.tree(example.variables["params"])
  stats = twin.tree(example.variables["batch_stats"])
  images = twin.torch.tensor(np.asarray(example.images))
  rows = np.arange(len(example.labels))

  def logits(added):
    result = twin.wide_resnet(
      example.model, params, stats, images, train=False, added=added
    )
    return result.logits.numpy()[rows, np.asarray(example.labels)]

  activations = twin.wide_resnet(
    example.model, params, stats, images, train=False
  ).activations
  for layer in INNER:
    tensor = activations[layer]
    weights = []
    for channel in range(tensor.shape[1]):
      # Raising a whole channel adds up the derivatives of its pixels.
      change = twin.torch.zeros_like(tensor)
      change[:, channel] = 1e-6
      slope = (logits({layer: change}) - logits({layer: -change})) / 2e-6
      weights.append(slope / np.prod(tensor.shape[2:]))
    expected = _map(tensor.permute(0, 2, 3, 1).numpy(), np.stack(weights, -1))
    assert (expected > 0).any()
    np.testing.assert_allclose(maps[layer], expected, rtol=1e-5, atol=1e-8)


class Trunk(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.softplus(nn.Conv(4, (3, 3), name="conv")(x))
    return nn.Conv(3, (3, 3), (2, 2), name="down")(x)


class Top(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(5, (3, 3), name="conv")(jnp.tanh(x))
    # Not pooled, so that the derivative differs from pixel to pixel.
    return nn.Dense(3, name="out")(jnp.sin(x).reshape(len(x), -1))


class Split(nn.Module):
  """A user's own network: no `train`, no BatchNorm, modules in modules."""

  def setup(self):
    self.trunk = Trunk()
    self.top = Top()

  def __call__(self, images):
    return self.top(self.trunk(images))


@pytest.fixture
def foreign(make_variables, x64):
  model = Split()
  generator = np.random.default_rng(0)
  images = jnp.asarray(generator.uniform(size=(2, 6, 6, 1)))
  labels = jnp.array([2, 0])
  return model, make_variables(model, images, dtype=np.float64), images, labels


def test_foreign_network_equals_finite_differences_of_every_pixel(foreign):
  model, variables, images, labels = foreign
  params = variables["params"]
  tensor = np.asarray(Trunk().apply({"params": params["trunk"]}, images))

  @quick.jit
  def logit(tensor):
    logits = Top().apply({"params": params["top"]}, tensor)
    return logits[jnp.arange(2), labels]

  gradient = np.zeros_like(tensor)
  for pixel in np.ndindex(tensor.shape[1:]):
    change = np.zeros_like(tensor)
    change[(slice(None), *pixel)] = 1e-6
    slope = logit(tensor + change) - logit(tensor - change)
    gradient[(slice(None), *pixel)] = slope / 2e-6
  assert gradient.std((1, 2)).min() > 1e-3
  expected = _map(tensor, gradient.mean((1, 2)))
  assert (expected > 0).any()
  # The trunk's output is that of its last convolution, by either name.
  maps = attention.grad_cam(
    model, variables, images, labels, layers=("trunk", "trunk/down")
  )
  for actual in maps.values():
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


def test_layer_names_follow_the_computation(foreign, wrn):
  model, variables, images, _ = foreign
  assert attention.layer_names(model, variables, images) == (
    "trunk/conv",
    "trunk/down",
    "trunk",
    "top/conv",
  )
  names = attention.layer_names(wrn.model, wrn.variables, wrn.images)
  assert names[0] == "stem" and names[-1] == "features"
  assert [n for n in names if n.startswith("stage") and n[-2] != "v"][
    -1
  ] == "stage3_unit1"
  units = [name for name in names if name.endswith("_unit1")]
  assert units == ["stage1_unit1", "stage2_unit1", "stage3_unit1"]
  assert "head" not in names  # [B, K]


def test_several_layers_in_one_pass_equal_one_at_a_time(small):
  layers = ("bn2", "conv1", "conv2")
  together = attention.grad_cam(*small, layers=list(layers))
  assert set(together) == set(layers)
  for layer in layers:
    alone = _maps(small, layers=(layer,))
    assert list(alone) == [layer]
    np.testing.assert_allclose(
      together[layer], alone[layer], rtol=1e-5, atol=1e-6
    )


def test_maps_are_of_each_image_by_itself(small):
  layers = ("conv1", "bn2")
  images, labels = small.images[:4], small.labels[:4]

  def maps(images, labels, mode):
    return attention.grad_cam(
      small.model,
      small.variables,
      images,
      labels,
      layers=layers,
      batch_norm=mode,
    )

  # Other images behind the first two, in a batch of the same size.
  others = jnp.concatenate([images[:2], small.images[4:6]])
  for layer in layers:
    np.testing.assert_allclose(
      maps(images, labels, "running")[layer][:2],
      maps(others, labels, "running")[layer][:2],
      rtol=1e-5,
      atol=1e-6,
    )
    in_batch = maps(images, labels, "batch")[layer][:2]
    in_other = maps(others, labels, "batch")[layer][:2]
    assert np.abs(in_batch - in_other).max() > 1e-3


def test_forward_returns_the_logits_and_statistics_of_a_plain_pass(small):
  for mode in ("running", "batch"):

    @quick.jit
    def both(variables, images, mode=mode):
      logits, _, stats = attention.forward(
        small.model,
        variables,
        images,
        small.labels,
        layers=("conv1", "bn2"),
        batch_norm=mode,
      )
      plain = small.model.apply(
        variables, images, train=mode == "batch", mutable=["batch_stats"]
      )
      return (logits, stats), (plain[0], plain[1]["batch_stats"])

    (logits, stats), (expected, moved) = both(small.variables, small.images)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stats, moved
    )


def test_second_derivative_equals_finite_differences(small, x64):
  """Along a direction in every parameter, and in the images."""
  model, variables, images, labels = small.astype(np.float64)
  generator = np.random.default_rng(0)
  shapes = {"conv1": (8, 6, 6), "bn2": (8, 3, 3)}
  weights = {name: generator.normal(size=s) for name, s in shapes.items()}

  def weighted(params, images):
    _, maps, _ = attention.forward(
      model,
      {**variables, "params": params},
      images,
      labels,
      layers=tuple(shapes),
    )
    return sum((maps[name] * weights[name]).sum() for name in shapes)

  args = (variables["params"], images)
  value = quick.jit(weighted)
  gradients = quick.jit(jax.grad(weighted, (0, 1)))(*args)
  leaves, structure = jax.tree.flatten(args)
  for index, gradient in enumerate(jax.tree.leaves(gradients)):
    direction = generator.normal(size=leaves[index].shape)

    def shifted(step, index=index, direction=direction):
      moved = list(leaves)
      moved[index] = leaves[index] + step * direction
      return value(*structure.unflatten(moved))

    difference = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    path = jax.tree_util.tree_leaves_with_path(args)[index][0]
    np.testing.assert_allclose(
      (gradient * direction).sum(),
      difference,
      rtol=1e-5,
      atol=1e-7,
      err_msg=jax.tree_util.keystr(path),
    )


def test_second_derivative_of_the_wide_resnet_equals_pytorch(wrn, twin, x64):
  example = wrn.astype(np.float64)
  layers = ("stage2_unit1", "features")

  @quick.jit
  def gradient(params):
    def total(params):
      variables = {**example.variables, "params": params}
      _, maps, _ = attention.forward(
        example.model,
        variables,
        example.images,
        example.labels,
        layers=layers,
        batch_norm="batch",
      )
      return sum((m**2).sum() for m in maps.values())

    return jax.grad(total)(params)

  torch = twin.torch
  params = twin.tree(example.variables["params"], requires_grad=True)
  result = twin.wide_resnet(
    example.model,
    params,
    twin.tree(example.variables["batch_stats"]),
    torch.tensor(np.asarray(example.images)),
    train=True,
  )
  rows = torch.arange(8), torch.tensor(np.array(example.labels)).long()
  total = 0
  for layer in layers:
    tensor = result.activations[layer]
    (slope,) = torch.autograd.grad(
      result.logits[rows].sum(), tensor, create_graph=True
    )
    weights = slope.mean((2, 3), keepdim=True)
    total = total + ((weights * tensor).sum(1).relu() ** 2).sum()
  total.backward()
  actual = jax.tree_util.tree_leaves_with_path(
    gradient(example.variables["params"])
  )
  for (path, ours), theirs in zip(actual, jax.tree.leaves(params), strict=True):
    # A parameter that the maps do not depend on has no gradient in torch.
    expected = 0 if theirs.grad is None else theirs.grad.numpy()
    np.testing.assert_allclose(
      ours,
      expected,
      rtol=1e-8,
      atol=1e-10,
      err_msg=jax.tree_util.keystr(path),
    )


def _convolutions(function, *args) -> int:
  """Convolutions in the program, dead ones not counted."""
  text = quick.jit(function).lower(*args).compile().as_text()
  return text.count(" convolution(")


def test_backward_pass_stops_at_the_tap(wrn):
  # XLA's own convolutions: one forward, one for each gradient.
  model = wrn.model.clone(convolution="xla")

  def maps(layer):
    return lambda variables, images: attention.forward(
      model, variables, images, wrn.labels, layers=layer and (layer,)
    )[:2]

  args = wrn.variables, wrn.images
  forward = _convolutions(model.apply, *args)
  assert forward == 1 + 3 * 2
  # The last tensor costs a dense layer, an inner one what lies above it.
  assert _convolutions(maps(None), *args) == forward
  assert _convolutions(maps("stage1_unit1"), *args) == forward + 4


def test_inside_jit_vmap_and_grad(small):
  def cam(images, labels):
    maps = attention.grad_cam(small.model, small.variables, images, labels)
    return maps["bn2"]

  expected = cam(small.images, small.labels)
  assert expected.shape == (8, 3, 3) and (expected > 0).any()

  @quick.jit
  def transformed(images, labels):
    pairs = images.reshape(4, 2, 6, 6, 2), labels.reshape(4, 2)
    gradient = jax.grad(lambda x: cam(x, labels).sum())(images)
    return cam(images, labels), jax.vmap(cam)(*pairs), gradient

  whole, pairs, gradient = transformed(small.images, small.labels)
  np.testing.assert_allclose(whole, expected, atol=1e-6)
  np.testing.assert_allclose(pairs.reshape(expected.shape), expected, atol=1e-6)
  assert np.isfinite(gradient).all() and (gradient != 0).any()


def test_half_precision_network_gives_float32_maps(wrn):
  half = wrn._replace(model=wrn.model.clone(dtype=jnp.bfloat16))
  maps = _maps(half)["features"]
  exact = _maps(wrn)["features"]
  assert maps.dtype == np.float32
  np.testing.assert_allclose(maps, exact, atol=0.05 * np.abs(exact).max())


def test_new_weights_compile_nothing(small, compilations):
  attention.grad_cam(*small)
  other = jax.tree.map(lambda x: 0.5 * x, small.variables)
  before = compilations()
  attention.grad_cam(small.model, other, small.images, small.labels)
  assert compilations() == before


def test_an_interceptor_that_stays_does_nothing(small, monkeypatch):
  """Under `python -O` flax 0.12 does not take interceptors off again."""
  stack = nn.module._global_interceptor_stack
  left = []

  @contextlib.contextmanager
  def never_off(interceptor):
    stack.push(interceptor)
    left.append(interceptor)
    yield

  model, variables, images, labels = small
  expected = model.apply(variables, images)
  monkeypatch.setattr(nn, "intercept_methods", never_off)
  try:
    with jax.disable_jit():
      attention.forward(model, variables, images, labels)
      found = model.apply(variables, images)
  finally:
    for _ in left:
      stack.pop()
  assert left
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sequential_networks(small, make_variables):
  """flax keeps their layers in a list, which has no hash."""
  layers = [nn.Conv(4, (3, 3)), nn.tanh, lambda x: x.mean((1, 2)), nn.Dense(3)]
  model = nn.Sequential(layers)
  variables = make_variables(model, small.images)
  maps = attention.grad_cam(model, variables, *small[2:])
  assert list(maps) == ["layers_0"]
  kernel = variables["params"]["layers_3"]["kernel"]
  tensor = quick.jit(layers[0].apply)(
    {"params": variables["params"]["layers_0"]}, small.images
  )
  slope = (1 - np.tanh(tensor) ** 2).mean((1, 2)) / 36
  expected = _map(np.asarray(tensor), slope * kernel[:, small.labels].T)
  np.testing.assert_allclose(maps["layers_0"], expected, atol=1e-6)


class Flat(nn.Module):
  """A network without an image inside."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x.reshape(len(x), -1))


def test_errors_name_the_argument(small):
  model, variables, images, labels = small

  def message(**changes):
    arguments = dict(images=images, labels=labels, layers=None) | changes
    with pytest.raises(UserError) as error:
      attention.grad_cam(model, variables, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)

  unknown = message(layers=("conv3",))
  assert unknown == "layers: 'conv3'; allowed: conv1, bn1, conv2, bn2"
  assert message(labels=labels + 1).startswith("labels: values in [1, 3]; ")
  assert message(labels=labels[:3]).startswith("labels: shape (3,); ")
  assert message(images=images * 2).startswith("images: values in [")
  assert message(images=(images * 255).astype(np.uint8)).startswith(
    "images: dtype uint8; "
  )
  with pytest.raises(UserError, match="batch_norm: 'train'; allowed: batch"):
    attention.grad_cam(*small, batch_norm="train")
  with pytest.raises(UserError, match="model: no submodule returns a tensor"):
    attention.grad_cam(
      Flat(), Flat().init(jax.random.key(0), images), *small[2:]
    )
