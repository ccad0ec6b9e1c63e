"""BatchNorm of groups: each group alone through flax's own BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from atat_jax import models
from atat_jax.errors import UserError
from atat_jax.models.normalization import GroupedBatchNorm

X = np.random.default_rng(0).normal(2, 3, (8, 3, 3, 5)).astype("float32")
GENERATOR = np.random.default_rng(1)
VARIABLES = {
  "params": {
    "scale": GENERATOR.normal(size=5).astype("float32"),
    "bias": GENERATOR.normal(size=5).astype("float32"),
  },
  "batch_stats": {
    "mean": GENERATOR.normal(size=5).astype("float32"),
    "var": GENERATOR.uniform(0.5, 2, 5).astype("float32"),
  },
}
FIELDS = {"momentum": 0.8, "epsilon": 1e-3}


def grouped(size, train=True):
  return GroupedBatchNorm(size, use_running_average=not train, **FIELDS)


def ordinary(x, train=True):
  module = nn.BatchNorm(use_running_average=not train, **FIELDS)
  return module.apply(VARIABLES, x, mutable=["batch_stats"])


def test_variables_are_those_of_flax():
  ours = grouped(2).init(jax.random.key(0), X)
  theirs = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), X)
  same = jax.tree.map(np.array_equal, ours, theirs)
  assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_group_is_normalised_as_a_batch_of_its_own(size):
  found, moved = grouped(size).apply(VARIABLES, X, mutable=["batch_stats"])
  parts = [ordinary(X[n : n + size]) for n in range(0, 8, size)]
  expected = np.concatenate([part[0] for part in parts])
  np.testing.assert_allclose(found, expected, 1e-4, 1e-4)
  for name in ("mean", "var"):
    each = [part[1]["batch_stats"][name] for part in parts]
    np.testing.assert_allclose(
      moved["batch_stats"][name], np.mean(each, 0), 1e-5, 1e-5
    )


def test_evaluation_is_that_of_flax_for_any_batch():
  found = grouped(4, train=False).apply(VARIABLES, X[:3])
  expected, _ = ordinary(X[:3], train=False)
  np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


def test_a_batch_that_has_no_such_groups_is_refused():
  with pytest.raises(
    UserError, match=r"^batch_norm_group_size: 3 with a batch"
  ):
    grouped(3).apply(VARIABLES, X, mutable=["batch_stats"])


def test_groups_of_a_network_do_not_see_each_other():
  """The gradient of one group's logits is 0 at the other group's images."""
  model = models.create(
    "wide_resnet", depth=8, width=1, batch_norm_group_size=2
  )
  images = jnp.asarray(np.random.default_rng(2).uniform(size=(4, 8, 8, 3)))
  variables = model.init(jax.random.key(0), images)

  def logits(x):
    found, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return (found[:2] ** 2).sum()

  slopes = np.abs(np.asarray(jax.grad(logits)(images))).max((1, 2, 3))
  assert (slopes[:2] > 0).all() and (slopes[2:] == 0).all()
