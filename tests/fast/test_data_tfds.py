"""Any prepared tfds set of images with labels."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from atat_jax import data
from atat_jax.data import tfds_sets
from atat_jax.errors import UserError

GENERATOR = np.random.default_rng(0)
SPLITS = {
  "train": GENERATOR.integers(0, 256, (12, 7, 6), np.uint8),
  "test": GENERATOR.integers(0, 256, (4, 7, 6), np.uint8),
}


def _png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, format="png")
  return file.getvalue()


def prepare(root, *, label="label", splits=("train", "test"), unlabelled=()):
  """Prepares a set of grey images without ids; returns its version."""

  class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Grey images."""

    name = "shapes"
    VERSION = tfds.core.Version("1.0.0")
    # tfds looks for a builder's notes in its package.
    __module__ = tfds.builder_cls("cifar10").__module__

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(7, 6, 1)),
        label: tfds.features.ClassLabel(names=["disc", "square"]),
      }
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(name) for name in splits}

    def _generate_examples(self, name):
      images = SPLITS["train" if name == "train" else "test"]
      for i, image in enumerate(images):
        number = -1 if name in unlabelled else i % 2
        yield i, {"image": _png(image), label: number}

  builder = Shapes(data_dir=str(root), file_format="array_record")
  builder.download_and_prepare()
  return root / "shapes" / "1.0.0"


def load(root):
  return data.load(
    "tfds:shapes",
    data_dir=str(root),
    cache_dir=str(root / "cache"),
    validation_size=2,
  )


def pairs(images, labels):
  return sorted((bytes(x), int(y)) for x, y in zip(images, labels, strict=True))


@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_prepared_set_is_read_by_its_name(test, tmp_path, monkeypatch):
  prepare(tmp_path, splits=("train", test))
  checked = []
  check = tfds_sets._check
  monkeypatch.setattr(
    tfds_sets, "_check", lambda *args: (checked.append(args), check(*args))[1]
  )
  found = load(tmp_path)
  assert len(checked) == 1
  assert found.spec.name == "tfds:shapes"
  assert found.spec.image_shape == (7, 6, 1)
  assert found.spec.class_names == ("disc", "square")
  expected = pairs(SPLITS["test"], np.arange(4) % 2)
  assert pairs(found.test.images[..., 0], found.test.labels) == expected
  again = load(tmp_path)  # from the decoded copy
  assert again.spec == found.spec
  np.testing.assert_array_equal(again.test.images, found.test.images)


def test_pictures_without_labels_are_not_tested_on(tmp_path):
  """As those of imagenet2012's test split, whose labels are -1."""
  prepare(
    tmp_path, splits=("train", "test", "validation"), unlabelled=("test",)
  )
  found = tfds_sets.stream("shapes", data_dir=str(tmp_path))
  labels = [found.test.read(number).label for number in range(4)]
  assert sorted(labels) == [0, 0, 1, 1]
  with pytest.raises(UserError, match="label -1 is out of range"):
    load(tmp_path)
  prepare(tmp_path / "other", unlabelled=("test",))
  found = tfds_sets.stream("shapes", data_dir=str(tmp_path / "other"))
  with pytest.raises(UserError, match=r"record 0: label -1; allowed: 0 to 1"):
    found.test.read(0)


def test_other_sets_are_refused(tmp_path):
  with pytest.raises(UserError, match="tfds:shapes not found: looked for"):
    load(tmp_path)
  with pytest.raises(UserError, match=r"'tfds:\.\./x'; allowed: tfds:<data"):
    data.spec("tfds:../x")
  with pytest.raises(UserError, match="'tfds:'; allowed: "):
    data.spec("tfds:")
  with pytest.raises(UserError, match="'tfds:'; allowed: "):
    data.spec("tfds")
  prepare(tmp_path, label="kind")
  with pytest.raises(UserError, match="have image, kind; allowed: an 'image'"):
    load(tmp_path)


def test_a_version_cannot_have_a_module_imported(tmp_path):
  version = prepare(tmp_path)
  path = version / "features.json"
  content = json.loads(path.read_text())
  content["pythonClassName"] = "antigravity.FeaturesDict"
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"pythonClassName is 'antigravity"):
    load(tmp_path)
