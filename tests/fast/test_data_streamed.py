"""Data sets that stay on the disk: which picture a step has, and its pixels."""

import pickle
import sys

import numpy as np
import picture_folders
import pytest
import test_data_tfds
from PIL import Image

from atat_jax import data, sharding
from atat_jax.data import Split, batches, streamed
from atat_jax.errors import UserError
from atat_jax.models import base as networks
from atat_jax.training.draws import BatchDraws

pytest.importorskip("grain", reason="grain reads the pictures")

SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return picture_folders.write(
    tmp_path_factory.mktemp("set"), classes=3, train=9, test=4
  )


def load(root, **options):
  return data.load(
    "folder",
    data_dir=str(root),
    validation_size=3,
    size=SIZE,
    streaming=data.Streaming(**options),
  )


def make(pictures, rows=None, seed=5, num_steps=9):
  rows = np.arange(8) if rows is None else rows
  return streamed.TrainingBatches(
    pictures, seed=seed, batch_size=8, rows=rows, num_steps=num_steps
  )


def equal(one, other):
  return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_splits_are_disjoint_and_those_of_data_in_memory(root, tmp_path):
  on_disk = load(root)
  inside = data.load(
    "folder",
    data_dir=str(root),
    cache_dir=str(tmp_path),
    validation_size=3,
    size=SIZE,
  )
  assert on_disk.num_train == inside.num_train == 24
  assert on_disk.num_test == inside.num_test == 12
  assert on_disk.spec.class_names == inside.spec.class_names
  for split in ("train", "validation", "test"):
    found = getattr(on_disk, split).decode()
    assert np.array_equal(found.labels, getattr(inside, split).labels)
  held = set(on_disk.validation.numbers) & set(on_disk.train.numbers)
  assert not held


def test_an_evaluated_picture_is_resized_and_cropped_in_the_centre(root):
  found = load(root).test.decode().images[5]
  with Image.open(root / "val" / "c01" / "1.jpg") as image:
    image = image.convert("RGB")
    side = round(SIZE * 256 / 224)
    # 40 x 30: the shorter side becomes 18.
    image = image.resize((side * 40 // 30, side), Image.Resampling.BILINEAR)
    left = round((image.width - SIZE) / 2)
    wanted = image.crop((left, 1, left + SIZE, 1 + SIZE))
  assert np.array_equal(found, np.asarray(wanted))


def test_a_batch_depends_on_seed_and_step_alone(root):
  pictures = load(root).train
  with make(pictures) as one:
    forward = [one.batch(step) for step in range(5)]
    # Three batches an epoch; as for data in memory.
    for step in range(5):
      rows = batches.train_indices(5, step, num_examples=24, batch_size=8)
      labels = pictures.select(rows).decode().labels
      assert np.array_equal(forward[step].labels, labels)
    assert all(
      equal(one.follow(step), forward[step]) for step in (0, 1, 2, 1, 2, 4)
    )
    assert not equal(forward[0], forward[3])
  with make(pictures, seed=6) as other:
    assert not equal(other.batch(0), forward[0])
  # Each process reads its part of the same batch.
  for rows in (np.arange(4), np.arange(4, 8), np.array([1, 6, 7])):
    with make(pictures, rows=rows) as part:
      found = part.follow(3)
      assert np.array_equal(found.images, forward[3].images[rows])
      assert np.array_equal(found.labels, forward[3].labels[rows])


def test_augmented_pictures_have_the_crops_of_the_others(root):
  plain = make(load(root).train).batch(2)
  made = make(load(root, rand_augment=9.0).train)
  found = made.batch(2)
  assert equal(found, made.batch(2))
  assert np.array_equal(found.labels, plain.labels)
  same = (found.images == plain.images).all((1, 2, 3))
  assert 0 < same.sum() < 8  # neither operation is done in a quarter
  again = load(root, rand_augment=9.0)
  assert equal(again.test.decode(), load(root).test.decode())


def test_without_a_random_crop_a_step_has_the_evaluated_pixels(root):
  pictures = load(root, smallest_crop=1.0).train
  with make(pictures) as one:
    found = one.batch(2)
  rows = batches.train_indices(5, 2, num_examples=24, batch_size=8)
  assert equal(found, pictures.select(rows).decode())


@pytest.mark.parametrize("smallest", [0.08, 0.5, 1.0])
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (64, 64)])
def test_areas_and_ratios_of_crops_are_torchvisions(size, smallest):
  width, height = size
  generator = np.random.default_rng(0)
  boxes = np.array(
    [
      streamed.random_box(
        width, height, generator.random(40).tolist(), smallest
      )
      for _ in range(2000)
    ]
  )
  left, top, right, bottom = boxes.T
  assert (left >= 0).all() and (top >= 0).all()
  assert (right <= width).all() and (bottom <= height).all()
  w, h = right - left, bottom - top
  shares, ratios = w * h / (width * height), w / h
  # Rounded to whole pixels.
  assert shares.min() > 0.9 * smallest - 0.02
  assert 0.65 < ratios.min() and ratios.max() < 1.55
  if smallest < 1:  # boxes that do not fit take the largest
    middle = (1 + smallest) / 2
    assert smallest < shares.mean() < middle + 0.02
    free = width - w
    places = left[free > 4] / free[free > 4]
    assert abs(places.mean() - 0.5) < 0.04
    assert places.min() == 0 and places.max() == 1


@pytest.mark.parametrize(
  ("size", "box"),
  [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56))],
)
def test_a_picture_too_long_for_any_box_is_cropped_in_the_centre(size, box):
  found = streamed.random_box(*size, [0.999] * 40, 0.9)
  assert found == box


def test_a_damaged_picture_is_named_when_its_step_is_due(tmp_path):
  root = picture_folders.write(tmp_path, classes=2, train=8, test=2)
  pictures = load(root).train
  bad = root / "train" / "c01" / "3.jpg"
  content = bad.read_bytes()
  bad.write_bytes(content[: len(content) // 2])
  number = pictures.records.__dict__["_paths"].index(str(bad))
  where = int(np.flatnonzero(pictures.numbers == number)[0])
  order = batches.train_indices(5, 0, num_examples=13, batch_size=8).tolist()
  due = 0 if where in order else 1
  with make(pictures) as one:
    for step in range(due):
      one.follow(step)
    with pytest.raises(UserError, match=r"3[.]jpg: not a picture") as error:
      for step in range(due, 9):
        one.follow(step)
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match=r"3[.]jpg: not a picture"):
    pictures.decode()
  bad.unlink()
  with pytest.raises(UserError, match=r"3[.]jpg"):
    pictures.decode()


def test_streamed_data_and_networks_have_one_mean_of_imagenet():
  """Written twice: what reads pictures in a worker imports no flax."""
  assert streamed.IMAGENET_MEAN == networks.IMAGENET_MEAN
  assert streamed.IMAGENET_STD == networks.IMAGENET_STD


def test_records_of_tensorflow_datasets_are_streamed(tmp_path):
  test_data_tfds.prepare(tmp_path)
  found = data.load(
    "tfds:shapes",
    data_dir=str(tmp_path),
    validation_size=2,
    size=6,
    streaming=data.Streaming(smallest_crop=1.0),
  )
  assert found.spec.class_names == ("disc", "square")
  assert (found.num_train, found.num_test) == (10, 4)
  # Open files stay behind when records go to another process.
  pickled = pickle.loads(pickle.dumps(found.test.records))
  assert pickled.read(2) == found.test.records.read(2)
  test = found.test.decode()
  assert test.images.shape == (4, 6, 6, 3)
  assert sorted(test.labels) == [0, 0, 1, 1]


def test_a_batch_on_the_devices_is_the_one_on_the_disk(root):
  pictures = load(root).train
  mesh = sharding.make_mesh()
  with make(pictures) as stream:
    draws = BatchDraws(
      5,
      num_examples=24,
      batch_size=8,
      num_extra=0,
      extra=None,
      mesh=mesh,
      streamed=stream,
    )
    one, two = stream.batch(3), stream.batch(4)
    assert equal(draws.images([3]), one)
    several = draws.follow(range(3, 5), size=3)
    # The last batch fills the rest.
    wanted = [np.stack(part) for part in zip(one, two, two, strict=True)]
    assert equal(several, Split(*wanted))
    assert draws.describe(3)["indices"] == list(
      batches.train_indices(5, 3, num_examples=24, batch_size=8)
    )


def test_what_cannot_be_streamed_is_refused_by_name(root, monkeypatch):
  options = data.Streaming()
  with pytest.raises(UserError, match="name: 'digits' with stream=True"):
    data.spec("digits", streaming=options)
  with pytest.raises(UserError, match="size: 0 with stream=True"):
    data.load("folder", data_dir=str(root), streaming=options)
  with pytest.raises(UserError, match="validation_size: 27; allowed: 1 to 26"):
    data.load(
      "folder",
      data_dir=str(root),
      validation_size=27,
      size=8,
      streaming=options,
    )
  for field, value in (
    ("workers", -1),
    ("prefetch", 0),
    ("smallest_crop", 0.0),
    ("smallest_crop", 1.5),
    ("rand_augment", 10.5),
    ("rand_augment", -1.0),
    ("shard_size", 0),
  ):
    with pytest.raises(UserError, match=f"{field}: "):
      data.Streaming(**{field: value})
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(UserError, match="pip install grain"):
    data.load("folder", data_dir=str(root), size=9, streaming=options)


@pytest.mark.slow
def test_processes_that_read_ahead_change_no_pixel(root):
  wanted, found = (
    make(load(root, workers=workers).train) for workers in (0, 2)
  )
  with wanted, found:
    assert all(
      equal(wanted.follow(step), found.follow(step)) for step in (2, 3, 4, 5, 0)
    )
