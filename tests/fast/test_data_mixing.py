"""Mixup and CutMix against what numpy makes of the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from atat_jax.data import mixing
from atat_jax.errors import UserError

BATCH, CLASSES = 64, 5


@pytest.fixture(scope="module")
def batch():
  generator = np.random.default_rng(3)
  # A number of its own in every image, the same in all its pixels.
  values = generator.permutation(BATCH) / BATCH
  images = np.broadcast_to(values[:, None, None, None], (BATCH, 9, 6, 2))
  labels = generator.integers(0, CLASSES, BATCH).astype(np.int32)
  return images.astype(np.float32), labels, np.eye(CLASSES, dtype=np.float32)


_mix = jit(mixing.mix, static_argnames="name")


def mix(batch, name, alpha=1.0, seed=0):
  images, labels, one_hot = batch
  return [
    np.asarray(x)
    for x in _mix(
      jax.random.key(seed),
      jnp.asarray(images),
      jnp.asarray(labels),
      jnp.asarray(one_hot[labels]),
      name=name,
      alpha=alpha,
    )
  ]


def check_targets(batch, labels, targets, partner, share):
  _, old, one_hot = batch
  expected = share[:, None] * one_hot[old]
  expected += (1 - share)[:, None] * one_hot[old[partner]]
  np.testing.assert_allclose(targets, expected, atol=1e-5)
  np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
  dominant = np.where(share > 0.5, old, old[partner])
  clear = np.abs(share - 0.5) > 1e-4
  assert clear.sum() > 0.9 * BATCH
  np.testing.assert_array_equal(labels[clear], dominant[clear])
  assert {True, False} == set(share > 0.5)


def test_cutmix_takes_a_box_of_the_partner(batch):
  """All is read off the images: box, partner and share."""
  images, labels, targets = mix(batch, "cutmix")
  old = batch[0][:, 0, 0, 0]
  partner, share = np.arange(BATCH), np.ones(BATCH)
  for i, image in enumerate(images):
    assert (image[..., 0] == image[..., 1]).all()
    foreign = image[..., 0] != old[i]
    rows, columns = np.nonzero(foreign)
    if not rows.size:
      continue
    top, left = rows.min(), columns.min()
    box = foreign[top : rows.max() + 1, left : columns.max() + 1]
    assert box.all()
    (value,) = np.unique(image[foreign])
    (partner[i],) = np.nonzero(old == value)[0]
    share[i] = 1 - foreign.mean()
  check_targets(batch, labels, targets, partner, share)
  mixed = partner != np.arange(BATCH)
  assert len(set(partner[mixed])) == mixed.sum() > BATCH / 2


def test_cutmix_boxes_are_those_of_the_papers_code():
  generator = np.random.default_rng(0)
  height, width = 9, 6
  share = generator.uniform(size=200).astype(np.float32)
  centers = np.stack(
    [generator.integers(0, n, 200) for n in (height, width)], 1
  )
  found, remaining = jit(mixing.boxes, static_argnums=(2, 3))(
    share, centers.astype(np.int32), height, width
  )
  found, remaining = np.asarray(found), np.asarray(remaining)
  for i, (row, column) in enumerate(centers):
    cut = np.sqrt(1 - share[i])
    h, w = int(height * cut), int(width * cut)
    y1, y2 = np.clip([row - h // 2, row + h // 2], 0, height)
    x1, x2 = np.clip([column - w // 2, column + w // 2], 0, width)
    expected = np.zeros((height, width), bool)
    expected[y1:y2, x1:x2] = True
    np.testing.assert_array_equal(found[i], expected)
    area = (y2 - y1) * (x2 - x1) / (height * width)
    assert float(remaining[i]) == pytest.approx(1 - area, abs=1e-6)


def test_mixup_is_a_convex_combination(batch):
  """The share is read off the targets, the partner off a second batch."""
  _, old, _ = batch
  identity = np.eye(BATCH, dtype=np.float32)
  own = batch[0], np.arange(BATCH, dtype=np.int32), identity
  images, _, matrix = mix(own, "mixup")  # row i: shares of i and its partner
  share = matrix.diagonal().copy()
  partner = (matrix - np.diag(share)).argmax(-1)
  alone = share == 1
  partner[alone] = np.arange(BATCH)[alone]
  expected = matrix.astype(np.float64) @ batch[0].reshape(BATCH, -1)
  np.testing.assert_allclose(
    images.reshape(BATCH, -1), expected, rtol=1e-5, atol=1e-6
  )
  assert images.min() >= 0 and images.max() <= 1
  _, labels, targets = mix(batch, "mixup")  # the same draws
  check_targets(batch, labels, targets, partner, share)
  assert sorted(partner) == list(range(BATCH)) and not (labels == old).all()


def test_the_share_is_drawn_from_the_beta_distribution(batch):
  """Mean 1/2, variance 1 / (4 (2 alpha + 1))."""
  own = batch[0], np.arange(BATCH, dtype=np.int32), np.eye(BATCH)
  shares = []
  for seed in range(20):
    matrix = mix(own, "mixup", 0.5, seed)[2]
    diagonal = matrix.diagonal()
    shares.append(diagonal[(matrix > 0).sum(-1) == 2])
  shares = np.concatenate(shares)
  assert len(shares) > 1000
  assert shares.mean() == pytest.approx(0.5, abs=0.04)
  assert shares.var() == pytest.approx(1 / 8, rel=0.1)


def test_without_a_mix_nothing_changes(batch):
  for found, given in zip(mix(batch, "none")[:2], batch, strict=False):
    np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize(
  ("name", "alpha", "named"),
  [("cutout", 1.0, "mix: 'cutout'"), ("mixup", 0.0, "mix_alpha: 0.0")],
)
def test_bad_values_are_named(name, alpha, named):
  with pytest.raises(UserError, match=named):
    mixing.check(name, alpha)
