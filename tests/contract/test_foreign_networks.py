"""Networks of other libraries: attacked, explained, or refused in one line."""

import functools
from typing import Any

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import torch
from flax import nnx
from jax.tree_util import Partial

from atat_jax import analyses, attacks, attention, models
from atat_jax.compilation import captures
from atat_jax.errors import UserError

eqx = pytest.importorskip("equinox")  # the extra "test" installs it

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(KEY, (2, 8, 8, 3), minval=0.2, maxval=0.8)
LABELS = jnp.array([0, 2])
EPSILON = 0.05


class EqxNet(eqx.Module):
  """A convolution and a head; an activation and a text among its leaves."""

  conv: Any
  head: Any
  activation: Any
  name: str

  def __init__(self, seed: int):
    keys = jax.random.split(jax.random.key(seed))
    self.conv = eqx.nn.Conv2d(3, 4, 3, padding=1, key=keys[0])
    self.head = eqx.nn.Linear(4, foreign.NUM_CLASSES, key=keys[1])
    self.activation, self.name = jnp.tanh, "net"

  def features(self, image):
    return self.activation(self.conv(image))

  def __call__(self, image):
    return self.head(self.features(image).mean((1, 2)))


def _eqx_logits(network, images):
  return jax.vmap(network)(images.transpose(0, 3, 1, 2))


def _eqx_features(network, images):
  found = jax.vmap(network.features)(images.transpose(0, 3, 1, 2))
  return found.transpose(0, 2, 3, 1)


def _eqx_head(network, tensor):
  return jax.vmap(network.head)(tensor.mean((1, 2)))


def _drawn(shapes, seed=0):
  """Numbers from numpy: drawing them by JAX compiles each shape."""
  generator = np.random.default_rng(seed)

  def draw(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    # Positive, as variances must be.
    return jnp.asarray(generator.uniform(0.1, 0.6, leaf.shape), leaf.dtype)

  return jax.tree.map(draw, shapes)


def _variables(model, seed=0, **mode):
  shapes = jax.eval_shape(
    lambda key, x: model.init(key, x, **mode), KEY, IMAGES
  )
  return _drawn(shapes, seed)


def _nnx(seed, *, training=False):
  network = nnx.eval_shape(lambda: foreign.NnxResNet(0))
  graph, state = nnx.split(network)
  # A key and its count are no numbers to draw.
  keys = jax.tree.map(
    lambda leaf: (
      KEY if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    ),
    state,
  )
  counts = jax.tree.map(
    lambda leaf: (
      jnp.zeros(leaf.shape, leaf.dtype) if leaf.dtype == jnp.uint32 else leaf
    ),
    keys,
  )
  network = nnx.merge(graph, _drawn(counts, seed))
  if not training:
    network.eval()
  return network


def _eqx(seed):
  shapes = eqx.filter_eval_shape(EqxNet, 0)
  arrays, static = eqx.partition(shapes, lambda x: hasattr(x, "dtype"))
  return eqx.combine(_drawn(arrays, seed), static)


def _pair_features(weights, images):
  return jnp.tanh(images @ weights["first"])


def _pair_head(weights, tensor):
  return tensor.mean((1, 2)) @ weights["last"]


def _pair_weights(seed):
  generator = np.random.default_rng(seed)
  return {
    "first": generator.normal(size=(3, 4)).astype(np.float32),
    "last": generator.normal(size=(4, foreign.NUM_CLASSES)).astype(np.float32),
    "name": "a text is static",
  }


def _tuple(seed):
  model = foreign.ReturnsATuple()
  return model, _variables(model, seed)


# Seed to (module, variables), and to a function from images to logits that has
# nothing of this package.
KINDS = {
  "nnx": (
    lambda seed: models.adapt(_nnx(seed, training=True)),
    lambda seed: _nnx(seed),
  ),
  "equinox": (
    lambda seed: models.adapt(_eqx(seed)),
    lambda seed: functools.partial(_eqx_logits, _eqx(seed)),
  ),
  "two functions": (
    lambda seed: models.from_functions(
      _pair_features, _pair_head, _pair_weights(seed)
    ),
    lambda seed: (
      lambda x: _pair_head(
        _pair_weights(seed), _pair_features(_pair_weights(seed), x)
      )
    ),
  ),
  "a linen network that returns a tuple": (
    lambda seed: models.adapt(*_tuple(seed), call=_first),
    lambda seed: lambda x: _tuple(seed)[0].apply(_tuple(seed)[1], x)[0],
  ),
}


def _first(network, images):
  return network(images)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_is_that_on_the_network_itself(kind, compilations):
  adapted, plain = KINDS[kind]

  def attacked(seed):
    classifier = models.classifier(*adapted(seed))
    return attacks.fgsm(KEY, classifier, IMAGES, LABELS, epsilon=EPSILON)

  def expected(seed):
    network = plain(seed)

    def loss(x):
      chosen = jax.nn.log_softmax(network(x))[jnp.arange(2), LABELS]
      return -chosen.sum()

    steps = EPSILON * jnp.sign(quick.jit(jax.grad(loss))(IMAGES))
    return np.clip(IMAGES + steps, 0, 1)

  np.testing.assert_allclose(attacked(0), expected(0), atol=1e-6)
  other = models.classifier(*adapted(1))
  before = compilations()
  found = attacks.fgsm(KEY, other, IMAGES, LABELS, epsilon=EPSILON)
  assert compilations() == before
  np.testing.assert_allclose(found, expected(1), atol=1e-6)


def _formula(tensor, weights):
  """Eq. (3) where logits are the mean over pixels times weights [C, K]."""
  slopes = np.asarray(weights).T[np.asarray(LABELS)] / np.prod(
    tensor.shape[1:3]
  )
  return np.maximum(np.einsum("bhwc,bc->bhw", tensor, slopes), 0)


def test_maps_of_two_functions_equal_the_formula():
  weights = _pair_weights(0)
  pair = models.from_functions(_pair_features, _pair_head, weights)
  (maps,) = attention.grad_cam(*pair, IMAGES, LABELS).values()
  expected = _formula(_pair_features(weights, IMAGES), weights["last"])
  np.testing.assert_allclose(maps, expected, atol=1e-6)
  network = _eqx(0)
  pair = models.from_functions(_eqx_features, _eqx_head, network)
  found = attention.grad_cam(*pair, IMAGES, LABELS)
  tensor = _eqx_features(network, IMAGES)
  expected = _formula(tensor, network.head.weight.T)
  np.testing.assert_allclose(found["features"], expected, atol=1e-6)


def test_maps_of_an_nnx_network_equal_the_formula():
  network = _nnx(0)

  @quick.jit
  def last(images):
    x = network.stem(images)
    for block in network.blocks:
      x = block(x)
    return x

  expected = _formula(last(IMAGES), network.head.kernel[...])
  network.train()  # it is evaluated all the same
  before = np.array(network.blocks[0].norm.mean[...])
  found = attention.grad_cam(*models.adapt(network), IMAGES, LABELS)
  np.testing.assert_allclose(found["blocks/1"], expected, atol=1e-6)
  np.testing.assert_array_equal(network.blocks[0].norm.mean[...], before)


def test_the_mode_batch_moves_the_statistics_of_an_nnx_network():
  model, variables = models.adapt(_nnx(0))

  @quick.jit
  def moved(variables, images):
    *_, moved = attention.forward(
      model, variables, images, LABELS, batch_norm="batch", layers=("stem",)
    )
    return moved["statistics"]["blocks/0/norm/mean/value"]

  network = _nnx(0)
  first = network.blocks[0]
  batch = quick.jit(lambda x: first.conv(network.stem(x)).mean((0, 1, 2)))
  expected = 0.99 * first.norm.mean[...] + 0.01 * batch(IMAGES)
  np.testing.assert_allclose(moved(variables, IMAGES), expected, atol=1e-6)


def test_the_second_call_of_a_module_is_explained():
  model = foreign.Twice()
  variables = _variables(model)
  (maps,) = attention.grad_cam(model, variables, IMAGES, LABELS).values()
  conv = foreign.nn.Conv(4, (3, 3))
  params = variables["params"]

  @quick.jit
  def second(images):
    x = conv.apply({"params": params["first"]}, images)
    for _ in range(2):
      x = conv.apply({"params": params["last"]}, jax.nn.relu(x))
    return x

  expected = _formula(second(IMAGES), params["head"]["kernel"])
  np.testing.assert_allclose(maps, expected, rtol=1e-5)


def test_maps_of_tokens_leave_the_class_token_out():
  """Of a mean over the tokens, and of a class token that knows them."""
  features, kernel = 4, np.random.default_rng(1).normal(size=(4, 3))

  class Tokens(foreign.nn.Module):
    silent: bool = False

    @foreign.nn.compact
    def __call__(self, x):
      x = foreign.nn.Conv(features, (2, 2), strides=2, name="patches")(x)
      x = x.reshape(len(x), -1, features)
      x = jnp.concatenate([jnp.ones_like(x[:, :1]), x], 1)
      x = models.base.Features(name="tokens")(x)
      x = x[:, 0] * x[:, 0] if self.silent else x[:, 1:].mean(1)
      return x @ kernel

  variables = _variables(Tokens())
  conv = foreign.nn.Conv(features, (2, 2), strides=2)
  patches = quick.jit(conv.apply)(
    {"params": variables["params"]["patches"]}, IMAGES
  )
  arguments = variables, IMAGES, LABELS
  found = attention.grad_cam(Tokens(), *arguments, layers=("tokens",))
  np.testing.assert_allclose(
    found["tokens"], _formula(patches, kernel), rtol=1e-5, atol=1e-7
  )
  with pytest.raises(
    UserError, match="'tokens': the logits depend on no token"
  ):
    attention.grad_cam(Tokens(silent=True), *arguments, layers=("tokens",))


def test_a_landscape_of_an_equinox_network():
  networks = {"net": models.adapt(_eqx(0))}
  found = analyses.loss_landscape(
    KEY, networks, IMAGES, LABELS, radius=0.1, num_points=3
  )
  logits = quick.jit(functools.partial(_eqx_logits, _eqx(0)))(IMAGES)
  expected = -jax.nn.log_softmax(logits)[jnp.arange(2), LABELS]
  np.testing.assert_allclose(found["net_loss"][:, 1, 1], expected, atol=1e-5)


def test_an_adapted_network_inside_jit_and_vmap():
  model, first = models.adapt(_nnx(0))
  _, second = models.adapt(_nnx(1))

  def run(variables):
    classifier = models.classifier(model, variables)
    return attacks.fgsm(KEY, classifier, IMAGES, LABELS, epsilon=EPSILON)

  expected = [run(first), run(second)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
  found = jax.jit(jax.vmap(run))(stacked)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_fresh_functools_partial_in_a_partial_is_no_other_function():
  def function(factor, weights, images):
    return factor * (images.reshape(len(images), -1) @ weights)

  def structure(factor):
    inner = functools.partial(function, factor)
    made = captures.argument(Partial(inner, jnp.ones((4, 3))))
    assert not captures.find(made)  # nothing to be traced anew
    return jax.tree.structure(made), np.asarray(made(jnp.ones((1, 2, 2, 1))))

  (one, logits), (again, _), (other, double) = map(structure, (1.0, 1.0, 2.0))
  assert one == again and hash(one) == hash(again)
  assert one != other and (double == 2 * logits).all()


# --- Refusals ----------------------------------------------------------------


def _linen(name):
  model = getattr(foreign, name)()
  return model, _variables(model)


def _attack(classifier, images=IMAGES):
  attacks.fgsm(KEY, classifier, images, LABELS, epsilon=EPSILON)


def _torch():
  return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))


def _explain(model, variables=None, images=IMAGES):
  attention.grad_cam(model, variables or {}, images, LABELS)


ADAPT = r"allowed: .*models\.adapt\("
REFUSED = {
  "a PyTorch module": (lambda: _attack(_torch()), r"interop\.load_torch"),
  "its maps": (lambda: _explain(_torch()), r"model: a PyTorch .*torch2jax"),
  "PyTorch in a function": (
    lambda: _attack(lambda x: _torch()(torch.tensor(np.asarray(x)))),
    r"PyTorch network is loaded by interop\.load_torch",
  ),
  "an nnx classifier": (
    lambda: models.classifier(_nnx(0), {}),
    f"an nnx module NnxResNet; {ADAPT}",
  ),
  "an nnx module": (lambda: _explain(_nnx(0)), ADAPT),
  "nnx in training mode": (
    lambda: _attack(_nnx(0, training=True)),
    r"a NnxResNet in training mode, see .*allowed: .*network\.eval\(\)",
  ),
  "nnx in a function": (
    lambda: _attack(
      functools.partial(_calls, _nnx(0, training=True).blocks[0])
    ),
    r"TraceContextError: .*allowed: .*network\.eval\(\)",
  ),
  "an Equinox module": (
    lambda: _explain(_eqx(0)),
    f"an Equinox module EqxNet; {ADAPT}",
  ),
  "an Equinox network of an image": (
    lambda: _attack(_eqx(0)),
    r"allowed: .*takes one image \[C, H, W\]: .*models\.adapt",
  ),
  "filter_jit of it": (
    lambda: _attack(eqx.filter_jit(_eqx(0))),
    r"allowed: .*takes one image \[C, H, W\]",
  ),
  "layers of an Equinox module": (
    lambda: _explain(*models.adapt(_eqx(0))),
    r"no submodule returns a tensor .*models\.from_functions",
  ),
  "a linen module": (
    lambda: _attack(foreign.Vgg()),
    r"a Vgg without its variables; allowed: models\.classifier\(model",
  ),
  "parameters alone": (
    lambda: _attack(models.classifier(_VGG[0], _VGG[1]["params"])),
    r"a linen network needs all its collections, {'params': ",
  ),
  "maps of parameters alone": (
    lambda: _explain(_VGG[0], _VGG[1]["params"]),
    r"variables: no params/.*allowed: .*{'params': params",
  ),
  "channels first": (
    lambda: _attack(models.classifier(*_VGG), IMAGES.transpose(0, 3, 1, 2)),
    r"images: shape \(2, 3, 8, 8\), .*allowed: \[B, H, W, C\]: images\.trans",
  ),
  "a seed": (
    lambda: attacks.fgsm(
      0, models.classifier(*_VGG), IMAGES, LABELS, epsilon=1
    ),
    r"key: 0; allowed: .*jax\.random\.key\(0\)",
  ),
  "a tuple": (
    lambda: _attack(models.classifier(*_linen("ReturnsATuple"))),
    r"ReturnsATuple returns a tuple; allowed: .*; models\.adapt\(",
  ),
  "maps of a tuple": (
    lambda: _explain(*_linen("ReturnsATuple")),
    r"ReturnsATuple returns a tuple; allowed: .*; models\.adapt\(",
  ),
  "a mask": (
    lambda: _explain(foreign.NeedsAMask(), _VGG[1]),
    rf"required positional argument: 'mask'; {ADAPT}",
  ),
  "an attack with a mask": (
    lambda: _attack(models.classifier(foreign.NeedsAMask(), _VGG[1])),
    rf"required positional argument: 'mask'; {ADAPT}",
  ),
  "features that are no tensor": (
    lambda: _explain(
      *models.from_functions(lambda x: x.mean((1, 2)), lambda x: x)
    ),
    r"features: returns shape \(., 3\) .*allowed: one tensor",
  ),
}
_VGG = _linen("Vgg")


def _calls(network, images):
  return network(jnp.tile(images, (1, 1, 1, 2))[..., :4]).mean((1, 2))


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_is_accepted_in_one_line(case):
  run, pattern = REFUSED[case]
  with pytest.raises(UserError, match=pattern) as error:
    run()
  assert "allowed: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ResNet", "DenseNet"])
def test_networks_that_name_their_mode_otherwise_are_evaluated(name):
  """`training` without a default, and `deterministic` that is False."""
  model = getattr(foreign, name)()
  mode = {"training": False} if name == "ResNet" else {"deterministic": True}
  variables = _variables(model, **mode)

  @quick.jit
  def both(variables, images):
    made = models.classifier(model, variables)(images)
    return made, model.apply(variables, images, **mode)

  np.testing.assert_array_equal(*both(variables, IMAGES))
