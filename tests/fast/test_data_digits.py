import collections

import numpy as np
import pytest
from sklearn import datasets

from atat_jax import data
from atat_jax.errors import UserError


@pytest.fixture(scope="module")
def digits():
  return data.load("digits", validation_size=180)


def test_digits_have_their_sizes_and_dtypes(digits):
  splits = digits.train, digits.validation, digits.test
  assert [len(split.labels) for split in splits] == [1257, 180, 360]
  for split in splits:
    assert split.images.dtype == np.uint8
    assert split.images.shape == (len(split.labels), 8, 8, 1)
    assert split.labels.dtype == np.int32


def test_splits_are_disjoint_and_hold_exactly_the_original(digits):
  original = datasets.load_digits()
  pixels = [[round(v * 255 / 16) for v in row] for row in original.data]
  expected = collections.Counter(
    (bytes(row), int(label))
    for row, label in zip(pixels, original.target, strict=True)
  )
  found = collections.Counter(
    (image.tobytes(), int(label))
    for split in (digits.train, digits.validation, digits.test)
    for image, label in zip(split.images, split.labels, strict=True)
  )
  assert found == expected
  assert max(expected.values()) == 1  # so that equal counts mean disjoint


def test_classes_are_in_proportion(digits):
  for split in (digits.validation, digits.test):
    counts = np.bincount(split.labels, minlength=10)
    assert counts.max() - counts.min() <= 2


def test_the_test_split_does_not_depend_on_the_validation_size(digits):
  other = data.load("digits", validation_size=1)
  np.testing.assert_array_equal(other.test.images, digits.test.images)
  np.testing.assert_array_equal(other.test.labels, digits.test.labels)
  assert len(other.train.labels) == 1436


def test_statistics_are_those_of_the_training_pixels(digits):
  pixels = np.concatenate([digits.train.images, digits.validation.images]) / 255
  assert digits.spec.mean == pytest.approx([pixels.mean()], abs=1e-4)
  assert digits.spec.std == pytest.approx([pixels.std()], abs=1e-4)


@pytest.mark.parametrize("size", [0, 1437])
def test_a_validation_size_out_of_range_is_named(size):
  with pytest.raises(UserError, match=f"validation_size: {size}; allowed: "):
    data.load("digits", validation_size=size)


def test_other_sources_are_refused():
  with pytest.raises(UserError, match="source: 'tfds'; allowed: auto"):
    data.load("digits", source="tfds")
