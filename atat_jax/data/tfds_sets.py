"""Reader of tensorflow-datasets directories in array_record form.

TensorFlow is not needed: the records hold encoded pictures, which Pillow
decodes. CIFAR has names of its own and its official order; any other set of
images with labels is `tfds:<name>`.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from atat_jax import checks
from atat_jax.data import base, own, record_files, streamed
from atat_jax.errors import UserError
from atat_jax.runs import files, locations
from atat_jax.untrusted import regular

_TESTS = ("test", "validation")  # splits for tests, the first first
_CHUNK = 1000  # records decoded at a time
_SMALLEST_RECORD = 60  # bytes of a PNG picture
_LARGEST_NOTE = 1 << 20  # bytes of a file of a tfds version without records

# Entries of its JSON files that make tfds import or open something.
_TFDS_VALUES = {
  "pythonclassname": r"tensorflow_datasets\.core\.features\.[a-z_]+\.[A-Za-z]+",
  "filepathtemplate": r"\{DATASET\}-\{SPLIT\}\.\{FILEFORMAT\}-\{SHARD_X_OF_Y\}",
}

Decode = Callable[[bytes], np.ndarray]
"""Content of a picture file to uint8 [H, W, C]."""


def default_data_dir() -> pathlib.Path:
  """Returns tfds' own directory: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`."""
  root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return locations.expand("data_dir", root)


def versions(data_dir: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Returns the directories of a data set's prepared versions, newest first.

  Leftovers of an interrupted preparation have other names and are not found.

  Args:
    data_dir: Root of the tfds data directory.
    name: Name of the data set, with its configuration after a slash where it
      has any.
  """
  found = [
    path
    for path in (data_dir / name).glob("*.*.*")
    if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
    and (path / "dataset_info.json").is_file()
  ]
  return sorted(
    found, key=lambda path: [*map(int, path.name.split("."))], reverse=True
  )


def records(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Returns the array_record files of a prepared version, [] if it has none."""
  stem = name.partition("/")[0]
  return sorted(directory.glob(f"{stem}-*.array_record*"))


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields every key of a JSON tree with its value."""
  if isinstance(tree, dict):
    yield from tree.items()
  if isinstance(tree, dict | list):
    for value in tree.values() if isinstance(tree, dict) else tree:
      yield from _entries(value)


def _check(directory: pathlib.Path, name: str) -> int:
  """Checks what tfds would believe of a prepared version.

  Its files name classes, whose modules tfds imports, and paths, which it opens.

  Returns:
    Number of bytes of all record files.

  Raises:
    Exception: The version is not one of this data set, mostly `UserError`,
      `ValueError` or `OSError`.
  """
  found = records(directory, name)
  for path in directory.iterdir():
    if not path.is_dir() and path not in found:
      regular.read_bytes(path, _LARGEST_NOTE)
  for path in sorted(directory.glob("*.json")):
    for key, value in _entries(files.read_json(path)):
      known = _TFDS_VALUES.get(key.replace("_", "").lower())
      if known is not None and not re.fullmatch(known, str(value)):
        raise ValueError(f"{path.name}: {key} is {value!r}")
  for path in found:
    record_files.check(path)
  return sum(path.stat().st_size for path in found)


def _decode(
  source: Any, decode: Decode, description: str, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes a data source to images and labels `[N, 1]`.

  Args:
    source: The data source; its images are bytes.
    decode: Decoder of one picture.
    description: Name of the split, for the progress bar.
    size: Number of bytes of the files of the data source.
  """
  total = len(source)
  if total * _SMALLEST_RECORD > size:
    raise ValueError(f"{total} records in {size} bytes")
  decoded: list[np.ndarray] = []
  labels = np.empty((total, 1), np.int64)
  ids = []
  progress = tqdm.tqdm(
    total=total,
    desc=f"decoding {description}, once",
    unit=" images",
    disable=None,  # where the output is no terminal
  )
  with progress:
    for start in range(0, total, _CHUNK):
      chunk = range(start, min(start + _CHUNK, total))
      found = source.__getitems__(list(chunk))
      for i, record in zip(chunk, found, strict=True):
        try:
          decoded.append(decode(record["image"]))
        except ValueError as error:
          raise ValueError(f"image {i}: {error}") from None
        labels[i] = record["label"]
        ids.append(record.get("id", i))
      progress.update(len(chunk))
  images = base.stack(decoded)
  # tfds shuffles the examples; their ids carry the official number.
  order = np.argsort(np.array(ids), kind="stable")
  return images[order], labels[order]


def read(
  directory: pathlib.Path,
  name: str,
  decode: Decode,
  *,
  splits: Mapping[str, str],
  remedy: str,
  num_bytes: int | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads a prepared version, in the order of its ids where it has ids.

  Args:
    directory: `<data_dir>/<name>/<version>`.
    name: Name of the data set.
    decode: Decoder of one picture.
    splits: "train" and "test" to the names that they have there.
    remedy: Advice for the error message.
    num_bytes: Size of the record files, where they have been checked already.

  Returns:
    "train" and "test" to images uint8 `[N, H, W, C]` and labels `[N, 1]`.

  Raises:
    UserError: The version cannot be read as such images.
  """
  try:
    import tensorflow_datasets as tfds

    size = _check(directory, name) if num_bytes is None else num_bytes
    builder = tfds.builder_from_directory(str(directory))
    found = {}
    for split, there in splits.items():
      source = builder.as_data_source(
        split=there,
        # Decoding one image at a time through tfds takes twice as long.
        decoders={"image": tfds.decode.SkipDecoding()},
      )
      found[split] = _decode(source, decode, f"{name} {there}", size)
  except ImportError as error:
    raise UserError(
      f"{directory}: reading it needs the Python packages tensorflow-datasets,"
      f" array_record and pillow ({base.first_line(error)})"
    ) from error
  # The C++ code that reads record files raises exceptions of its own.
  except Exception as error:
    raise UserError(
      f"{directory}: cannot be read as {name} of tensorflow-datasets"
      f" ({type(error).__name__}: {base.first_line(error)}); {remedy}"
    ) from error
  return found


# --- Any set of images with labels --------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Described:
  """Parts of a version's own description."""

  splits: dict[str, str]
  spare: str | None  # another split for tests
  class_names: Sequence[str]
  num_bytes: int


def _describe(directory: pathlib.Path, name: str) -> _Described:
  """Reads which splits a version has, and its classes."""
  import tensorflow_datasets as tfds

  num_bytes = _check(directory, name)
  info = tfds.builder_from_directory(str(directory)).info
  known = dict(info.features)
  for key, kind in (
    ("image", tfds.features.Image),
    ("label", tfds.features.ClassLabel),
  ):
    if not isinstance(known.get(key), kind):
      raise ValueError(
        f"its examples have {', '.join(sorted(known))}; allowed: an 'image' and"
        " a 'label' that is a class"
      )
  there = list(info.splits)
  test, spare, *_ = *(x for x in _TESTS if x in there), None, None
  if "train" not in there or test is None:
    raise ValueError(f"it has {', '.join(there)}; allowed: train and test")
  splits = {"train": "train", "test": test}
  return _Described(splits, spare, known["label"].names, num_bytes)


def _described(directory: pathlib.Path, name: str) -> _Described:
  """Reads the description; what is wrong with it becomes one line."""
  try:
    return _describe(directory, name)
  except Exception as error:  # whatever tfds finds wrong
    raise UserError(f"{directory}: {base.first_line(error)}") from error


def _newest(root: pathlib.Path, name: str) -> pathlib.Path:
  """Finds the newest version that holds array_record files."""
  for directory in versions(root, name):
    if records(directory, name):
      return directory
  raise UserError(
    f"tfds:{name} not found: looked for {name}/<version>/"
    f"{name.partition('/')[0]}-*.array_record* in {root}; prepare it where"
    " TensorFlow is, with tfds.builder(name, file_format='array_record')"
    ".download_and_prepare()"
  )


def _decode_any(directory: pathlib.Path, name: str, size: int) -> own.Contents:
  """Decodes a prepared version of any set."""
  described = _described(directory, name)
  found = read(
    directory,
    name,
    own.decoder(size),
    splits=described.splits,
    remedy="allowed: pictures with labels",
    num_bytes=described.num_bytes,
  )
  train, test = (
    base.Split(found[split][0], found[split][1][:, 0]) for split in found
  )
  return own.Contents(train, test, tuple(described.class_names))


def find_any(
  name: str,
  *,
  data_dir: str | None = None,
  source: str = "auto",
  size: int = 0,
) -> own.Unread:
  """Finds any prepared tfds set of images with labels.

  Args:
    name: Name of the data set, as in `svhn_cropped` or `eurosat/rgb`.
    data_dir: Root of the tfds data directory; default `default_data_dir()`.
    source: "auto" or "tfds".
    size: Side of the square images in pixels, see `own.decoder`; 0: pictures
      have one size and keep it.

  Returns:
    The data set, which reading may find to be another kind; where there is no
    test split, "validation" is it.

  Raises:
    UserError: Nothing found.
  """
  directory = _place(name, data_dir, source)
  return own.Unread(
    f"tfds:{name}",
    directory,
    [directory / "dataset_info.json", *records(directory, name)],
    lambda: _decode_any(directory, name, size),
    size,
  )


def _place(name: str, data_dir: str | None, source: str) -> pathlib.Path:
  """Finds the prepared version that a name stands for."""
  checks.choice("source", source, ("auto", "tfds"))
  if not re.fullmatch(r"\w+(/\w[\w.-]*)?", name):
    raise UserError(
      f"name: {'tfds:' + name!r}; allowed: tfds:<data set>, as in"
      " tfds:svhn_cropped"
    )
  root = locations.expand("data_dir", data_dir) if data_dir else None
  return _newest(root or default_data_dir(), name)


# --- Records that stay on the disk --------------------------------------------


class PreparedRecords:
  """Records of a prepared version, for `streamed.Pictures`.

  Each process opens the files itself: open ones cannot be handed on.

  Args:
    directory: `<data_dir>/<name>/<version>`.
    split: Name of the split there.
    num_classes: Number of its classes, K.
  """

  labels = None  # only reading all records would show them

  def __init__(self, directory: pathlib.Path, split: str, num_classes: int):
    self._directory, self._split = directory, split
    self._num_classes = num_classes
    self._opened: Any = None

  def __getstate__(self) -> dict[str, Any]:
    """Leaves the open files behind."""
    return {**self.__dict__, "_opened": None}

  @property
  def _source(self) -> Any:
    if self._opened is None:
      import tensorflow_datasets as tfds

      builder = tfds.builder_from_directory(str(self._directory))
      self._opened = builder.as_data_source(
        split=self._split, decoders={"image": tfds.decode.SkipDecoding()}
      )
    return self._opened

  def __len__(self) -> int:
    """Returns the number of records."""
    return len(self._source)

  def name(self, number: int) -> str:
    """Returns a name of a record for messages."""
    return f"{self._directory} ({self._split}): record {number}"

  def read(self, number: int) -> streamed.Record:
    """Reads a record; raises whatever tfds and its reader do.

    Raises:
      UserError: A label that is no class, as -1 of pictures without a label.
    """
    found = self._source[number]
    label = int(found["label"])
    if not 0 <= label < self._num_classes:
      raise UserError(
        f"{self.name(number)}: label {label}; allowed: 0 to"
        f" {self._num_classes - 1}"
      )
    return streamed.Record(bytes(found["image"]), label)

  def are_labelled(self) -> bool:
    """Whether the first record has a label."""
    return int(self._source[0]["label"]) >= 0


def stream(
  name: str,
  *,
  data_dir: str | None = None,
  source: str = "auto",
) -> streamed.Found:
  """Finds a prepared tfds set of images with labels; reads one record.

  Args:
    name: Name of the data set, as in `imagenet2012`.
    data_dir: Root of the tfds data directory; default `default_data_dir()`.
    source: "auto" or "tfds".

  Returns:
    Its records; where there is no test split, or one without labels as that of
    imagenet2012, "validation" is it.

  Raises:
    UserError: Nothing found, or what was found is not such a data set.
  """
  directory = _place(name, data_dir, source)
  described = _described(directory, name)
  classes = tuple(described.class_names)
  train, test = (
    PreparedRecords(directory, described.splits[split], len(classes))
    for split in ("train", "test")
  )
  try:
    empty = not (len(train) and len(test))
    if described.spare and not empty and not test.are_labelled():
      test = PreparedRecords(directory, described.spare, len(classes))
      empty = not len(test)
  # The C++ code that reads record files raises exceptions of its own.
  except Exception as error:
    raise UserError(f"{directory}: {base.first_line(error)}") from error
  if empty:
    raise UserError(f"{directory}: holds no images")
  return streamed.Found(f"tfds:{name}", classes, train, test)
