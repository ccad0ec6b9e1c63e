"""Fingerprints: equal for callables that compute the same, none if unknown."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from atat_jax import models
from atat_jax.compilation import fingerprints

ARRAY = np.ones(3)
NUMBER = 2.0
USER = types.ModuleType("a_module_of_a_user")


class Net(nn.Module):
  """A network of a user."""

  width: int = 3

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(self.width)(nn.relu(x))


class Config:
  """An object whose attributes can change."""

  scale = 1.0


def plain(w, x):
  return jax.nn.relu(x @ w) * NUMBER


def calls(w, x):
  return plain(w, jnp.tanh(x))


def recursive(w, x, depth=2):
  return recursive(w, x, depth - 1) if depth else x @ w


def over_an_array(x):
  return x * ARRAY


def over_a_module(x):
  return x * USER.scale


def draws(x):
  return x * np.random.rand()  # noqa: NPY002


def imports(x):
  import os

  return x * len(os.environ)


def writes(x):
  global NUMBER
  NUMBER = 3.0
  return x


def counts():
  number = 0

  def function(x):
    nonlocal number
    number += 1
    return x * number

  return function


def with_attribute(x):
  return x * with_attribute.w


with_attribute.w = ARRAY

KNOWN = {
  "function": plain,
  "calls another": calls,
  "recursive": recursive,
  "partial": functools.partial(plain, 2.0),
  "of jax": jax.nn.relu,
  "network": Net(),
  "network in a lambda": lambda v, x, model=Net(): model.apply(v, x),  # noqa: B008
  "list of layers": nn.Sequential([nn.Dense(3), nn.relu]),
  "our network": models.create("resnet18"),
}
UNKNOWN = {
  "array": over_an_array,
  "array in a partial": functools.partial(plain, ARRAY),
  "array in a default": lambda x, w=ARRAY: x * w,
  "array as an attribute": with_attribute,
  "module": over_a_module,
  "object": lambda x, c=Config(): x * c.scale,  # noqa: B008
  "jitted": jax.jit(plain),
  "random numbers": draws,
  "import": imports,
  "written global": writes,
  "written cell": counts(),
  "bound network": Net().bind({"params": {}}),
  "method": Config().__init__,
}


@pytest.mark.parametrize("name", KNOWN)
def test_functions_without_state_are_known(name):
  found = fingerprints.keyed(KNOWN[name])
  assert found is not None
  assert found == fingerprints.keyed(KNOWN[name])
  assert hash(found) == hash(fingerprints.keyed(KNOWN[name]))


@pytest.mark.parametrize("name", UNKNOWN)
def test_functions_with_state_are_not_known(name):
  assert fingerprints.keyed(UNKNOWN[name]) is None


def test_equal_functions_are_equal_and_others_are_not():
  def make(value):
    return fingerprints.keyed(lambda x: x * value)

  assert make(1.0) == make(1.0)
  others = [make(v) for v in (1.0, 1, True, -0.0, 0.0, (1,), [1], "1", None)]
  assert len(set(others)) == len(others)
  assert fingerprints.keyed(Net(3)) != fingerprints.keyed(Net(4))
  assert fingerprints.keyed(Net(3)) == fingerprints.keyed(Net(3))


def test_a_changed_global_changes_the_fingerprint(monkeypatch):
  before = fingerprints.keyed(calls)
  monkeypatch.setitem(globals(), "NUMBER", 3.0)
  assert fingerprints.keyed(calls) != before
  monkeypatch.undo()
  assert fingerprints.keyed(calls) == before
  monkeypatch.setitem(globals(), "plain", lambda w, x: x @ w)
  assert fingerprints.keyed(calls) != before


def test_our_own_networks_stay_themselves():
  """So that they compare and hash as before."""
  model = models.create("preact_resnet18")
  assert fingerprints.keyed(model) is model
  forward = models.classifier(model, {}).func
  assert fingerprints.keyed(forward) is forward
