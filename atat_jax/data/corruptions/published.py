"""Reader of CIFAR-10-C, CIFAR-100-C, and other sets in their format.

A folder with `labels.npy`, integers [5 N], and a file of uint8 [5 N, H, W, C]
for each kind of corruption: N corrupted test images in their order, at each
severity in turn. The images stay on the disk, mapped into memory; a batch
reads its own. The format has no checksums.

Published at doi.org/10.5281/zenodo.2535967 and doi.org/10.5281/zenodo.3555552.
Their four further files (gaussian_blur, saturate, spatter, speckle_noise) are
meant for tuning, belong to no mean, and are not read.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from atat_jax import checks
from atat_jax.data import base
from atat_jax.data.corruptions import CORRUPTIONS, SEVERITIES
from atat_jax.errors import UserError
from atat_jax.runs import locations
from atat_jax.untrusted import arrays

_LABELS = "labels.npy"
_ALLOWED = "'', 'generated', or the folder of CIFAR-10-C or a set like it"

_NAMES = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}


@dataclasses.dataclass(frozen=True)
class Published:
  """Corrupted test images on the disk.

  Attributes:
    name: Name of the set: the published one for CIFAR, else the folder's.
    path: The folder.
    labels: Classes of the N images, int32 [N].
    images: Kind of corruption to uint8 [5 N, H, W, C], mapped into memory.
  """

  name: str
  path: pathlib.Path
  labels: np.ndarray
  images: Mapping[str, np.ndarray]

  def block(self, kind: str, severity: int, count: int) -> np.ndarray:
    """Returns the first images of a severity, uint8 [count, H, W, C]."""
    start = (severity - 1) * len(self.labels)
    return self.images[kind][start : start + count]

  def mark(self, kind: str, severity: int, count: int) -> str:
    """Returns what tells other images from these: a CRC-32 of some of them."""
    found = self.block(kind, severity, count)
    some = found[:: max(1, count // 16)]
    return f"{zlib.crc32(np.ascontiguousarray(some).tobytes()):08x}"

  def check_labels(self, labels: np.ndarray, dataset: str) -> None:
    """Checks that the images are those of a test split, in its order.

    Args:
      labels: Classes of the test images, or of the first of them.
      dataset: Name of the data set.

    Raises:
      UserError: Fewer images, or one of another class.
    """
    where = f"corruptions: {self.path / _LABELS}"
    if len(labels) > len(self.labels):
      raise UserError(
        f"{where}: {len(self.labels)} images at each severity; allowed:"
        f" {len(labels)}, the test images of {dataset}"
      )
    (wrong,) = np.nonzero(self.labels[: len(labels)] != labels)
    if len(wrong):
      first = wrong[0]
      raise UserError(
        f"{where}: image {first} has class {self.labels[first]}; allowed:"
        f" {labels[first]}, as in the test images of {dataset}, in their order"
      )


def find(path: str | pathlib.Path) -> pathlib.Path:
  """Checks that a folder has a file for each corruption, and returns it.

  Args:
    path: The folder.

  Raises:
    UserError: No such folder, or a file is missing; the message names it.
  """
  path = locations.expand("corruptions", path)
  if not path.is_dir():
    what = "is no folder" if path.exists() else "does not exist"
    raise UserError(f"corruptions: {path} {what}; allowed: {_ALLOWED}")
  for name in (_LABELS, *map(_file, CORRUPTIONS)):
    if not (path / name).exists():
      raise UserError(
        f"corruptions: {path / name} does not exist; allowed: a folder with all"
        f" {len(CORRUPTIONS)} corruptions and {_LABELS}"
      )
  return path


def read(
  path: str | pathlib.Path,
  *,
  dataset: str,
  image_shape: Sequence[int],
  num_classes: int,
) -> Published:
  """Opens corrupted test images.

  Args:
    path: The folder.
    dataset: Name of the data set whose test images are corrupted.
    image_shape: Shape [H, W, C] of its images.
    num_classes: Number of its classes, K.

  Returns:
    The images, which stay on the disk.

  Raises:
    UserError: No such folder, a file is missing, damaged, or of another shape,
      dtype or class; the message names the file.
  """
  checks.instance("dataset", dataset, str, "the name of a data set")
  checks.count("num_classes", num_classes)
  shape = checks.sequence("image_shape", image_shape, "sizes")
  path = find(path)
  labels = _labels(path / _LABELS, num_classes)
  images = dict(_images(path, (len(SEVERITIES) * len(labels), *shape)))
  return Published(_NAMES.get(dataset, path.name), path, labels, images)


def _file(kind: str) -> str:
  return f"{kind}.npy"


def _open(path: pathlib.Path) -> np.ndarray:
  """Maps an `.npy` into memory; a damaged one ends in a line that names it."""
  try:
    return arrays.map_array(path)
  except OSError as error:
    raise UserError(
      f"corruptions: {path}: {error.strerror or error}; allowed: the files of"
      " CIFAR-10-C"
    ) from None
  except UserError as error:
    raise UserError(f"corruptions: {error}") from None
  # A damaged file can raise anything in the header parser.
  except Exception as error:
    raise UserError(
      f"corruptions: {path} cannot be used ({base.first_line(error)}); allowed:"
      " an array as numpy.save writes it"
    ) from error


def _labels(path: pathlib.Path, num_classes: int) -> np.ndarray:
  """Reads the classes of the images, which are those of every severity."""
  found = _open(path)
  blocks = len(SEVERITIES)
  wrong = found.dtype.kind not in "iu" or found.ndim != 1
  if wrong or not len(found) or len(found) % blocks:
    raise UserError(
      f"corruptions: {path}: {found.dtype} {list(found.shape)}; allowed:"
      f" integers [{blocks} N], N images at each severity"
    )
  low, high = int(found.min()), int(found.max())
  if low < 0 or high >= num_classes:
    raise UserError(
      f"corruptions: {path}: classes {low} to {high}; allowed: 0 to"
      f" {num_classes - 1}"
    )
  by_severity = np.asarray(found, np.int32).reshape(blocks, -1)
  if (by_severity != by_severity[0]).any():
    raise UserError(
      f"corruptions: {path}: classes that differ between the severities;"
      " allowed: the same images in the same order"
    )
  return by_severity[0]


def _images(
  path: pathlib.Path, shape: Sequence[int]
) -> Iterator[tuple[str, np.ndarray]]:
  """Maps the images of every kind, which must have a shape."""
  for kind in CORRUPTIONS:
    file = path / _file(kind)
    found = _open(file)
    if found.dtype != np.uint8 or found.shape != tuple(shape):
      raise UserError(
        f"corruptions: {file}: {found.dtype} {list(found.shape)}; allowed: uint8"
        f" {list(shape)}, as {_LABELS} has {shape[0]} classes"
      )
    yield kind, found
