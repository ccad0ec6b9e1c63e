"""Preparing a tfds data directory without TensorFlow, from tiny archives."""

import functools
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading

import cifar_archives as archives
import numpy as np
import picture_folders
import pytest
import tensorflow_datasets as tfds

from atat_jax.data import cifar, prepare, tfds_sets
from atat_jax.errors import UserError

TRAIN10 = archives.random_images(30, 10, seed=1)
TEST10 = archives.random_images(8, 10, seed=2)
TRAIN100 = archives.random_images(20, 100, seed=3)
TEST100 = archives.random_images(10, 100, seed=4)


@pytest.fixture
def archive(tmp_path):
  return archives.cifar10_binary(tmp_path / "mine.tar.gz", TRAIN10, TEST10)


def read_back(data_dir, name, split):
  """All records through tfds' own decoding."""
  return list(
    tfds.data_source(
      name,
      split=split,
      data_dir=str(data_dir),
      download=False,
      builder_kwargs=dict(file_format="array_record"),
    )
  )


def same_records(records, split, images, labels):
  assert len(records) == len(labels)
  numbers = [int(record["id"].decode().split("_")[1]) for record in records]
  assert sorted(numbers) == list(range(len(labels)))
  for number, record in zip(numbers, records, strict=True):
    assert record["id"] == f"{split}_{number:05d}".encode()
    np.testing.assert_array_equal(record["image"], images[number])
    assert record["label"] == labels[number]


def test_cifar10_is_a_standard_tfds_directory(tmp_path, archive, capsys):
  root = tmp_path / "tfds"
  prepare.main(["cifar10", f"--data_dir={root}", f"--archive={archive}"])
  version = root / "cifar10" / "3.0.2"
  assert f"{version} is ready" in capsys.readouterr().out

  same_records(read_back(root, "cifar10", "train"), "train", *TRAIN10)
  same_records(read_back(root, "cifar10", "test"), "test", *TEST10)
  info = json.loads((version / "dataset_info.json").read_text())
  assert info["moduleName"] == "tensorflow_datasets.image_classification.cifar"
  assert [split["shardLengths"] for split in info["splits"]] == [["30"], ["8"]]
  names = (version / "label.labels.txt").read_text().split()
  assert tuple(names) == cifar.CIFAR10.class_names

  train, test = cifar.read_cifar10(
    data_dir=str(root), cache_dir=str(tmp_path / "cache"), source="tfds"
  )
  for split, (images, labels) in ((train, TRAIN10), (test, TEST10)):
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, labels)


def test_records_stand_in_the_order_of_the_stock_builder(tmp_path, archive):
  prepare.prepare(
    "cifar10", data_dir=str(tmp_path / "tfds"), archive=str(archive)
  )
  records = read_back(tmp_path / "tfds", "cifar10", "train")
  # tfds sorts by the MD5 of the split's name and the key.
  expected = sorted(
    range(30), key=lambda key: hashlib.md5(f"train{key}".encode()).digest()
  )
  assert [int(record["id"][-5:]) for record in records] == expected


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar100_has_both_labels(tmp_path, kind):
  write = getattr(archives, f"cifar100_{kind}")
  path = write(tmp_path / "mine.tar.gz", TRAIN100, TEST100)
  root = tmp_path / "tfds"
  prepare.prepare("cifar100", data_dir=str(root), archive=str(path))
  records = read_back(root, "cifar100", "train")
  same_records(records, "train", *TRAIN100)
  for record in records:
    assert record["coarse_label"] == record["label"] // 5
  version = root / "cifar100" / "3.0.2"
  names = (version / "coarse_label.labels.txt").read_text().split()
  assert len(set(names)) == 20
  train, _ = cifar.read_cifar100(
    data_dir=str(root), cache_dir=str(tmp_path / "cache")
  )
  np.testing.assert_array_equal(train.labels, TRAIN100[1])


def test_what_is_prepared_is_left_alone(tmp_path, archive, capsys):
  where = dict(data_dir=str(tmp_path / "tfds"), archive=str(archive))
  first = prepare.prepare("cifar10", **where)
  before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
  capsys.readouterr()
  archive.unlink()  # not needed any more
  assert prepare.prepare("cifar10", **where) == first
  assert "prepared already, nothing to do" in capsys.readouterr().out
  assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before


def run_python(code, *args):
  return subprocess.run(
    [sys.executable, "-c", code, *map(str, args)],
    capture_output=True,
    text=True,
  )


WITHOUT_TENSORFLOW = """
import sys
from atat_jax import data
from atat_jax.data import prepare
root, archive, cache = sys.argv[1:]
prepare.prepare("cifar10", data_dir=root, archive=archive)
found = data.load(
    "cifar10", data_dir=root, cache_dir=cache, validation_size=5, source="tfds")
assert len(found.train.labels) == 25
assert "tensorflow_datasets" in sys.modules
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""


def test_tensorflow_is_never_imported(tmp_path, archive):
  result = run_python(
    WITHOUT_TENSORFLOW, tmp_path / "tfds", archive, tmp_path / "cache"
  )
  assert result.returncode == 0, result.stderr
  assert "TensorFlow" not in result.stdout + result.stderr


KILLED = """
import os, signal, sys
from atat_jax.data import prepare
png, count = prepare._png, 0
def fatal(image):
  global count
  count += 1
  if count == 35:  # 30 training images are through, 5 of 8 test images
    os.kill(os.getpid(), signal.SIGKILL)
  return png(image)
prepare._png = fatal
prepare.prepare("cifar10", data_dir=sys.argv[1], archive=sys.argv[2])
"""


def test_killed_half_way_it_leaves_nothing_that_loads(tmp_path, archive):
  root = tmp_path / "tfds"
  assert run_python(KILLED, root, archive).returncode == -signal.SIGKILL
  assert list((root / "cifar10").iterdir())  # it had begun
  where = dict(data_dir=str(root), cache_dir=str(tmp_path / "cache"))
  with pytest.raises(UserError, match="cifar10 not found"):
    cifar.read_cifar10(**where)
  prepare.prepare("cifar10", data_dir=str(root), archive=str(archive))
  np.testing.assert_array_equal(
    cifar.read_cifar10(**where)[0].images, TRAIN10[0]
  )


def test_what_is_not_renamed_yet_is_not_found(tmp_path, archive):
  root = tmp_path / "tfds"
  version = prepare.prepare("cifar10", data_dir=str(root), archive=str(archive))
  version.rename(version.with_name("incomplete.ABCDEF_3.0.2"))
  assert tfds_sets.versions(root, "cifar10") == []


def test_damaged_records_are_a_user_error(tmp_path, archive):
  root = tmp_path / "tfds"
  version = prepare.prepare("cifar10", data_dir=str(root), archive=str(archive))
  (records,) = version.glob("cifar10-test*")
  content = bytearray(records.read_bytes())
  third = len(content) // 3
  content[third : 2 * third] = bytes(third)
  records.write_bytes(content)
  with pytest.raises(UserError, match=r"cannot be read.*prepare cifar10") as e:
    cifar.read_cifar10(data_dir=str(root), cache_dir=str(tmp_path / "cache"))
  assert "\n" not in str(e.value)
  assert f"--data_dir={root}`" in str(e.value)


def test_data_in_another_form_are_not_taken_for_ready(tmp_path, archive):
  version = tmp_path / "cifar10" / "3.0.2"
  version.mkdir(parents=True)
  (version / "dataset_info.json").write_text("{}")
  (version / "cifar10-train.tfrecord-00000-of-00001").write_bytes(b"")
  with pytest.raises(UserError, match="no array_record files"):
    prepare.prepare("cifar10", data_dir=str(tmp_path), archive=str(archive))


def test_a_bad_archive_leaves_nothing(tmp_path, archive):
  archive.write_bytes(archive.read_bytes()[:-50])
  with pytest.raises(UserError, match="not a usable cifar10 archive"):
    prepare.prepare(
      "cifar10", data_dir=str(tmp_path / "tfds"), archive=str(archive)
    )
  assert not list((tmp_path / "tfds").iterdir())


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(SystemExit) as end:
    prepare.main(["cifar10", f"--data_dir={file}/x", "--archive=gone.tar.gz"])
  assert str(end.value.code).startswith(f"error: data_dir={file}/x: ")
  with pytest.raises(SystemExit) as end:
    prepare.main(["cifar01"])
  text = str(end.value.code)
  assert text.startswith("error: name: 'cifar01'; allowed: digits, cifar10, ")
  assert text.endswith(" (did you mean 'cifar10'?)")
  with pytest.raises(SystemExit) as end:
    prepare.main(["digits", "--archive=a.tar.gz"])
  assert (
    end.value.code
    == "error: --archive: 'a.tar.gz'; allowed: with cifar10, cifar100"
  )
  with pytest.raises(UserError, match="name: 'mnist'"):
    prepare.prepare("mnist")


# --- Data that need no preparation -------------------------------------------


def test_digits_are_described(capsys):
  prepare.main(["digits"])
  lines = capsys.readouterr().out.splitlines()
  assert lines[1] == "images:    8 x 8 pixels, 1 channel"
  assert lines[2] == "training:  1,437 images, 139 to 146 of a class"
  assert lines[3] == "test:      360 images, 35 to 37 of a class"
  assert lines[-1].startswith("next: atat-jax run --config=digits ")


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_own_data_are_described_by_their_path(kind, tmp_path, capsys):
  if kind == "folder":
    place = picture_folders.write(
      tmp_path / "mine", classes=3, train=4, test=2, size=(9, 9)
    )
  else:
    place = tmp_path / "mine.npz"
    train, test = np.arange(12) % 3, np.arange(6) % 3
    np.savez(
      place,
      train_images=np.zeros((12, 9, 9, 3), np.uint8),
      train_labels=train,
      test_images=np.zeros((6, 9, 9, 3), np.uint8),
      test_labels=test,
    )
  prepare.main([str(place)])
  text = capsys.readouterr().out
  assert "images:    9 x 9 pixels, 3 channels\n" in text
  assert "training:  12 images, 4 of each class\n" in text
  assert "test:      6 images, 2 of each class\n" in text
  assert "classes:   3: " in text
  assert f"--config.data.name={kind} --config.data.dir={place}\n" in text


@pytest.mark.parametrize("name", ["nowhere", "digts", "./flowers", "x:y"])
def test_data_that_are_nowhere_are_named_with_what_is_allowed(name):
  with pytest.raises(SystemExit) as stopped:
    prepare.main([name])
  said = str(stopped.value)
  assert f"name: {name!r}; allowed: digits, " in said and ".npz" in said
  assert ("did you mean 'digits'" in said) == (name == "digts")


# --- Download ----------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.fixture
def server(tmp_path):
  """Serves tmp_path / "www" on this machine; yields the folder and the URL."""
  folder = tmp_path / "www"
  folder.mkdir()
  handler = functools.partial(Handler, directory=str(folder))
  httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
  thread.start()
  yield folder, f"http://127.0.0.1:{httpd.server_port}"
  httpd.shutdown()
  thread.join()
  httpd.server_close()


@pytest.fixture
def published(server, archive, monkeypatch):
  """The tiny archive in place of the official one, with its own checksum."""
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  folder, url = server
  path = archive.rename(folder / "cifar-10-binary.tar.gz")
  content = path.read_bytes()
  entry = prepare.Download(
    f"{url}/{path.name}", len(content), hashlib.sha256(content).hexdigest()
  )
  monkeypatch.setitem(prepare.DOWNLOADS, "cifar10", entry)
  return path


def test_a_downloaded_archive_is_prepared_and_loads(tmp_path, published):
  root = tmp_path / "tfds"
  prepare.main(["cifar10", f"--data_dir={root}"])
  kept = root / "downloads" / published.name
  assert kept.read_bytes() == published.read_bytes()
  train, _ = cifar.read_cifar10(
    data_dir=str(root), cache_dir=str(tmp_path / "cache")
  )
  np.testing.assert_array_equal(train.images, TRAIN10[0])


def test_a_finished_download_is_used_again(tmp_path, published, capsys):
  entry = prepare.DOWNLOADS["cifar10"]
  first = prepare.download(entry, tmp_path / "downloads")
  published.unlink()
  assert prepare.download(entry, tmp_path / "downloads") == first
  assert "there already" in capsys.readouterr().out


@pytest.mark.parametrize(
  "change",
  [
    lambda content: content[:-1],
    lambda content: content + b"more",
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    lambda content: b"<html>moved</html>",
  ],
)
def test_wrong_content_is_refused_and_removed(tmp_path, published, change):
  published.write_bytes(change(published.read_bytes()))
  with pytest.raises(
    UserError, match=r"wrong content.*--archive=PATH"
  ) as error:
    prepare.prepare("cifar10", data_dir=str(tmp_path / "tfds"))
  assert "\n" not in str(error.value)
  assert not list((tmp_path / "tfds" / "downloads").iterdir())


def test_a_damaged_download_is_fetched_again(tmp_path, published):
  entry = prepare.DOWNLOADS["cifar10"]
  path = prepare.download(entry, tmp_path / "downloads")
  path.write_bytes(bytes(entry.size))
  prepare.download(entry, tmp_path / "downloads")
  assert path.read_bytes() == published.read_bytes()


def test_a_missing_file_on_the_server_is_named(tmp_path, published):
  published.unlink()
  with pytest.raises(UserError, match=r"cannot be downloaded.*404.*--archive"):
    prepare.prepare("cifar10", data_dir=str(tmp_path / "tfds"))


def test_an_unreachable_server_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  entry = prepare.Download("http://127.0.0.1:1/a.tar.gz", 1, "")
  with pytest.raises(UserError, match=r"cannot be downloaded.*refused"):
    prepare.download(entry, tmp_path)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_addresses_and_checksums_are_those_that_tfds_publishes(name):
  entry = prepare.DOWNLOADS[name]
  info = tfds.builder_cls(name).url_infos[entry.url]
  assert (info.size, info.checksum) == (entry.size, entry.sha256)
