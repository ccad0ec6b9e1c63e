"""Classifiers with their convolutions replaced, against what they were."""

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from quick import jit

from atat_jax import attacks, compilation
from atat_jax.attacks import base, convolutions
from atat_jax.attacks.classifiers import as_pytree
from atat_jax.models import convolution

KEY = jax.random.key(0)
Convolution = Callable[[jax.Array], jax.Array]


def _array(*shape: int) -> np.ndarray:
  return np.random.default_rng(sum(shape)).normal(size=shape)


def _convolution(
  layout: str = "NHWC/HWIO/NHWC",
  sides: tuple[int, int] = (3, 3),
  channels: tuple[int, int] = (2, 3),
  strides: tuple[int, int] = (1, 1),
  padding: Any = "SAME",
  dtype: Any = np.float64,
  **others: Any,
) -> Convolution:
  """A function of images [2, 7, 8, C], whose result is NHWC again."""
  numbers = tuple(layout.split("/"))
  shape = dict(zip("HWIO", (*sides, *channels), strict=True))
  shape["I"] //= others.get("feature_group_count", 1)
  kernel = _array(*(shape[axis] for axis in numbers[1])).astype(dtype)

  def function(x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(
      x.astype(dtype).transpose(["NHWC".index(axis) for axis in numbers[0]]),
      kernel,
      strides,
      padding,
      dimension_numbers=numbers,
      **others,
    )
    return y.transpose([numbers[2].index(axis) for axis in "NHWC"])

  return function


def _plain_convolutions(function: Convolution, x: jax.Array) -> int:
  """Number of convolutions without a derivative of their own."""

  def count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
      if eqn.primitive.name.startswith(("custom_vjp", "custom_jvp")):
        continue
      total += eqn.primitive.name == "conv_general_dilated"
      total += sum(map(count, core.jaxprs_in_params(eqn.params)))
    return total

  return count(jax.make_jaxpr(lambda x: function(x))(x).jaxpr)


def _assert_replaced(function: Convolution, x: Any) -> None:
  """Checks that all convolutions were replaced and nothing else happened."""
  fast = convolutions.fast(function)
  assert _plain_convolutions(function, x) > 0
  assert _plain_convolutions(fast, x) == 0

  def both(x: jax.Array) -> list[Any]:
    found = []
    for f in (fast, function):
      y, pullback = jax.vjp(f, x)
      found.append((y, *pullback(jnp.sin(y))))
    return found

  actual, expected = jit(both)(x)
  for a, b in zip(actual, expected, strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


FORMS: dict[str, dict[str, Any]] = {
  "NCHW": {"layout": "NCHW/OIHW/NCHW"},
  "NCHW, strided": {"layout": "NCHW/OIHW/NCHW", "strides": (2, 2)},
  "three layouts": {"layout": "CHWN/WIHO/HCNW", "channels": (5, 3)},
  "VALID": {"padding": "VALID", "strides": (3, 2)},
  "uneven padding": {"padding": ((0, 2), (1, 0)), "channels": (5, 3)},
  "a row": {"sides": (1, 7), "channels": (5, 3)},
  "a thin column": {"sides": (5, 2)},
  "a strided rectangle": {"sides": (2, 3), "strides": (1, 2)},
  "many channels": {"channels": (64, 64)},
  "patches": {"sides": (2, 3), "strides": (2, 3), "padding": "VALID"},
  "patches with gaps": {"sides": (2, 1), "strides": (3, 3)},
}


@pytest.mark.parametrize("name", FORMS)
def test_any_layout_stride_and_padding_keeps_its_values(name, x64):
  channels = FORMS[name].get("channels", (2, 3))[0]
  x = _array(2, 8 if channels == 64 else 7, 8, channels)
  _assert_replaced(_convolution(**FORMS[name]), x)


def _scanned(function: Convolution, x: jax.Array) -> jax.Array:
  return lax.scan(lambda y, _: (function(y), None), x, None, length=2)[0]


def _switched(function: Convolution, x: jax.Array) -> jax.Array:
  return lax.cond(x.sum() > 0, function, lambda x: -function(x), x)


def _searched(function: Convolution, x: jax.Array) -> jax.Array:
  """A while loop, which has no derivative, and something that has one."""
  size = lax.stop_gradient(x)
  size = lax.while_loop(
    lambda y: (function(y) ** 2).sum() < 10, lambda y: y + function(y), size
  )
  return function(x) * size


def _gradient(function: Convolution, x: jax.Array) -> jax.Array:
  """A gradient, as classifiers compute it that explain themselves."""
  return jax.grad(lambda x: jnp.sin(function(x)).sum())(x)


STRUCTURES: dict[str, Callable[[Convolution, jax.Array], jax.Array]] = {
  "jit": lambda f, x: jax.jit(f)(x),
  "remat": lambda f, x: jax.checkpoint(f)(x),
  "vmap": lambda f, x: jax.vmap(lambda row: f(row[None])[0])(x),
  "scan": _scanned,
  "cond": _switched,
  "while": _searched,
  "gradient": _gradient,
  "jit in scan in remat": lambda f, x: jax.checkpoint(
    lambda x: _scanned(jax.jit(f), x)
  )(x),
}


@pytest.mark.parametrize(
  ("structure", "channels"),
  [*((name, 2) for name in STRUCTURES), ("scan", 64), ("remat", 64)],
)
def test_convolutions_inside_other_programs_are_replaced(
  structure, channels, x64
):
  """64 channels have a form with constants of its own."""
  function = _convolution(channels=(channels, channels))
  x = _array(2, 4, 4, channels) / 10
  _assert_replaced(functools.partial(STRUCTURES[structure], function), x)


def test_second_derivatives_keep_their_values(x64):
  """A thin, a strided and a plain convolution, one after the other."""
  layers = [
    _convolution(channels=(2, 5)),
    _convolution(channels=(5, 6), strides=(2, 2)),
    _convolution(channels=(6, 5), layout="NCHW/OIHW/NCHW"),
  ]

  def function(x: jax.Array) -> jax.Array:
    for layer in layers:
      x = jnp.tanh(layer(x))
    return x

  def curvature(f: Convolution) -> Convolution:
    return jax.grad(lambda x: (_gradient(f, x) ** 2).sum())

  x = _array(2, 5, 4, 2)
  found, expected = jit(
    lambda x: [curvature(f)(x) for f in (convolutions.fast(function), function)]
  )(x)
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


LEFT: dict[str, dict[str, Any]] = {
  "groups": {"feature_group_count": 2, "channels": (2, 4)},
  "dilated kernel": {"rhs_dilation": (2, 2)},
  "dilated image": {"lhs_dilation": (1, 2), "padding": ((1, 1), (1, 1))},
  "wide padding": {"padding": ((3, 3), (1, 1))},
  "negative padding": {"padding": ((-1, 1), (1, 1))},
  "no pixel left": {"padding": "VALID", "sides": (8, 3)},
  "large kernel": {"sides": (7, 20)},
  "16 bits": {"dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("name", LEFT)
def test_what_has_no_faster_form_is_left_alone(name):
  function = _convolution(**({"dtype": np.float32} | LEFT[name]))
  x = _array(2, 7, 8, 2).astype(np.float32)
  fast = convolutions.fast(function)
  assert _plain_convolutions(fast, x) == 1
  np.testing.assert_array_equal(jit(fast)(x), jit(function)(x))


def _in_other_dimensions(number: int) -> Convolution:
  places = "HWD"[:number]
  numbers = f"N{places}C", f"{places}IO", f"N{places}C"
  kernel = jnp.ones((3,) * number + (2, 2))
  return lambda x: lax.conv_general_dilated(
    x.reshape(2, *(7,) * number, 2),
    kernel,
    (1,) * number,
    "SAME",
    dimension_numbers=numbers,
  )


def _weak(x: jax.Array) -> jax.Array:
  """A convolution of Python's numbers, whose dtype gives way to others."""
  image, kernel = jnp.full((1, 7, 8, 2), 0.5), jnp.full((3, 3, 2, 2), 0.1)
  numbers = "NHWC", "HWIO", "NHWC"
  y = lax.conv_general_dilated(
    image, kernel, (1, 1), "SAME", dimension_numbers=numbers
  )
  assert y.weak_type
  return x * y


def _wide(x: jax.Array) -> jax.Array:
  """A convolution of float64 where that is off elsewhere."""
  with jax.enable_x64(True):
    return _convolution(channels=(2, 2))(x)


@pytest.mark.parametrize(
  ("function", "shape"),
  [
    (_in_other_dimensions(1), (2, 7, 2)),
    (_in_other_dimensions(3), (2, 7, 7, 7, 2)),
    (_weak, (2, 7, 8, 2)),
    (_wide, (2, 7, 8, 2)),
  ],
  ids=["1-D", "3-D", "weak", "float64"],
)
def test_convolutions_of_another_kind_are_left_alone(function, shape):
  x = _array(*shape).astype(np.float32)
  fast = convolutions.fast(function)
  assert _plain_convolutions(function, x) == 1
  assert _plain_convolutions(fast, x) == 1
  actual, expected = (jax.eval_shape(f, x) for f in (fast, function))
  assert actual == expected


def test_convolutions_of_split_images_are_left_alone():
  mesh = jax.make_mesh((1,), ("data",), (AxisType.Explicit,))
  function = _convolution(dtype=np.float32)
  with jax.set_mesh(mesh):
    x = jax.device_put(_array(2, 7, 8, 2).astype(np.float32), P("data"))
    assert _plain_convolutions(convolutions.fast(function), x) == 1


def test_convolutions_as_written_are_left_alone():
  """Attacks keep them, networks of this package too; so does `jax.jvp`."""
  function = _convolution(dtype=np.float32)
  x = _array(2, 7, 8, 2).astype(np.float32)
  kept = convolution.as_written(function)
  for kind in (kept, jax.vmap(lambda row: kept(row[None])[0])):
    assert _plain_convolutions(convolutions.fast(kind), x) == 1
  fast = convolutions.fast(kept)
  derivative = jax.eval_shape(lambda x: jax.jvp(fast, (x,), (x,))[1], x)
  assert derivative.shape == function(x).shape
  kernel = jnp.ones((3, 3, 2, 2))
  for form, left in (("xla", 1), ("auto", 0)):
    own = functools.partial(
      convolution.convolve, kernel=kernel, convolution=form
    )
    assert _plain_convolutions(convolutions.fast(own), x) == left


def test_a_function_is_traced_once_and_keeps_its_effects():
  inner, calls = _convolution(dtype=np.float32), []

  def function(x: jax.Array) -> jax.Array:
    calls.append(x)
    jax.debug.callback(lambda x: None, x.sum())
    return inner(x)

  fast = convolutions.fast(function)
  x = _array(2, 7, 8, 2).astype(np.float32)
  jaxpr = jax.make_jaxpr(jax.grad(lambda x: fast(x).sum()))(x)
  names = [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
  assert len(calls) == 1 and names.count("debug_callback") == 1


def test_other_backends_keep_their_convolutions(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  function = _convolution(dtype=np.float32)
  assert convolutions.fast(function) is function


@pytest.mark.parametrize("kind", ["vjp", "jvp"])
def test_derivatives_of_the_author_are_kept(kind):
  inner = _convolution(dtype=np.float32)
  if kind == "vjp":
    function: Any = jax.custom_vjp(inner)
    function.defvjp(
      lambda x: (inner(x), None), lambda _, g: (jnp.full((2, 7, 8, 2), 5.0),)
    )
  else:
    function = jax.custom_jvp(inner)
    function.defjvp(lambda x, t: (inner(*x), 5 * t[0].sum() * inner(*x)))
  x = _array(2, 7, 8, 2).astype(np.float32)
  found, expected = (
    jax.grad(lambda x, f=f: f(x).sum())(x)
    for f in (convolutions.fast(function), function)
  )
  np.testing.assert_array_equal(found, expected)
  assert np.ptp(found) == 0  # the planted derivative


def _closing(kind: str, weights: jax.Array, x: jax.Array) -> jax.Array:
  """A network whose own derivative uses a value that it has computed."""
  scale = jnp.sin(weights.sum())
  if kind == "vjp":
    double: Any = jax.custom_vjp(lambda x: 2 * x)
    double.defvjp(lambda x: (2 * x, None), lambda _, g: (g * scale,))
  else:
    double = jax.custom_jvp(lambda x: 2 * x)
    double.defjvp(lambda x, t: (2 * x[0], t[0] * scale))
  y = lax.conv_general_dilated(
    double(x),
    weights,
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return jax.checkpoint(jax.nn.relu)(y).sum((1, 2))


@pytest.mark.parametrize("kind", ["vjp", "jvp"])
@pytest.mark.usefixtures("quick_compilation")
def test_derivatives_that_use_what_the_network_computes_are_kept(kind):
  weights = jnp.asarray(abs(_array(3, 3, 2, 3)), jnp.float32)
  x = jnp.asarray(abs(_array(2, 3, 4, 2)), jnp.float32)
  closing = functools.partial(_closing, kind)
  doubled = jit(jax.grad(lambda x: closing(weights, x).sum()))(x)
  classifiers = (
    jax.tree_util.Partial(closing, weights),
    lambda x: closing(weights, x),
  )
  for classifier in classifiers:
    found = compilation.jit(_image_gradient)(as_pytree(classifier), x)
    np.testing.assert_allclose(found, doubled, rtol=1e-6)


def _image_gradient(classifier: Any, x: jax.Array) -> jax.Array:
  return base.evaluate(classifier, KEY, x, lambda z: z.sum(-1)).gradient


def test_convolutions_of_nnx_are_replaced():
  layer = nnx.Conv(2, 3, (3, 3), padding="SAME", rngs=nnx.Rngs(0))
  x = _array(2, 7, 8, 2).astype(np.float32)
  assert _plain_convolutions(layer, x) == 1
  assert _plain_convolutions(convolutions.fast(layer), x) == 0


class _Net(nn.Module):
  """Plain convolutions of flax, as a user has them."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = nn.relu(nn.Conv(6, (3, 3))(images))
    x = nn.relu(nn.Conv(8, (3, 3), 2, padding=1)(x))
    return nn.Dense(4)(x.mean((1, 2)))


@pytest.mark.usefixtures("quick_compilation")
def test_attacks_alone_replace_a_networks_convolutions(compilations):
  """Its gradient, new weights, and what stays alive."""
  model, images = _Net(), jax.random.uniform(KEY, (3, 8, 8, 3))
  make = jit(model.init)
  held = {"variables": make(KEY, images)}

  def classifier(images: jax.Array) -> jax.Array:
    return model.apply(held["variables"], images)

  for evaluate, left in ((base.score, 2), (base.apply, 0)):
    function = functools.partial(evaluate, classifier, KEY)
    assert _plain_convolutions(function, images) == left
  found = jit(lambda x: base.evaluate(classifier, KEY, x, lambda z: z[:, 0]))(
    images
  )
  logits, gradient = jit(
    lambda x: (
      classifier(x),
      jax.grad(lambda x: classifier(x)[:, 0].sum())(x),
    )
  )(images)
  np.testing.assert_allclose(found.logits, logits, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    found.gradient, gradient, rtol=1e-5, atol=1e-6 * abs(gradient).max()
  )

  def run() -> jax.Array:
    numbers = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 2}
    return attacks.pgd(KEY, classifier, images, jnp.arange(3), **numbers)

  first = run()
  held["variables"] = make(jax.random.key(1), images)
  before = compilations()
  assert not np.array_equal(run(), first)
  assert compilations() == before
  alive = weakref.ref(held["variables"]["params"]["Conv_0"]["kernel"])
  held.clear()
  gc.collect()
  assert alive() is None
