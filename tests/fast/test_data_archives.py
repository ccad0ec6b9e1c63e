"""The official archives, read in memory and trusted in nothing."""

import os
import pickle
import tarfile
import warnings

import cifar_archives as archives
import numpy as np
import pytest

from atat_jax.data import cifar
from atat_jax.errors import UserError

TRAIN10 = archives.random_images(12, 10, seed=1)
TEST10 = archives.random_images(4, 10, seed=2)
TRAIN100 = archives.random_images(9, 100, seed=3)
TEST100 = archives.random_images(5, 100, seed=4)


def same(split, images, labels):
  assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
  np.testing.assert_array_equal(split.images, images)
  np.testing.assert_array_equal(split.labels, labels)


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("source", ["auto", "named"])
@pytest.mark.parametrize("place", ["folder", "file", "renamed"])
def test_cifar10_archives_give_their_images_and_labels(
  tmp_path, kind, source, place
):
  name = "mine.tgz" if place == "renamed" else f"cifar-10-{kind}.tar.gz"
  write = getattr(archives, f"cifar10_{kind}")
  path = write(tmp_path / name, TRAIN10, TEST10)
  train, test = cifar.read_cifar10(
    data_dir=str(tmp_path if place == "folder" else path),
    cache_dir=str(tmp_path / "cache"),
    source=kind if source == "named" else "auto",
  )
  same(train, *TRAIN10)
  same(test, *TEST10)
  assert sorted(os.listdir(tmp_path)) == sorted([name, "cache"])  # no more


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar100_archives_give_the_fine_labels(tmp_path, kind):
  write = getattr(archives, f"cifar100_{kind}")
  write(tmp_path / f"cifar-100-{kind}.tar.gz", TRAIN100, TEST100)
  train, test = cifar.read_cifar100(
    data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")
  )
  same(train, *TRAIN100)
  same(test, *TEST100)


def test_auto_takes_binary_before_python(tmp_path):
  other = archives.random_images(12, 10, seed=9)
  archives.cifar10_python(tmp_path / "cifar-10-python.tar.gz", other, TEST10)
  archives.cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", TRAIN10, TEST10)
  where = dict(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
  same(cifar.read_cifar10(**where)[0], *TRAIN10)
  same(cifar.read_cifar10(source="python", **where)[0], *other)


# --- Pickles -----------------------------------------------------------------


def read_python(tmp_path, batch: bytes):
  """Reads an archive whose second training file is `batch`."""
  folder = "cifar-10-batches-py"
  good = archives.python2_file(TEST10[0], {"labels": TEST10[1]})
  names = (*archives.TRAIN10, "test_batch")
  files = {f"{folder}/{name}": good for name in names}
  files[f"{folder}/data_batch_2"] = batch
  path = archives.write_tar(tmp_path / "a.tar.gz", files)
  return cifar.read_cifar10(data_dir=str(path), cache_dir=str(tmp_path / "c"))


def rows(images):
  return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def test_the_fixture_is_a_pickle_that_numpy_reads():
  content = archives.python2_file(TEST10[0], {"labels": TEST10[1]})
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # newer numpy dislikes the old dtype state
    batch = pickle.loads(content, encoding="bytes")
  np.testing.assert_array_equal(batch[b"data"], rows(TEST10[0]))
  assert batch[b"labels"] == TEST10[1].tolist()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_copies_pickled_by_python_3_are_read(tmp_path, protocol):
  batch = {"data": rows(TRAIN10[0]), "labels": TRAIN10[1].tolist()}
  train, _ = read_python(tmp_path, pickle.dumps(batch, protocol=protocol))
  np.testing.assert_array_equal(train.images[4:16], TRAIN10[0])
  np.testing.assert_array_equal(train.labels[4:16], TRAIN10[1])


class Call:
  """Pickles to an instruction to call `function(*args)`."""

  def __init__(self, function, *args):
    self.reduced = (function, args)

  def __reduce__(self):
    return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("inside", ["alone", "value", "label", "array state"])
def test_a_malicious_pickle_is_refused_and_not_executed(
  tmp_path, protocol, inside
):
  canary = tmp_path / "executed"
  attack = Call(os.system, f"touch {canary}")
  batch = {"data": rows(TEST10[0]), "labels": TEST10[1].tolist()}
  batch |= {
    "alone": {},
    "value": {"filenames": attack},
    "label": {"labels": [attack] * 4},
    "array state": {"data": Call(np.dtype, attack)},
  }[inside]
  content = pickle.dumps(attack if inside == "alone" else batch, protocol)
  with pytest.raises(UserError, match=r"data_batch_2: .*system.*refused") as e:
    read_python(tmp_path, content)
  assert "\n" not in str(e.value)
  assert not canary.exists()
  # It is a live one: the pickle module does execute it.
  try:
    pickle.loads(content)
  except TypeError:
    pass  # numpy dislikes what comes after the attack
  assert canary.exists()


def test_known_names_are_not_called_either(tmp_path):
  # A huge array from allowed names: numpy would allocate it at once.
  huge = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
  huge += b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85U\x01b\x87R"
  batch = archives.python2_file(TEST10[0], {"labels": TEST10[1]}, data=huge)
  with pytest.raises(UserError, match="data_batch_2"):
    read_python(tmp_path, batch)


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    ([1, 2], "does not hold a dict"),
    ({"labels": [1]}, "has no 'data'"),
    ({"data": rows(TEST10[0])}, "has no 'labels'"),
    ({"data": [1], "labels": [1]}, "'data' is not an array"),
    ({"data": rows(TEST10[0]).astype("f4"), "labels": [1]}, "not a uint8"),
    ({"data": rows(TEST10[0]), "labels": [1, 2]}, "4 images, but 2 labels"),
    ({"data": rows(TEST10[0]), "labels": [1, 2, 3, "4"]}, "list of integers"),
    ({"data": rows(TEST10[0])[:, :9], "labels": [1] * 4}, r"\[4, 9\]"),
    ({"data": rows(TEST10[0]), "labels": [1, 2, 3, 10]}, "label 10 is out of"),
    ({"data": rows(TEST10[0]), "labels": [1, 2, 3, -1]}, "label -1 is out of"),
    ({"data": rows(TEST10[0]), "labels": [1, 2, 3, 2**70]}, "data_batch_2"),
  ],
)
def test_pickles_of_other_content_are_refused(tmp_path, batch, message):
  with pytest.raises(UserError, match=message) as error:
    read_python(tmp_path, pickle.dumps(batch, protocol=2))
  assert "\n" not in str(error.value)


def test_a_pickle_that_ends_early_is_refused(tmp_path):
  content = archives.python2_file(TEST10[0], {"labels": TEST10[1]})
  with pytest.raises(UserError, match="data_batch_2"):
    read_python(tmp_path, content[:-5000])


# --- Damaged and wrong archives ----------------------------------------------


@pytest.fixture
def good(tmp_path):
  return archives.cifar10_binary(tmp_path / "good.tar.gz", TRAIN10, TEST10)


def refused(tmp_path, path, message, read=cifar.read_cifar10):
  with pytest.raises(UserError, match=message) as error:
    read(data_dir=str(path), cache_dir=str(tmp_path / "cache"))
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "cache").exists()


def test_a_file_without_gzip_is_refused(tmp_path):
  path = tmp_path / "cifar-10-binary.tar.gz"
  path.write_bytes(b"<html>404</html>")
  refused(tmp_path, path, "not a usable cifar10 archive")


def test_a_truncated_archive_is_refused(tmp_path, good):
  content = good.read_bytes()
  good.write_bytes(content[: len(content) // 2])
  refused(tmp_path, good, "not a usable cifar10 archive")


def test_every_damaged_byte_is_noticed(tmp_path, good):
  content = good.read_bytes()
  for position in range(100, len(content), len(content) // 20):
    damaged = bytearray(content)
    damaged[position] ^= 1
    good.write_bytes(damaged)
    refused(tmp_path, good, "archive")


def test_the_archive_of_the_other_data_set_is_refused(tmp_path, good):
  refused(
    tmp_path, good, "not a cifar100 archive.*cifar-100-", cifar.read_cifar100
  )


def test_another_version_than_asked_for_is_refused(tmp_path, good):
  with pytest.raises(UserError, match="no images in cifar-10-batches-py/"):
    cifar.read_cifar10(
      data_dir=str(good), cache_dir=str(tmp_path / "c"), source="python"
    )


def rewritten(good, change):
  with tarfile.open(good) as tar:
    files = {x.name: tar.extractfile(x).read() for x in tar.getmembers()}
  change(files)
  return archives.write_tar(good, files)


def test_an_archive_that_lacks_a_file_is_refused(tmp_path, good):
  path = rewritten(
    good, lambda files: files.pop("cifar-10-batches-bin/data_batch_3.bin")
  )
  refused(tmp_path, path, "incomplete.*cifar-10-batches-bin/data_batch_3.bin")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "test_batch.bin: 0 bytes"),
    (bytes(3072), "test_batch.bin: 3072 bytes are not records of 3073"),
    (bytes([10]) + bytes(3072), r"\(test\): label 10 is out of range"),
    (bytes(3073 * 12_000), "too many for 10000 images"),
  ],
)
def test_a_file_of_wrong_size_or_labels_is_refused(
  tmp_path, good, content, message
):
  name = "cifar-10-batches-bin/test_batch.bin"
  refused(
    tmp_path,
    rewritten(good, lambda files: files.update({name: content})),
    message,
  )


def test_links_are_not_followed(tmp_path, good):
  secret = tmp_path / "secret"
  secret.write_bytes(bytes(3073))
  path = rewritten(
    good, lambda files: files.pop("cifar-10-batches-bin/test_batch.bin")
  )
  with tarfile.open(path) as tar:
    files = {x.name: tar.extractfile(x).read() for x in tar.getmembers()}
  with tarfile.open(path, "w:gz") as tar:
    link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    tar.addfile(link)
  assert files  # the link is the only member left
  refused(tmp_path, path, "not a cifar10 archive")
