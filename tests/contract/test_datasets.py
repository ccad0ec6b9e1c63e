"""The contract of every data set in `data.DATASETS`.

A minimal data set, registered the way a new one is, goes through the same battery,
as does a user's own in each form that needs no code.
"""

import hashlib

import minimal
import numpy as np
import pytest
from PIL import Image

from atat_jax import data
from atat_jax.errors import UserError

# A tfds set needs a prepared one; tests/fast/test_data_tfds.py makes one.
NAMES = sorted({*data.DATASETS, "minimal"} - {"tfds"})
every_data_set = pytest.mark.parametrize("name", NAMES)


def _write_own(folder):
  """Writes a data set as an .npz and as a folder; returns name to place."""
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (40, 4, 5, 3), np.uint8)
  labels = np.arange(40) % 4
  parts = {"train": slice(0, 36), "test": slice(36, 40)}
  arrays = {}
  for split, part in parts.items():
    arrays |= {
      f"{split}_images": images[part],
      f"{split}_labels": labels[part],
    }
    for label, image in zip(labels[part], images[part], strict=True):
      place = folder / "folder" / split / str(label)
      place.mkdir(parents=True, exist_ok=True)
      name = hashlib.sha256(image).hexdigest()
      Image.fromarray(image).save(place / f"{name}.png")
  np.savez(folder / "own.npz", **arrays)
  return {"npz": folder / "own.npz", "folder": folder / "folder"}


@pytest.fixture(autouse=True)
def _minimal(monkeypatch):
  minimal.register_data_set(monkeypatch)


def _load(name, folder, **fields):
  """Loads a user's own data, or from an empty folder what needs no files."""
  own = {} if data.DATASETS[name].spec else _write_own(folder)
  where = {
    "data_dir": str(own.get(name, folder)),
    "cache_dir": str(folder / "cache"),
  }
  try:
    return data.load(name, validation_size=30, **where, **fields)
  except UserError as error:
    if "not found" not in str(error):
      raise
    assert str(folder) in str(error) and "\n" not in str(error)
    pytest.skip("needs files")


@every_data_set
def test_description_is_consistent(name, tmp_path):
  if data.DATASETS[name].spec:
    spec = data.spec(name)
    assert spec.name == name
  else:
    spec = _load(name, tmp_path).spec
    assert spec.name.startswith(f"{name}:")
  assert len(set(spec.class_names)) == len(spec.class_names) == spec.num_classes
  assert len(spec.image_shape) == 3 and min(spec.image_shape) >= 1
  assert len(spec.mean) == len(spec.std) == spec.image_shape[2]
  assert all(0 < value < 1 for value in (*spec.mean, *spec.std))


@every_data_set
def test_splits_have_the_described_form(name, tmp_path):
  dataset = _load(name, tmp_path)
  if data.DATASETS[name].spec:
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
