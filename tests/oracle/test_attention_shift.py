"""Distances of maps, AUC and shift against SciPy, scikit-learn and attacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial.distance
import scipy.stats
import sklearn.metrics
from flax import linen as nn

from atat_jax import (
  analyses,
  attacks,
  attention,
  evaluation,
  models,
  sharding,
)
from atat_jax.analyses.shift import mean_band
from atat_jax.errors import UserError
from atat_jax.evaluation import map_distances
from atat_jax.evaluation.ranking import auc
from atat_jax.rng import stream

# Compiling is most of the time that these tests take.
pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
HEIGHT, WIDTH = 5, 7
TENTH = 4  # of 35 positions
ALL = tuple(map_distances.DISTANCES)


def _maps(seed, count=60):
  """Maps as Eq. (3) makes them: some values zero, some values equal."""
  generator = np.random.default_rng(seed)
  maps = np.maximum(generator.normal(0.3, 1, (count, HEIGHT, WIDTH)), 0)
  maps[::3] = maps[::3].round(1)
  # All of their values are float32's, so that float64 sees the same ties.
  return maps.astype(np.float32)


def _top_share(a, b):
  """Share of the highest tenth in common, by its definition, in float64."""

  def members(values):
    border = sorted(values)[-TENTH]
    left = TENTH - sum(v > border for v in values)
    share = left / sum(v == border for v in values)
    return [1.0 if v > border else share if v == border else 0 for v in values]

  both = zip(members(a), members(b), strict=True)
  return sum(min(pair) for pair in both) / TENTH


def _expected(name, a, b):
  """Returns a distance in float64, by other means."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  if name == "cosine":
    return scipy.spatial.distance.cosine(a.ravel(), b.ravel())
  if name == "rank_correlation":
    return 1 - scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic
  if name == "top_decile":
    return 1 - _top_share(a.ravel(), b.ravel())
  way = np.subtract(
    scipy.ndimage.center_of_mass(a), scipy.ndimage.center_of_mass(b)
  )
  return np.hypot(*way) / np.hypot(HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ALL)
def test_distances_equal_those_in_float64(name):
  clean, attacked = _maps(0), _maps(1)
  attacked[:10] = clean[:10] + 1e-3 * attacked[:10]  # hardly moved
  distance = jax.jit(map_distances.DISTANCES[name])
  found = distance(clean, attacked)
  assert found.dtype == jnp.float32 and found.shape == (60,)
  expected = [
    _expected(name, a, b) for a, b in zip(clean, attacked, strict=True)
  ]
  assert np.std(expected) > 0.02
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
  # Several rounds against one clean map; scale does not matter.
  tiny = distance(clean[None] * 1e-25, np.stack([attacked, clean]) * 1e20)
  np.testing.assert_allclose(tiny[0], found, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(tiny[1], 0, atol=1e-6)


def test_highest_tenth_without_ties_is_a_set():
  generator = np.random.default_rng(4)
  a, b = (generator.permutation(35) for _ in range(2))
  sets = [set(np.argsort(x)[-TENTH:]) for x in (a, b)]
  found = map_distances.top_decile(
    *(jnp.asarray(x).reshape(1, HEIGHT, WIDTH) for x in (a, b))
  )
  assert found == pytest.approx(1 - len(sets[0] & sets[1]) / TENTH)


@pytest.mark.parametrize(
  ("name", "one_zero", "one_even"),
  [
    ("cosine", 1.0, None),
    ("rank_correlation", 1.0, 1.0),
    ("top_decile", 1 - TENTH / 35, 1 - TENTH / 35),
    ("center_of_mass", None, None),
  ],
)
def test_maps_of_zeros_and_even_maps(name, one_zero, one_even):
  distance = map_distances.DISTANCES[name]
  generator = np.random.default_rng(5)
  some = generator.permutation(35).astype(np.float32)
  some = some.reshape(HEIGHT, WIDTH)
  zero, even = np.zeros_like(some), np.full_like(some, 0.7)
  for same in (zero, even, some):
    assert distance(same, same) == pytest.approx(0, abs=1e-6)
  for other, expected in ((zero, one_zero), (even, one_even)):
    if expected is None:
      # Where an even map is as any, and where zeros count as an even map.
      expected = _expected(name, even, some)
    for pair in ((other, some), (some, other)):
      assert distance(*pair) == pytest.approx(expected, abs=1e-6)


# --- Statistics --------------------------------------------------------------


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_auc_equals_scikit_learns_and_its_error_delongs(decimals):
  generator = np.random.default_rng(6)
  positive = generator.uniform(size=90) < 0.3
  scores = (generator.normal(size=90) + positive).round(decimals)
  area, error = auc(scores, positive)
  expected = sklearn.metrics.roc_auc_score(positive, scores)
  assert area == pytest.approx(expected, abs=1e-12)
  above, below = scores[positive], scores[~positive]
  wins = (above[:, None] > below) + 0.5 * (above[:, None] == below)
  variance = np.var(wins.mean(1), ddof=1) / len(above)
  variance += np.var(wins.mean(0), ddof=1) / len(below)
  assert error == pytest.approx(np.sqrt(variance), rel=1e-10)


def test_the_error_is_how_much_areas_differ_from_sample_to_sample():
  generator = np.random.default_rng(7)
  positive = np.arange(120) < 40
  draws = [
    auc(generator.normal(size=120) + 0.8 * positive, positive)
    for _ in range(800)
  ]
  areas, errors = np.array(draws).T
  assert errors.mean() == pytest.approx(areas.std(), rel=0.08)


def test_auc_of_nothing_to_tell_apart():
  assert np.isnan(auc(np.arange(3), np.zeros(3, bool))).all()
  assert np.isnan(auc(np.arange(3), np.ones(3, bool))).all()
  assert np.isnan(auc(np.zeros(0), np.zeros(0, bool))).all()
  area, error = auc(np.arange(3), np.array([False, False, True]))
  assert area == 1 and np.isnan(error)


def test_means_with_bands():
  generator = np.random.default_rng(8)
  values = generator.normal(size=(4, 50)).astype(np.float32)
  members = generator.uniform(size=(4, 50)) < 0.5
  members[2], members[3] = False, np.arange(50) == 7
  found = mean_band(values, members)
  for row in range(2):
    some = values[row][members[row]].astype(np.float64)
    low, high = scipy.stats.t.interval(
      0.95, len(some) - 1, some.mean(), scipy.stats.sem(some)
    )
    assert found["mean"][row] == pytest.approx(some.mean())
    assert found["low"][row] == pytest.approx(low, abs=1e-6)
    assert found["high"][row] == pytest.approx(high, abs=1e-6)
  assert np.isnan([found[what][2] for what in found]).all()
  assert found["mean"][3] == pytest.approx(values[3, 7])
  assert np.isnan(found["low"][3]) and np.isnan(found["high"][3])


# --- The analysis ------------------------------------------------------------

NUMBERS = {"epsilon": 0.05, "step_size": 0.01}
ROUNDS = (0, 2, 7)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def pair(small):
  return small.model, small.variables


@pytest.fixture(scope="module")
def data(small):
  """23 images with the labels that `small` gives them, but for two."""
  generator = np.random.default_rng(2)
  images = generator.uniform(size=(23, 6, 6, 2)).astype(np.float32)
  classifier = models.classifier(small.model, small.variables)
  labels = np.array(classifier(images).argmax(-1), np.int32)
  labels[:2] = (labels[:2] + 1) % 3
  return images, labels


@pytest.fixture(scope="module")
def shift(pair, data, mesh):
  return analyses.attention_shift(
    KEY,
    {"small": pair},
    *data,
    rounds=ROUNDS,
    batch_size=16,
    mesh=mesh,
    **NUMBERS,
  )


def _attacked(pair, data, num_steps):
  """Returns attacked images, from one attack for each batch."""
  images, labels = data
  found = []
  for batch, first in enumerate((0, 16)):
    rows = np.arange(first, first + 16) % 23
    found.append(
      attacks.pgd(
        stream(KEY, "evaluation", batch),
        models.classifier(*pair),
        images[rows],
        labels[rows],
        num_steps=num_steps,
        **NUMBERS,
      )
    )
  return np.concatenate(found)[:23]


def test_one_attack_is_as_many_attacks(pair, data, shift):
  images, labels = data
  place = 2
  adversarial = _attacked(pair, data, ROUNDS[place])
  logits = np.asarray(models.classifier(*pair)(adversarial))
  np.testing.assert_array_equal(
    shift["small_prediction"][place], logits.argmax(-1)
  )
  (before,) = attention.grad_cam(*pair, images, labels).values()
  (after,) = attention.grad_cam(*pair, adversarial, labels).values()
  for name, distance in map_distances.DISTANCES.items():
    expected = distance(before, after)
    assert expected.max() > 1e-4
    np.testing.assert_allclose(
      shift[f"small_{name}"][place], expected, rtol=1e-3, atol=1e-5
    )


def test_arrays_of_the_shift(shift, data):
  _, labels = data
  assert list(shift["networks"]) == ["small"]
  assert list(shift["distances"]) == list(ALL)
  assert list(shift["rounds"]) == list(ROUNDS)
  assert str(shift["layer"]) == "bn2"
  right = shift["small_clean_prediction"] == labels
  assert list(np.flatnonzero(~right)) == [0, 1]
  fooled, kept = shift["small_fooled"], shift["small_kept"]
  assert 0 < fooled[-1].sum() < 21
  # Images that are wrong without attack belong to neither.
  np.testing.assert_array_equal(fooled | kept, np.broadcast_to(right, (3, 23)))
  for name in ALL:
    values = shift[f"small_{name}"]
    assert values.shape == (3, 23) and values.dtype == np.float32
    mean = shift[f"small_{name}_mean"]
    np.testing.assert_allclose(mean, values.mean(-1, dtype=float), 1e-6)
    for group, members in (("fooled", fooled), ("kept", kept)):
      np.testing.assert_allclose(
        shift[f"small_{name}_{group}_mean"][-1],
        values[-1][members[-1]].mean(dtype=float),
        1e-6,
      )
    by_class = [values[-1][labels == c].mean(dtype=float) for c in range(3)]
    np.testing.assert_allclose(
      shift[f"small_{name}_class_mean"], by_class, 1e-6
    )
    area = sklearn.metrics.roc_auc_score(fooled[-1][right], values[-1][right])
    assert shift[f"small_{name}_auc"][-1] == pytest.approx(area)
    low, high = (shift[f"small_{name}_auc_{x}"][-1] for x in ("low", "high"))
    assert 0 <= low <= area <= high <= 1 and high - low > 0.1
  assert all(array.dtype != object for array in shift.values())


def test_nothing_compiles_for_other_numbers_and_none_is_fooled(
  pair, data, shift, mesh, compilations
):
  del shift
  before = compilations()
  found = analyses.attention_shift(
    KEY,
    {"other": pair},
    *data,
    rounds=(0, 1, 3),
    epsilon=1e-6,
    step_size=1e-6,
    random_start=False,
    batch_size=16,
    mesh=mesh,
  )
  assert compilations() == before
  assert not found["other_fooled"].any()
  for name in ALL:
    # From the clean image, which is at no distance from itself.
    np.testing.assert_allclose(found[f"other_{name}"][0], 0, atol=1e-6)
    assert np.isnan(found[f"other_{name}_auc"]).all()
    assert np.isnan(found[f"other_{name}_fooled_mean"]).all()
    assert np.isfinite(found[f"other_{name}_kept_mean"]).all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rounds": ()}, r"rounds: \[\]"),
    ({"rounds": (2, 1)}, r"rounds: \[2, 1\]"),
    ({"rounds": (-1, 1)}, "rounds"),
    ({"rounds": (0.5,)}, "rounds"),
    ({"epsilon": 8}, "epsilon: 8; allowed: at most 1"),
    ({"step_size": 0.0}, "step_size"),
    ({"norm": "l3"}, "norm: 'l3'"),
    ({"loss": "targeted_dlr"}, "loss: 'targeted_dlr'"),
    ({"batch_size": 0}, "batch_size"),
    ({"layer": "conv3"}, "layer: 'conv3'; allowed: .*conv1"),
  ],
)
def test_bad_settings_are_named(pair, data, changes, message):
  with pytest.raises(UserError, match=message):
    analyses.attention_shift(KEY, {"small": pair}, *data, **NUMBERS | changes)


# --- Maps at rounds of one attack --------------------------------------------


def test_maps_of_rounds_are_those_of_attacks(pair, data, mesh):
  images, labels = (part[:6] for part in data)
  found = analyses.attention_rounds(
    KEY, {"net": pair}, images, labels, rounds=(0, 5), mesh=mesh, **NUMBERS
  )
  kinds = ["clean", "round0", "round5"]
  assert list(found["kinds"]) == kinds and list(found["networks"]) == ["net"]
  assert np.ptp(found["net_round0"] - images) > 0.05  # a random start
  classifier = models.classifier(*pair)
  for kind, seen in [("clean", images)] + [
    (
      f"round{k}",
      attacks.pgd(KEY, classifier, images, labels, num_steps=k, **NUMBERS),
    )
    for k in (5,)
  ]:
    if kind != "clean":
      np.testing.assert_allclose(found[f"net_{kind}"], seen, atol=1e-6)
    (expected,) = attention.grad_cam(*pair, seen, labels).values()
    np.testing.assert_allclose(
      found[f"net_{kind}_map"], expected, rtol=1e-3, atol=1e-6
    )
    shares = np.asarray(jax.nn.softmax(classifier(seen)))
    predicted = found[f"net_{kind}_prediction"]
    np.testing.assert_array_equal(predicted, shares.argmax(-1))
    np.testing.assert_allclose(
      found[f"net_{kind}_probability"], shares.max(-1), rtol=1e-4
    )


def test_all_networks_can_see_images_made_for_one(small, pair, data, mesh):
  images, labels = (part[:6] for part in data)
  other = (small.model, jax.tree.map(lambda x: 1.1 * x, small.variables))
  networks = {"first": pair, "second": other}
  protocol = evaluation.parse("pgd2", **NUMBERS)
  how = {"protocol": protocol, "layer": "conv1", "mesh": mesh}
  own = analyses.attention_maps(KEY, networks, images, labels, **how)
  assert str(own["layer"]) == "conv1"
  assert own["first_clean_map"].shape == (6, 6, 6)
  assert (own["first_adversarial"] != own["second_adversarial"]).any()
  shared = analyses.attention_maps(
    KEY, networks, images, labels, source="second", **how
  )
  assert str(shared["protocol"]).endswith("images made for second")
  for name in networks:
    np.testing.assert_array_equal(
      shared[f"{name}_adversarial"], own["second_adversarial"]
    )
  with pytest.raises(UserError, match="source: 'third'; allowed: first"):
    analyses.attention_maps(
      KEY, networks, images, labels, source="third", **how
    )


# --- What maps cost ----------------------------------------------------------


def test_a_map_of_the_last_tensor_costs_a_forward_pass(wrn):
  def forward(variables, images):
    return wrn.model.apply(variables, images)

  def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]

  maps = flops(
    lambda v, x, y: attention.grad_cam(wrn.model, v, x, y),
    *(wrn.variables, wrn.images, wrn.labels),
  )
  assert maps < 1.02 * flops(forward, wrn.variables, wrn.images)


class _Tiny(nn.Module):
  """A network of its own, which nothing has compiled before."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.Conv(2, (3, 3))(x).mean((1, 2)))


def test_the_next_batch_compiles_nothing(compilations):
  images = np.full((2, 4, 4, 1), 0.5, np.float32)
  model = _Tiny()
  variables = model.init(jax.random.key(0), images)
  attention.grad_cam(model, variables, images, np.array([0, 1]))
  before = compilations()
  attention.grad_cam(model, variables, images + 0.1, np.array([2, 1]))
  assert compilations() == before
