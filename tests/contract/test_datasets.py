"""The contract of every data set in `data.DATASETS`.

A minimal data set, registered the way a new one is, goes through the same battery.
"""

import minimal
import numpy as np
import pytest

from atat_jax import data
from atat_jax.errors import UserError

every_data_set = pytest.mark.parametrize("name", [*data.DATASETS, "minimal"])


@pytest.fixture(autouse=True)
def _minimal(monkeypatch):
  minimal.register_data_set(monkeypatch)


def _load(name, folder, **fields):
  """Loads from an empty folder; skips data sets that need files."""
  where = {"data_dir": str(folder), "cache_dir": str(folder)}
  try:
    return data.load(name, validation_size=30, **where, **fields)
  except UserError as error:
    if "not found" not in str(error):
      raise
    assert str(folder) in str(error) and "\n" not in str(error)
    pytest.skip("needs files")


@every_data_set
def test_description_is_consistent(name):
  spec = data.spec(name)
  assert spec.name == name
  assert len(set(spec.class_names)) == len(spec.class_names) == spec.num_classes
  assert len(spec.image_shape) == 3 and min(spec.image_shape) >= 1
  assert len(spec.mean) == len(spec.std) == spec.image_shape[2]
  assert all(0 < value < 1 for value in (*spec.mean, *spec.std))


@every_data_set
def test_splits_have_the_described_form(name, tmp_path):
  dataset = _load(name, tmp_path)
  assert dataset.spec == data.spec(name)
  assert len(dataset.validation.labels) == 30
  for images, labels in (dataset.train, dataset.validation, dataset.test):
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    assert images.shape == (len(labels), *dataset.spec.image_shape)
    assert 0 <= labels.min() and labels.max() < dataset.spec.num_classes


@every_data_set
def test_two_readings_are_equal(name, tmp_path):
  first, second = (_load(name, tmp_path) for _ in range(2))
  for split in ("train", "validation", "test"):
    for a, b in zip(getattr(first, split), getattr(second, split), strict=True):
      np.testing.assert_array_equal(a, b)


@every_data_set
def test_an_unknown_source_is_refused(name, tmp_path):
  with pytest.raises(UserError, match="source: 'carrier pigeon'"):
    _load(name, tmp_path, source="carrier pigeon")
