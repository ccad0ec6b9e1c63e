"""Checks: what passes, what is refused, and what the message says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from atat_jax import checks
from atat_jax.errors import TrainingDivergedError, UserError, shown


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
    ([0.0, 1.0, 2.0], "target: dtype float64; allowed: integers"),
    ([True, False, True], "target: dtype bool; allowed: integers"),
    ([0, 1], "target: shape (2,); allowed: [3]"),
    ([[0, 1, 2]], "target: shape (1, 3); allowed: [3]"),
  ],
)
def test_bad_labels_are_named(x, message):
  assert _message(checks.labels, np.array(x), 3, 10, "target").startswith(
    message
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


@pytest.mark.parametrize(
  "value",
  ["abc", None, [[1], [1, 2]], np.array([None]), {}, object(), {1, 2}, b"a"],
)
def test_what_cannot_be_an_array_of_numbers_is_refused(value):
  for check in (checks.images, lambda x, name: checks.labels(x, 1, 2, name)):
    message = _message(check, value, "batch")
    assert message.startswith("batch: ") and "an array of numbers" in message


def test_a_deleted_array_is_refused():
  x = jnp.zeros((1, 2, 2, 1))
  x.delete()
  assert _message(checks.images, x).startswith("images: a deleted array")


def test_labels_are_checked_before_they_become_int32():
  for wide in (2**32, -(2**32), 2**33 + 1):
    message = _message(checks.labels, np.array([wide, 1]), 2, 10)
    assert str(wide) in message and message.endswith("allowed: 0 to 9")
  assert "an array of numbers" in _message(checks.labels, [2**70], 1, 10)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_the_message_shows_how_a_value_differs_from_one(dtype):
  above = 1 + jnp.finfo(dtype).eps
  x = jnp.full((1, 2, 2, 1), above, dtype)
  low = _message(checks.images, x).split("[")[1].split(",")[0]
  assert float(low) > 1


@pytest.mark.parametrize("value", [1e39, 1e-60, 10**400, 2.0**-140])
def test_numbers_that_float32_does_not_hold_are_refused(value):
  assert "allowed: a number > 0" in _message(checks.positive, "x", value)
  if value < 1:
    checks.not_negative("x", value)
  else:
    _message(checks.not_negative, "x", value)


@pytest.mark.parametrize("value", [True, False, np.True_, np.array(True)])
def test_a_boolean_is_no_number(value):
  _message(checks.positive, "x", value)
  _message(checks.not_negative, "x", value)
  _message(checks.integer, "x", value)
  _message(checks.count, "x", value)


def test_integers_fit_into_int32():
  checks.integer("n", 2**31 - 1)
  assert "1 to 2147483647" in _message(checks.count, "n", 2**31)
  _message(checks.integer, "n", 10**5000)  # not even shown
  assert _message(checks.integer, "n", -1) == "n: -1; allowed: an integer >= 0"


def test_a_count_is_a_python_integer_that_is_known():
  assert type(checks.count("n", np.int8(3))) is int
  assert "a Python integer" in _message(checks.count, "n", jnp.asarray(3))
  with pytest.raises(UserError, match=r"^n: a traced value; allowed: "):
    jax.jit(lambda n: checks.count("n", n))(3)


def test_numbers_within_limits():
  checks.number("share", 0.5, 0, 1)
  checks.number("share", 1, 0, 1)
  assert _message(checks.number, "share", 1.5, 0, 1) == (
    "share: 1.5; allowed: a number from 0 to 1"
  )
  assert "> 0 and <= 1" in _message(checks.number, "share", 0, 0, 1, above=True)


def test_traced_scalars_pass_and_traced_arrays_do_not():
  def check(x):
    checks.positive("x", x)
    checks.integer("x", x)
    return x

  jax.jit(check)(-3.5)
  with pytest.raises(UserError, match=r"^x: "):
    jax.jit(check)(jnp.ones(2))


@pytest.mark.parametrize(
  "value",
  [0, "key", None, [0, 1], jnp.zeros(2), np.zeros((2, 2), np.uint32)],
)
def test_other_values_than_a_key_are_refused(value):
  assert "jax.random.key(0)" in _message(checks.key, value)


def test_keys_old_and_new_pass_and_an_array_of_them_does_not():
  for new in (jax.random.key(0), jax.random.PRNGKey(0)):
    assert checks.key(new) is new
    jax.jit(checks.key)(new)
    jax.vmap(checks.key)(jax.random.split(new))
  assert "shape (2,)" in _message(
    checks.key, jax.random.split(jax.random.key(0))
  )


@pytest.mark.parametrize("value", ["no", "", 1, 0, None, np.zeros(2, bool)])
def test_only_true_and_false_are_booleans(value):
  assert _message(checks.boolean, "x", value).endswith("True or False")


def test_booleans_pass():
  for value in (True, False, np.True_):
    checks.boolean("x", value)
  jax.jit(lambda x: checks.boolean("x", x))(True)
  with pytest.raises(UserError, match=r"^x: a traced int32"):
    jax.jit(lambda x: checks.boolean("x", x))(1)


@pytest.mark.parametrize("value", ["ab", b"ab", (), [], 5, None, {"a": 1}, {1}])
def test_other_values_than_a_sequence_are_refused(value):
  assert "a sequence of" in _message(checks.sequence, "x", value)
  assert "a sequence of" in _message(checks.names, "x", value)


def test_sequences_become_tuples():
  assert checks.sequence("x", [1, 2]) == (1, 2)
  assert checks.sequence("x", range(2)) == (0, 1)
  assert checks.sequence("x", np.arange(2.0)) == (0.0, 1.0)
  assert checks.sequence("x", [], empty=True) == ()
  assert checks.names("x", {"a": 1}.keys()) == ("a",)
  assert "such as ('ab',)" in _message(checks.names, "x", "ab")
  assert _message(checks.names, "x", [1]).startswith("x: 1; ")


def test_numbers_that_are_not_finite_are_counted_and_placed():
  tree = {"a": np.zeros(3), "b": {"c": jnp.array([1, jnp.nan]), "d": np.inf}}
  assert _message(checks.finite, "weights", tree) == (
    "weights: 2 numbers not finite, the first in b/c; allowed: finite numbers"
  )
  assert _message(checks.finite, "x", np.nan).startswith("x: 1 number not")
  checks.finite("x", {"a": jnp.zeros(2), "b": np.arange(3), "c": 1.0})
  jax.jit(lambda x: checks.finite("x", {"x": x}))(jnp.nan)  # not known
  assert "an array of numbers" in _message(checks.finite, "x", {"a": "abc"})


def test_numbers_on_an_accelerator_are_counted_there(monkeypatch):
  monkeypatch.setattr(checks, "_on_host", lambda x: False)
  tree = {"a": jnp.array([jnp.inf, jnp.nan, 0]), "b": jnp.array(jnp.nan)}
  assert "3 numbers not finite, the first in a" in _message(
    checks.finite, "x", tree
  )
  checks.finite("x", {"a": jnp.zeros(2)})


class Dense(nn.Module):
  """A dense layer on all pixels, of a size that depends on the images."""

  width: int = 2

  @nn.compact
  def __call__(self, images):
    return nn.Dense(self.width)(images.reshape(len(images), -1))


def test_variables_of_another_network_are_refused_by_their_first_leaf():
  model, images = Dense(), jnp.zeros((1, 2, 2, 1))
  made = model.init(jax.random.key(0), images)
  for given in (made, jax.tree.map(lambda x: x.astype(jnp.bfloat16), made)):
    checks.variables(model, given, images.shape)
    checks.variables(model, {**given, "extra": {"a": 1}}, (5, 2, 2, 1))
  kernel = made["params"]["Dense_0"]["kernel"]
  bias = {"bias": jnp.zeros(2)}
  cases = [
    (None, "collections"),
    ([made], "collections"),
    ({}, "no params/Dense_0/bias"),
    ({"params": {"Dense_0": bias}}, "no params/Dense_0/kernel"),
    ({"params": {"Dense_0": {**bias, "kernel": kernel.T}}}, "shape (2, 4)"),
    ({"params": {"Dense_0": {**bias, "kernel": "abc"}}}, "'abc'"),
    ({"params": {**made["params"], "Dense_1": bias}}, "does not have"),
    (jax.tree.map(lambda x: x.astype(int), made), "dtype int"),
  ]
  for given, words in cases:
    message = _message(checks.variables, model, given, images.shape)
    assert message.startswith("variables: ") and words in message
  assert "shape (4, 2)" in _message(checks.variables, model, made, (3, 3, 1))
  assert _message(checks.variables, "x", made, (2, 2, 1)).startswith("model: ")


def test_a_message_is_one_short_line_whatever_it_shows():
  message = str(UserError("name: " + "a\nb\x1b[31m\u2028" * 10**6))
  assert message.isprintable() and len(message) < 10_000
  for value in ("x\ny" * 10**6, [0] * 10**6, 10**5000, np.zeros((999, 999))):
    assert shown(value).isprintable() and len(shown(value)) < 500
  assert shown(np.zeros((2, 3))) == "ndarray of shape (2, 3) and dtype float64"
