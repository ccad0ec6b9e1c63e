"""Sweeps over steps and radii: against attacks made one by one, and formulas."""

import jax
import linear_networks
import numpy as np
import pytest

from atat_jax import analyses, attacks, evaluation, models, sharding
from atat_jax.data.base import Split
from atat_jax.errors import UserError
from atat_jax.rng import stream

# Compiling is most of the time that these tests take.
pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(5)
NUMBERS = {"epsilon": 0.03, "step_size": 0.01}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def data(small):
  """23 images of whole levels, with the labels that `small` gives them."""
  generator = np.random.default_rng(2)
  images = generator.integers(0, 256, (23, 6, 6, 2), np.uint8)
  classifier = models.classifier(small.model, small.variables)
  scaled = images.astype(np.float32) / 255
  return Split(
    images, np.asarray(classifier(scaled)).argmax(-1).astype("int32")
  )


def floats(data):
  return data.images.astype(np.float32) / 255, data.labels


@pytest.fixture(scope="module")
def swept(small, data, mesh):
  return analyses.attack_steps(
    KEY,
    {"small": (small.model, small.variables)},
    *floats(data),
    num_steps=12,
    batch_size=10,
    mesh=mesh,
    **NUMBERS,
  )


@pytest.mark.parametrize("num_steps", [1, 12])
def test_each_iterate_is_that_of_an_attack_of_so_many_steps(
  small, data, mesh, swept, num_steps
):
  images, labels = floats(data)
  classifier = models.classifier(small.model, small.variables)
  expected = []
  for batch, first in enumerate((0, 10, 20)):
    rows = np.arange(first, first + 10) % 23
    adversarial = attacks.pgd(
      stream(KEY, "evaluation", batch),
      classifier,
      images[rows],
      labels[rows],
      num_steps=num_steps,
      **NUMBERS,
    )
    expected.append(np.asarray(classifier(adversarial)).argmax(-1))
  expected = np.concatenate(expected)[:23] == labels
  np.testing.assert_array_equal(swept["small_correct"][num_steps], expected)
  # As the table of results has it.
  protocol = evaluation.parse(f"pgd{num_steps}", **NUMBERS)
  accuracy = evaluation.accuracy(
    KEY, classifier, data, protocol=protocol, batch_size=10, mesh=mesh
  )
  found = swept["small_accuracy"][num_steps]
  assert found == pytest.approx(accuracy, abs=1e-6)


def test_arrays_of_the_sweep_over_steps(swept):
  assert list(swept["steps"]) == list(range(13))
  assert swept["small_clean"] == 1 and swept["num_examples"] == 23
  assert swept["chance"] == pytest.approx(1 / 3)
  correct, accuracy = swept["small_correct"], swept["small_accuracy"]
  np.testing.assert_allclose(accuracy, correct.mean(1))
  assert accuracy[0] > accuracy[-1] > 0
  for k in range(13):
    expected = correct[: k + 1].all(0).mean()
    assert swept["small_worst_case"][k] == pytest.approx(expected)


def test_one_pass_of_one_attack(mesh):
  rows = []
  pair, *_ = linear_networks.linear(seen=rows.append)
  images = np.random.default_rng(0).uniform(0, 1, (7, 4, 4, 1))
  analyses.attack_steps(
    KEY,
    {"net": pair},
    images,
    np.zeros(7, np.int32),
    num_steps=9,
    mesh=mesh,
    **NUMBERS,
  )
  jax.effects_barrier()
  # Nine gradients, a look at the last iterate, one at the clean images.
  assert sum(map(int, rows)) == 11 * 7


def test_devices_make_no_difference(small, data, swept, eight_devices):
  several = analyses.attack_steps(
    KEY,
    {"small": (small.model, small.variables)},
    *floats(data),
    num_steps=12,
    batch_size=10,
    mesh=sharding.make_mesh(eight_devices[:2]),
    **NUMBERS,
  )
  for name, array in swept.items():
    np.testing.assert_array_equal(several[name], array)


# --- Radii -------------------------------------------------------------------


def near_grey(count=40):
  """Images so near to grey that the box is far."""
  generator = np.random.default_rng(7)
  return generator.uniform(0.4, 0.6, (count, 4, 4, 1)).astype(np.float32)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_radii_of_a_linear_network(mesh, norm, dual):
  """Its distance to the border is the margin by the dual norm of the weights."""
  pair, weights, biases = linear_networks.linear(num_classes=2)
  images = near_grey()
  logits = images.reshape(40, -1).astype(np.float64) @ weights + biases
  labels = logits.argmax(-1).astype(np.int32)
  labels[:4] = 1 - labels[:4]  # wrong from the start
  margins = logits[np.arange(40), labels] - logits[np.arange(40), 1 - labels]
  distances = margins / np.linalg.norm(weights[:, 0] - weights[:, 1], dual)
  radii = [0.0, *np.quantile(distances[distances > 0], [0.31, 0.72])]
  found = analyses.attack_epsilons(
    KEY,
    {"net": pair},
    images,
    labels,
    epsilons=[*radii, 0.9],
    norm=norm,
    batch_size=16,
    mesh=mesh,
  )
  for place, radius in enumerate(radii):
    np.testing.assert_array_equal(
      found["net_correct"][place], distances > radius
    )
  np.testing.assert_allclose(
    found["net_accuracy"], [*((distances > r).mean() for r in radii), 0]
  )
  np.testing.assert_allclose(found["net_worst_case"], found["net_accuracy"])


def test_what_a_blind_attack_leaves_shows(mesh):
  """Without gradients accuracy stays in a ball that covers all images."""
  pair, *_ = linear_networks.linear(blind=True)
  images = np.random.default_rng(1).uniform(0, 1, (40, 4, 4, 1))
  labels = np.asarray(pair[0].apply(pair[1], images)).argmax(-1)
  seeing = linear_networks.linear()[0]
  found = analyses.attack_epsilons(
    KEY,
    {"blind": pair, "seeing": seeing},
    images,
    labels,
    epsilons=analyses.default_epsilons(0.2, "linf", 16),
    mesh=mesh,
  )
  assert found["seeing_worst_case"][-1] == 0
  assert found["blind_worst_case"][-1] > 0.1
  assert (np.diff(found["blind_worst_case"]) <= 0).all()


def test_no_radius_compiles_anew(mesh, compilations):
  pair, *_ = linear_networks.linear(num_classes=4)

  def sweep(*epsilons):
    return analyses.attack_epsilons(
      KEY,
      {"net": pair},
      near_grey(),
      np.zeros(40, np.int32),
      epsilons=epsilons,
      mesh=mesh,
    )

  sweep(0.0, 0.1)
  before = compilations()
  sweep(0.0, 0.05, 0.2, 0.3, 1.0)
  assert compilations() == before


def test_default_radii():
  radii = analyses.default_epsilons(8 / 255, "linf", 3072)
  np.testing.assert_allclose(
    255 * np.array(radii), [0, 2, 4, 6, 8, 12, 16, 32, 64, 128, 255]
  )
  assert analyses.default_epsilons(1.0, "linf", 64) == (0, 0.25, 0.5, 0.75, 1)
  assert analyses.default_epsilons(0.5, "l2", 64)[-1] == 8


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"epsilons": []}, "epsilons: .*allowed: one or more, increasing"),
    ({"epsilons": [0.2, 0.1]}, "epsilons: .*increasing"),
    ({"epsilons": [0.1, 1.5]}, "epsilons: 1.5; allowed: at most 1"),
    ({"epsilons": [-0.1]}, "epsilons: -0.1"),
    ({"norm": "l7"}, "norm: 'l7'"),
    ({"loss": "targeted_dlr"}, "loss: 'targeted_dlr'"),
    ({"loss": "dlr"}, "loss: 'dlr' with 2 classes"),
    ({"num_steps": 0}, "num_steps: 0"),
    ({"networks": {}}, "networks: none"),
  ],
)
def test_bad_arguments_are_named(changes, message):
  pair, *_ = linear_networks.linear(num_classes=2)
  arguments = {
    "networks": {"net": pair},
    "images": near_grey(),
    "labels": np.zeros(40, np.int32),
    "epsilons": [0.1],
  } | changes
  with pytest.raises(UserError, match=message):
    analyses.attack_epsilons(KEY, **arguments)
  del arguments["epsilons"]
  if not changes.keys() & {"epsilons"}:
    with pytest.raises(UserError, match=message):
      analyses.attack_steps(KEY, **arguments, **NUMBERS)
