"""Every network against its PyTorch twin, through a file: tensors, logits, maps.

The default tests take networks of few layers in float64, the slow ones those of
torchvision at full size in float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from atat_jax import attention, interop, models
from atat_jax.models import vgg

torch = pytest.importorskip(
  "torch", reason="PyTorch is the oracle of these tests"
)
import torch_zoo  # noqa: E402

USUAL = dict(
  shortcut="conv",
  padding="symmetric",
  activation="relu",
  normalization="none",
  batch_norm_epsilon=1e-5,
)
# Every kind of unit and of transition, sizes that cannot be confused.
SMALL = {
  "vgg16": dict(stage_sizes=(1, 2), stage_channels=(4, 6), hidden=9),
  "vgg16_bn": dict(stage_sizes=(2, 1), stage_channels=(4, 6), hidden=9),
  "resnet18": dict(stage_sizes=(2, 1), base_channels=6),
  "resnet50": dict(stage_sizes=(2, 1), base_channels=4),
  "densenet121": dict(
    stage_sizes=(2, 1), growth=5, bottleneck=3, base_channels=6
  ),
  "preact_resnet18": dict(stage_sizes=(2, 1), base_channels=6),
  "wide_resnet": dict(depth=16, width=2, stem_channels=4, **USUAL),
}
# The published numbers of parameters, with 1000 classes (torchvision).
PARAMETERS = {
  "vgg16": 138_357_544,
  "vgg16_bn": 138_365_992,
  "resnet18": 11_689_512,
  "resnet50": 25_557_032,
  "densenet121": 7_978_856,
}


def _pair(name, path, **fields):
  """A network, its variables read from a file, and the twin that wrote it."""
  model = models.create(name, **fields)
  network = torch_zoo.randomize(torch_zoo.TWINS[name](model))
  torch.save(network.state_dict(), path)
  return model, interop.load_torch(path, model), network


def _maps(logits, taps, labels):
  """Eq. (1) to (3) by PyTorch's autograd."""
  rows = torch.arange(len(labels)), torch.tensor(labels)
  gradients = torch.autograd.grad(
    logits[rows].sum(), list(taps.values()), allow_unused=True
  )
  return {
    name: (gradient.mean((2, 3), keepdim=True) * tensor).sum(1).relu()
    for (name, tensor), gradient in zip(taps.items(), gradients, strict=True)
  }


def _compare(
  model, variables, network, images, labels, *, tolerance, with_maps=True
):
  """Logits, all taps and the Grad-CAM map of each.

  Returns the largest difference of each, in units of the largest value.
  """
  expected_logits, taps = network(torch.tensor(images).permute(0, 3, 1, 2))
  expected_maps = _maps(expected_logits, taps, labels)

  @jit
  def run(variables, images):
    logits, maps, _ = attention.forward(
      model, variables, images, jnp.asarray(labels), layers=tuple(taps)
    )
    _, collections = model.apply(
      variables,
      images,
      capture_intermediates=lambda module, _: module.name in taps,
      mutable=["intermediates"],
    )
    return logits, maps, collections["intermediates"]

  logits, maps, tensors = run(variables, images)
  errors = {}

  def check(what, actual, expected):
    expected = expected.detach().numpy()
    scale = np.abs(expected).max() or 1  # a map can be zero everywhere
    errors[what] = np.abs(np.asarray(actual) - expected).max() / scale
    assert errors[what] < tolerance, (what, errors[what])

  check("logits", logits, expected_logits)
  assert set(maps) == set(tensors) == set(taps)
  for name, tensor in taps.items():
    check(name, tensors[name]["__call__"][0], tensor.permute(0, 2, 3, 1))
    if with_maps:
      check(f"map of {name}", maps[name], expected_maps[name])
  return errors


@pytest.mark.parametrize("name", SMALL)
def test_tensors_logits_and_maps_equal_pytorch(name, tmp_path, x64):
  model, variables, network = _pair(
    name, tmp_path / "weights.pth", num_classes=5, **SMALL[name]
  )
  model = model.clone(dtype=jnp.float64)
  variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
  images = np.random.default_rng(0).uniform(size=(2, 38, 44, 3))
  _compare(model, variables, network.double(), images, [4, 1], tolerance=1e-10)
  # The topmost tensor has one name in all networks, and is the default.
  layers = attention.layer_names(model, variables, images)
  assert layers[-1] == "features"


def test_both_shortcuts_of_the_preact_resnet_equal_pytorch(tmp_path, x64):
  fields = SMALL["preact_resnet18"] | dict(num_classes=5)
  images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3))
  logits = []
  for activated in (True, False):
    model, variables, network = _pair(
      "preact_resnet18",
      tmp_path / "weights.pth",
      activated_shortcut=activated,
      **fields,
    )
    model = model.clone(dtype=jnp.float64)
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    logits.append(np.asarray(jit(model.apply)(variables, images)))
    expected = network.double()(torch.tensor(images).permute(0, 3, 1, 2))[0]
    np.testing.assert_allclose(
      logits[-1], expected.detach().numpy(), rtol=1e-10
    )
  assert np.abs(logits[0] - logits[1]).max() > 1e-2


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_networks_have_torchvisions_layers(name):
  """Names and shapes of the twin, its number of parameters the published one."""
  model = models.create(name)
  with torch.device("meta"):
    network = torch_zoo.TWINS[name](model)
  sizes = {k: math.prod(p.shape) for k, p in network.named_parameters()}
  assert sum(sizes.values()) == PARAMETERS[name]
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
  )
  names = interop.layouts.of(model)[-1].names(model)
  ours = {
    f"{names[layer]}.{'bias' if leaf == 'bias' else 'weight'}": math.prod(
      value.shape
    )
    for layer, leaves in shapes["params"].items()
    for leaf, value in leaves.items()
  }
  assert ours == sizes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
  "name", [*PARAMETERS, "preact_resnet18", "wide_resnet"]
)
def test_full_networks_equal_pytorch(name, dtype, tmp_path):
  """Maps in float64 only: rounding decides on which side of a ReLU's kink a
  gradient is taken, and the mean over pixels cancels what remains.
  """
  fields, side = {}, 224
  if name == "preact_resnet18":
    side = 32
  elif name == "wide_resnet":
    fields, side = dict(depth=34, width=10, **USUAL), 32
  model, variables, network = _pair(name, tmp_path / "weights.pth", **fields)
  images = np.random.default_rng(0).uniform(size=(1, side, side, 3))
  if dtype == "float32":
    images = images.astype(np.float32)
    pair = model, variables, network
    errors = _compare(*pair, images, [7], tolerance=1e-4, with_maps=False)
  else:
    with jax.enable_x64(True):
      variables = jax.tree.map(lambda x: x.astype(np.float64), variables)
      pair = model.clone(dtype=jnp.float64), variables, network.double()
      errors = _compare(*pair, images, [7], tolerance=1e-9)
  worst = max(errors, key=errors.get)
  print(
    f"{name} {dtype}: logits {errors['logits']:.1e}, largest"
    f" {errors[worst]:.1e} ({worst})"
  )


@pytest.mark.parametrize("size", [1, 3, 7, 10, 14, 16])
def test_bins_are_those_of_adaptive_pooling(size, x64):
  x = np.random.default_rng(0).normal(size=(2, 3, size))
  expected = torch.nn.functional.adaptive_avg_pool1d(torch.tensor(x), 7)
  np.testing.assert_allclose(x @ vgg._bins(size).T, expected, rtol=1e-12)
