"""Extra images: what is read, what is refused, and that disks stay disks."""

import threading
import time
import zipfile

import numpy as np
import pytest

from atat_jax.data import digits, extra
from atat_jax.data.prefetch import Prefetcher
from atat_jax.errors import UserError

SPEC = digits.SPEC


def make(number, seed=0):
  generator = np.random.default_rng(seed)
  images = generator.integers(0, 256, (number, *SPEC.image_shape), np.uint8)
  return images, generator.integers(0, SPEC.num_classes, number)


def mapped(array):
  while array is not None:
    if isinstance(array, np.memmap):
      return True
    array = getattr(array, "base", None)
  return False


def test_an_npz_file_is_mapped_not_read(tmp_path):
  images, labels = make(50)
  path = tmp_path / "generated.npz"
  np.savez(path, image=images, label=labels)
  found = extra.read(path, SPEC)
  assert len(found) == 50
  assert all(mapped(shard) for shard in found._images)
  order = np.array([49, 0, 7, 7, 31])
  taken = found.take(order)
  np.testing.assert_array_equal(taken.images, images[order])
  np.testing.assert_array_equal(taken.labels, labels[order])
  assert (taken.images.dtype, taken.labels.dtype) == (np.uint8, np.int32)
  assert not mapped(taken.images)


@pytest.mark.parametrize("first", ["label", "other"])
def test_the_place_in_the_file_does_not_matter(tmp_path, first):
  """Names and headers of other lengths before it, and a comment after."""
  images, labels = make(9)
  arrays = {"image": images, "label": labels, "other": np.arange(77)}
  path = tmp_path / "x.npz"
  np.savez(path, **{first: arrays.pop(first)}, **arrays)
  with zipfile.ZipFile(path, "a") as file:
    file.comment = b"made by a test"
  taken = extra.read(path, SPEC).take(np.arange(9))
  np.testing.assert_array_equal(taken.images, images)
  np.testing.assert_array_equal(taken.labels, labels)


def test_a_directory_of_shards_is_numbered_through(tmp_path):
  sizes = {"a.npz": 5, "b.npz": 1, "image-0.npy": 7, "image-1.npy": 4}
  everything = []
  for seed, (name, size) in enumerate(sizes.items()):
    images, labels = make(size, seed)
    if name.endswith("npz"):
      np.savez(tmp_path / name, image=images, label=labels)
    else:
      np.save(tmp_path / name, images)
      np.save(tmp_path / name.replace("image", "label"), labels)
    everything.append((images, labels))
  images, labels = (np.concatenate(x) for x in zip(*everything, strict=True))
  found = extra.read(str(tmp_path), SPEC)
  assert len(found) == 17 and all(mapped(x) for x in found._images)
  order = np.random.default_rng(0).permutation(17)
  np.testing.assert_array_equal(found.take(order).images, images[order])
  np.testing.assert_array_equal(found.take(order).labels, labels[order])


def refused(path, *parts):
  with pytest.raises(UserError) as error:
    extra.read(path, SPEC)
  message = str(error.value)
  assert len(message.splitlines()) == 1
  for part in ("extra: ", path.name, *parts):
    assert part in message


def test_compressed_files_are_refused_with_the_way_out(tmp_path):
  images, labels = make(5)
  path = tmp_path / "generated.npz"
  np.savez_compressed(path, image=images, label=labels)
  refused(path, "compressed", "numpy.savez(")
  with np.load(path) as a:
    np.savez(tmp_path / "new.npz", image=a["image"], label=a["label"])
  assert len(extra.read(tmp_path / "new.npz", SPEC)) == 5


@pytest.mark.parametrize(
  ("change", "parts"),
  [
    (lambda x, y: (x.astype(np.float32), y), ["float32", "uint8"]),
    (lambda x, y: (x[..., :-1, :], y), ["[6, 8, 7, 1]", "[N, 8, 8, 1]"]),
    (lambda x, y: (x[:0], y[:0]), ["no images"]),
    (lambda x, y: (x, y[:-1]), ["labels", "6 images"]),
    (lambda x, y: (x, y.astype(float)), ["labels", "float64"]),
    (lambda x, y: (x, np.full_like(y, 10)), ["label 10", "0 to 9"]),
    (lambda x, y: (x, np.full_like(y, -1)), ["label -1", "0 to 9"]),
    (lambda x, y: (x.astype(object), y), ["cannot be used"]),
  ],
)
def test_wrong_content_is_named(tmp_path, change, parts):
  images, labels = change(*make(6))
  path = tmp_path / "x.npz"
  np.savez(path, image=images, label=labels)
  refused(path, *parts)


def test_what_is_not_there_is_named(tmp_path):
  refused(tmp_path / "none", "does not exist")
  refused(tmp_path, "no shards")
  images, labels = make(3)
  np.savez(tmp_path / "x.npz", images=images, label=labels)
  refused(tmp_path / "x.npz", "has no 'image'", "images, label")
  (tmp_path / "torn.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:200])
  refused(tmp_path / "torn.npz", "BadZipFile")
  np.save(tmp_path / "image-3.npy", images)
  refused(tmp_path / "image-3.npy", "cannot be used")  # it is no .npz
  (tmp_path / "x.npz").unlink()
  (tmp_path / "torn.npz").unlink()
  with pytest.raises(UserError, match=r"image-3\.npy.*label-3\.npy"):
    extra.read(tmp_path, SPEC)


def test_results_come_in_order_and_before_they_are_asked_for():
  calls, third = [], threading.Event()

  def square(x):
    calls.append((x, threading.current_thread().name))
    if len(calls) == 3:
      third.set()
    return x * x

  with Prefetcher(square, range(6), depth=3) as ahead:
    assert third.wait(60)  # nobody has asked for anything
    assert [ahead.get() for _ in range(6)] == [0, 1, 4, 9, 16, 25]
  assert [x for x, _ in calls] == list(range(6))
  assert threading.current_thread().name not in {name for _, name in calls}


def test_an_exception_comes_where_the_result_would():
  def inverse(x):
    return 1 / x

  with Prefetcher(inverse, [2, 0, 4]) as ahead:
    assert ahead.get() == 0.5
    with pytest.raises(ZeroDivisionError):
      ahead.get()


def test_only_the_time_of_an_idle_consumer_counts_as_waiting():
  go, asked, counted = threading.Event(), [], []

  def slow(x):
    assert go.wait(60)
    return x

  def idle():
    """Says that the devices are at work for the first hundred questions."""
    asked.append(len(asked))
    if len(asked) == 200:
      go.set()
    return len(asked) > 100

  with Prefetcher(slow, [1, 2]) as ahead:
    began = time.perf_counter()
    assert ahead.get(idle, counted.append) == 1
    seconds = time.perf_counter() - began
    assert len(counted) == len(asked) - 100 >= 100
    assert 0.09 <= sum(counted) < seconds - 0.09
    counted.clear()
    time.sleep(0.05)
    assert ahead.get(idle, counted.append) == 2 and not counted
