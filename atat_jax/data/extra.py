"""Extra training images, as many as the disk holds.

A `.npz` file with `image` and `label` (the form in which generated sets are
published), or a directory of shards: such `.npz` files, or pairs
`image<x>.npy`, `label<x>.npy`. Images are uint8 [N, H, W, C] and stay on the
disk, mapped into memory; each batch reads its own. Labels are read at once.

The checksum of the images in a `.npz` is compared before the first use; that of
a large file once, as long as its size, its time and its place on the disk stay
the same. An `.npy` has no checksum: only its size is compared.
"""

import hashlib
import logging
import pathlib
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from atat_jax import checks
from atat_jax.data import base
from atat_jax.data.base import DatasetSpec, Split
from atat_jax.errors import UserError, printable
from atat_jax.runs import files, locations
from atat_jax.untrusted import arrays, regular, zips

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAGIC = b"PK\3\4"
_LARGE = 1 << 26  # smaller files are read faster than a note of them is found
_CHUNK = 1 << 20

_log = logging.getLogger(__name__)


class Extra:
  """Images in shards with one numbering.

  Args:
    shards: Shards in order, at least one; images may be memory maps.
  """

  def __init__(self, shards: Sequence[Split]):
    self._images = [shard.images for shard in shards]
    self._labels = np.concatenate([shard.labels for shard in shards])
    self._ends = np.cumsum([len(images) for images in self._images])

  def __len__(self) -> int:
    """Returns the number of images."""
    return len(self._labels)

  def take(self, indices: np.ndarray) -> Split:
    """Reads images into memory.

    Args:
      indices: Integers [E], 0 to N - 1.

    Returns:
      Images uint8 [E, H, W, C] and labels int32 [E].
    """
    images = np.empty((len(indices), *self._images[0].shape[1:]), np.uint8)
    shards = np.searchsorted(self._ends, indices, side="right")
    for number in np.unique(shards):
      (where,) = np.nonzero(shards == number)
      source = self._images[number]
      images[where] = source[indices[where] - self._ends[number] + len(source)]
    return Split(images, self._labels[indices])


def read(
  path: str | pathlib.Path, spec: DatasetSpec, *, cache_dir: str | None = None
) -> Extra:
  """Opens extra images.

  Args:
    path: A `.npz` file or a directory.
    spec: Description of the data set that they extend.
    cache_dir: Directory for notes of checksums that were right; default
      `base.cache_root(None)`.

  Returns:
    The images, which stay on the disk.

  Raises:
    UserError: No such file, compressed, damaged, wrong shape, dtype or label.
  """
  checks.instance("spec", spec, DatasetSpec, "see data.spec")
  path = locations.expand("extra", path)
  if path.is_dir():
    shards = sorted((*path.glob("*.npz"), *path.glob("image*.npy")))
    if not shards:
      raise UserError(
        f"extra: {path} has no shards; allowed: *.npz, or pairs of image*.npy"
        " and label*.npy"
      )
  elif path.exists():
    shards = [path]
  else:
    raise UserError(f"extra: {path} does not exist")
  return Extra([_read_shard(shard, spec, cache_dir) for shard in shards])


def _read_shard(
  path: pathlib.Path, spec: DatasetSpec, cache_dir: str | None
) -> Split:
  try:
    if path.suffix == ".npy":
      images, labels = _read_pair(path)
    else:
      images, labels = _read_npz(path, cache_dir)
  except UserError as error:
    message = str(error)
    raise UserError(
      message if message.startswith("extra: ") else f"extra: {message}"
    ) from None
  # A damaged file can raise anything in the zip reader or the header parser.
  except Exception as error:
    raise UserError(
      f"extra: {path} cannot be used ({type(error).__name__}:"
      f" {base.first_line(error)})"
    ) from error
  return base.checked_split(spec, images, labels, where=f"extra: {path}")


def _read_pair(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  other = path.with_name("label" + path.name.removeprefix("image"))
  images = arrays.map_array(path)
  with regular.open_regular(other) as file:
    return images, arrays.read_array(file, regular.size(file))


def _read_npz(
  path: pathlib.Path, cache_dir: str | None
) -> tuple[np.ndarray, np.ndarray]:
  identity = _identity(path)  # a file that changes now is not remembered
  with zips.open_zip(path) as archive:
    found = [name.removesuffix(".npy") for name in archive.members]
    missing = {"image", "label"} - set(found)
    if missing:
      raise UserError(
        f"extra: {path} has no {sorted(missing)[0]!r}, but"
        f" {', '.join(found)}; allowed: image and label"
      )
    member = archive.members["image.npy"]
    if member.compress_type != zipfile.ZIP_STORED:
      raise UserError(
        f"extra: {path} is compressed, so that it cannot be mapped into memory;"
        " write it again with numpy.savez:"
        f" a = numpy.load('{path.name}');"
        " numpy.savez('new.npz', image=a['image'], label=a['label'])"
      )
    with archive.open("image.npy") as file:
      header = arrays.read_header(file, member.file_size)
      if not _is_known(path, identity, cache_dir):
        while file.read(_CHUNK):  # its end compares the checksum
          pass
    labels = arrays.read_members(archive, {"label"})["label"]
  with regular.open_regular(path) as file:
    file.seek(member.header_offset)
    # Name and extra field of the local header may differ in length from those
    # in the directory at the end.
    magic, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != _MAGIC:
      raise ValueError("no zip header where there should be one")
    file.seek(sum(lengths) + header.offset, 1)
    images = arrays.map_elements(path, file, header)
  _remember(path, identity, cache_dir)
  return images, labels


# --- Notes of checksums that were right ---------------------------------------


def _identity(path: pathlib.Path) -> dict[str, Any]:
  found = regular.require_regular(path)
  return {
    "path": str(path.resolve()),
    "size": found.st_size,
    "mtime_ns": found.st_mtime_ns,
    "inode": found.st_ino,
  }


def _note(path: pathlib.Path, cache_dir: str | None) -> pathlib.Path | None:
  digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
  root = base.cache_root(cache_dir)
  return root / f"extra-{digest}.json" if root else None


def _is_known(
  path: pathlib.Path, identity: dict[str, Any], cache_dir: str | None
) -> bool:
  """Checks whether a large file was compared with its checksum before."""
  if identity["size"] < _LARGE:
    return False
  try:
    note = _note(path, cache_dir)
    if note and files.read_json(note) == identity:
      return True
  except (OSError, UserError):
    pass  # it costs only the time to read the file
  _log.info("extra: comparing %s with its checksum, once", printable(str(path)))
  return False


def _remember(
  path: pathlib.Path, identity: dict[str, Any], cache_dir: str | None
) -> None:
  if identity["size"] < _LARGE:
    return
  try:
    if note := _note(path, cache_dir):
      files.write_json(note, identity)
  except (OSError, UserError) as error:
    _log.info("extra: no note of its checksum (%s)", error)
