"""Where CIFAR is looked for, and the decoded copy kept of it."""

import logging
import os

import cifar_archives as archives
import numpy as np
import pytest

from atat_jax import data
from atat_jax.data import archives as official
from atat_jax.data import cifar
from atat_jax.errors import UserError

TRAIN = archives.random_images(12, 10, seed=1)
TEST = archives.random_images(4, 10, seed=2)


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  archives.cifar10_binary(folder / "cifar-10-binary.tar.gz", TRAIN, TEST)
  return folder


@pytest.fixture
def decodings(monkeypatch):
  """Counts how often an archive is decoded."""
  calls = []
  original = official.read_archive

  def counted(*args, **kwargs):
    calls.append(args)
    return original(*args, **kwargs)

  monkeypatch.setattr(official, "read_archive", counted)
  return calls


def read(data_dir, cache_dir, **kwargs):
  return cifar.read_cifar10(
    data_dir=str(data_dir), cache_dir=str(cache_dir), **kwargs
  )


def same(splits, train=TRAIN, test=TEST):
  for split, (images, labels) in zip(splits, (train, test), strict=True):
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, labels)


def only_file(folder):
  (path,) = folder.iterdir()  # no partial files left
  return path


def test_an_archive_is_decoded_once(source, tmp_path, decodings):
  for _ in range(3):
    same(read(source, tmp_path / "cache"))
  assert len(decodings) == 1
  assert only_file(tmp_path / "cache").stat().st_size > 16 * 3072


def test_folder_and_file_share_the_decoded_copy(source, tmp_path, decodings):
  read(source, tmp_path / "cache")
  same(read(source / "cifar-10-binary.tar.gz", tmp_path / "cache"))
  assert len(decodings) == 1


def test_changed_data_replace_the_decoded_copy(source, tmp_path, decodings):
  read(source, tmp_path / "cache")
  other = archives.random_images(12, 10, seed=5)
  archives.cifar10_binary(source / "cifar-10-binary.tar.gz", other, TEST)
  same(read(source, tmp_path / "cache"), other)
  same(read(source, tmp_path / "cache"), other)
  assert len(decodings) == 2
  only_file(tmp_path / "cache")


def test_a_new_modification_time_counts_as_a_change(
  source, tmp_path, decodings
):
  read(source, tmp_path / "cache")
  os.utime(source / "cifar-10-binary.tar.gz", ns=(1, 1))
  same(read(source, tmp_path / "cache"))
  assert len(decodings) == 2


def flip_pixel_byte(content):
  position = content.index(TRAIN[0].tobytes()[:64])
  return content[:position] + b"\xaa\x55" + content[position + 2 :]


@pytest.mark.parametrize(
  "damage",
  [
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: content[:-1],
    lambda content: bytes(len(content)),
    flip_pixel_byte,
  ],
)
def test_a_damaged_copy_is_made_again(source, tmp_path, decodings, damage):
  read(source, tmp_path / "cache")
  path = only_file(tmp_path / "cache")
  content = path.read_bytes()
  path.write_bytes(damage(content))
  same(read(source, tmp_path / "cache"))
  assert len(decodings) == 2
  same(read(source, tmp_path / "cache"))
  assert len(decodings) == 2


def test_a_copy_with_pickled_objects_is_not_loaded(source, tmp_path, decodings):
  read(source, tmp_path / "cache")
  path = only_file(tmp_path / "cache")
  with np.load(path) as copy:
    arrays = dict(copy)
  arrays["train_labels"] = arrays["train_labels"].astype(object)
  np.savez(path, **arrays)
  same(read(source, tmp_path / "cache"))
  assert len(decodings) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(source, tmp_path, caplog):
  blocked = tmp_path / "file"
  blocked.write_text("")
  with caplog.at_level(logging.WARNING):
    same(read(source, blocked / "cache"))
  (record,) = caplog.records
  assert "cannot write the decoded copy of cifar10" in record.getMessage()


def test_a_write_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
  def full(file, **arrays):
    file.write(b"half of it")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", full)
  same(read(source, tmp_path / "cache"))
  assert not list((tmp_path / "cache").iterdir())


def test_the_copy_alone_is_enough(source, tmp_path):
  before = data.load(
    "cifar10",
    data_dir=str(source),
    cache_dir=str(tmp_path / "cache"),
    validation_size=3,
  )
  copy = only_file(tmp_path / "cache").rename(tmp_path / "elsewhere.npz")
  (source / "cifar-10-binary.tar.gz").unlink()
  after = data.load(
    "cifar10",
    data_dir=str(copy),
    cache_dir=str(tmp_path / "unused"),
    validation_size=3,
  )
  for name in ("train", "validation", "test"):
    for a, b in zip(getattr(before, name), getattr(after, name), strict=True):
      np.testing.assert_array_equal(a, b)
  assert (len(after.train.labels), len(after.validation.labels)) == (9, 3)
  assert not (tmp_path / "unused").exists()


def test_a_copy_of_the_other_data_set_is_refused(source, tmp_path):
  read(source, tmp_path / "cache")
  with pytest.raises(
    UserError, match=r"decoded copy of cifar100.*holds cifar10"
  ):
    cifar.read_cifar100(data_dir=str(only_file(tmp_path / "cache")))


def test_a_damaged_copy_given_by_name_is_an_error(tmp_path):
  path = tmp_path / "copy.npz"
  path.write_bytes(b"nothing")
  with pytest.raises(
    UserError, match=r"copy\.npz: not a decoded copy"
  ) as error:
    read(path, tmp_path)
  assert "\n" not in str(error.value)


def test_missing_data_says_what_where_and_how(tmp_path):
  with pytest.raises(UserError) as error:
    read(tmp_path / "nowhere", tmp_path / "cache")
  message = str(error.value)
  where = tmp_path / "nowhere"
  for part in (
    "cifar10/<version>/cifar10-*.array_record*",
    "cifar-10-binary.tar.gz",
    "cifar-10-python.tar.gz",
    f"in {where};",
    f"`python -m atat_jax.data.prepare cifar10 --data_dir={where}`",
    "`--config=configs/digits.py`",
  ):
    assert part in message
  assert "\n" not in message


def test_missing_data_names_only_the_source_asked_for(tmp_path):
  with pytest.raises(UserError, match=r"for cifar-10-python\.tar\.gz in"):
    read(tmp_path, tmp_path, source="python")


def test_missing_data_points_at_a_copy_of_it(source, tmp_path):
  read(source, tmp_path / "cache")
  (source / "cifar-10-binary.tar.gz").unlink()
  with pytest.raises(UserError) as error:
    read(source, tmp_path / "cache")
  assert str(only_file(tmp_path / "cache")) in str(error.value)


@pytest.mark.parametrize(
  ("data_dir", "message"),
  [
    ("gone.npz", r"gone\.npz: no such file"),
    ("cifar-10-binary.tar.gz", r"cifar-10-binary\.tar\.gz: no such file"),
    ("x" * 300, "data_dir: .*: File name too long"),
  ],
)
def test_paths_of_no_file_are_named(tmp_path, data_dir, message):
  with pytest.raises(UserError, match=message):
    read(tmp_path / data_dir, tmp_path)


def test_an_unknown_source_is_refused_with_the_known_ones(source, tmp_path):
  with pytest.raises(
    UserError, match=r"source: 'torch'.*auto, binary, python, tfds"
  ):
    read(source, tmp_path, source="torch")


def test_default_directories_follow_the_environment(
  source, tmp_path, monkeypatch
):
  monkeypatch.setenv("TFDS_DATA_DIR", str(source))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  same(cifar.read_cifar10())
  only_file(tmp_path / "xdg" / "atat_jax" / "data")

  monkeypatch.delenv("TFDS_DATA_DIR")
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  source.rename(tmp_path / "moved")
  (tmp_path / "home").mkdir()
  (tmp_path / "moved").rename(tmp_path / "home" / "tensorflow_datasets")
  same(cifar.read_cifar10())
  only_file(tmp_path / "home" / ".cache" / "atat_jax" / "data")
