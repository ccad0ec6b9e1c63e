"""The loss landscape: against formulas of a linear network in float64."""

import jax
import linear_networks
import numpy as np
import pytest

from atat_jax import analyses, models, sharding
from atat_jax.errors import UserError

# Compiling is most of the time that these tests take.
pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).uniform(0, 1, (3, 4, 4, 1)).astype("float32")
LABELS = np.array([0, 1, 2], np.int32)


def test_points_lie_where_they_should():
  pair, weights, biases = linear_networks.linear()
  found = analyses.loss_landscape(
    KEY, {"net": pair}, IMAGES, LABELS, radius=0.3, num_points=5, batch_size=20
  )
  coefficients = found["coefficients"]
  np.testing.assert_allclose(coefficients, [-0.3, -0.15, 0, 0.15, 0.3], 1e-6)
  random = found["random_direction"].reshape(3, 16)
  assert set(np.unique(random)) == {-1, 1}
  for n, label in enumerate(LABELS):
    x = IMAGES[n].reshape(-1).astype(np.float64)
    shares = linear_networks.softmax(x @ weights + biases)
    direction = np.sign(weights @ (shares - np.eye(3)[label]))
    given = found["net_gradient_direction"][n].reshape(-1)
    np.testing.assert_array_equal(given, direction)
    for i, a in enumerate(coefficients):
      for j, b in enumerate(coefficients):
        logits = (x + a * direction + b * random[n]) @ weights + biases
        loss = -np.log(linear_networks.softmax(logits)[label])
        margin = np.delete(logits, label).max() - logits[label]
        at = n, i, j
        np.testing.assert_allclose(found["net_loss"][at], loss, 1e-4, 1e-5)
        np.testing.assert_allclose(found["net_margin"][at], margin, 1e-4, 1e-4)
  # Some of these points lie outside [0, 1]: nothing was clipped.
  assert (IMAGES + 0.3 > 1).any()


# 50 batches are cut into parts of 3, the last of which has 2 new ones.
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_one_forward_pass_a_point(batch_size):
  rows = []
  pair, *_ = linear_networks.linear(seen=rows.append)
  analyses.loss_landscape(
    KEY,
    {"net": pair},
    IMAGES[:2],
    LABELS[:2],
    radius=0.1,
    num_points=5,
    batch_size=batch_size,
  )
  jax.effects_barrier()
  assert sum(map(int, rows)) == 2 * 25 + 2  # and one gradient an image


def test_networks_share_the_random_direction_and_not_the_gradient():
  pairs = {
    name: linear_networks.linear(seed=seed)[0] for seed, name in enumerate("ab")
  }
  both = analyses.loss_landscape(
    KEY, pairs, IMAGES, LABELS, radius=0.3, num_points=3
  )
  assert list(both["networks"]) == ["a", "b"]
  directions = [both[f"{name}_gradient_direction"] for name in "ab"]
  assert (directions[0] != directions[1]).any()
  alone = analyses.loss_landscape(
    KEY, {"b": pairs["b"]}, IMAGES, LABELS, radius=0.3, num_points=3
  )
  for name, array in alone.items():
    if name != "networks":
      np.testing.assert_array_equal(array, both[name])


def test_nothing_compiles_again(compilations):
  def landscape(seed, radius):
    pair, *_ = linear_networks.linear(seed=seed)
    return analyses.loss_landscape(
      KEY, {"net": pair}, IMAGES, LABELS, radius=radius, num_points=3
    )

  landscape(0, 0.1)
  before = compilations()
  landscape(1, 0.2)
  assert compilations() == before


def test_of_a_convolutional_network(small):
  """Its own middle, and its edge, against one look at each."""
  found = analyses.loss_landscape(
    KEY,
    {"small": (small.model, small.variables)},
    small.images[:2],
    small.labels[:2],
    radius=0.2,
    num_points=3,
  )
  classifier = models.classifier(small.model, small.variables)
  points = [
    small.images[:2],
    small.images[:2] + 0.2 * found["small_gradient_direction"],
    small.images[:2] - 0.2 * found["random_direction"],
  ]
  logits = np.asarray(classifier(np.concatenate(points)), np.float64)
  shares = linear_networks.softmax(logits).reshape(3, 2, -1)
  for place, (i, j) in enumerate([(1, 1), (2, 1), (1, 0)]):
    expected = -np.log(shares[place, [0, 1], small.labels[:2]])
    np.testing.assert_allclose(found["small_loss"][:, i, j], expected, 1e-4)
  assert (found["small_loss"][:, 2, 1] > found["small_loss"][:, 1, 1]).all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"radius": 0.0}, "radius: 0.0"),
    ({"num_points": 4}, "num_points: 4; allowed: odd"),
    ({"num_points": 1}, "num_points: 1"),
    ({"batch_size": 0}, "batch_size: 0"),
    ({"images": IMAGES + 1}, "images: values"),
    ({"labels": LABELS + 1}, "labels: values"),
    ({"networks": {}}, "networks: none"),
  ],
)
def test_bad_arguments_are_named(changes, message):
  pair, *_ = linear_networks.linear()
  arguments = {
    "networks": {"net": pair},
    "images": IMAGES,
    "labels": LABELS,
    "radius": 0.1,
  } | changes
  with pytest.raises(UserError, match=message):
    analyses.loss_landscape(KEY, **arguments)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_several_devices_make_the_same_surface(eight_devices, batch_size):
  pair, *_ = linear_networks.linear()
  arguments = {"radius": 0.3, "num_points": 5, "batch_size": batch_size}
  one, eight = (
    analyses.loss_landscape(
      KEY, {"net": pair}, IMAGES, LABELS, **arguments, mesh=mesh
    )
    for mesh in (None, sharding.make_mesh(eight_devices))
  )
  assert one.keys() == eight.keys()
  for name, array in one.items():
    if array.dtype.kind == "f":
      np.testing.assert_allclose(eight[name], array, 1e-5, 1e-6)
    else:
      np.testing.assert_array_equal(eight[name], array)
