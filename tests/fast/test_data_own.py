"""Data sets of a user's own: one .npz, or pictures in folders."""

import numpy as np
import pytest
from PIL import Image

from atat_jax import data
from atat_jax.errors import UserError

GENERATOR = np.random.default_rng(0)


def random_arrays(shape=(6, 5, 3), classes=3, train=12, test=6):
  """A data set in which every class is there."""
  return {
    "train_images": GENERATOR.integers(0, 256, (train, *shape), np.uint8),
    "train_labels": np.arange(train) % classes,
    "test_images": GENERATOR.integers(0, 256, (test, *shape), np.uint8),
    "test_labels": np.arange(test) % classes,
  }


def write_npz(folder, **changes):
  path = folder / "mine.npz"
  found = random_arrays() | changes
  np.savez(path, **{k: v for k, v in found.items() if v is not None})
  return path


def load_npz(path, name="npz"):
  return data.load(name, data_dir=str(path), validation_size=3)


def write_folder(root, images, classes=("b", "a"), suffix=".png"):
  """Writes one picture a class and split; returns the folder."""
  for split in ("train", "test"):
    for name, image in zip(classes, images, strict=True):
      place = root / split / name
      place.mkdir(parents=True, exist_ok=True)
      for number in range(2 if split == "train" else 1):
        image.save(place / f"{number}{suffix}")
  return root


def load_folder(root, cache, **fields):
  return data.load(
    "folder",
    data_dir=str(root),
    cache_dir=str(cache),
    validation_size=1,
    **fields,
  )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_npz_comes_back_whole_and_describes_itself(channels, tmp_path):
  arrays = random_arrays((6, 5, channels))
  path = write_npz(tmp_path, **arrays, class_names=np.array(["x", "y", "ä"]))
  found = load_npz(path)
  assert found.spec == data.spec("npz", data_dir=str(path))
  assert found.spec.name == "npz:mine"
  assert found.spec.class_names == ("x", "y", "ä")
  assert found.spec.image_shape == (6, 5, channels)
  pixels = arrays["train_images"].astype(np.float64) / 255
  np.testing.assert_allclose(found.spec.mean, pixels.mean((0, 1, 2)))
  np.testing.assert_allclose(found.spec.std, pixels.std((0, 1, 2)))
  np.testing.assert_array_equal(found.test.images, arrays["test_images"])
  np.testing.assert_array_equal(found.test.labels, arrays["test_labels"])
  held = np.concatenate([found.train.images, found.validation.images])
  assert sorted(map(bytes, held)) == sorted(map(bytes, arrays["train_images"]))


def test_grey_images_without_an_axis_and_labels_of_keras_are_read(tmp_path):
  arrays = random_arrays((6, 5))
  labels = arrays["train_labels"][:, None]
  path = write_npz(tmp_path, **arrays | {"train_labels": labels})
  found = load_npz(path, "npz:flowers")
  assert found.spec.name == "npz:flowers"
  assert found.spec.image_shape == (6, 5, 1)
  assert found.spec.class_names == ("0", "1", "2")
  assert found.spec.num_classes == 3


def test_a_channel_without_variation_is_not_divided_by_zero(tmp_path):
  arrays = random_arrays((6, 5, 4))
  arrays["train_images"][..., 3] = 255
  assert load_npz(write_npz(tmp_path, **arrays)).spec.std[3] == 1.0


FLOATS = np.zeros((12, 6, 5, 3), np.float32)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"test_labels": None}, r"has no test_labels, but train_images"),
    ({"train_images": FLOATS}, r"\(train\): images are float32.*\* 255"),
    (
      {"train_images": np.zeros((12, 3, 8, 8), np.uint8)},
      r"\[12, 3, 8, 8\]; allowed: \[N, H, W, C\].*transpose\(0, 2, 3, 1\)",
    ),
    ({"train_labels": np.arange(12) % 3 + 1}, "no training image has 0"),
    ({"train_labels": np.arange(12) % 3 - 1}, "labels -1 to 1"),
    ({"train_labels": np.arange(12) % 3 * 10**9}, "no training image has 1"),
    ({"train_labels": np.arange(12) / 4}, r"labels are float64 \[12\]"),
    ({"train_labels": np.arange(11) % 3}, r"\[11\] for 12 images"),
    ({"test_labels": np.arange(6)}, r"\(test\): label 5 is out of range"),
    (
      {"test_images": np.zeros((6, 5, 5, 3), np.uint8)},
      r"\(test\): images are uint8 \[6, 5, 5, 3\]",
    ),
    ({"train_labels": np.zeros(12, int)}, "1 classes; allowed: 2 to 1000"),
    ({"class_names": np.array(["a", "b", "a"])}, "two classes are named 'a'"),
    ({"class_names": np.array(["a", "b"])}, "label 2 is out of range"),
    ({"class_names": np.arange(3)}, r"class_names is int64 \[3\]"),
  ],
)
def test_an_npz_that_cannot_be_used_is_refused(changes, message, tmp_path):
  path = write_npz(tmp_path, **changes)
  with pytest.raises(UserError, match=message) as refusal:
    load_npz(path)
  assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_place_and_a_wrong_name_are_refused(tmp_path):
  for name in ("npz", "folder"):
    with pytest.raises(UserError, match="data_dir: missing; allowed: "):
      data.load(name)
    with pytest.raises(UserError, match=r"data_dir=.*nowhere: (n|N)o such "):
      data.load(name, data_dir=str(tmp_path / "nowhere"))
  for name in ("digits:mine", "npz:", "nothing:x"):
    with pytest.raises(UserError, match=r"name: '.*; allowed: "):
      data.spec(name)
  with pytest.raises(UserError, match="size: 8; allowed: 0"):
    data.load("digits", size=8)
  (tmp_path / "text.npz").write_text("hello")
  with pytest.raises(UserError, match=r"text\.npz: not a \.npz"):
    data.load("npz", data_dir=str(tmp_path / "text.npz"))


def colours(seed, size=(5, 6)):
  generator = np.random.default_rng(seed)
  return Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))


def test_a_folder_is_read_in_the_order_of_the_names_and_kept(tmp_path):
  pictures = [colours(1), colours(2)]
  root = write_folder(tmp_path / "mine", pictures)
  (root / "train" / ".hidden").mkdir()
  found = load_folder(root, tmp_path / "cache")
  assert found.spec.name == "folder:mine"
  assert found.spec.class_names == ("a", "b")
  np.testing.assert_array_equal(found.test.labels, [0, 1])
  for image, picture in zip(found.test.images, pictures[::-1], strict=True):
    np.testing.assert_array_equal(image, np.asarray(picture))
  (copy,) = (tmp_path / "cache").iterdir()
  before = copy.stat().st_mtime_ns
  assert load_folder(root, tmp_path / "cache").spec == found.spec
  assert copy.stat().st_mtime_ns == before
  colours(3).save(root / "test" / "a" / "0.png")  # the copy is now old
  again = load_folder(root, tmp_path / "cache")
  np.testing.assert_array_equal(again.test.images[0], np.asarray(colours(3)))


def test_pictures_of_one_set_get_the_same_channels(tmp_path):
  grey = Image.fromarray(np.full((5, 6), 7, np.uint8))
  both = write_folder(tmp_path / "both", [grey, colours(1)])
  found = load_folder(both, tmp_path)
  assert found.spec.image_shape == (5, 6, 3)
  assert (found.test.images[1] == 7).all()
  greys = write_folder(tmp_path / "grey", [grey, grey])
  assert load_folder(greys, tmp_path).spec.image_shape == (5, 6, 1)
  clear = [colours(1).convert("RGBA"), grey.convert("LA")]
  alpha = write_folder(tmp_path / "alpha", clear)
  assert load_folder(alpha, tmp_path).spec.image_shape == (5, 6, 4)


def test_pictures_of_several_sizes_need_a_size(tmp_path):
  root = write_folder(tmp_path / "x", [colours(1), colours(2, (8, 6))])
  with pytest.raises(UserError, match=r"b/0\.png: .* --config\.data\.size=64"):
    load_folder(root, tmp_path)
  found = load_folder(root, tmp_path, size=4)
  assert found.spec.image_shape == (4, 4, 3)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
  root = write_folder(tmp_path / "x", [colours(1), colours(2)])
  (root / "test" / "c").mkdir()
  with pytest.raises(UserError, match=r"test/c: a class that .*train does not"):
    load_folder(root, tmp_path)
  (root / "test" / "c").rmdir()
  (root / "train" / "c").mkdir()
  with pytest.raises(UserError, match=r"train/c: no pictures"):
    load_folder(root, tmp_path)
  (root / "train" / "c").rmdir()
  (root / "train" / "a" / "0.png").write_bytes(b"no picture")
  with pytest.raises(UserError, match=r"train/a/0\.png: not a picture"):
    load_folder(root, tmp_path)
  with pytest.raises(UserError, match=r"train/<class>/\* and test, val"):
    load_folder(root / "train", tmp_path)


@pytest.fixture
def reads(monkeypatch):
  """Names of the files that are read whole, decoded copies included."""
  from atat_jax.data import base, folder, npz

  found = []
  for module, name in ((npz, "_load"), (folder, "_read"), (base, "read_cache")):
    original = getattr(module, name)

    def spy(path, *args, original=original, **fields):
      found.append(path.name)
      return original(path, *args, **fields)

    monkeypatch.setattr(module, name, spy)
  return found


def test_a_start_reads_an_npz_once_and_notices_another(tmp_path, reads):
  path = write_npz(tmp_path)
  for _ in range(2):  # a plan asks for the description, a run for the arrays
    spec = data.spec("npz", data_dir=str(path))
    assert data.spec("npz", data_dir=str(path)) == spec
    assert load_npz(path).spec == spec
    assert reads == ["mine.npz"]
    reads.clear()
  data.spec("npz", data_dir=str(path))
  changed = random_arrays()
  write_npz(tmp_path, **changed)
  found = load_npz(path)
  np.testing.assert_array_equal(found.test.images, changed["test_images"])
  assert found.spec == data.spec("npz", data_dir=str(path)) != spec


@pytest.mark.parametrize("writable", [True, False])
def test_a_start_reads_each_picture_once(tmp_path, reads, writable):
  root = write_folder(tmp_path / "mine", [colours(1), colours(2)])
  cache = tmp_path / "cache"
  if not writable:
    cache.write_text("no folder")

  def start():
    reads.clear()
    where = {"data_dir": str(root), "cache_dir": str(cache)}
    assert data.spec("folder", **where) == load_folder(root, cache).spec
    return len(reads)

  assert start() == 6  # pictures
  assert start() == (1 if writable else 6)  # of a copy the header, then all
  colours(3).save(root / "train" / "a" / "0.png")
  before = data.spec("folder", data_dir=str(root), cache_dir=str(cache))
  colours(4).save(root / "test" / "a" / "0.png")
  found = load_folder(root, cache)
  assert found.spec == before  # of training pictures
  np.testing.assert_array_equal(found.test.images[0], np.asarray(colours(4)))


def test_a_copy_that_is_damaged_behind_its_header_is_made_again(tmp_path):
  root = write_folder(tmp_path / "mine", [colours(1), colours(2)])
  found = load_folder(root, tmp_path / "cache")
  (copy,) = (tmp_path / "cache").iterdir()
  content = copy.read_bytes()
  pixels = found.test.images.tobytes()
  assert pixels in content
  copy.write_bytes(content.replace(pixels, pixels[::-1]))
  where = {"data_dir": str(root), "cache_dir": str(tmp_path / "cache")}
  assert data.spec("folder", **where) == found.spec
  again = load_folder(root, tmp_path / "cache")
  np.testing.assert_array_equal(again.test.images, found.test.images)
