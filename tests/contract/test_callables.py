"""Classifiers of every kind: never an old weight, nothing compiled, no leak."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from callables import KINDS, formula
from flax import linen as nn
from jax.tree_util import Partial

from atat_jax import attacks, attention, compilation, evaluation, models
from atat_jax.attacks import base
from atat_jax.data.base import Split
from atat_jax.errors import UserError
from atat_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
X = jax.random.uniform(KEY, (4, 2, 2, 2), minval=0.3, maxval=0.7)
Y = jnp.array([0, 1, 2, 3])
EPSILON = 0.1


def _weights(number: int) -> jax.Array:
  return jax.random.normal(jax.random.key(number), (8, 4))


def _pgd(classifier: Any) -> np.ndarray:
  numbers = {"epsilon": EPSILON, "step_size": 0.03, "num_steps": 3}
  return np.asarray(attacks.pgd(KEY, classifier, X, Y, **numbers))


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
  found = [_pgd(Partial(formula, _weights(n))) for n in range(3)]
  assert not np.array_equal(found[0], found[1])
  return found


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_are_seen_and_compile_nothing(kind, expected, compilations):
  classifier, change = KINDS[kind](_weights(0))
  np.testing.assert_array_equal(_pgd(classifier), expected[0])
  others = {number: _weights(number) for number in (1, 2, 0)}
  before = compilations()
  for number, weights in others.items():
    np.testing.assert_array_equal(_pgd(change(weights)), expected[number])
  assert compilations() == before


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_let_go(kind):
  weights = _weights(1)
  classifier, change = KINDS[kind](weights)
  _pgd(classifier)
  alive = weakref.ref(weights)
  del classifier, change, weights
  gc.collect()
  assert alive() is None


def test_other_python_values_are_seen(expected):
  """A factor, a branch, an activation: each is another program."""
  weights = _weights(0)
  settings = {"factor": 1.0, "flip": False, "activation": jnp.tanh}

  def classifier(images: jax.Array) -> jax.Array:
    flat = images.reshape(len(images), -1)
    logits = settings["activation"](flat @ weights)
    return (-logits if settings["flip"] else logits) * settings["factor"]

  np.testing.assert_array_equal(_pgd(classifier), expected[0])
  settings["flip"] = True
  assert not np.array_equal(_pgd(classifier), expected[0])
  settings["factor"] = -1.0
  np.testing.assert_allclose(_pgd(classifier), expected[0], atol=1e-6)
  settings.update(flip=False, factor=1.0, activation=jnp.sin)
  sine = Partial(lambda w, x: jnp.sin(x.reshape(len(x), -1) @ w), weights)
  np.testing.assert_array_equal(_pgd(classifier), _pgd(sine))


FACTOR = 1.0


def _with_a_global(weights: Any, images: jax.Array) -> jax.Array:
  return FACTOR * formula(weights, images)


class _Scaled(nn.Module):
  """A linen module that reads a global name."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = nn.Conv(4, (1, 1), name="conv")(images)
    return nn.Dense(4, name="dense")(x.reshape(len(x), -1)) * FACTOR


@pytest.mark.parametrize("rebound", ["partial", "linen", "cell", "grad_cam"])
def test_a_rebound_number_is_seen(rebound, monkeypatch):
  model, factor = _Scaled(), 1.0
  variables = model.init(KEY, X)

  def in_a_cell(weights: Any, images: jax.Array) -> jax.Array:
    return factor * formula(weights, images)

  def run() -> Any:
    if rebound == "grad_cam":
      return attention.grad_cam(model, variables, X, Y)["conv"]
    return _pgd(
      {
        "partial": Partial(_with_a_global, _weights(0)),
        "linen": models.classifier(model, variables),
        "cell": Partial(in_a_cell, _weights(0)),
      }[rebound]
    )

  before = run()
  factor = -1.0
  monkeypatch.setitem(globals(), "FACTOR", -1.0)
  after = run()
  assert not np.array_equal(before, after)
  if rebound in ("partial", "cell"):
    turned = Partial(lambda w, x: -formula(w, x), _weights(0))
    np.testing.assert_allclose(after, _pgd(turned), atol=1e-6)


class _Fixed(nn.Module):
  """A linen module with weights that are no variables."""

  weights: Any = None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = nn.Conv(4, (1, 1), name="conv")(images)
    return x.reshape(len(x), -1) @ self.weights


def test_weights_in_a_field_of_a_network_are_seen():
  """By all that takes a network: it is a static argument there."""
  fields = [
    np.array(jax.random.normal(jax.random.key(n), (16, 4))) for n in (0, 1)
  ]
  array = fields[0].copy()
  model = _Fixed(array)
  variables = model.init(KEY, X)

  def look(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    maps = attention.grad_cam(model, variables, X, Y)
    return np.asarray(maps["conv"]), _pgd(models.classifier(model, variables))

  look(model)
  array[...] = fields[1]
  for found, right in zip(look(model), look(_Fixed(fields[1])), strict=True):
    np.testing.assert_array_equal(found, right)
  alive = weakref.ref(array)
  del array, model
  gc.collect()
  assert alive() is None


def test_another_branch_at_another_batch_size_is_seen():
  """The first trace, of two images, cannot tell these two apart."""

  def make(large: float) -> Any:
    weights = _weights(0)
    return lambda x: formula(weights, x) * (large if len(x) > 2 else 1.0)

  def adversarial(classifier: Any) -> np.ndarray:
    return attacks.autoattack(
      KEY,
      classifier,
      np.tile(X, (2, 1, 1, 1)),
      np.tile(Y, 2),
      epsilon=EPSILON,
      version=["apgd-ce"],
      options={"apgd-ce": {"num_steps": 2}},
      batch_size=4,
      progress=False,
    ).adversarial

  assert not np.array_equal(adversarial(make(1.0)), adversarial(make(-1.0)))


def _autoattack(classifier: Any) -> np.ndarray:
  return attacks.autoattack(
    KEY,
    classifier,
    X,
    Y,
    epsilon=EPSILON,
    version=["apgd-ce", "fab-t"],
    options={"apgd-ce": {"num_steps": 2}, "fab-t": {"num_steps": 2}},
    progress=False,
  ).adversarial


def _accuracy(classifier: Any) -> float:
  pixels = (255 * np.asarray(X)).astype(np.uint8)
  return evaluation.accuracy(
    KEY,
    classifier,
    Split(jnp.asarray(pixels), jnp.asarray(Y)),
    protocol=evaluation.parse("pgd2", epsilon=EPSILON, step_size=0.05),
    batch_size=2,
    mesh=make_mesh(jax.devices()[:2]),
  )


def _attack_by(name: str) -> Any:
  numbers: dict[str, Any] = {"epsilon": EPSILON}
  numbers |= {
    "fgsm": {},
    "ifgsm": {"step_size": 0.03, "num_steps": 2},
    "square": {"num_queries": 5},
  }.get(name, {"num_steps": 2})
  return lambda classifier: attacks.ATTACKS[name](
    KEY, classifier, X, Y, **numbers
  )


@pytest.mark.parametrize("kind", ["attribute", "jit"])
@pytest.mark.parametrize(
  "run",
  [
    *(_attack_by(name) for name in ("fgsm", "apgd", "fab", "square")),
    _autoattack,
    _accuracy,
  ],
  ids=["fgsm", "apgd", "fab", "square", "autoattack", "accuracy"],
)
def test_every_entry_sees_new_weights(run, kind, compilations):
  weights = [_weights(n) for n in range(2)]
  classifier, change = KINDS[kind](weights[0])
  run(classifier)
  run(change(weights[1]))  # an attack may have more to do on this one
  before = compilations()
  found = [run(change(w)) for w in weights]
  assert compilations() == before
  for result, w in zip(found, weights, strict=True):
    right = run(Partial(formula, w))
    np.testing.assert_allclose(result, right, atol=1e-6)


def test_calls_inside_transformations_see_new_weights(expected):
  def inside(weights: jax.Array) -> jax.Array:
    return attacks.pgd(
      KEY,
      lambda images: formula(weights, images),
      X,
      Y,
      epsilon=EPSILON,
      step_size=0.03,
      num_steps=3,
    )

  stacked = jnp.stack([_weights(0), _weights(1)])
  for found in (
    [jax.jit(inside)(w) for w in stacked],
    jax.vmap(inside)(stacked),
    jax.lax.map(inside, stacked),
  ):
    for got, right in zip(found, expected, strict=False):
      np.testing.assert_allclose(got, right, atol=1e-6)

  net, change = KINDS["attribute"](_weights(0))
  for number in (0, 1):  # another function of the user, the same object
    change(_weights(number))
    found = jax.jit(lambda x: x + _traced(net))(0.0)
    np.testing.assert_allclose(found, expected[number], atol=1e-6)


def _traced(net: Any) -> jax.Array:
  numbers = {"epsilon": EPSILON, "step_size": 0.03, "num_steps": 3}
  return attacks.pgd(KEY, net, X, Y, **numbers)


def test_weights_on_many_devices_stay_there():
  """A network that is split over devices, under an attack on all of them."""
  mesh = make_mesh(jax.devices()[:2])
  weights = jax.device_put(_weights(0), jax.devices()[0])
  results = [
    attacks.autoattack(
      KEY,
      classifier,
      X,
      Y,
      epsilon=EPSILON,
      version=["apgd-ce"],
      options={"apgd-ce": {"num_steps": 2}},
      mesh=mesh,
      progress=False,
    )
    for classifier in (
      lambda x: formula(weights, x),
      Partial(formula, weights),
    )
  ]
  np.testing.assert_array_equal(results[0].adversarial, results[1].adversarial)


def _numpy_only(images: Any) -> Any:
  return np.asarray(images).reshape(len(images), -1)[:, :4]


def _raises(images: Any) -> Any:
  raise KeyError("conv1\nsecond line")


def _stateful() -> Any:
  total = []

  def function(images: jax.Array) -> jax.Array:
    total.append(np.random.rand())  # noqa: NPY002
    return formula(_weights(0), images) * total[-1]

  return function


def _logits(images: jax.Array) -> jax.Array:
  return images.reshape(len(images), -1)[:, :4]


REFUSED = {
  "no callable": (None, "NoneType"),
  "a text": ("resnet", "str"),
  "an array": (np.ones((8, 4)), "ndarray"),
  "a class": (_Fixed, "the class _Fixed"),
  "numpy": (_numpy_only, "TracerArrayConversionError"),
  "a value": (lambda x: _logits(x) * float(x.sum()), "Concretization"),
  "an exception": (_raises, "KeyError: 'conv1"),
  "an assertion": (lambda x: 1 / 0, "ZeroDivisionError"),
  "no argument": (lambda: 0, "TypeError"),
  "two arguments": (lambda x, y: x, "TypeError"),
  "a tuple": (lambda x: (_logits(x), x), "returns a tuple"),
  "a list": (lambda x: [_logits(x)], "returns a list"),
  "a dictionary": (lambda x: {"logits": _logits(x)}, "returns a dict"),
  "nothing": (lambda x: None, "returns a NoneType"),
  "a number": (lambda x: 1.0, "returns"),
  "a text returned": (lambda x: "cat", "str"),
  "a vector": (lambda x: x.sum((1, 2, 3)), r"shape \(.,\)"),
  "images": (lambda x: x, r"shape \(., 2, 2, 2\)"),
  "another batch": (lambda x: _logits(x)[:1], r"shape \(1, 4\)"),
  "one class": (lambda x: _logits(x)[:, :1], r"shape \(., 1\)"),
  "no class": (lambda x: _logits(x)[:, :0], r"shape \(., 0\)"),
  "integers": (lambda x: _logits(x).astype(int), "int32"),
  "booleans": (lambda x: _logits(x) > 0, "bool"),
  "complex numbers": (lambda x: _logits(x) + 1j, "complex64"),
  "random numbers": (_stateful(), "numpy.random"),
  "randomized text": (attacks.Randomized("x"), "str"),
  "randomized without key": (attacks.Randomized(lambda x: x), "TypeError"),
  "nnx BatchNorm in training": (None, ""),  # made in the test
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_classifiers_are_refused_in_one_line(case):
  classifier, text = REFUSED[case]
  if case.startswith("nnx"):
    classifier, text = _nnx_in_training(), "TraceContextError"
  for run in (_pgd, _autoattack):
    with pytest.raises(UserError, match=text) as caught:
      run(classifier)
    message = str(caught.value)
    assert message.startswith("classifier: ") and "allowed: " in message
    assert "\n" not in message


def _nnx_in_training() -> Any:
  from flax import nnx

  norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  return lambda images: _logits(norm(images))


def test_a_networks_own_refusal_passes_through():
  def network(images: jax.Array) -> jax.Array:
    raise UserError("images: 2 x 2 pixels; allowed: at least 32")

  with pytest.raises(UserError, match=r"^images: 2 x 2 pixels"):
    _pgd(network)


def test_a_batch_that_only_later_is_wrong_is_refused():
  """The first trace sees two images, and there all is well."""
  with pytest.raises(UserError, match=r"classifier: returns shape \(2, 4\)"):
    _autoattack(lambda x: _logits(x)[:2])


def test_wrong_weights_are_refused_in_one_line():
  model = _Scaled()
  variables = model.init(KEY, X)
  del variables["params"]["dense"]
  with pytest.raises(UserError, match="classifier: Scope") as caught:
    _pgd(models.classifier(model, variables))
  assert "\n" not in str(caught.value)


def test_a_converted_classifier_is_converted_once():
  for kind, make in KINDS.items():
    classifier = base.as_pytree(make(_weights(0))[0])
    again = base.as_pytree(classifier)
    assert jax.tree.structure(again) == jax.tree.structure(classifier), kind


def test_hashable_keeps_what_has_a_hash():
  model = _Scaled()
  assert compilation.hashable(model) is model
  assert (
    compilation.unwrap(compilation.hashable(_Fixed(np.ones(2)))).weights.sum()
    == 2
  )
