"""Logits that are not finite lower an accuracy, are counted, and are told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from atat_jax import analyses, attention, evaluation, sharding
from atat_jax.data.base import Split
from atat_jax.errors import UserError
from atat_jax.evaluation import map_distances, ranking

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
NUMBERS = {"epsilon": 0.1, "step_size": 0.05}
BAD = 7  # the image of zeros


def _logits(weights, fragile, images):
  """Linear logits; if `fragile`, 0 / 0 for an image of zeros."""
  flat = images.reshape(len(images), -1)
  size = flat.sum(1, keepdims=True)
  return (flat @ weights) * jnp.where(fragile, size / size, 1.0)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def split():
  generator = np.random.default_rng(0)
  images = generator.integers(1, 256, (23, 4, 4, 1), np.uint8)
  images[BAD] = 0
  labels = generator.integers(0, 3, 23).astype(np.int32)
  labels[BAD] = 0  # the class that argmax gives for NaN
  return Split(images, labels)


@pytest.fixture(scope="module")
def judge(split, mesh):
  weights = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)

  def judged(name, *, fragile, batch_size=10):
    return evaluation.judge(
      KEY,
      jax.tree_util.Partial(_logits, weights, jnp.asarray(fragile)),
      split,
      protocol=evaluation.parse(name, **NUMBERS),
      batch_size=batch_size,
      mesh=mesh,
    )

  return judged


@pytest.mark.parametrize("batch_size", [10, 23, 64])
def test_one_bad_image_lowers_the_accuracy_by_one_image(judge, batch_size):
  sound = judge("nominal", fragile=False, batch_size=batch_size)
  found = judge("nominal", fragile=True, batch_size=batch_size)
  # Logits of zeros are a tie, which argmax gives to class 0: its label.
  assert sound.correct[BAD] and sound.nonfinite == 0 and sound.finite.all()
  assert not found.correct[BAD] and found.nonfinite == 1
  assert np.flatnonzero(~found.finite).tolist() == [BAD]
  others = np.arange(23) != BAD
  np.testing.assert_array_equal(found.correct[others], sound.correct[others])
  assert found.accuracy == pytest.approx(sound.accuracy - 1 / 23)


def test_accuracy_and_class_counts_are_those_of_the_judgement(
  judge, split, mesh
):
  found = judge("nominal", fragile=True)
  counts = evaluation.count_classes(found.correct, split.labels, 3)
  right = [(found.correct & (split.labels == k)).sum() for k in range(3)]
  assert counts[0].tolist() == right
  assert counts[1].tolist() == np.bincount(split.labels).tolist()
  with pytest.raises(UserError, match="num_classes: 2; allowed: more than 2"):
    evaluation.count_classes(found.correct, split.labels, 2)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"key": 0}, "key: 0"),
    ({"protocol": "pgd20"}, "protocol: 'pgd20'"),
    ({"batch_size": True}, "batch_size: True"),
    ({"batch_size": 0}, "batch_size: 0"),
    ({"data": None}, "data: None"),
    ({"labels": [0, 3]}, r"data.labels: values in \[0, 3\]; allowed: 0 to 2"),
    ({"labels": [0, -1]}, r"data.labels: values in \[-1, 0\]"),
    ({"labels": [0]}, "data.labels: shape"),
    ({"labels": [0.0, 1.0]}, "data.labels: dtype float64"),
    ({"images": np.full((2, 4, 4, 1), 255.0)}, "data.images: float64"),
    ({"images": np.zeros((2, 4, 4, 1))}, "data.images: float64"),
    ({"images": np.zeros((0, 4, 4, 1), np.uint8)}, "data.images.*not empty"),
    ({"images": np.zeros((2, 4, 4), np.uint8)}, "data.images: uint8 of shape"),
    ({"classifier": 5}, "classifier: int"),
    ({"classifier": lambda x: x}, "classifier: returns shape"),
  ],
)
def test_bad_arguments_of_an_accuracy_are_named(mesh, changes, message):
  arguments = {
    "key": KEY,
    "classifier": lambda x: x.reshape(len(x), -1)[:, :3],
    "images": np.zeros((2, 4, 4, 1), np.uint8),
    "labels": [0, 1],
    "protocol": evaluation.parse("nominal", **NUMBERS),
    "batch_size": 2,
  } | changes
  parts = arguments.pop("images"), np.array(arguments.pop("labels"))
  data = arguments.pop("data", Split(*parts))
  with pytest.raises(UserError, match=message) as error:
    evaluation.accuracy(
      arguments.pop("key"),
      arguments.pop("classifier"),
      data,
      mesh=mesh,
      **arguments,
    )
  assert "\n" not in str(error.value)


# --- Analyses and explanations ------------------------------------------------


class Fragile(nn.Module):
  """A convolution and a dense layer; an image of zeros gives 0 / 0."""

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    x = x / x.sum((1, 2, 3), keepdims=True)
    x = nn.relu(nn.Conv(2, (3, 3), name="conv")(x))
    return nn.Dense(3, name="head")(x.mean((1, 2)))


SETTINGS = analyses.FigureSettings(
  analyses=(),
  attack=evaluation.parse("fgsm", **NUMBERS),
  epsilon=0.001,
  step_size=0.001,
  num_examples=4,
  rounds=(1,),
  num_points=3,
  num_steps=1,
  epsilons=(0.0, 0.001),
  batch_size=4,
)


@pytest.fixture(scope="module")
def network():
  images = np.random.default_rng(2).uniform(0.3, 0.7, (4, 4, 4, 1))
  images = images.astype(np.float32)
  model = Fragile()
  return model, model.init(jax.random.key(3), images), images


def analyse(name, networks, images, mesh):
  analysis = analyses.ANALYSES[name]
  return analysis.compute(
    KEY,
    networks,
    images,
    np.array([0, 1, 2, 0], np.int32),
    mesh=mesh,
    **analysis.arguments(SETTINGS, images.shape[1:]),
  )


def spoiled(variables):
  return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), variables)


@pytest.mark.parametrize("name", analyses.ANALYSES)
def test_an_analysis_refuses_weights_that_are_not_finite(name, network, mesh):
  model, variables, images = network
  networks = {"good": (model, variables), "bad": (model, spoiled(variables))}
  with pytest.raises(UserError, match=r"networks\['bad'\]: 4 numbers"):
    analyse(name, networks, images, mesh)


@pytest.mark.parametrize("name", analyses.ANALYSES)
def test_an_analysis_refuses_results_that_are_not_finite(name, network, mesh):
  """The weights are finite; the images of the zeros are not classified."""
  model, variables, images = network
  images = images.copy()
  images[2] = 0
  with pytest.raises(
    UserError, match=r"networks\['net'\]: \d+ of \d+ .* are not finite"
  ) as error:
    analyse(name, {"net": (model, variables)}, images, mesh)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("networks", "message"),
  [
    (lambda m, v: [(m, v)], "networks: "),
    (lambda m, v: {}, "networks: none"),
    (lambda m, v: {1: (m, v)}, "networks: name 1"),
    (lambda m, v: {"": (m, v)}, "networks: name ''"),
    (lambda m, v: {"a": m}, r"networks\['a'\]"),
    (lambda m, v: {"a": (v, m)}, r"networks\['a'\]"),
    (lambda m, v: {"a": (m, v["params"])}, r"networks\['a'\]: no params"),
    (
      lambda m, v: {"a": (m, {"params": {"head": v["params"]["head"]}})},
      r"networks\['a'\]: no params/conv",
    ),
  ],
)
def test_networks_that_are_none_are_named(networks, message, network, mesh):
  model, variables, images = network
  with pytest.raises(UserError, match=message):
    analyse("steps", networks(model, variables), images, mesh)


LABELS = np.array([0, 1, 2, 0], np.int32)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layers": 5}, "layers: 5"),
    ({"layers": "conv"}, r"layers: 'conv'; .* \('conv',\)"),
    ({"layers": ()}, "layers: "),
    ({"layers": ("nope",)}, "layers: 'nope'; allowed: conv"),
    ({"batch_norm": "best"}, "batch_norm: 'best'"),
    ({"variables": {"params": {}}}, "variables: no params/conv"),
    ({"variables": None}, "variables: None"),
    ({"model": "wide_resnet"}, "model: 'wide_resnet'"),
    ({"images": np.zeros((4, 4, 4, 3), np.float32)}, "variables: params/conv"),
    ({"labels": np.array([0, 1, 2, 3])}, r"labels: values in \[0, 3\]"),
  ],
)
def test_bad_arguments_of_grad_cam_are_named(network, changes, message):
  model, variables, images = network
  given = {"model": model, "variables": variables, "images": images}
  given |= {"labels": LABELS} | changes
  first = [given.pop(name) for name in ("model", "variables", "images")]
  with pytest.raises(UserError, match=message) as error:
    attention.grad_cam(*first, **given)
  assert "\n" not in str(error.value)


def test_grad_cam_refuses_what_is_not_finite(network):
  model, variables, images = network
  for tree, seen, message in (
    (spoiled(variables), images, "variables: 4 numbers of Fragile are not"),
    (variables, 0 * images, "logits: 12 numbers of Fragile are not finite"),
  ):
    with pytest.raises(UserError, match=message):
      attention.grad_cam(model, tree, seen, LABELS)
  maps = attention.grad_cam(model, variables, images, LABELS)["conv"]
  assert np.isfinite(maps).all()
  # Inside jit it cannot refuse, and does not stop.
  inside = jax.jit(lambda x: attention.grad_cam(model, variables, x, LABELS))
  np.testing.assert_allclose(inside(images)["conv"], maps, rtol=1e-5)


@pytest.mark.parametrize("name", map_distances.DISTANCES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_at_no_distance(name, bad):
  distance = map_distances.DISTANCES[name]
  maps = np.random.default_rng(0).uniform(size=(3, 4, 4)).astype(np.float32)
  maps[2] = 0
  broken = maps.copy()
  broken[0, 1, 1] = bad
  found = np.array([distance(maps, broken), distance(broken, maps)])
  assert np.isnan(found[:, 0]).all() and np.isfinite(found[:, 1:]).all()
  # Not even from a map of zeros.
  assert np.isnan(distance(maps[2], broken[0]))


def test_scores_without_an_order_have_no_area():
  with pytest.raises(UserError, match="scores: 1 of 3 are not numbers"):
    ranking.auc([0.1, np.nan, 0.3], [True, False, True])
  with pytest.raises(UserError, match="positive: shape"):
    ranking.auc([0.1, 0.2], [True])


def test_a_diagnostic_can_be_written(judge):
  found = judge("nominal", fragile=True)
  row = {
    "model": "net",
    "attack": "nominal",
    "batch_norm": "running",
    "num_examples": 23,
    "accuracy": found.accuracy,
    "nonfinite": found.nonfinite,
    "nonfinite_points": found.points,
    "nonfinite_gradients": found.gradients,
  }
  diagnosed = evaluation.diagnose([row], "net")
  assert diagnosed["nonfinite"]["flag"] and diagnosed["nonfinite"]["value"] == 1
  json.dumps(diagnosed, allow_nan=False)
