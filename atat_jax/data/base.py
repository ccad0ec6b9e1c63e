"""Data sets: description, arrays, fixed splits and the cache of decoded copies.

Images on the host are uint8 `[N, H, W, C]`, labels int32 `[N]`. Which images
are held out is a property of the data, never of a run: the order used for it
comes from a counter generator with a constant key, so that every run, seed and
machine chooses its checkpoints on the same validation images.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, locations

if TYPE_CHECKING:
  from atat_jax.data.streamed import Pictures

_CACHE_FORMAT = 1
# An arbitrary constant; changing it would change every validation split.
_HOLD_OUT_KEY = (0x61746174, 0x73706C69)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """Description of a data set, known without reading it.

  Attributes:
    name: Name in `DATASETS`.
    num_classes: Number of labels; labels are `0 .. num_classes - 1`.
    image_shape: `(height, width, channels)`.
    class_names: One name for every label.
    mean: Mean of the training pixels in [0, 1], one value per channel.
    std: Standard deviation of the same pixels, one value per channel.
  """

  name: str
  num_classes: int
  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]


class Split(NamedTuple):
  """Images with their labels: uint8 `[N, H, W, C]` and int32 `[N]`."""

  images: np.ndarray
  labels: np.ndarray

  def first(self, number: int) -> "Split":
    """Returns the first images with their labels.

    Args:
      number: Number of images; where there are fewer, all of them.
    """
    return Split(self.images[:number], self.labels[:number])


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Three disjoint splits of one data set: in memory, or all on the disk."""

  spec: DatasetSpec
  train: "Split | Pictures"
  validation: "Split | Pictures"
  test: "Split | Pictures"

  @property
  def num_train(self) -> int:
    """Number of training images."""
    return count(self.train)

  @property
  def num_test(self) -> int:
    """Number of test images."""
    return count(self.test)


def count(split: "Split | Pictures") -> int:
  """Returns the number of images of a split."""
  return len(split.labels) if isinstance(split, Split) else len(split)


def in_memory(split: "Split | Pictures") -> Split:
  """Returns a split with its images, read from the disk where they are there.

  Raises:
    UserError: A picture cannot be read; the message names it.
  """
  return split if isinstance(split, Split) else split.decode()


class Source(NamedTuple):
  """Member of `DATASETS`.

  Attributes:
    spec: Description of the data set; its `name` is the key in `DATASETS`. None
      where the data describe themselves.
    read: Function `read(*, data_dir, cache_dir, source)` that returns the
      official training and test splits, checked by `checked_split`. `load`
      takes the validation split from the former. A data set without a file
      ignores the directories. Where `spec` is None: function
      `find(name, *, data_dir, source, size)` of the name after the colon that
      returns what can be described and read (`own.Unread`).
    stream: Function `stream(name, *, data_dir, source)` that finds data which
      stay on the disk (`streamed.Found`); None: there is none.
  """

  spec: DatasetSpec | None
  read: Callable[..., Any]
  stream: Callable[..., Any] | None = None


def first_images(split: "Split | Pictures", number: int) -> Split:
  """Returns a split in memory; of pictures on the disk, the first ones.

  Args:
    split: The split.
    number: Number of pictures that are read.

  Raises:
    UserError: A picture cannot be read; the message names it.
  """
  if isinstance(split, Split):
    return split
  return split.select(slice(number)).decode()


def first_line(error: Exception) -> str:
  """Returns the first line of an exception's message, or its type's name."""
  lines = str(error).splitlines()
  return lines[0] if lines else type(error).__name__


def permutation(num_examples: int, key: tuple[int, int]) -> np.ndarray:
  """Returns a permutation of `0 .. num_examples - 1`, int64, fixed by `key`.

  The permutation sorts the raw output of the counter generator Philox. NumPy
  guarantees that output for all versions, unlike `Generator.permutation`.

  Args:
    num_examples: Length of the permutation.
    key: Two unsigned 64-bit integers.
  """
  raw = np.random.Philox(key=np.array(key, np.uint64)).random_raw(num_examples)
  return np.argsort(raw, kind="stable")


def stratified_order(labels: np.ndarray) -> np.ndarray:
  """Returns a fixed random order whose prefixes have the classes in proportion.

  Args:
    labels: Integers `[N]`.

  Returns:
    int64 `[N]`: a permutation of `0 .. N - 1`. Among the first m examples, each
    class has its share of m, give or take one.
  """
  shuffled = permutation(len(labels), _HOLD_OUT_KEY)
  position = np.empty(len(labels))
  for label in np.unique(labels):
    members = np.flatnonzero(labels[shuffled] == label)
    # Member k of n gets the fraction (k + 1/2) / n of the order.
    position[members] = (np.arange(len(members)) + 0.5) / len(members)
  return shuffled[np.argsort(position, kind="stable")]


def hold_out(split: Split, size: int) -> tuple[Split, Split]:
  """Divides a split by the fixed stratified order.

  Args:
    split: N images with labels.
    size: Number of images to hold out.

  Returns:
    The remaining `N - size` images and the `size` held out, both in their
    original order.

  Raises:
    UserError: `size` is below 1 or leaves nothing.
  """
  total = len(split.labels)
  if not 1 <= size < total:
    raise UserError(
      f"validation_size: {size}; allowed: 1 to {total - 1}, the training split"
      f" has {total} images"
    )
  held = np.zeros(total, bool)
  held[stratified_order(split.labels)[:size]] = True
  rest = Split(split.images[~held], split.labels[~held])
  return rest, Split(split.images[held], split.labels[held])


def checked_split(
  spec: DatasetSpec, images: np.ndarray, labels: np.ndarray, *, where: str
) -> Split:
  """Checks arrays read from outside and makes a `Split` of them.

  Args:
    spec: Description that the arrays have to agree with.
    images: Pixels, uint8 `[N, H, W, C]`.
    labels: Labels `[N]` of any integer dtype.
    where: File and split, for the error message.

  Returns:
    The images unchanged, the labels as int32.

  Raises:
    UserError: Wrong dtype, shape or number, no images, labels out of range.
  """
  expected = ("N", *spec.image_shape)
  if images.dtype != np.uint8 or images.shape[1:] != spec.image_shape:
    raise UserError(
      f"{where}: images are {images.dtype} {list(images.shape)}, {spec.name}"
      f" needs uint8 [{', '.join(map(str, expected))}]"
    )
  if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
    raise UserError(
      f"{where}: labels are {labels.dtype} {list(labels.shape)} for"
      f" {len(images)} images, must be integers [{len(images)}]"
    )
  if not len(images):
    raise UserError(f"{where}: holds no images")
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high >= spec.num_classes:
    raise UserError(
      f"{where}: label {low if low < 0 else high} is out of range, {spec.name}"
      f" has labels 0 to {spec.num_classes - 1}"
    )
  return Split(images, labels.astype(np.int32, copy=False))


def stack(
  images: Sequence[np.ndarray], names: Sequence[object] | None = None
) -> np.ndarray:
  """Stacks pictures of one size; they get the same channels.

  Args:
    images: Pictures, uint8 `[H, W, C]` each: grey, grey and alpha, colour, or
      colour and alpha.
    names: A name for each, for the error message; default: its number.

  Returns:
    uint8 `[N, H, W, C]`: colour where any picture has colour, alpha only where
    all have it.

  Raises:
    UserError: Pictures of different sizes.
  """
  if not images:
    return np.empty((0, 1, 1, 1), np.uint8)
  for number, image in enumerate(images):
    if image.shape[:2] != images[0].shape[:2]:
      name = names[number] if names else f"image {number}"
      raise UserError(
        f"{name}: {image.shape[1]} x {image.shape[0]} pixels, those before"
        f" {images[0].shape[1]} x {images[0].shape[0]}; allowed: one size, or"
        " --config.data.size=64, which resizes and crops all to squares"
      )
  colours = max(3 if image.shape[2] >= 3 else 1 for image in images)
  alpha = all(image.shape[2] in (2, 4) for image in images)
  found = np.empty(
    (len(images), *images[0].shape[:2], colours + alpha), np.uint8
  )
  for image, place in zip(images, found, strict=True):
    place[..., :colours] = image[..., : 3 if image.shape[2] >= 3 else 1]
    if alpha:
      place[..., -1] = image[..., -1]
  return found


def as_floats(images: np.ndarray) -> np.ndarray:
  """Converts pixels on the host, uint8 or floats in [0, 1], to float32.

  Args:
    images: Images `[N, H, W, C]`.

  Returns:
    float32 `[N, H, W, C]` in [0, 1].
  """
  if images.dtype != np.uint8:
    return np.asarray(images, np.float32)
  return images.astype(np.float32) / np.float32(255)


def cache_root(cache_dir: str | None) -> pathlib.Path | None:
  """Returns `cache_dir`, by default in `$XDG_CACHE_HOME` or `~/.cache`.

  Returns:
    The folder; None where the default is none that can be written.

  Raises:
    UserError: `cache_dir` is no path.
  """
  if cache_dir is not None:
    return locations.expand("cache_dir", cache_dir)
  return locations.cache("data")


def cache_path(
  cache_dir: str | None, spec: DatasetSpec, origin: Mapping[str, object]
) -> pathlib.Path | None:
  """Returns the cache file for a data set from one kind of source in one place.

  None where there is no folder for it, see `cache_root`.

  A source that changes in its place replaces its decoded copy, so that old
  copies do not pile up.
  """
  place = json.dumps([origin["kind"], origin["path"]])
  digest = hashlib.sha256(place.encode()).hexdigest()[:12]
  root = cache_root(cache_dir)
  return root and root / f"{spec.name}-{digest}.npz"


def write_cache(
  path: pathlib.Path,
  spec: DatasetSpec,
  train: Split,
  test: Split,
  *,
  origin: Mapping[str, object],
) -> None:
  """Writes decoded arrays as an uncompressed `.npz`, whole or not at all.

  A directory that cannot be written costs only the time to decode again, so
  that it is no error but a warning in the log.

  Args:
    path: File to write or replace.
    spec: Description of the data set.
    train: The official training split.
    test: The official test split.
    origin: Identity of the files that were decoded; JSON values.
  """
  header = {
    "format": _CACHE_FORMAT,
    "name": spec.name,
    "origin": origin,
    "spec": dataclasses.asdict(spec),
  }
  arrays = {
    "header": np.array(json.dumps(header, sort_keys=True)),
    "train_images": train.images,
    "train_labels": train.labels,
    "test_images": test.images,
    "test_labels": test.labels,
  }
  files.remove_temporaries(path.parent, below=False)
  try:
    files.write_arrays(path, arrays)
  except UserError as error:
    _log.warning(
      "cannot write the decoded copy of %s (%s); it will be decoded again at"
      " the next start",
      spec.name,
      error,
    )


def read_cache(
  path: pathlib.Path,
  spec: DatasetSpec,
  *,
  origin: Mapping[str, object] | None = None,
) -> tuple[Split, Split]:
  """Reads a decoded copy that `write_cache` wrote.

  Args:
    path: The `.npz` file.
    spec: Description of the data set that the file must hold.
    origin: Identity of the files that it must have been made from; None: any.

  Returns:
    The official training and test splits.

  Raises:
    UserError: Another data set or another origin.
    DamagedFileError: Not readable, or not what was written.
  """
  unusable = f"{path}: not a decoded copy of {spec.name} that can be used"
  try:
    arrays = files.load_arrays(path)
    header = json.loads(str(arrays["header"]))
    if header["format"] != _CACHE_FORMAT or header["name"] != spec.name:
      raise UserError(
        f"{unusable} (it holds {header['name']}, format {header['format']})"
      )
    # JSON turns tuples into lists.
    if origin is not None and header["origin"] != json.loads(
      json.dumps(origin)
    ):
      raise UserError(f"{unusable} (it was made from other files)")
    train, test = (
      checked_split(
        spec,
        arrays[f"{name}_images"],
        arrays[f"{name}_labels"],
        where=f"{path} ({name})",
      )
      for name in ("train", "test")
    )
  except UserError:
    raise
  # A damaged file can raise anything in the zip reader or the header parser.
  except Exception as error:
    raise DamagedFileError(
      f"{unusable} ({type(error).__name__}: {first_line(error)})"
    ) from error
  return train, test
