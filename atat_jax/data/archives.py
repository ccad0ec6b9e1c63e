"""Reader of the official CIFAR archives, binary and python version.

Archives are read in memory, member by member, and not trusted: no file is
extracted, and no pickle of the python version is executed.
"""

import gzip
import io
import pathlib
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np

from atat_jax import checks
from atat_jax.data import base
from atat_jax.errors import UserError
from atat_jax.runs import locations
from atat_jax.untrusted import pickles, regular

_PIXELS = 32 * 32 * 3
# The python version adds a file name and a label to each image.
_RECORD = _PIXELS + 200
_MOST_MEMBERS = 1000
_LONGEST_NAME = 1 << 16
_PLAIN_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)  # no links, no sparse files


class Archive(NamedTuple):
  """Layout of an official archive.

  Attributes:
    filename: Official name of the archive.
    folder: Folder inside the archive that holds all files.
    files: Files with the images of each split, in order.
    labels: Labels stored with an image, in order; the last one is used. One
      byte each in the binary version, dict keys in the python version.
    records: Largest number of images in a file of each split.
  """

  filename: str
  folder: str
  files: Mapping[str, tuple[str, ...]]
  labels: tuple[str, ...]
  records: Mapping[str, int]


ARCHIVES: dict[str, dict[str, Archive]] = {
  "cifar10": {
    "binary": Archive(
      filename="cifar-10-binary.tar.gz",
      folder="cifar-10-batches-bin",
      files={
        "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("test_batch.bin",),
      },
      labels=("labels",),
      records={"train": 10_000, "test": 10_000},
    ),
    "python": Archive(
      filename="cifar-10-python.tar.gz",
      folder="cifar-10-batches-py",
      files={
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
      },
      labels=("labels",),
      records={"train": 10_000, "test": 10_000},
    ),
  },
  "cifar100": {
    "binary": Archive(
      filename="cifar-100-binary.tar.gz",
      folder="cifar-100-binary",
      files={"train": ("train.bin",), "test": ("test.bin",)},
      labels=("coarse_labels", "fine_labels"),
      records={"train": 50_000, "test": 10_000},
    ),
    "python": Archive(
      filename="cifar-100-python.tar.gz",
      folder="cifar-100-python",
      files={"train": ("train",), "test": ("test",)},
      labels=("coarse_labels", "fine_labels"),
      records={"train": 50_000, "test": 10_000},
    ),
  },
}


_ARRAY = (
  "numpy.core.multiarray._reconstruct",
  "numpy._core.multiarray._reconstruct",
)
# An array of bytes needs only these names; Python 3 writes bytes in the old
# protocols through `_codecs.encode`.
_NAMES = frozenset((*_ARRAY, "numpy.ndarray", "numpy.dtype", "_codecs.encode"))


def _check_name(name: str) -> None:
  if name not in _NAMES:
    raise ValueError(
      f"it refers to {name!r}, which no CIFAR file does; refused"
    )


def _is_call(node: Any, *names: str) -> bool:
  return isinstance(node, pickles.Call) and node.name in names


def _pixels(node: Any) -> np.ndarray:
  """Returns the array uint8 [N, 3072] that numpy would rebuild from a pickle."""
  if not _is_call(node, *_ARRAY):
    raise ValueError("'data' is not an array")
  _, shape, dtype, fortran_order, raw = node.state
  if (
    not _is_call(dtype, "numpy.dtype")
    or dtype.args[0] not in ("u1", b"u1")
    or fortran_order
  ):
    raise ValueError("'data' is not a uint8 array in C order")
  if _is_call(raw, "_codecs.encode"):
    text, encoding = raw.args
    raw = text.encode("latin1") if encoding == "latin1" else None
  if not isinstance(raw, bytes):
    raise ValueError("'data' does not hold bytes")
  return np.frombuffer(raw, np.uint8).reshape(shape)


def _decode_python(
  data: bytes, label_keys: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
  program = pickles.Program(io.BytesIO(data), len(data))
  batch = pickles.load(program, _check_name)
  if not isinstance(batch, dict):
    raise ValueError("it does not hold a dict")
  # Python 2 wrote byte strings; copies made with Python 3 hold text.
  batch = {
    key.decode() if isinstance(key, bytes) else key: value
    for key, value in batch.items()
  }
  missing = [key for key in ("data", *label_keys) if key not in batch]
  if missing:
    raise ValueError(f"it has no {missing[0]!r}")
  columns = [batch[key] for key in label_keys]
  if any(
    not isinstance(column, list) or any(type(x) is not int for x in column)
    for column in columns
  ):
    raise ValueError("labels are not a list of integers")
  return _pixels(batch["data"]), np.array(columns, np.int64).T


def _decode_binary(
  data: bytes, label_keys: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
  width = len(label_keys) + _PIXELS
  if not data or len(data) % width:
    raise ValueError(f"{len(data)} bytes are not records of {width}")
  records = np.frombuffer(data, np.uint8).reshape(-1, width)
  return records[:, len(label_keys) :], records[:, : len(label_keys)]


def _decode_member(
  kind: str, layout: Archive, name: str, content: bytes
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes images uint8 [N, 32, 32, 3] and labels [N, len(layout.labels)]."""
  decode = _decode_python if kind == "python" else _decode_binary
  try:
    pixels, labels = decode(content, layout.labels)
    if pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
      raise ValueError(
        f"pixels are {list(pixels.shape)}, must be [N, {_PIXELS}]"
      )
    if len(pixels) != len(labels):
      raise ValueError(f"{len(pixels)} images, but {len(labels)} labels")
  except Exception as error:
    raise ValueError(
      f"{layout.folder}/{name}: {base.first_line(error)}"
    ) from error
  # The files store three colour planes, each row by row.
  images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return np.ascontiguousarray(images), labels


class _Member(tarfile.TarInfo):
  """Header of a member whose name cannot fill the memory."""

  @classmethod
  def frombuf(
    cls, buf: bytes | bytearray, encoding: str, errors: str
  ) -> "_Member":
    member = super().frombuf(buf, encoding, errors)
    # All other types hold a name or attributes, which tarfile reads at once.
    if not member.isreg() and member.size > _LONGEST_NAME:
      raise tarfile.ReadError(f"a header of {member.size} bytes")
    return member


class _Limited(io.RawIOBase):
  """Unpacked bytes, no more than an archive can hold."""

  def __init__(self, stream: IO[bytes], limit: int) -> None:
    self._stream, self._left = stream, limit

  def read(self, size: int = -1) -> bytes:
    block = self._stream.read(min(size, 1 << 20) if size >= 0 else 1 << 20)
    self._left -= len(block)
    if self._left < 0:
      raise ValueError("it unpacks to more than such an archive can hold")
    return block


def _wanted(
  layouts: Mapping[str, Archive],
) -> dict[str, tuple[str, str, int]]:
  """Kind, file name and number of images of each file that a layout names."""
  return {
    f"{layout.folder}/{name}": (kind, name, layout.records[split])
    for kind, layout in layouts.items()
    for split, names in layout.files.items()
    for name in names
  }


def _extracted(
  folder: pathlib.Path, layouts: Mapping[str, Archive]
) -> Iterator[tuple[str, str, bytes]]:
  """Yields kind, file name and content of the files of an extracted archive."""
  for kind, name, records in _wanted(layouts).values():
    path = folder / name
    if path.is_file():
      yield kind, name, regular.read_bytes(path, records * _RECORD + 10_000)


def _members(
  path: pathlib.Path, layouts: Mapping[str, Archive]
) -> Iterator[tuple[str, str, bytes]]:
  """Yields kind, file name and content of every member that a layout names."""
  wanted = _wanted(layouts)
  total = sum(records for _, _, records in wanted.values()) * _RECORD
  with (
    regular.open_regular(path) as file,
    gzip.open(file) as unpacked,
    _Limited(unpacked, total + 10_000_000) as stream,  # type: ignore[arg-type]
  ):
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
      for number, member in enumerate(tar):
        if number >= _MOST_MEMBERS:
          raise ValueError(f"it has more than {_MOST_MEMBERS} members")
        found = wanted.get(member.name.removeprefix("./"))
        if found is None or member.type not in _PLAIN_FILES:
          continue
        kind, name, records = found
        # A header cannot make us read more than such a file can hold.
        if member.size > records * _RECORD + 10_000:
          raise ValueError(
            f"{member.name} has {member.size} bytes, too many for"
            f" {records} images"
          )
        content = tar.extractfile(member)
        if content is not None:
          yield kind, name, content.read()
    while stream.read(1 << 20):  # gzip's checksum comes at the end
      pass


def read_archive(
  path: pathlib.Path, spec: base.DatasetSpec, source: str = "auto"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads an official archive, binary or python version, whatever its name.

  Args:
    path: A tar file compressed with gzip, or the folder of its files.
    spec: Description of the data set, `cifar.CIFAR10` or `cifar.CIFAR100`.
    source: "binary" or "python" to accept only that version.

  Returns:
    For "train" and "test" the images, uint8 `[N, 32, 32, 3]`, and all labels,
    `[N, L]`: coarse and fine ones in CIFAR-100, one column in CIFAR-10.

  Raises:
    UserError: Not such an archive, damaged, incomplete or malformed.
  """
  path = locations.expand("path", path)
  known = ARCHIVES.get(getattr(spec, "name", None))  # type: ignore[arg-type]
  if known is None:
    raise UserError(f"spec: {spec!r}; allowed: cifar.CIFAR10, cifar.CIFAR100")
  checks.choice("source", source, ("auto", *known))
  layouts = {
    kind: layout for kind, layout in known.items() if source in ("auto", kind)
  }
  decoded = {}
  members = _extracted if path.is_dir() else _members
  try:
    for kind, name, content in members(path, layouts):
      if (kind, name) in decoded:
        raise ValueError(f"two members are {layouts[kind].folder}/{name}")
      decoded[kind, name] = _decode_member(kind, layouts[kind], name, content)
  except UserError:
    raise
  # A damaged or hostile file can raise anything in gzip, tar and pickle.
  except Exception as error:
    raise UserError(
      f"{path}: not a usable {spec.name} archive: {base.first_line(error)}"
    ) from error
  if not decoded:
    folders = " or ".join(f"{layout.folder}/" for layout in layouts.values())
    raise UserError(
      f"{path}: not a {spec.name} archive, it has no images in {folders}"
    )
  kind = next(iter(decoded))[0]
  layout = layouts[kind]
  splits = {}
  for split, names in layout.files.items():
    for name in names:
      if (kind, name) not in decoded:
        raise UserError(
          f"{path}: incomplete {spec.name} archive, it has no"
          f" {layout.folder}/{name}"
        )
    images, labels = zip(*(decoded[kind, name] for name in names), strict=True)
    splits[split] = np.concatenate(images), np.concatenate(labels)
  return splits
