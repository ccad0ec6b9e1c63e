"""Data sets of a user's own, which describe themselves.

Number of classes, size and channels of the images, mean and deviation of the
pixels come from the data. Decoded pictures are kept in the cache directory, with
the description, so that the next start reads no pictures, and for the
description alone no arrays. What had to be read for a description is handed on to
whoever asks for the arrays next.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from atat_jax.data import base, pictures
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, locations
from atat_jax.untrusted import arrays as array_files
from atat_jax.untrusted import zips

MOST_CLASSES = 1000
"""Largest number of classes."""

_MOST_CHANNELS = 4

_log = logging.getLogger(__name__)

_Origin = dict[str, object]
_T = TypeVar("_T")


class Contents(NamedTuple):
  """Splits of a data set, and one name for every label."""

  train: base.Split
  test: base.Split
  class_names: tuple[str, ...]


class Described(NamedTuple):
  """Description that was made of a data set, and its official splits."""

  spec: base.DatasetSpec
  train: base.Split
  test: base.Split


def decoder(size: int) -> Callable[[bytes], np.ndarray]:
  """Makes a decoder of picture files.

  Args:
    size: Side of the square images in pixels: the shorter side is resized to
      it, and the centre is cropped; 0: pictures keep their size.

  Returns:
    Function of a file's content; returns uint8 `[H, W, C]` with the channels of
    the picture: grey, grey and alpha, colour, or colour and alpha.
  """

  def decode(content: bytes) -> np.ndarray:
    image = pictures.decode_bytes(content)
    if size:
      image = pictures.resize_and_crop(image, size, size)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]

  return decode


def describe(name: str, arrays: Contents) -> base.DatasetSpec:
  """Describes a data set by its arrays.

  Args:
    name: Name of the data set.
    arrays: Splits and class names.

  Returns:
    The description; a channel without variation has the deviation 1.
  """
  images = arrays.train.images
  values = np.arange(256) / 255
  counts = np.stack(
    [
      np.bincount(images[..., c].ravel(), minlength=256)
      for c in range(images.shape[-1])
    ]
  )
  weights = counts / counts.sum(1, keepdims=True)
  mean = weights @ values
  # Not from the mean of the squares, which would cancel.
  variance = (weights * (values - mean[:, None]) ** 2).sum(1)
  std = np.where(variance > 0, np.sqrt(variance), 1.0)
  return base.DatasetSpec(
    name=name,
    num_classes=len(arrays.class_names),
    image_shape=images.shape[1:],
    class_names=arrays.class_names,
    mean=tuple(map(float, mean)),
    std=tuple(map(float, std)),
  )


def checked(name: str, arrays: Contents, where: object) -> Described:
  """Describes a data set and checks its splits against the description.

  Args:
    name: Name of the data set.
    arrays: Splits as they were read, and class names; where there are none, the
      labels are the names.
    where: File or folder, for the error message.

  Returns:
    The description with the splits.

  Raises:
    UserError: Wrong dtype, shape, number of channels or classes; a label
      without a name, or without training images.
  """
  train, test = (
    base.Split(_with_channels(images, f"{where} ({split})"), labels)
    for split, (images, labels) in zip(
      ("train", "test"), arrays[:2], strict=True
    )
  )
  names = arrays.class_names or _names(train.labels, test.labels, where)
  if not 2 <= len(names) <= MOST_CLASSES:
    raise UserError(
      f"{where}: {len(names)} classes; allowed: 2 to {MOST_CLASSES}"
    )
  if len(set(names)) < len(names):
    twice = next(x for x in names if names.count(x) > 1)
    raise UserError(f"{where}: two classes are named {twice!r}")
  if not len(train.images):
    raise UserError(f"{where} (train): holds no images")
  spec = describe(name, Contents(train, test, names))
  train, test = (
    base.checked_split(spec, *split, where=f"{where} ({part})")
    for part, split in (("train", train), ("test", test))
  )
  return Described(spec, train, test)


def checked_test(test: base.Split, where: object) -> base.Split:
  """Checks test images that come without training images.

  Args:
    test: Images and labels as they were read.
    where: File, for the error message.

  Returns:
    Images uint8 `[N, H, W, C]` and labels int32 `[N]`.

  Raises:
    UserError: Wrong dtype, shape or number of channels; a negative label.
  """
  images = _with_channels(test.images, f"{where} (test)")
  labels = test.labels
  if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
    raise UserError(
      f"{where} (test): labels are {labels.dtype.name} {list(labels.shape)};"
      f" allowed: integers [{len(images)}]"
    )
  if not len(images) or labels.min() < 0:
    raise UserError(f"{where} (test): no images, or a label below 0")
  return base.Split(images, labels.astype(np.int32))


def _with_channels(images: np.ndarray, where: str) -> np.ndarray:
  """Returns images [N, H, W, C], grey ones without a channel included."""
  if images.dtype != np.uint8:
    hint = ""
    if images.dtype.kind == "f":
      hint = (
        "; floats in [0, 1] become such by (x * 255).round().astype('uint8')"
      )
    raise UserError(
      f"{where}: images are {images.dtype.name}; allowed: uint8, 0 to 255{hint}"
    )
  if images.ndim == 3:
    images = images[..., None]
  if images.ndim != 4 or not 1 <= images.shape[-1] <= _MOST_CHANNELS:
    hint = ""
    if images.ndim == 4 and 1 <= images.shape[1] <= _MOST_CHANNELS:
      hint = "; PyTorch's order becomes this by x.transpose(0, 2, 3, 1)"
    raise UserError(
      f"{where}: images are {list(images.shape)}; allowed: [N, H, W, C] with 1"
      f" to {_MOST_CHANNELS} channels{hint}"
    )
  return images


def _names(
  train: np.ndarray, test: np.ndarray, where: object
) -> tuple[str, ...]:
  """Makes names of labels without names, which have to be 0 to K - 1."""
  for labels in (train, test):
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
      raise UserError(
        f"{where}: labels are {labels.dtype.name} {list(labels.shape)}; allowed:"
        " integers [N]"
      )
  found = set(np.unique(train).tolist())
  number = max(found, default=0) + 1
  missing = set(range(min(number, MOST_CLASSES + 1))) - found
  if missing or min(found, default=0) < 0:
    raise UserError(
      f"{where}: labels {min(found)} to {max(found)}, no training image has"
      f" {min(missing or found)}; allowed: 0 to K - 1, each of them there, or"
      " class_names"
    )
  return tuple(map(str, range(number)))


@dataclasses.dataclass(frozen=True)
class Unread:
  """Data set that has been found, and not been read.

  Attributes:
    name: Name of the data set.
    place: File or folder that holds it.
    files: Files that it is made from; a change in one makes it anew.
    decode: Reader of everything.
    size: Side of the images, part of the copy's identity.
    is_copied: Whether a decoded copy is kept.
  """

  name: str
  place: pathlib.Path
  files: Sequence[pathlib.Path]
  decode: Callable[[], Contents]
  size: int = 0
  is_copied: bool = True

  def describe(self, cache_dir: str | None) -> base.DatasetSpec:
    """Reads the description: that in the decoded copy, or of all pictures.

    Args:
      cache_dir: Directory for decoded copies; default `base.cache_root(None)`.

    Raises:
      UserError: The data cannot be used.
    """
    origin = self._origin()
    spec = self._from_copy(cache_dir, lambda path: self._spec(path, origin))
    if spec is not None:
      return spec
    kept = _kept.get(self.name)
    if kept is None or kept[0] != origin:
      _kept.clear()
      kept = _kept[self.name] = origin, self._decode(cache_dir, origin)
    return kept[1].spec

  def read(self, cache_dir: str | None) -> Described:
    """Reads everything: the decoded copy, or all pictures where there is none.

    Args:
      cache_dir: Directory for decoded copies; default `base.cache_root(None)`.

    Returns:
      The description with the splits.

    Raises:
      UserError: The data cannot be used.
    """
    origin = self._origin()
    kept = _kept.pop(self.name, None)
    if kept is not None and kept[0] == origin:
      return kept[1]

    def from_copy(path: pathlib.Path) -> Described:
      spec = self._spec(path, origin)
      return Described(spec, *base.read_cache(path, spec, origin=origin))

    found = self._from_copy(cache_dir, from_copy)
    return self._decode(cache_dir, origin) if found is None else found

  def _spec(self, path: pathlib.Path, origin: _Origin) -> base.DatasetSpec:
    """Reads the description in a decoded copy of these files."""
    spec, made_from = read_header(path)
    if spec.name != self.name or made_from != origin:
      raise UserError(f"{path}: a decoded copy of other files")
    return spec

  def _from_copy(
    self, cache_dir: str | None, read: Callable[[pathlib.Path], _T]
  ) -> _T | None:
    """Reads from the decoded copy; None where none can be used."""
    path = self._copy(cache_dir)
    if path is None or not path.is_file():
      return None
    try:
      return read(path)
    except DamagedFileError as error:
      _log.warning("%s; decoding again", error)
    except UserError as error:
      _log.info("decoding again: %s", error)
    return None

  def _decode(self, cache_dir: str | None, origin: _Origin) -> Described:
    """Decodes all pictures, and writes the copy."""
    found = checked(self.name, self.decode(), self.place)
    path = self._copy(cache_dir)
    if path is not None:
      base.write_cache(path, *found, origin=origin)
    return found

  def _copy(self, cache_dir: str | None) -> pathlib.Path | None:
    """Path of the decoded copy; None where none is kept."""
    root = base.cache_root(cache_dir) if self.is_copied else None
    place = [self.name, str(locations.resolved(self.place)), self.size]
    digest = hashlib.sha256(json.dumps(place).encode()).hexdigest()[:12]
    return root and root / f"own-{digest}.npz"

  def _origin(self) -> _Origin:
    """Returns what changes whenever the data do, without reading them."""
    digest = hashlib.sha256()
    try:
      for path in self.files:
        changed, length = files.stamp(path)
        entry = [str(path.relative_to(self.place)), length, changed]
        digest.update(json.dumps(entry).encode())
    except OSError as error:
      raise UserError(
        f"data_dir={self.place}: {error.strerror or error}"
      ) from None
    return {
      "kind": "own",
      "path": str(locations.resolved(self.place)),
      "files": digest.hexdigest(),
      "size": self.size,
    }


_kept: dict[str, tuple[_Origin, Described]] = {}
"""Last data set that was read for its description, until its arrays are asked
for, with the identity of its files."""


def read_header(path: pathlib.Path) -> tuple[base.DatasetSpec, _Origin]:
  """Reads the description in a decoded copy, and what it was made from.

  Args:
    path: A `.npz` that `base.write_cache` wrote.

  Returns:
    The description, and the identity of the files.

  Raises:
    DamagedFileError: Not readable, or without a description.
  """
  try:
    with zips.open_zip(path) as archive:
      header = json.loads(
        str(array_files.read_members(archive, {"header"})["header"])
      )
    fields = {
      key: tuple(value) if isinstance(value, list) else value
      for key, value in header["spec"].items()
    }
    spec = base.DatasetSpec(**cast(dict[str, Any], fields))
    return spec, dict(header["origin"])
  # A damaged file can raise anything in the zip reader or the header parser.
  except Exception as error:
    raise DamagedFileError(
      f"{path}: not a decoded copy that can be used ({base.first_line(error)})"
    ) from error
