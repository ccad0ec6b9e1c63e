"""Data sets that stay on the disk: pictures are read as the steps need them.

Google's grain reads ahead in threads, or in processes of its own: it decodes,
crops and resizes. Which pictures a step has, and where each is cropped, are
functions of seed and step alone, so that a resumed run needs no state of the
reader, and another number of processes or workers changes no pixel. A picture
that cannot be read ends the run when its step is due, in a line with its name.
"""

import dataclasses
import functools
import math
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from atat_jax import checks
from atat_jax.data import base, batches, pictures, rand_augment
from atat_jax.data.base import Split
from atat_jax.errors import UserError

if TYPE_CHECKING:
  import grain

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and deviation that streamed data are normalised by: nobody reads a
terabyte for its own."""

_THREADS = 16  # Pillow decodes and resizes without Python's lock
_CHUNK = 32  # pictures that a thread or process reads at a time
# Share of the shorter side that evaluation crops, as torchvision's 224 of 256.
_CENTRE = 224 / 256
_TRIES = 10
_RATIOS = (3 / 4, 4 / 3)
_CROP_STREAM = 1 << 33  # added to the seed; seeds of stages are below 2**32


class Record(NamedTuple):
  """Encoded picture with its label."""

  content: bytes
  label: int


class Pictures:
  """Pictures on the disk with labels; what is indexed is read.

  Args:
    records: Object with a length, `read(number)` to a `Record` and
      `name(number)` to the name of a file or record, which can be pickled.
    numbers: Numbers of the records that belong to the split.
    labels: Labels of all records, or None where only reading shows them.
    size: Side of the square images in pixels.
    options: Options of reading.
  """

  def __init__(
    self,
    records: Any,
    numbers: np.ndarray,
    labels: np.ndarray | None,
    *,
    size: int,
    options: "Streaming",
  ):
    self.records, self.numbers = records, numbers
    self._all_labels = labels
    self.size, self.options = size, options

  def __len__(self) -> int:
    """Returns the number of pictures."""
    return len(self.numbers)

  def select(self, numbers: np.ndarray | slice) -> "Pictures":
    """Returns a part of the pictures.

    Args:
      numbers: Their places in this split.
    """
    return Pictures(
      self.records,
      self.numbers[numbers],
      self._all_labels,
      size=self.size,
      options=self.options,
    )

  def hold_out(self, size: int) -> tuple["Pictures", "Pictures"]:
    """Divides the pictures as `base.hold_out` divides arrays.

    Args:
      size: Number of pictures to hold out.

    Returns:
      The rest and those held out, both in their order. The classes are in
      proportion where the labels are known without reading.

    Raises:
      UserError: `size` is below 1 or leaves nothing.
    """
    total = len(self)
    if not 1 <= size < total:
      raise UserError(
        f"validation_size: {size}; allowed: 1 to {total - 1}, the training"
        f" split has {total} images"
      )
    labels = np.zeros(total, np.int32)
    if self._all_labels is not None:
      labels = self._all_labels[self.numbers]
    held = np.zeros(total, bool)
    held[base.stratified_order(labels)[:size]] = True
    return self.select(~held), self.select(held)

  def decode(self) -> Split:
    """Reads all pictures: resized, and cropped in the centre.

    Returns:
      Images uint8 [N, size, size, 3] and labels int32 [N].

    Raises:
      UserError: A picture cannot be read; the message names it.
    """
    examples = _Examples(self.numbers)
    decode = functools.partial(_decode, self.records, self.size, 1.0)
    with _ChunkReader(
      examples, decode, chunk=_CHUNK, threads=_THREADS, ahead=2 * _THREADS
    ) as reader:
      return _joined([*reader])


class Found(NamedTuple):
  """Data set on the disk, of which no picture has been read.

  Attributes:
    name: Name in results.
    class_names: One name for every label.
    train: Records of the training split, see `Pictures`, with `labels`: int32
      [N], or None where only reading shows them.
    test: Records of the test split.
  """

  name: str
  class_names: tuple[str, ...]
  train: Any
  test: Any

  def describe(self, size: int) -> base.DatasetSpec:
    """Describes the data set as images of a size; nothing is read."""
    return base.DatasetSpec(
      name=self.name,
      num_classes=len(self.class_names),
      image_shape=(size, size, 3),
      class_names=self.class_names,
      mean=IMAGENET_MEAN,
      std=IMAGENET_STD,
    )

  def pictures(
    self, size: int, options: "Streaming"
  ) -> tuple[Pictures, Pictures]:
    """Returns the training and test pictures, to be read at a size."""
    train, test = (
      Pictures(
        records,
        np.arange(len(records)),
        records.labels,
        size=size,
        options=options,
      )
      for records in (self.train, self.test)
    )
    return train, test


@dataclasses.dataclass(frozen=True)
class Streaming:
  """Options of reading streamed pictures.

  Attributes:
    workers: Processes that read ahead; 0: threads of this process.
    prefetch: Number of batches that are read ahead.
    smallest_crop: Smallest share of a training picture that its random crop
      has; 1: no random crop, but the centre, as in evaluation.
    rand_augment: Magnitude of RandAugment on training pictures, up to 10
      (`rand_augment`); 0: none.
    shard_size: Number of test images that are in memory at a time.
  """

  workers: int = 0
  prefetch: int = 2
  smallest_crop: float = 0.08
  rand_augment: float = 0.0
  shard_size: int = 1000

  def __post_init__(self) -> None:
    """Checks the numbers."""
    checks.integer("workers", self.workers, 0, 1024)
    checks.integer("prefetch", self.prefetch, 1, 1024)
    checks.integer("shard_size", self.shard_size, 1)
    checks.number("smallest_crop", self.smallest_crop)
    if not 0 < self.smallest_crop <= 1:
      raise UserError(
        f"smallest_crop: {self.smallest_crop}; allowed: above 0, at most 1"
      )
    checks.number("rand_augment", self.rand_augment)
    if not 0 <= self.rand_augment <= rand_augment.LARGEST:
      raise UserError(
        f"rand_augment: {self.rand_augment}; allowed: 0 to"
        f" {rand_augment.LARGEST:g}"
      )


# --- One picture --------------------------------------------------------------


def random_box(
  width: int, height: int, draws: Sequence[float], smallest: float
) -> tuple[int, int, int, int]:
  """Chooses the box of a random crop, as torchvision's RandomResizedCrop.

  The area is uniform between `smallest` and 1 times that of the picture, the
  logarithm of the aspect ratio uniform between those of 3/4 and 4/3. A box that
  does not fit is drawn again; after ten of them, the largest in the centre with
  an aspect ratio within the limits is taken (Szegedy et al., 2015).

  Args:
    width: Width of the picture in pixels.
    height: Height of the picture in pixels.
    draws: 40 uniform numbers in [0, 1): area, ratio, left and top of each try.
    smallest: Smallest share of the area.

  Returns:
    Left, top, right and bottom.
  """
  low, high = (math.log(ratio) for ratio in _RATIOS)
  for first in range(0, 4 * _TRIES, 4):
    area, ratio, left, top = draws[first : first + 4]
    pixels = width * height * (smallest + (1 - smallest) * area)
    aspect = math.exp(low + (high - low) * ratio)
    w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    if 0 < w <= width and 0 < h <= height:
      x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
      return x, y, x + w, y + h
  w, h = width, height
  if width / height < _RATIOS[0]:
    h = min(height, max(1, round(width / _RATIOS[0])))
  elif width / height > _RATIOS[1]:
    w = min(width, max(1, round(height * _RATIOS[1])))
  x, y = (width - w) // 2, (height - h) // 2
  return x, y, x + w, y + h


def _uniform(key: tuple[int, int], count: int) -> list[float]:
  """Uniform numbers in [0, 1) that are the same in all versions of NumPy."""
  raw = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)
  return ((raw >> np.uint64(11)) * 2.0**-53).tolist()


class _Example(NamedTuple):
  """Picture to read, and the key of its crop; None: the centre."""

  number: int
  key: tuple[int, int] | None


class _Read(NamedTuple):
  """Picture that was read: uint8 [size, size, 3]; or why it could not be."""

  image: np.ndarray
  label: int
  fault: str


def _decode(
  records: Any,
  size: int,
  smallest: float,
  example: _Example,
  magnitude: float = 0.0,
) -> _Read:
  """Reads a picture; what is wrong with it is told, not raised.

  An exception in a worker would come out as a traceback of that process.
  """
  number = int(example.number)
  try:
    record = records.read(number)
    image = pictures.decode_bytes(record.content).convert("RGB")
    return _Read(
      np.asarray(_augmented(image, size, smallest, example.key, magnitude)),
      int(record.label),
      "",
    )
  except UserError as error:
    fault = str(error)
  except Exception as error:  # a damaged file can raise anything in a decoder
    fault = (
      f"{records.name(number)}: not a picture that can be used"
      f" ({base.first_line(error)})"
    )
  return _Read(np.zeros((size, size, 3), np.uint8), 0, fault)


def _augmented(
  image: Any,
  size: int,
  smallest: float,
  key: tuple[int, int] | None,
  magnitude: float,
) -> Any:
  """Crops, and augments what has a key."""
  image = _cropped(image, size, smallest, key)
  if key is None or not magnitude:
    return image
  draws = _uniform(key, 4 * _TRIES + rand_augment.NUM_DRAWS)
  return rand_augment.augment(image, draws[4 * _TRIES :], magnitude)


def _cropped(
  image: Any, size: int, smallest: float, key: tuple[int, int] | None
) -> Any:
  from PIL import Image

  if key is None or smallest == 1:
    return pictures.resize_and_crop(image, round(size / _CENTRE), size)
  width, height = image.size
  box = random_box(width, height, _uniform(key, 4 * _TRIES), smallest)
  return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


# --- Many pictures ------------------------------------------------------------


class _Examples:
  """Source of grain: the examples of a decoding, one after the other.

  Args:
    numbers: Numbers of the records, in order.
  """

  def __init__(self, numbers: np.ndarray) -> None:
    self._numbers = numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def __getitem__(self, place: Any) -> _Example:
    return _Example(int(self._numbers[int(place)]), None)


class _Plan:
  """Source of grain: the examples of a training, in the order of its steps.

  Args:
    numbers: Numbers of the records of the split.
    seed: Seed of the training.
    batch_size: Size of a batch over all processes, B.
    rows: Places in a batch that this process reads.
    num_steps: Number of steps.
  """

  def __init__(
    self,
    numbers: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    rows: np.ndarray,
    num_steps: int,
  ) -> None:
    self._numbers, self._seed = numbers, seed
    self._batch_size, self._rows = batch_size, rows
    self._num_steps = num_steps

  def __len__(self) -> int:
    return self._num_steps * len(self._rows)

  def __getitem__(self, place: Any) -> _Example:
    step, row = divmod(int(place), len(self._rows))
    row = int(self._rows[row])
    indices = batches.train_indices(
      self._seed,
      step,
      num_examples=len(self._numbers),
      batch_size=self._batch_size,
    )
    key = self._seed + _CROP_STREAM, step * self._batch_size + row
    return _Example(int(self._numbers[indices[row]]), key)


def _stacked(found: Sequence[_Read]) -> _Read:
  """Joins what was read; the first fault counts."""
  fault = next((one.fault for one in found if one.fault), "")
  labels = np.array([one.label for one in found], np.int32)
  return _Read(np.stack([one.image for one in found]), labels, fault)  # type: ignore[arg-type]


def _joined(chunks: Sequence[_Read]) -> Split:
  for chunk in chunks:
    if chunk.fault:
      raise UserError(chunk.fault)
  images, labels = (
    np.concatenate([chunk[i] for chunk in chunks]) for i in (0, 1)
  )
  return Split(images, labels)


def check_installed() -> None:
  """Checks that grain is there.

  Raises:
    UserError: It is not.
  """
  try:
    import grain  # noqa: F401
  except ImportError as error:
    raise UserError(
      "stream: True needs the Python package grain"
      f" ({base.first_line(error)}): pip install grain"
    ) from None


class _ChunkReader:
  """Reads chunks of examples ahead, in order; a context manager.

  Args:
    examples: Source of grain.
    decode: Function of an example.
    chunk: Number of pictures in a chunk; the last one may be smaller.
    threads: Threads that read, where there are no processes.
    ahead: Number of chunks that are read ahead.
    workers: Processes that read; 0: none.
    start: Number of the first chunk.
    stop: Number of the chunk after the last; None: all.
  """

  def __init__(
    self,
    examples: Any,
    decode: Any,
    *,
    chunk: int,
    threads: int,
    ahead: int,
    workers: int = 0,
    start: int = 0,
    stop: int | None = None,
  ) -> None:
    check_installed()
    import grain

    chunks = grain.MapDataset.source(examples).map(decode)
    chunks = chunks.batch(chunk, batch_fn=_stacked)
    reading = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=max(threads, ahead)
    )
    found = chunks[start:stop].to_iter_dataset(reading)
    if workers:
      found = _in_processes(found, workers, ahead)
    self._chunks: Iterator[_Read] = iter(found)

  def __iter__(self) -> Iterator[_Read]:
    return self._chunks

  def __enter__(self) -> "_ChunkReader":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends threads and processes."""
    self._chunks.close()  # type: ignore[attr-defined]


def _in_processes(
  found: "grain.IterDataset", workers: int, ahead: int
) -> "grain.IterDataset":
  """Reads in processes; each has a share of what is read ahead."""
  import grain
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain hands them to its processes
  options = grain.MultiprocessingOptions(
    num_workers=workers, per_worker_buffer_size=max(1, -(-ahead // workers))
  )
  return found.mp_prefetch(options, worker_init_fn=_begin_worker)


def _begin_worker(number: int, count: int) -> None:
  """Leaves Ctrl-C to the process that the worker reads for."""
  del number, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)


class TrainingBatches:
  """Batches of a training, read from the disk; a context manager.

  Args:
    pictures_: Training pictures.
    seed: Seed of the training.
    batch_size: Size of a batch over all processes, B.
    rows: Places in a batch that this process reads, int [M].
    num_steps: Number of steps of the training.
  """

  def __init__(
    self,
    pictures_: Pictures,
    *,
    seed: int,
    batch_size: int,
    rows: np.ndarray,
    num_steps: int,
  ) -> None:
    options = pictures_.options
    self._examples = _Plan(
      pictures_.numbers,
      seed=seed,
      batch_size=batch_size,
      rows=rows,
      num_steps=num_steps,
    )
    self._decode = functools.partial(
      _decode,
      pictures_.records,
      pictures_.size,
      options.smallest_crop,
      magnitude=options.rand_augment,
    )
    # A batch is whole chunks, so that each step begins with one.
    self._chunk = max(n for n in range(1, _CHUNK + 1) if len(rows) % n == 0)
    self._per_step = len(rows) // self._chunk
    self._options = options
    self._reader: _ChunkReader | None = None
    self._next = 0

  def batch(self, number: int) -> Split:
    """Reads the batch of any step.

    Args:
      number: Number of the step, from 0.

    Returns:
      This process's part: images uint8 [M, size, size, 3], labels int32 [M].

    Raises:
      UserError: A picture cannot be read; the message names it.
    """
    with self._open(number, number + 1) as reader:
      return _joined([*reader])

  def follow(self, number: int) -> Split:
    """Reads the batch of a step, and those of the next ones ahead.

    Calls with consecutive numbers wait for nothing once enough is read; any
    other number starts reading there.

    Args:
      number: Number of the step, from 0.

    Returns:
      The result of `batch`.

    Raises:
      UserError: A picture cannot be read; the message names it.
    """
    if self._reader is None or number != self._next:
      self.close()
      self._reader = self._open(number, None)
    self._next = number + 1
    chunks = iter(self._reader)
    return _joined([next(chunks) for _ in range(self._per_step)])

  def _open(self, start: int, stop: int | None) -> _ChunkReader:
    options = self._options
    return _ChunkReader(
      self._examples,
      self._decode,
      chunk=self._chunk,
      threads=_THREADS,
      ahead=options.prefetch * self._per_step,
      # Processes take seconds to start, too long for one batch.
      workers=options.workers if stop is None else 0,
      start=start * self._per_step,
      stop=None if stop is None else stop * self._per_step,
    )

  def __enter__(self) -> "TrainingBatches":
    """Returns itself."""
    return self

  def __exit__(self, *error: object) -> None:
    """Ends threads and processes."""
    self.close()

  def close(self) -> None:
    """Ends threads and processes; the next batch starts them again."""
    if self._reader is not None:
      self._reader.close()
      self._reader = None
