"""Extra training images, as many as the disk holds.

A `.npz` file with `image` and `label` (the form in which generated sets are
published), or a directory of shards: such `.npz` files, or pairs
`image<x>.npy`, `label<x>.npy`. Images are uint8 [N, H, W, C] and stay on the
disk, mapped into memory; each batch reads its own. Labels are read at once.
"""

import pathlib
import struct
import zipfile
from collections.abc import Sequence

import numpy as np

from atat_jax.data import base
from atat_jax.data.base import DatasetSpec, Split
from atat_jax.errors import UserError
from atat_jax.runs import locations

_LOCAL_HEADER = struct.Struct("<4s22xHH")


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


def read(path: str | pathlib.Path, spec: DatasetSpec) -> Extra:
  """Opens extra images.

  Args:
    path: A `.npz` file or a directory.
    spec: Description of the data set that they extend.

  Returns:
    The images; only headers and labels have been read.

  Raises:
    UserError: No such file, compressed, damaged, wrong shape, dtype or label.
  """
  path = locations.expand("extra", path)
  if path.is_dir():
    files = sorted((*path.glob("*.npz"), *path.glob("image*.npy")))
    if not files:
      raise UserError(
        f"extra: {path} has no shards; allowed: *.npz, or pairs of image*.npy"
        " and label*.npy"
      )
  elif path.is_file():
    files = [path]
  else:
    raise UserError(f"extra: {path} does not exist")
  return Extra([_read_shard(file, spec) for file in files])


def _read_shard(path: pathlib.Path, spec: DatasetSpec) -> Split:
  try:
    if path.suffix == ".npy":
      other = path.with_name("label" + path.name.removeprefix("image"))
      images = np.load(path, mmap_mode="r", allow_pickle=False)
      labels = np.load(other, allow_pickle=False)
    else:
      with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        missing = {"image", "label"} - set(arrays.files)
        if missing:
          raise UserError(
            f"extra: {path} has no {sorted(missing)[0]!r}, but"
            f" {', '.join(arrays.files)}; allowed: image and label"
          )
        labels = arrays["label"]
      images = _map_member(path, "image.npy")
  except UserError:
    raise
  # A damaged file can raise anything in the zip reader or the header parser.
  except Exception as error:
    raise UserError(
      f"extra: {path} cannot be used ({type(error).__name__}:"
      f" {base.first_line(error)})"
    ) from error
  return base.checked_split(spec, images, labels, where=f"extra: {path}")


def _map_member(path: pathlib.Path, name: str) -> np.ndarray:
  """Maps an array that is stored uncompressed in a zip file into memory."""
  with zipfile.ZipFile(path) as archive:
    member = archive.getinfo(name)
  if member.compress_type != zipfile.ZIP_STORED:
    raise UserError(
      f"extra: {path} is compressed, so that it cannot be mapped into memory;"
      " write it again with numpy.savez:"
      f" a = numpy.load('{path.name}');"
      " numpy.savez('new.npz', image=a['image'], label=a['label'])"
    )
  with path.open("rb") as file:
    file.seek(member.header_offset)
    # Name and extra field of the local header may differ in length from those
    # in the directory at the end.
    magic, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != b"PK\3\4":
      raise ValueError("no zip header where there should be one")
    file.seek(sum(lengths), 1)
    version = np.lib.format.read_magic(file)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran_order, dtype = read_header(file)
    return np.memmap(
      path,
      dtype,
      mode="r",
      offset=file.tell(),
      shape=shape,
      order="F" if fortran_order else "C",
    )
