"""Files that somebody else has written: refused, within bounds, and never run.

`tests/support/hostile.py` plants them and reads them all in one process, whose
memory is limited; each test looks at what came of one.
"""

import contextlib
import itertools
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import zipfile

import hostile
import numpy as np
import pytest
import safetensors.numpy
from array_record.python import array_record_module

from atat_jax import interop, models
from atat_jax.data import (
  archives,
  base,
  cifar,
  digits,
  extra,
  photographs,
  prepare,
  record_files,
)
from atat_jax.errors import UserError
from atat_jax.untrusted import arrays, regular, zips

SPEC = digits.SPEC
SECONDS = 10  # of the processor, for a file that takes one or two


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hostile")
  secret = folder.parent / hostile.MARKER
  found = subprocess.run(
    [sys.executable, hostile.__file__, str(folder)],
    capture_output=True,
    text=True,
    timeout=900,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert found.returncode == 0, found.stderr[-3000:]
  assert (
    not secret.exists() and not pathlib.Path("/tmp", hostile.MARKER).exists()
  )
  return json.loads(found.stdout[found.stdout.index('{"files"') :])


@pytest.mark.parametrize("name", hostile.THREATS)
def test_a_hostile_file_is_refused_in_one_line(outcomes, name):
  found = outcomes["files"][name]
  assert found["outcome"] == "UserError", found
  message = found["message"]
  assert message.isprintable() and 0 < len(message) < 1000, message
  assert "MemoryError" not in message
  assert not found["executed"]
  assert found["seconds"] < SECONDS
  assert found["growth"] < hostile.MEMORY


@pytest.mark.parametrize("name", hostile.HARMLESS)
def test_a_file_that_only_looks_hostile_is_read(outcomes, name):
  found = outcomes["files"][name]
  assert not found["outcome"], found
  assert found["growth"] < hostile.MEMORY // 4
  assert not found["executed"]


def test_no_socket_is_opened_for_a_file(outcomes):
  assert outcomes["sockets"] == []


def test_the_thief_is_a_live_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pickle.loads(pickle.dumps({"w": hostile.Thief()}))
  assert (tmp_path / hostile.MARKER).exists()


# --- Limits leave room for real files ----------------------------------------


def test_what_shrinks_as_real_arrays_do_is_read(tmp_path):
  """Labels, masks and blank pictures, compressed to a twentieth."""
  path = tmp_path / "a.npz"
  generator = np.random.default_rng(0)
  content = {
    "labels": np.repeat(np.arange(1000), 1300),
    "blank": np.zeros((600, 28, 28), np.uint8),
    "noise": generator.normal(size=(300, 1000)),
    "text": np.array(["ä", "b"]),
    "empty": np.zeros((0, 3)),
    "scalar": np.array(True),
    "fortran": np.asfortranarray(generator.normal(size=(3, 4))),
    "big endian": np.arange(3, dtype=">f4"),
  }
  np.savez_compressed(path, **content)
  with zips.open_zip(path) as archive:
    found = arrays.read_members(archive)
  assert list(found) == list(content)
  for name, array in content.items():
    np.testing.assert_array_equal(found[name], array)
    assert found[name].dtype == array.dtype.newbyteorder("=")


def test_tensors_on_one_storage_share_its_memory(tmp_path):
  _, make = hostile.HARMLESS["300 tensors on one storage of 16 MiB"]
  found = interop.read_state_dict(make(tmp_path))
  assert len(found) == 300
  first, *others = found.values()
  assert first.shape == (1 << 22,)
  assert all(np.shares_memory(first, other) for other in others)


@pytest.mark.parametrize(
  ("sizes", "options"),
  [
    ([3000] * 300, "group_size:1"),
    ([10] * 3000, "group_size:100"),
    ([200_000] * 20, "group_size:1"),
    ([65_472] * 10, "group_size:1"),
    ([0] * 50, "group_size:1"),
    (list(range(0, 3000, 7)), "group_size:7"),
    ([5000] * 20, "group_size:1,uncompressed"),
  ],
)
def test_sizes_of_records_are_those_of_their_library(tmp_path, sizes, options):
  path, generator = tmp_path / "x", np.random.default_rng(0)
  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for size in sizes:
    writer.write(generator.bytes(size))
  writer.close()
  # A record and its chunk take some bytes of their own.
  total = record_files.check(path)
  assert sum(sizes) <= total < sum(sizes) + 11 * len(sizes) + 1000


def _mutated(content, generator):
  """A few bytes changed, put in or left out; or the end cut off."""
  found = bytearray(content)
  if generator.random() < 0.1:
    return bytes(found[: generator.randrange(len(found))])
  for _ in range(generator.choice([1, 1, 2, 8])):
    place, kind = generator.randrange(len(found)), generator.random()
    if kind < 0.6:
      found[place] = generator.randrange(256)
    elif kind < 0.8:
      found[place:place] = generator.choice(PIECES)
    else:
      del found[place : place + generator.choice([1, 4])]
  return bytes(found)


PIECES = [
  b"\xff\xff\xff\xff",
  bytes(8),
  b"]]",
  b"\x85",
  b"r\xff\xff\xff\x7f",
  b"0",
]


@pytest.mark.parametrize("kind", ["zip", "legacy", "program", "safetensors"])
def test_changed_weights_are_refused_or_read(tmp_path, kind):
  torch = pytest.importorskip("torch", reason="it writes the files")
  state = {"a.w": torch.arange(20.0).reshape(4, 5), "b": torch.arange(6)}
  path, generator = tmp_path / "w.pth", random.Random(0)
  torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
  if kind == "safetensors":
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({k: v.numpy() for k, v in state.items()}, path)
  content = path.read_bytes()
  with contextlib.suppress(zipfile.BadZipFile):
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
      members = {name: archive.read(name) for name in archive.namelist()}
  refused = 0
  for _ in range(400):
    if kind == "program":
      with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
          is_program = name.endswith("data.pkl")
          data = _mutated(data, generator) if is_program else data
          archive.writestr(name, data)
    else:
      path.write_bytes(_mutated(content, generator))
    try:
      found = interop.read_state_dict(path)
    except UserError as error:
      assert str(error).startswith(str(path)) and str(error).isprintable()
      refused += 1
      continue
    if kind == "zip":  # its checksums leave no room for other numbers
      for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
  assert refused > 200


# --- Extra images ------------------------------------------------------------


def _save(path, number=3000, seed=0):
  generator = np.random.default_rng(seed)
  images = generator.integers(0, 256, (number, *SPEC.image_shape), np.uint8)
  labels = generator.integers(0, SPEC.num_classes, number)
  np.savez(path, image=images, label=labels)
  return images, labels


def test_no_damage_of_extra_images_is_silent(tmp_path):
  """Every bit that can change what is read is noticed."""
  path = tmp_path / "extra.npz"
  images, labels = _save(path, 40)
  content = path.read_bytes()
  generator = np.random.default_rng(1)
  refused = 0
  for position in generator.integers(0, len(content), 300):
    damaged = bytearray(content)
    damaged[position] ^= 1 << int(generator.integers(8))
    path.write_bytes(damaged)
    try:
      found = extra.read(path, SPEC).take(np.arange(len(labels)))
    except UserError as error:
      assert str(error).startswith("extra: ") and "\n" not in str(error)
      refused += 1
    else:
      np.testing.assert_array_equal(found.images, images)
      np.testing.assert_array_equal(found.labels, labels)
  assert refused > 250
  path.write_bytes(content)
  extra.read(path, SPEC)


def _damage(path):
  """Changes a pixel, but neither size nor time."""
  before = path.stat()
  content = bytearray(path.read_bytes())
  content[100_000] ^= 1
  with path.open("r+b") as file:  # in its place on the disk
    file.write(content)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_large_file_is_compared_once(tmp_path, monkeypatch):
  monkeypatch.setattr(extra, "_LARGE", 1000)
  path, cache = tmp_path / "extra.npz", str(tmp_path / "cache")
  _save(path)
  _damage(path)
  with pytest.raises(UserError, match="CRC"):
    extra.read(path, SPEC, cache_dir=cache)
  with pytest.raises(UserError, match="CRC"):  # a bad one is not remembered
    extra.read(path, SPEC, cache_dir=cache)

  path.unlink()
  _save(path)
  extra.read(path, SPEC, cache_dir=cache)
  _damage(path)  # shows that the second start does not read it all again
  extra.read(path, SPEC, cache_dir=cache)
  os.utime(path, ns=(1, 1))
  with pytest.raises(UserError, match="CRC"):
    extra.read(path, SPEC, cache_dir=cache)

  path.unlink()
  _save(path, seed=2)
  extra.read(path, SPEC, cache_dir=cache)
  _damage(path)
  for note in (tmp_path / "cache").glob("extra-*"):
    note.write_text("{")  # a damaged note costs a look at the file
  with pytest.raises(UserError, match="CRC"):
    extra.read(path, SPEC, cache_dir=cache)


def test_images_without_a_cache_are_compared_each_time(tmp_path, monkeypatch):
  monkeypatch.setattr(extra, "_LARGE", 1000)
  monkeypatch.setattr(base, "cache_root", lambda _: None)
  path = tmp_path / "extra.npz"
  _save(path)
  extra.read(path, SPEC)
  _damage(path)
  with pytest.raises(UserError, match="CRC"):
    extra.read(path, SPEC)


# --- Files while they are read, and their names ------------------------------


def test_a_file_that_grows_is_read_up_to_the_limit(tmp_path, monkeypatch):
  path = tmp_path / "grows"
  path.write_bytes(bytes(100))
  monkeypatch.setattr(regular, "size", lambda file: 10)  # when it was opened
  with pytest.raises(UserError, match="at most 50"):
    regular.read_bytes(path, 50)


def test_names_of_tensors_cannot_drive_a_terminal(tmp_path):
  path = tmp_path / "w.safetensors"
  name = "\x1b[2J\n\u202eerror: all is well\x07"
  header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
  model = models.create("preact_resnet18", num_classes=3)
  with pytest.raises(UserError, match="all is well") as error:
    interop.load_torch(path, model)
  assert str(error.value).isprintable()


# --- Arguments ---------------------------------------------------------------

BAD = [
  *(None, 0, -1, 1.5, b"x", [], {}, True, float("nan"), object(), print),
  *("\0", "a\0b", "~nobody-has-this-name/x", "/dev/zero", "/dev/null"),
  *("/nonexistent/x", "x" * 5000, "\x1b[2J", "loop", "pipe", "pipe.npz"),
  *("pipe.safetensors", ".", "empty.npz", "empty.pth", "empty.tar.gz"),
]
MODEL = models.create("preact_resnet18", num_classes=3)
CALLS = {
  "read_state_dict(path)": lambda x: interop.read_state_dict(x),
  "load_torch(path)": lambda x: interop.load_torch(x, MODEL),
  "load_torch(model)": lambda x: interop.load_torch("empty.pth", x),
  "load_torch(num_channels)": lambda x: interop.load_torch(
    "empty.pth", MODEL, num_channels=x
  ),
  "read_archive(path)": lambda x: archives.read_archive(x, cifar.CIFAR10),
  "read_archive(spec)": lambda x: archives.read_archive("empty.tar.gz", x),
  "read_archive(source)": lambda x: archives.read_archive(
    "empty.tar.gz", cifar.CIFAR10, x
  ),
  "read_cifar10(data_dir)": lambda x: cifar.read_cifar10(
    data_dir=x if x is not None else ".", cache_dir="cache"
  ),
  "read_cifar100(source)": lambda x: cifar.read_cifar100(
    data_dir=".", cache_dir="cache", source=x
  ),
  "read_cache(path)": lambda x: base.read_cache(x, cifar.CIFAR10),
  "prepare(name)": lambda x: prepare.prepare(
    x, data_dir="data", archive="empty.tar.gz"
  ),
  "prepare(data_dir)": lambda x: prepare.prepare(
    "cifar10", data_dir=x or "data", archive="empty.tar.gz"
  ),
  "prepare(archive)": lambda x: prepare.prepare(
    "cifar10", data_dir="data", archive=x or "empty.tar.gz"
  ),
  "extra.read(path)": lambda x: extra.read(x, SPEC),
  "read_photograph(path)": lambda x: photographs.read_photograph(x),
  "read_photograph(resize)": lambda x: photographs.read_photograph(
    "empty.npz", resize=x
  ),
}


@pytest.fixture(scope="module")
def odd_places(tmp_path_factory):
  folder = tmp_path_factory.mktemp("odd")
  (folder / "loop").symlink_to("loop")
  for name in ("pipe", "pipe.npz", "pipe.safetensors"):
    os.mkfifo(folder / name)
  for name in ("empty.npz", "empty.pth", "empty.tar.gz"):
    (folder / name).touch()
  return folder


@pytest.mark.parametrize("call", CALLS)
def test_arguments_that_name_no_good_file_are_refused(
  call, odd_places, monkeypatch, capsys
):
  monkeypatch.chdir(odd_places)
  for value in BAD:
    with pytest.raises(UserError) as error:
      CALLS[call](value)
      pytest.fail(f"{call} takes {value!r}")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 5000
  capsys.readouterr()


def test_enough_is_tried():
  assert len(hostile.THREATS) > 280
  assert len(list(itertools.product(CALLS, BAD))) > 400
