import numpy as np
import pytest

from atat_jax import data
from atat_jax.data import base
from atat_jax.errors import UserError


def philox_block(counter: int, key: tuple[int, int]) -> list[int]:
  """Philox4x64-10 (Salmon et al., SC 2011) in plain integers."""
  word = 2**64
  c0, c1, c2, c3 = counter, 0, 0, 0
  k0, k1 = key
  for _ in range(10):
    product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
    c0, c1, c2, c3 = (
      product1 // word ^ c1 ^ k0,
      product1 % word,
      product0 // word ^ c3 ^ k1,
      product0 % word,
    )
    k0 = (k0 + 0x9E3779B97F4A7C15) % word
    k1 = (k1 + 0xBB67AE8584CAA73B) % word
  return [c0, c1, c2, c3]


@pytest.mark.parametrize("key", [(0, 0), (7, 3), (2**64 - 1, 12)])
def test_permutation_is_philox_sorted(key):
  raw = [x for counter in (1, 2, 3) for x in philox_block(counter, key)]
  expected = sorted(range(10), key=lambda i: raw[i])
  assert base.permutation(10, key).tolist() == expected


def test_every_prefix_of_the_order_has_the_classes_in_proportion():
  rng = np.random.default_rng(0)
  labels = rng.permutation(np.repeat([0, 1, 2], [300, 100, 37]))
  order = base.stratified_order(labels)
  assert sorted(order.tolist()) == list(range(437))
  for size in (1, 10, 99, 250, 436):
    counts = np.bincount(labels[order[:size]], minlength=3)
    share = np.array([300, 100, 37]) * size / 437
    assert np.abs(counts - share).max() <= 1


def numbered_split(count: int = 200) -> base.Split:
  """Images that carry their own number."""
  number = np.arange(count, dtype=np.uint8)
  images = np.broadcast_to(number[:, None, None, None], (count, 2, 2, 1))
  return base.Split(images.copy(), (number % 7).astype(np.int32))


def test_hold_out_divides_without_loss_and_keeps_order():
  split = numbered_split()
  rest, held = base.hold_out(split, 30)
  assert (len(rest.labels), len(held.labels)) == (170, 30)
  for part in (rest, held):
    numbers = part.images[:, 0, 0, 0]
    assert (np.diff(numbers.astype(int)) > 0).all()
    np.testing.assert_array_equal(part.labels, numbers % 7)
  together = np.concatenate([rest.images, held.images])[:, 0, 0, 0]
  assert sorted(together.tolist()) == list(range(200))


def test_a_smaller_validation_split_is_part_of_a_larger_one():
  small, large = (
    set(base.hold_out(numbered_split(), size)[1].images[:, 0, 0, 0].tolist())
    for size in (20, 50)
  )
  assert small < large


@pytest.mark.parametrize("size", [-1, 0, 200, 1024])
def test_hold_out_must_leave_something_on_both_sides(size):
  with pytest.raises(UserError, match=f"validation_size: {size}; .*199"):
    base.hold_out(numbered_split(), size)


SPEC = data.spec("cifar10")
IMAGES = np.zeros((3, 32, 32, 3), np.uint8)
LABELS = np.array([0, 9, 4])


def test_checked_split_gives_int32_labels():
  split = base.checked_split(SPEC, IMAGES, LABELS, where="here")
  assert split.images is IMAGES
  assert split.labels.dtype == np.int32
  assert split.labels.tolist() == [0, 9, 4]


@pytest.mark.parametrize(
  ("images", "labels", "message"),
  [
    (IMAGES.astype(np.float32), LABELS, "here: images are float32"),
    (IMAGES[:, :28], LABELS, r"\[3, 28, 32, 3\].*\[N, 32, 32, 3\]"),
    (IMAGES, LABELS[:2], r"labels are int64 \[2\] for 3 images"),
    (IMAGES, LABELS.astype(float), "labels are float64"),
    (IMAGES[:0], LABELS[:0], "no images"),
    (IMAGES, np.array([0, 10, 4]), "label 10 is out of range.* 0 to 9"),
    (IMAGES, np.array([0, -1, 4]), "label -1 is out of range.* 0 to 9"),
  ],
)
def test_checked_split_says_what_is_wrong(images, labels, message):
  with pytest.raises(UserError, match=message):
    base.checked_split(SPEC, images, labels, where="here")


def test_unknown_name_lists_the_known_ones():
  for call in (data.spec, data.load):
    with pytest.raises(UserError, match=r"'mnist'.*cifar10, cifar100, digits"):
      call("mnist")
