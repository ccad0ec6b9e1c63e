"""Published corruptions: what is read, and what is refused with its file."""

import os

import corrupted_files
import numpy as np
import pytest

from atat_jax.data.corruptions import published
from atat_jax.errors import UserError

SHAPE = (4, 3, 1)
LABELS = np.array([2, 0, 1, 1, 0, 2, 2], np.uint8)


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "Things-C"
  corrupted_files.write(path, SHAPE, LABELS)
  return path


def read(path, dataset="things", shape=SHAPE, classes=3):
  return published.read(
    path, dataset=dataset, image_shape=shape, num_classes=classes
  )


def refusal(call, *names):
  with pytest.raises(UserError) as error:
    call()
  message = str(error.value)
  assert message.startswith("corruptions: ") and "\n" not in message
  assert "; allowed: " in message
  for name in names:
    assert name in message, message


def test_images_stay_on_the_disk_until_a_block_is_asked_for(tmp_path):
  path = tmp_path / "x"
  arrays = corrupted_files.write(path, SHAPE, LABELS)
  found = read(path, dataset="cifar10")
  assert found.name == "CIFAR-10-C" and read(path).name == "x"
  assert found.labels.tolist() == LABELS.tolist()
  assert all(isinstance(x, np.memmap) for x in found.images.values())
  block = found.block("fog", 4, 5)
  np.testing.assert_array_equal(block, arrays["fog"][3, :5])
  assert isinstance(block, np.memmap)


def test_other_images_have_another_mark(folder, tmp_path):
  found = read(folder)
  corrupted_files.write(tmp_path / "other", SHAPE, LABELS, seed=1)
  marks = {
    *(found.mark("fog", severity, 7) for severity in (1, 2)),
    found.mark("snow", 1, 7),
    read(tmp_path / "other").mark("fog", 1, 7),
  }
  assert len(marks) == 4
  assert found.mark("fog", 1, 7) == read(folder).mark("fog", 1, 7)


def test_a_folder_that_is_none_is_named(tmp_path):
  refusal(lambda: read(tmp_path / "nowhere"), "nowhere", "does not exist")
  (tmp_path / "CIFAR-10-C.tar").write_bytes(b"x")
  refusal(lambda: read(tmp_path / "CIFAR-10-C.tar"), "C.tar", "no folder")


@pytest.mark.parametrize("name", ["labels", "gaussian_noise", "pixelate"])
def test_a_missing_file_is_named(folder, name):
  (folder / f"{name}.npy").unlink()
  refusal(lambda: published.find(folder), f"{name}.npy", "does not exist")


IMAGES = np.zeros((35, *SHAPE), np.uint8)


@pytest.mark.parametrize(
  "images",
  [
    IMAGES[:28],
    IMAGES[:7],
    IMAGES[:, :3],
    IMAGES[..., 0],
    IMAGES.repeat(3, -1),
    IMAGES.astype(np.float32),
    IMAGES.astype(np.int8),
    IMAGES[:0],
  ],
)
def test_images_of_another_shape_or_dtype_are_refused(folder, images):
  np.save(folder / "frost.npy", images)
  refusal(lambda: read(folder), "frost.npy", "uint8 [35, 4, 3, 1]")


@pytest.mark.parametrize(
  "labels, told",
  [
    (np.tile(LABELS, 4), "[28]"),
    (np.tile(LABELS, 5)[:, None], "[35, 1]"),
    (np.tile(LABELS, 5).astype(np.float32), "float32"),
    (np.zeros(0, np.uint8), "[0]"),
    (np.tile(LABELS, 5) + 1, "classes 1 to 3"),
    (np.tile(LABELS, 5).astype(np.int64) - 1, "classes -1 to 1"),
    (np.repeat(LABELS, 5), "differ between the severities"),
  ],
)
def test_labels_that_are_none_are_refused(folder, labels, told):
  np.save(folder / "labels.npy", labels)
  refusal(lambda: read(folder), "labels.npy", told)


def test_labels_of_other_test_images_are_refused(folder):
  found = read(folder)
  found.check_labels(LABELS.astype(np.int32), "things")
  found.check_labels(LABELS[:4], "things")  # the first images
  refusal(
    lambda: found.check_labels(np.array([2, 0, 2]), "things"),
    *("labels.npy", "image 2 has class 1", "things"),
  )
  more = np.append(LABELS, 1)
  refusal(lambda: found.check_labels(more, "things"), "7 images", "8")


def test_hostile_files_end_in_one_line(folder):
  path = folder / "fog.npy"
  whole = path.read_bytes()

  def planted(content):
    path.write_bytes(content)
    refusal(lambda: read(folder), "fog.npy")

  planted(b"")
  planted(b"not an array")
  planted(whole[:-1])
  planted(whole + b"x")
  planted(whole.replace(b"(35, ", b"(99, "))
  planted(whole.replace(b"'|u1'", b"'|O8'"))
  planted(whole.replace(b"(35, ", b"((((("))
  path.unlink()
  np.save(path, np.array([{}], object), allow_pickle=True)
  refusal(lambda: read(folder), "fog.npy")
  path.unlink()
  os.mkfifo(path)
  refusal(lambda: read(folder), "fog.npy")
  path.unlink()
  path.mkdir()
  refusal(lambda: read(folder), "fog.npy")


def test_the_further_files_of_the_archive_do_no_harm(folder):
  (folder / "saturate.npy").write_bytes(b"damaged")
  assert "saturate" not in read(folder).images
