"""MALT's choice of classes against the whole Jacobian in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from atat_jax import attacks
from atat_jax.attacks import search, targeting
from atat_jax.attacks.autoattack import versions
from atat_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE, CLASSES, COUNT = (3, 4, 2), 12, 9
DUAL_ORDER = {"linf": 1, "l2": 2, "l1": np.inf}


def _mlp(params, images):
  flat = images.reshape(len(images), -1) - 0.5
  return jnp.tanh(flat @ params["w1"]) @ params["w2"]


@pytest.fixture(scope="module")
def problem():
  generator = np.random.default_rng(3)
  size = int(np.prod(SHAPE))
  weights = {
    "w1": generator.normal(size=(size, 16)) * 2 / np.sqrt(size),
    # Classes whose logits move at very different speeds.
    "w2": generator.normal(size=(16, CLASSES)) * np.geomspace(0.3, 3, CLASSES),
  }
  images = generator.uniform(size=(COUNT, *SHAPE))
  hidden = np.tanh((images.reshape(COUNT, -1) - 0.5) @ weights["w1"])
  logits = hidden @ weights["w2"]
  jacobian = np.einsum(
    "dh,nh,hk->nkd", weights["w1"], 1 - hidden**2, weights["w2"]
  )
  labels = logits.argmax(-1)
  return weights, images, labels, logits, jacobian


def _classifier(weights):
  return Partial(_mlp, {k: jnp.asarray(w) for k, w in weights.items()})


def _expected(labels, logits, jacobian, norm, candidates):
  """Ranks the classes of each image by plain loops."""
  rows = []
  for label, z, j in zip(labels, logits, jacobian, strict=True):
    others = [k for k in np.argsort(-z) if k != label]
    distances = [
      (z[label] - z[k]) / np.linalg.norm(j[k] - j[label], DUAL_ORDER[norm])
      for k in others[:candidates]
    ]
    order = np.argsort(distances, kind="stable")
    rows.append([others[i] for i in order] + others[candidates:])
  return np.array(rows)


@pytest.mark.parametrize("norm", list(DUAL_ORDER))
def test_the_classes_are_ranked_by_the_linearised_distance(
  problem, norm, monkeypatch
):
  weights, images, labels, logits, jacobian = problem
  monkeypatch.setattr(targeting, "CANDIDATES", 7)
  x, y = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
  found = targeting.malt(
    _classifier(weights),
    jax.random.key(0),
    x,
    y,
    search.ranked(jnp.asarray(logits), y),
    norm=norm,
  )
  expected = _expected(labels, logits, jacobian, norm, 7)
  np.testing.assert_array_equal(found, expected)
  by_logits = np.argsort(-logits, -1)[:, 1:]
  assert (expected != by_logits).any(-1).mean() > 0.5  # it is another order


def _no_numbers(images):
  logits = images.reshape(len(images), -1)[:, :5] @ jnp.eye(5)
  return jnp.where(images[:, :1, 0, 0] > 0.9, jnp.nan, logits)


def test_what_is_not_finite_stays_in_the_order_of_the_logits():
  x = jnp.full((2, *SHAPE), 0.5).at[1, 0, 0, 0].set(0.95)
  y = jnp.zeros(2, jnp.int32)
  ranking = jnp.array([[4, 3, 2, 1], [2, 1, 4, 3]])
  found = targeting.malt(
    _no_numbers, jax.random.key(0), x, y, ranking, norm="l2"
  )
  np.testing.assert_array_equal(found, ranking)
  flat = targeting.malt(
    lambda x: jnp.tile(jnp.arange(5.0), (len(x), 1)),
    jax.random.key(0),
    x,
    y,
    ranking,
    norm="l2",
  )
  np.testing.assert_array_equal(flat, ranking)  # the gradient is 0


def test_a_very_small_gradient_still_ranks(problem):
  """Its squares are 0 in float32."""
  weights, images, labels, logits, jacobian = problem
  small = weights | {"w2": weights["w2"] * 1e-25}
  found = targeting.linear_distances(
    _classifier(small),
    jax.random.key(0),
    jnp.asarray(images, jnp.float32),
    jnp.asarray(labels),
    search.ranked(jnp.asarray(logits), jnp.asarray(labels)),
    norm="l2",
  )
  rows = np.arange(COUNT)[:, None]
  order = np.argsort(-logits, -1)[:, 1:]
  lead = logits.max(-1)[:, None] - logits[rows, order]
  steepness = jacobian[rows, order] - jacobian[rows, labels[:, None]]
  expected = lead / np.linalg.norm(steepness, axis=-1)
  np.testing.assert_allclose(found, expected, rtol=2e-4)


def _memory(problem, candidates):
  """Bytes of temporaries of the program that ranks so many candidates."""
  weights, images, labels, *_ = problem
  x = jnp.asarray(np.tile(images, (1, 8, 8, 1)), jnp.float32)
  w1 = np.tile(weights["w1"], (64, 1)) / 64
  classifier = _classifier({"w1": w1, "w2": weights["w2"]})
  chosen = jnp.tile(jnp.arange(candidates) % CLASSES, (COUNT, 1))
  program = jax.jit(
    lambda x, y, chosen: targeting.linear_distances(
      classifier, jax.random.key(0), x, y, chosen, norm="l2"
    )
  )
  compiled = program.lower(x, jnp.asarray(labels), chosen).compile()
  return compiled.memory_analysis().temp_size_in_bytes, x.nbytes


def test_memory_does_not_grow_with_the_candidates(problem):
  few, _ = _memory(problem, 2)
  many, image_bytes = _memory(problem, 200)
  assert many < few + 2 * image_bytes  # all gradients would be 200 times this


# --- In the attacks ----------------------------------------------------------


def _linear(params, images):
  return images.reshape(len(images), -1) @ params["w"] + params["b"]


@pytest.fixture(scope="module")
def misleading():
  """The second highest logit is far away, the third close: three linear maps."""
  size = int(np.prod(SHAPE))
  w = np.zeros((size, 6), np.float32)
  w[:, 2] = 1  # it gains epsilon times the size, the others nothing
  b = np.array([1.0, 0.9, 0.0, -1, -2, -3], np.float32)
  b[2] = 0.2 - 0.5 * size
  classifier = Partial(_linear, {"w": jnp.asarray(w), "b": jnp.asarray(b)})
  images = np.full((5, *SHAPE), 0.5, np.float32)
  return classifier, images, np.zeros(5, np.int32)


def test_one_target_by_malt_fools_where_one_by_logits_cannot(misleading):
  classifier, images, labels = misleading
  options = {"apgd-t": {"num_steps": 3, "num_targets": 1}}
  robust = {}
  for how in targeting.TARGETINGS:
    found = attacks.autoattack(
      jax.random.key(0),
      classifier,
      images,
      labels,
      epsilon=0.05,
      version=["apgd-t"],
      options=options,
      targeting=how,
      progress=False,
    )
    robust[how] = found.accuracy
    says = "1 target by MALT among the first 100 classes"
    assert (says in found.summary()) == (how == "malt")
    x = attacks.apgd(
      jax.random.key(0),
      classifier,
      images,
      labels,
      epsilon=0.05,
      num_steps=3,
      loss="targeted_margin",
      num_targets=1,
      targeting=how,
    )
    right = np.asarray(classifier(x).argmax(-1)) == labels
    assert right.all() == (how == "logits") and right.any() == right.all()
  assert robust == {"logits": 1.0, "malt": 0.0}


def test_where_every_class_is_aimed_at_nothing_changes():
  for version in ("standard", "plus"):
    plain, malt = (
      versions.make(version, norm="linf", num_classes=10, targeting=how)
      for how in targeting.TARGETINGS
    )
    assert plain == malt
    many = versions.make(
      version, norm="linf", num_classes=100, targeting="malt"
    )
    assert {j.name for j in many.jobs if j.targeting == "malt"} == {
      "apgd-t",
      "fab-t",
    }


def test_an_unknown_way_to_choose_is_refused():
  with pytest.raises(UserError, match="targeting: 'best'; allowed: logits, m"):
    versions.make("fast", norm="l2", num_classes=5, targeting="best")
