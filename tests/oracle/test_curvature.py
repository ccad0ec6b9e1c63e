"""Curvature of the loss: against eigenvalues of whole Hessians in float64."""

import jax
import jax.numpy as jnp
import linear_networks
import numpy as np
import pytest
from scipy import stats

from atat_jax import analyses, losses, sharding
from atat_jax.errors import UserError

# Compiling is most of the time that these tests take.
pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).uniform(0, 1, (9, 4, 4, 1)).astype("float32")
LABELS = np.arange(9, dtype=np.int32) % 3


def _curvature(*arguments, **changes):
  """On one device: on eight, each would compute everything."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  return analyses.loss_curvature(*arguments, mesh=mesh, **changes)


def hessians(example):
  """Hessians in the pixels by differences of gradients, float64 [B, D, D]."""
  step, size = 1e-6, example.images[0].size
  shifts = step * np.concatenate([np.eye(size), -np.eye(size)])
  with jax.enable_x64(True):
    example = example.astype(np.float64)

    @jax.jit
    @jax.grad
    def gradient(x, labels):
      logits = example.model.apply(example.variables, x, train=False)
      return losses.cross_entropy(logits, labels).sum()

    found = []
    for image, label in zip(example.images, example.labels, strict=True):
      near = image + shifts.reshape(-1, *image.shape)
      slopes = np.asarray(gradient(near, jnp.full(2 * size, label)))
      up, down = slopes.reshape(2, size, size)
      found.append((up - down) / (2 * step))
  found = np.array(found)
  turned = found.transpose(0, 2, 1)
  np.testing.assert_allclose(found, turned, atol=1e-4 * abs(found).max())
  return (found + turned) / 2


def check(found, name, matrices):
  """Each eigenvalue against its matrix, within what its residual says."""
  values, residuals = found[f"{name}_eigenvalue"], found[f"{name}_residual"]
  spectra = np.linalg.eigvalsh(matrices)
  for value, residual, spectrum in zip(values, residuals, spectra, strict=True):
    largest = spectrum[abs(spectrum).argmax()]
    assert residual <= 0.02
    # For a symmetric matrix the quotient errs by the residual's square.
    assert value == pytest.approx(largest, rel=5e-3)
    assert abs(spectrum - value).min() <= (residual + 1e-4) * abs(value)
  return spectra


def test_largest_eigenvalues_of_a_smooth_network(small):
  found = _curvature(
    KEY,
    {"small": (small.model, small.variables)},
    small.images,
    small.labels,
    num_iterations=2000,
    tolerance=0.02,
  )
  spectra = check(found, "small", hessians(small))
  # The sign is the eigenvalue's own, and both occur.
  assert len(set(np.sign(found["small_eigenvalue"]))) == 2
  assert (abs(spectra[:, 0]) > abs(spectra[:, -1])).any()


def test_through_the_convolutions_of_the_backend(wrn):
  """Their own derivative on CPU has no forward mode."""
  wrn = wrn._replace(images=wrn.images[:2], labels=wrn.labels[:2])
  found = _curvature(
    KEY,
    {"wrn": (wrn.model, wrn.variables)},
    wrn.images,
    wrn.labels,
    num_iterations=2000,
    tolerance=0.02,
  )
  check(found, "wrn", hessians(wrn))


def test_formula_of_a_linear_network():
  pair, weights, biases = linear_networks.linear()
  found = _curvature(
    KEY, {"net": pair}, IMAGES, LABELS, tolerance=1e-3, num_iterations=500
  )
  x = IMAGES.reshape(9, -1).astype(np.float64)
  shares = linear_networks.softmax(x @ weights + biases)
  expected = [
    np.linalg.eigvalsh(
      weights @ (np.diag(share) - np.outer(share, share)) @ weights.T
    )[-1]
    for share in shares
  ]
  np.testing.assert_allclose(found["net_eigenvalue"], expected, 1e-3)
  mean, error = np.mean(expected), stats.sem(expected)
  np.testing.assert_allclose(found["net_mean"], mean, 1e-3)
  expected = stats.t.interval(0.95, len(expected) - 1, mean, error)
  np.testing.assert_allclose(found["net_interval"], expected, 1e-3)


def test_batches_make_no_difference():
  pair, *_ = linear_networks.linear()
  whole, parts = (
    _curvature(
      KEY,
      {"net": pair},
      IMAGES,
      LABELS,
      tolerance=1e-3,
      num_iterations=500,
      batch_size=size,
    )["net_eigenvalue"]
    for size in (64, 4)
  )
  np.testing.assert_allclose(whole, parts, 1e-4)


def test_too_few_products_show_in_the_residual():
  pair, *_ = linear_networks.linear()

  def residual(number):
    return _curvature(
      KEY, {"net": pair}, IMAGES, LABELS, num_iterations=number
    )["net_residual"]

  assert residual(1).min() > 0.05
  assert residual(500).max() <= 0.05


def test_where_nothing_bends():
  """Constant logits, and a softmax that is saturated to the last bit."""
  (module, variables), *_ = linear_networks.linear(scale=1e4)
  flat = jax.tree.map(jnp.zeros_like, variables)
  labels = np.asarray(module.apply(variables, IMAGES)).argmax(-1)
  found = _curvature(
    KEY, {"flat": (module, flat), "sure": (module, variables)}, IMAGES, labels
  )
  for name in ("flat", "sure"):
    assert (found[f"{name}_eigenvalue"] == 0).all()
    assert (found[f"{name}_residual"] == 0).all()
    assert np.isnan(found[f"{name}_interval"]).all()


def test_one_image_has_no_interval():
  pair, *_ = linear_networks.linear()
  found = _curvature(KEY, {"net": pair}, IMAGES[:1], LABELS[:1])
  assert (
    np.isfinite(found["net_mean"]) and np.isnan(found["net_interval"]).all()
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_iterations": 0}, "num_iterations: 0"),
    ({"tolerance": -1.0}, "tolerance: -1.0"),
    ({"batch_size": 1.5}, "batch_size: 1.5"),
    ({"labels": LABELS[:2]}, "labels: shape"),
    ({"networks": {}}, "networks: none"),
  ],
)
def test_bad_arguments_are_named(changes, message):
  pair, *_ = linear_networks.linear()
  arguments = {"networks": {"net": pair}, "images": IMAGES, "labels": LABELS}
  with pytest.raises(UserError, match=message):
    _curvature(KEY, **arguments | changes)
