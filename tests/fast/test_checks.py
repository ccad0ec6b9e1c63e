"""Checks: what passes, what is refused, and what the message says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atat_jax import checks
from atat_jax.errors import TrainingDivergedError, UserError


def _message(check, *args, **kwargs) -> str:
  with pytest.raises(UserError) as error:
    check(*args, **kwargs)
  message = str(error.value)
  assert "\n" not in message and "allowed: " in message
  return message


def test_user_errors_are_value_errors():
  assert issubclass(UserError, ValueError)
  assert issubclass(TrainingDivergedError, UserError)


@pytest.mark.parametrize(
  "dtype", [np.float32, np.float64, np.float16, jnp.bfloat16]
)
def test_images_of_every_float_dtype_pass(dtype):
  x = np.linspace(0, 1, 24).reshape(2, 3, 4, 1).astype(dtype)
  checked = checks.images(x)
  np.testing.assert_array_equal(checked, jnp.asarray(x))
  assert jnp.issubdtype(checked.dtype, jnp.floating)


@pytest.mark.parametrize(
  ("x", "message"),
  [
    (np.zeros((3, 4, 1)), "photo: shape (3, 4, 1); "),
    (np.zeros((0, 3, 4, 1)), "photo: shape (0, 3, 4, 1); "),
    (np.zeros((1, 2, 2, 1), np.uint8), "photo: dtype uint8; "),
    (np.zeros((1, 2, 2, 1), bool), "photo: dtype bool; "),
    (np.full((1, 2, 2, 1), 1.001), "photo: values in [1.001, 1.001]; "),
    (np.full((1, 2, 2, 1), -1e-3), "photo: values in [-0.001, -0.001]; "),
    (np.full((1, 2, 2, 1), np.nan), "photo: values in [nan, nan]; "),
    (np.full((1, 2, 2, 1), np.inf), "photo: values in [inf, inf]; "),
  ],
)
def test_bad_images_are_named(x, message):
  assert _message(checks.images, x, "photo").startswith(message)


def test_uint8_message_says_what_to_do():
  message = _message(checks.images, np.zeros((1, 2, 2, 1), np.uint8))
  assert "divide by 255" in message


def test_one_nan_among_many_is_found():
  x = np.full((1, 8, 8, 1), 0.5)
  x[0, 3, 3, 0] = np.nan
  assert "nan" in _message(checks.images, x)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int8])
def test_labels_pass_as_int32(dtype):
  checked = checks.labels(np.array([0, 9, 3], dtype), 3, 10)
  assert checked.dtype == np.int32 and checked.tolist() == [0, 9, 3]
  assert checks.labels([1, 2], 2, 3).tolist() == [1, 2]


@pytest.mark.parametrize(
  ("x", "message"),
  [
    ([0, 1, 10], "target: values in [0, 10]; allowed: 0 to 9"),
    ([0, -1, 5], "target: values in [-1, 5]; allowed: 0 to 9"),
    ([0.0, 1.0, 2.0], "target: dtype float32; allowed: integers"),
    ([True, False, True], "target: dtype bool; allowed: integers"),
    ([0, 1], "target: shape (2,); allowed: [3]"),
    ([[0, 1, 2]], "target: shape (1, 3); allowed: [3]"),
  ],
)
def test_bad_labels_are_named(x, message):
  assert _message(checks.labels, np.array(x), 3, 10, "target").startswith(
    message.replace("float32", str(jnp.asarray(np.array(x)).dtype))
  )


def test_traced_values_pass_and_shapes_do_not():
  def shapes(x, y):
    checks.positive("epsilon", x.sum())
    return checks.images(x), checks.labels(y, 2, 10)

  x, y = jnp.full((2, 3, 3, 1), 7.0), jnp.array([-1, 99])
  jax.jit(shapes)(x, y)  # values cannot be looked at
  jax.vmap(shapes)(x[None], y[None])
  with pytest.raises(UserError, match="images: shape"):
    jax.jit(shapes)(x[0], y)
  with pytest.raises(UserError, match="labels: dtype"):
    jax.jit(shapes)(x, y.astype(jnp.float32))


def test_concrete_values_are_looked_at_inside_jit():
  """An array that the traced function closes over is still a known one."""
  good, bad = jnp.full((2, 3, 3, 1), 0.5), jnp.full((2, 3, 3, 1), 7.0)
  labels = jnp.array([0, 1])

  def closed_over(images):
    def function(scale):
      checks.labels(labels, 2, 10)
      return checks.images(images) * scale

    return jax.jit(function)(2.0)

  assert (closed_over(good) == 1).all()
  with pytest.raises(UserError, match="images: values in"):
    closed_over(bad)


@pytest.mark.parametrize("value", [1, 0.5, 8 / 255, np.float32(1), 1e-30])
def test_positive_numbers_pass(value):
  checks.positive("epsilon", value)
  checks.positive("epsilon", jnp.asarray(value))


@pytest.mark.parametrize(
  "value",
  [0, 0.0, -1, float("nan"), float("inf"), None, "0.1", [0.1], (0.1, 0.2), {}],
)
def test_other_values_than_positive_numbers_are_refused(value):
  message = _message(checks.positive, "epsilon", value)
  assert message == f"epsilon: {value!r}; allowed: a number > 0"


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(3)])
def test_positive_integers_pass(value):
  checks.positive("num_steps", value, integer=True)


@pytest.mark.parametrize("value", [0, -3, 1.0, 2.5, True, "3", None])
def test_other_values_than_positive_integers_are_refused(value):
  message = _message(checks.positive, "num_steps", value, integer=True)
  assert message == f"num_steps: {value!r}; allowed: an integer > 0"


def test_epsilon_of_linf_is_at_most_the_range_of_a_pixel():
  checks.epsilon(1.0, "linf")
  checks.epsilon(8, "l2")
  checks.epsilon(jnp.asarray(8 / 255), "linf")
  jax.jit(lambda value: checks.epsilon(value, "linf"))(8.0)  # not known
  message = _message(checks.epsilon, 8, "linf")
  assert message.startswith("epsilon: 8; allowed: at most 1 for linf")
  assert _message(checks.epsilon, 0, "l2", "radius").startswith("radius: 0; ")


def test_a_choice_outside_the_list_is_refused_with_the_list():
  checks.choice("norm", "l2", {"linf": 1, "l2": 2})
  message = _message(checks.choice, "norm", "l1", ("linf", "l2"))
  assert message == "norm: 'l1'; allowed: l2, linf"
  assert _message(checks.choice, "norm", None, ("l2",)) == (
    "norm: None; allowed: l2"
  )
