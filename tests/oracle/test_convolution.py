"""The canonical convolution against XLA's own and PyTorch's, twice derived."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from atat_jax.models import convolution, winograd

# An even and an odd side in one image; channels that cannot be confused.
HEIGHT, WIDTH, FEATURES, BATCH = 7, 8, 3, 2
# Few channels at stride 1 have a form of their own. Where paddings agree, at
# stride 1 (see `test_stride_1_pads_symmetrically`), one is enough.
CASES = [
  *itertools.product((1, 3, 5), (1,), ("same",), (2, 6)),
  *itertools.product((1, 3, 5), (2, 3), ("same", "symmetric"), (2,)),
]


def _inputs(size: int, stride: int, channels: int) -> tuple[np.ndarray, ...]:
  generator = np.random.default_rng(0)
  shapes = (
    (BATCH, HEIGHT, WIDTH, channels),
    (size, size, channels, FEATURES),
    (BATCH, -(-HEIGHT // stride), -(-WIDTH // stride), FEATURES),
  )
  return tuple(generator.normal(size=shape) for shape in shapes)


@functools.cache
def _derivatives(
  form: str, size: int, stride: int, padding: str, channels: int
) -> dict[str, np.ndarray]:
  """Computes value, gradients, and gradients of a function of the gradients."""

  def value(x, kernel):
    return convolution.convolve(
      x, kernel, stride=stride, padding=padding, convolution=form
    )

  def first(x, kernel, g):
    return jax.grad(lambda x, k: (g * value(x, k)).sum(), (0, 1))(x, kernel)

  def second(x, kernel, g):
    # Cubes: the second derivatives depend on everything.
    return sum((gradient**3).sum() for gradient in first(x, kernel, g))

  def everything(x, kernel, g):
    return (
      value(x, kernel),
      *first(x, kernel, g),
      *jax.grad(second, (0, 1, 2))(x, kernel, g),
    )

  names = ("value", "x", "kernel", "second_x", "second_kernel", "second_g")
  with jax.enable_x64(True):
    results = jit(everything)(*_inputs(size, stride, channels))
    assert all(result.dtype == np.float64 for result in results)
    return dict(zip(names, map(np.asarray, results), strict=True))


@pytest.mark.parametrize(("size", "stride", "padding", "channels"), CASES)
def test_canonical_form_equals_xla(size, stride, padding, channels):
  case = size, stride, padding, channels
  canonical = _derivatives("canonical", *case)
  for name, expected in _derivatives("xla", *case).items():
    np.testing.assert_allclose(
      canonical[name], expected, rtol=1e-10, atol=1e-10, err_msg=name
    )


@pytest.mark.parametrize(("size", "stride", "padding", "channels"), CASES)
def test_canonical_form_equals_pytorch(size, stride, padding, channels, twin):
  torch = twin.torch
  x, kernel, g = (
    torch.tensor(array, requires_grad=True)
    for array in _inputs(size, stride, channels)
  )
  value = twin.convolve(x.permute(0, 3, 1, 2), kernel, stride, padding)
  value = value.permute(0, 2, 3, 1)
  first = torch.autograd.grad((g * value).sum(), (x, kernel), create_graph=True)
  second = torch.autograd.grad(
    sum((gradient**3).sum() for gradient in first), (x, kernel, g)
  )
  canonical = _derivatives("canonical", size, stride, padding, channels)
  for (name, actual), expected in zip(
    canonical.items(), (value, *first, *second), strict=True
  ):
    np.testing.assert_allclose(
      actual, expected.detach(), rtol=1e-10, atol=1e-10, err_msg=name
    )


def test_winograd_and_its_gradients_equal_xla(x64):
  generator = np.random.default_rng(0)
  x, kernel, g = (
    generator.normal(size=shape)
    for shape in [(2, 4, 6, 64), (3, 3, 64, 66), (2, 4, 6, 66)]
  )
  assert winograd.fits(x, kernel, 1, ((1, 1), (1, 1)))

  @functools.partial(jit, static_argnums=0)
  def everything(form, x, kernel, g):
    def value(x, kernel):
      return convolution.convolve(x, kernel, convolution=form)

    def first(x, kernel):
      return jax.grad(lambda x, k: (g * value(x, k)).sum(), (0, 1))(x, kernel)

    def second(x, kernel):
      return sum((gradient**3).sum() for gradient in first(x, kernel))

    return (
      value(x, kernel),
      first(x, kernel),
      jax.grad(second, (0, 1))(x, kernel),
    )

  expected = everything("xla", x, kernel, g)
  actual = everything("canonical", x, kernel, g)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-9, atol=1e-10 * abs(b).max()
    ),
    actual,
    expected,
  )


def test_winograd_is_about_as_exact_as_the_direct_sum():
  """Both in float32, against float64."""
  generator = np.random.default_rng(0)
  x = generator.normal(size=(2, 8, 8, 128))
  kernel = generator.normal(size=(3, 3, 128, 64))
  convolve = jit(convolution.convolve, static_argnames="convolution")
  with jax.enable_x64(True):
    exact = np.asarray(convolve(x, kernel, convolution="xla"))
  x, kernel = x.astype(np.float32), kernel.astype(np.float32)
  errors = {
    form: abs(convolve(x, kernel, convolution=form) - exact).mean()
    for form in ("canonical", "xla")
  }
  assert 0 < errors["canonical"] < 3 * errors["xla"], errors


@pytest.mark.parametrize(
  ("shape", "kernel", "stride", "padding", "dtype"),
  [
    ((2, 4, 5, 64), (3, 3, 64, 64), 1, ((1, 1), (1, 1)), np.float32),
    ((2, 4, 6, 64), (3, 3, 64, 63), 1, ((1, 1), (1, 1)), np.float32),
    ((2, 4, 6, 64), (3, 3, 64, 64), 2, ((1, 1), (1, 1)), np.float32),
    ((2, 4, 6, 64), (3, 3, 64, 64), 1, ((0, 1), (1, 1)), np.float32),
    ((2, 4, 6, 64), (1, 1, 64, 64), 1, ((0, 0), (0, 0)), np.float32),
    ((2, 4, 6, 64), (3, 3, 64, 64), 1, ((1, 1), (1, 1)), jnp.bfloat16),
  ],
)
def test_winograd_is_not_used_where_it_does_not_apply(
  shape, kernel, stride, padding, dtype
):
  x, weights = np.zeros(shape, dtype), np.zeros(kernel, dtype)
  assert not winograd.fits(x, weights, stride, padding)


@pytest.mark.parametrize(
  ("padding", "size", "kernel", "stride", "expected"),
  [
    ("same", (8, 7), 3, 1, ((1, 1), (1, 1))),
    ("same", (8, 7), 3, 2, ((0, 1), (1, 1))),
    ("same", (8, 7), 5, 2, ((1, 2), (2, 2))),
    ("same", (8, 7), 1, 2, ((0, 0), (0, 0))),
    ("same", (8, 9), 1, 3, ((0, 0), (0, 0))),
    ("symmetric", (8, 7), 3, 2, ((1, 1), (1, 1))),
    ("symmetric", (8, 7), 5, 1, ((2, 2), (2, 2))),
    ("symmetric", (8, 7), 1, 2, ((0, 0), (0, 0))),
  ],
)
def test_padding_equals_hand_computed_values(
  padding, size, kernel, stride, expected
):
  actual = convolution.explicit_padding(padding, size, kernel, stride)
  assert actual == expected


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_stride_1_pads_symmetrically(kernel):
  same, symmetric = (
    convolution.explicit_padding(padding, (HEIGHT, WIDTH), kernel, 1)
    for padding in ("same", "symmetric")
  )
  assert same == symmetric


def test_gradient_inside_a_loop():
  x, kernel, _ = (np.asarray(v, np.float32) for v in _inputs(3, 1, 2))
  kernel = kernel[..., :2] / 10

  def descend(form):
    def step(_, x):
      return x - 0.1 * jax.grad(
        lambda x: (
          convolution.convolve(x, kernel, stride=2, convolution=form) ** 2
        ).sum()
      )(x)

    return jit(lambda x: jax.lax.fori_loop(0, 3, step, x))(x)

  np.testing.assert_allclose(descend("canonical"), descend("xla"), atol=1e-5)


def test_forward_mode_exists_in_the_xla_form_only():
  x, kernel, _ = _inputs(3, 1, 2)

  def tangent(form):
    function = functools.partial(
      convolution.convolve, kernel=jnp.asarray(kernel), convolution=form
    )
    return jax.jvp(function, (jnp.asarray(x),), (jnp.asarray(x),))

  value, derivative = tangent("xla")
  np.testing.assert_allclose(derivative, value)  # linear
  with pytest.raises(TypeError, match="forward-mode"):
    tangent("canonical")


def _is_canonical(form: str) -> bool:
  jaxpr = jax.make_jaxpr(
    lambda x, k: convolution.convolve(x, k, convolution=form)
  )(np.zeros((1, 4, 4, 1), np.float32), np.zeros((3, 3, 1, 1), np.float32))
  return "custom_vjp" in str(jaxpr)


def test_auto_chooses_by_backend(monkeypatch):
  assert _is_canonical("canonical") and not _is_canonical("xla")
  for backend, canonical in (("cpu", True), ("gpu", False), ("tpu", False)):
    monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
    assert _is_canonical("auto") == canonical


def test_layer_has_one_kernel_and_computes_in_its_dtype():
  layer = convolution.Conv(features=5, stride=2, dtype=jnp.bfloat16)
  x = jnp.ones((2, 7, 8, 3))
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  kernel = variables["params"]["kernel"]
  assert list(variables["params"]) == ["kernel"]
  assert kernel.shape == (3, 3, 3, 5) and kernel.dtype == np.float32
  output = jax.eval_shape(layer.apply, variables, x)
  assert output.shape == (2, 4, 4, 5) and output.dtype == jnp.bfloat16
