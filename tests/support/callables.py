"""Every kind of callable that a user may pass as a classifier.

`KINDS` maps a name to a function of weights [D, K]. It returns the callable and
`change`, which gives the callable other weights, in place where that is the
point of the kind, and returns the one to attack next. All compute `formula`.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.tree_util import Partial

from atat_jax import attacks

Made = tuple[Callable[..., Any], Callable[[Any], Callable[..., Any]]]


def formula(weights: Any, images: jax.Array) -> jax.Array:
  """Maps images to logits by the first rows of the weights.

  More rows make the weights heavier and change nothing.
  """
  flat = images.reshape(len(images), -1)
  return jnp.tanh(flat @ weights[: flat.shape[-1]])


class Holder:
  """An object with weights, and methods that use them."""

  def __init__(self, weights: Any):
    self.weights = weights
    self.inner = {"layers": [weights]}

  def __call__(self, images: jax.Array) -> jax.Array:
    return formula(self.weights, images)

  def method(self, images: jax.Array) -> jax.Array:
    return formula(self.weights, images)

  def nested(self, images: jax.Array) -> jax.Array:
    return formula(self.inner["layers"][0], images)

  def scaled(self, factor: jax.Array, images: jax.Array) -> jax.Array:
    return factor * formula(self.weights, images)


def _attribute(weights: Any) -> Made:
  net = Holder(weights)

  def change(other: Any) -> Any:
    net.weights = other
    return net

  return net, change


def _bound_method(weights: Any) -> Made:
  net = Holder(weights)

  def change(other: Any) -> Any:
    net.weights = other
    return net.method

  return net.method, change


def _weights_in_a_list(weights: Any) -> Made:
  net = Holder(weights)

  def change(other: Any) -> Any:
    net.inner["layers"][0] = other
    return net.nested

  return net.nested, change


def _numpy_in_place(weights: Any) -> Made:
  net = Holder(np.array(weights))

  def change(other: Any) -> Any:
    net.weights[...] = np.asarray(other)
    return net

  return net, change


def _rebound_cell(weights: Any) -> Made:
  def function(images: jax.Array) -> jax.Array:
    return formula(weights, images)

  def change(other: Any) -> Any:
    nonlocal weights
    weights = other
    return function

  return function, change


def _global(weights: Any) -> Made:
  module = types.ModuleType("module_of_a_user")
  source = "def net(images):\n  return formula(weights, images)\n"
  vars(module).update(formula=formula, weights=weights)
  exec(source, vars(module))

  def change(other: Any) -> Any:
    module.weights = other
    return module.net

  return module.net, change


def _attribute_of_a_function(weights: Any) -> Made:
  def function(images: jax.Array) -> jax.Array:
    return formula(function.weights, images)

  def change(other: Any) -> Any:
    function.weights = other
    return function

  return change(weights), change


def _fresh(make: Callable[[Any], Callable[..., Any]]) -> Callable[..., Made]:
  """A kind whose callable is made again for other weights."""
  return lambda weights: (make(weights), make)


def _lambda(weights: Any) -> Any:
  return lambda images: formula(weights, images)


def _default_argument(weights: Any) -> Any:
  return lambda images, w=weights: formula(w, images)


def _jitted(weights: Any) -> Any:
  return jax.jit(lambda images: formula(weights, images))


def _jitted_over_numpy(weights: Any) -> Any:
  array = np.array(weights)
  return jax.jit(lambda images: formula(array, images))


def _partial_of_a_method(weights: Any) -> Any:
  return Partial(Holder(weights).scaled, jnp.ones(()))


def _partial_with_captured(weights: Any) -> Any:
  return Partial(
    lambda factor, images: factor * formula(weights, images), jnp.ones(())
  )


def _randomized(weights: Any) -> Any:
  return attacks.Randomized(lambda key, images: formula(weights, images))


def _scan_of_a_jit(weights: Any) -> Any:
  inner = jax.jit(lambda x: x @ weights[: x.shape[-1]])

  def function(images: jax.Array) -> jax.Array:
    flat = images.reshape(len(images), -1)
    last, _ = jax.lax.scan(
      lambda carry, _: (inner(flat), None), inner(flat), None, length=2
    )
    return jnp.tanh(last)

  return function


def _while_of_a_jit(weights: Any) -> Any:
  inner = jax.jit(lambda x: x @ weights[: x.shape[-1]])

  def function(images: jax.Array) -> jax.Array:
    flat = images.reshape(len(images), -1)
    return jnp.tanh(
      jax.lax.fori_loop(0, 2, lambda _, y: inner(flat), inner(flat))
    )

  return function


def _cond_of_a_jit(weights: Any) -> Any:
  inner = jax.jit(lambda x: x @ weights[: x.shape[-1]])

  def function(images: jax.Array) -> jax.Array:
    flat = images.reshape(len(images), -1)
    known = images.sum() > -1
    return jnp.tanh(jax.lax.cond(known, inner, lambda x: -inner(x), flat))

  return function


def _remat(weights: Any) -> Any:
  return jax.checkpoint(lambda images: formula(weights, images))


def _custom_gradient(weights: Any) -> Any:
  @jax.custom_vjp
  def logits(images: jax.Array) -> jax.Array:
    return formula(weights, images)

  def forward(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return logits(images), images

  def backward(images: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return jax.vjp(lambda x: formula(weights, x), images)[1](cotangent)

  logits.defvjp(forward, backward)
  return lambda images: logits(images)


def _custom_derivative(weights: Any) -> Any:
  @jax.custom_jvp
  def logits(images: jax.Array) -> jax.Array:
    return formula(weights, images)

  @logits.defjvp
  def rule(primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda x: formula(weights, x), primals, tangents)

  return logits


class Linear(nn.Module):
  """A linen module that computes `formula`."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    return formula(self.get_variable("params", "w"), images)


def _bound_module(weights: Any) -> Any:
  return Linear().bind({"params": {"w": weights}})


def _module_applied(weights: Any) -> Any:
  model, variables = Linear(), {"params": {"w": weights}}
  return lambda images: model.apply(variables, images)


class NnxLinear(nnx.Module):
  """An nnx module that computes `formula`."""

  def __init__(self, weights: Any):
    self.weights = nnx.Param(weights)

  def __call__(self, images: jax.Array) -> jax.Array:
    return formula(self.weights[...], images)


def _nnx_module(weights: Any) -> Made:
  net = NnxLinear(weights)

  def change(other: Any) -> Any:
    net.weights[...] = other
    return net

  return net, change


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tree:
  """A pytree with a leaf that is no array, as Equinox has them."""

  weights: Any
  activation: Any

  def __call__(self, images: jax.Array) -> jax.Array:
    flat = images.reshape(len(images), -1)
    return self.activation(flat @ self.weights[: flat.shape[-1]])


def _tree(weights: Any) -> Any:
  return Tree(weights, jnp.tanh)


def _tree_that_captures(weights: Any) -> Any:
  def activation(x: jax.Array) -> jax.Array:
    return jnp.tanh(x + 0 * weights.sum())

  return Tree(weights, activation)


KINDS: dict[str, Callable[[Any], Made]] = {
  "attribute": _attribute,
  "bound method": _bound_method,
  "weights in a list": _weights_in_a_list,
  "numpy changed in place": _numpy_in_place,
  "rebound cell": _rebound_cell,
  "global": _global,
  "attribute of a function": _attribute_of_a_function,
  "nnx module": _nnx_module,
  "lambda": _fresh(_lambda),
  "default argument": _fresh(_default_argument),
  "functools.partial": _fresh(lambda w: functools.partial(formula, w)),
  "jit": _fresh(_jitted),
  "jit over numpy": _fresh(_jitted_over_numpy),
  "Partial": _fresh(lambda w: Partial(formula, w)),
  "Partial of a method": _fresh(_partial_of_a_method),
  "Partial that captures": _fresh(_partial_with_captured),
  "Randomized": _fresh(_randomized),
  "scan": _fresh(_scan_of_a_jit),
  "while": _fresh(_while_of_a_jit),
  "cond": _fresh(_cond_of_a_jit),
  "checkpoint": _fresh(_remat),
  "custom_vjp": _fresh(_custom_gradient),
  "custom_jvp": _fresh(_custom_derivative),
  "bound linen module": _fresh(_bound_module),
  "linen module applied": _fresh(_module_applied),
  "pytree": _fresh(_tree),
  "pytree that captures": _fresh(_tree_that_captures),
}
