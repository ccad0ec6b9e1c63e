"""CIFAR-10 and CIFAR-100: from tensorflow-datasets or the official archives.

Three sources hold the same images: a tensorflow-datasets directory in
array_record form (read without TensorFlow), and the official archives in their
binary and their python version. All give the images in the official order, so
that a run does not depend on where its data came from.

Decoding takes seconds, so the arrays are kept as an `.npz` in a cache
directory. It is used as long as the files it was made from have not changed.

The archives are read in memory, member by member, and trusted in nothing: no
file is extracted, and no pickle of the python version is executed.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

import gzip
import io
import logging
import os
import pathlib
import pickle
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tqdm

from atat_jax.data import base
from atat_jax.errors import UserError

SOURCES = ("auto", "tfds", "binary", "python")
_IMAGE_SHAPE = (32, 32, 3)
_PIXELS = 32 * 32 * 3
_CHUNK = 1000  # records decoded at a time

_log = logging.getLogger(__name__)

CIFAR10 = base.DatasetSpec(
  name="cifar10",
  num_classes=10,
  image_shape=_IMAGE_SHAPE,
  class_names=tuple(
    "airplane automobile bird cat deer dog frog horse ship truck".split()
  ),
  mean=(0.4914, 0.4822, 0.4465),
  std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = base.DatasetSpec(
  name="cifar100",
  num_classes=100,
  image_shape=_IMAGE_SHAPE,
  class_names=tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
    bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee
    clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
    leopard lion lizard lobster man maple_tree motorcycle mountain mouse
    mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
    seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train
    trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
  ),
  mean=(0.5071, 0.4865, 0.4409),
  std=(0.2673, 0.2564, 0.2762),
)


class Archive(NamedTuple):
  """Layout of an official archive.

  Attributes:
    filename: Its official name.
    folder: The folder inside that holds all files.
    files: For each split the files with its images, in order.
    labels: The labels stored with an image, in order; the last one is ours.
      In the binary version one byte each, in the python version dict keys.
    records: The most images that a file of the split may hold.
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


# --- Python archives: pickles read as data, never executed -------------------


class _Inert:
  """Stands for whatever a pickle refers to: keeps what it is given, runs nothing.

  A pickle asks for callables by name, calls them, and hands state to the
  results. Here every name becomes an `_Inert`, calling one gives another with
  the arguments in it, and state is stored. What comes out is a tree of plain
  values, from which `_pixels` takes an array after looking at all of it.
  """

  __slots__ = ("args", "name", "state")

  def __init__(self, name: str, args: tuple[Any, ...] = ()):
    self.name = name
    self.args = args
    self.state: Any = None

  def __call__(self, *args: Any) -> "_Inert":
    return _Inert(self.name, args)

  def __setstate__(self, state: Any) -> None:
    self.state = state


_ARRAY = (
  "numpy.core.multiarray._reconstruct",
  "numpy._core.multiarray._reconstruct",
)
# An array of bytes needs these names and no others; `_codecs.encode` is how
# Python 3 writes bytes in the old protocols.
_NAMES = frozenset((*_ARRAY, "numpy.ndarray", "numpy.dtype", "_codecs.encode"))


class _Unpickler(pickle.Unpickler):
  """Reads the structure of a pickle without importing or calling anything."""

  def find_class(self, module: str, name: str) -> Any:
    full_name = f"{module}.{name}"
    if full_name not in _NAMES:
      raise pickle.UnpicklingError(
        f"it refers to {full_name!r}, which no CIFAR file does; refused"
      )
    return _Inert(full_name)


def _pixels(node: Any) -> np.ndarray:
  """The array that numpy would have rebuilt from a pickle: uint8 [N, 3072]."""
  if not isinstance(node, _Inert) or node.name not in _ARRAY:
    raise ValueError("'data' is not an array")
  _, shape, dtype, fortran_order, raw = node.state
  if (
    not isinstance(dtype, _Inert)
    or dtype.name != "numpy.dtype"
    or dtype.args[0] not in ("u1", b"u1")
    or fortran_order
  ):
    raise ValueError("'data' is not a uint8 array in C order")
  if isinstance(raw, _Inert) and raw.name == "_codecs.encode":
    text, encoding = raw.args
    raw = text.encode("latin1") if encoding == "latin1" else None
  if not isinstance(raw, bytes):
    raise ValueError("'data' does not hold bytes")
  return np.frombuffer(raw, np.uint8).reshape(shape)


def _decode_python(
  data: bytes, label_keys: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
  batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
  if not isinstance(batch, dict):
    raise ValueError("it does not hold a dict")
  # Python 2 wrote byte strings, a copy made with Python 3 has text.
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


# --- Archives ----------------------------------------------------------------


def _decode_member(
  kind: str, layout: Archive, name: str, content: bytes
) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 [N, 32, 32, 3] and labels [N, len(layout.labels)]."""
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
  # Stored as three planes, each row by row.
  images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return np.ascontiguousarray(images), labels


def _members(
  path: pathlib.Path, layouts: Mapping[str, Archive]
) -> Iterator[tuple[str, str, bytes]]:
  """Yields kind, file name and content of every member that a layout names."""
  wanted = {
    f"{layout.folder}/{name}": (kind, name, layout.records[split])
    for kind, layout in layouts.items()
    for split, names in layout.files.items()
    for name in names
  }
  with gzip.open(path) as stream:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
      for member in tar:
        found = wanted.get(member.name.removeprefix("./"))
        if found is None or not member.isfile():
          continue
        kind, name, records = found
        # The header's size is believed only up to what such a file can have:
        # the python version adds a file name and a label to each image.
        if member.size > records * (_PIXELS + 200) + 10_000:
          raise ValueError(
            f"{member.name} has {member.size} bytes, too many for"
            f" {records} images"
          )
        content = tar.extractfile(member)
        assert content is not None  # it is a file
        yield kind, name, content.read()
    while stream.read(1 << 20):  # to the end, where the checksum is
      pass


def read_archive(
  path: pathlib.Path, spec: base.DatasetSpec, source: str = "auto"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads an official archive, binary or python version, whatever its name.

  Args:
    path: A tar file compressed with gzip.
    spec: `CIFAR10` or `CIFAR100`.
    source: "binary" or "python" to accept only that version.

  Returns:
    For "train" and "test" the images, uint8 `[N, 32, 32, 3]`, and all labels,
    `[N, L]`: with CIFAR-100 coarse and fine ones, with CIFAR-10 one column.

  Raises:
    UserError: Not such an archive, damaged, incomplete, or not as it should be.
  """
  layouts = {
    kind: layout
    for kind, layout in ARCHIVES[spec.name].items()
    if source in ("auto", kind)
  }
  decoded = {}
  try:
    for kind, name, content in _members(path, layouts):
      decoded[kind, name] = _decode_member(kind, layouts[kind], name, content)
  # A damaged or hostile file can fail anywhere in gzip, tar and pickle.
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


# --- tensorflow-datasets -----------------------------------------------------


def default_data_dir() -> pathlib.Path:
  """Where tfds keeps data: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`."""
  root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return pathlib.Path(root).expanduser()


def tfds_versions(data_dir: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Directories of prepared versions of a data set, the newest first.

  What an interrupted preparation leaves behind is called otherwise and not
  found.
  """
  versions = [
    path
    for path in (data_dir / name).glob("*.*.*")
    if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
    and (path / "dataset_info.json").is_file()
  ]
  return sorted(
    versions, key=lambda path: [*map(int, path.name.split("."))], reverse=True
  )


def tfds_records(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The array_record files of a prepared version; none in another form."""
  return sorted(directory.glob(f"{name}-*.array_record*"))


def _decode_records(
  records: Any, spec: base.DatasetSpec, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels `[N, 1]` of a data source with PNG bytes."""
  from PIL import Image

  total = len(records)
  images = np.empty((total, *spec.image_shape), np.uint8)
  labels = np.empty((total, 1), np.int64)
  ids = []
  progress = tqdm.tqdm(
    total=total,
    desc=f"decoding {spec.name} {split}, once",
    unit=" images",
    disable=None,  # where nobody watches
  )
  with progress:
    for start in range(0, total, _CHUNK):
      chunk = range(start, min(start + _CHUNK, total))
      found = records.__getitems__(list(chunk))
      for i, record in zip(chunk, found, strict=True):
        image = np.asarray(Image.open(io.BytesIO(record["image"])))
        if image.shape != spec.image_shape or image.dtype != np.uint8:
          raise ValueError(f"image {i} is {image.dtype} {list(image.shape)}")
        images[i], labels[i] = image, record["label"]
        ids.append(record["id"])
      progress.update(len(chunk))
  # tfds stores examples shuffled; ids carry the official number.
  order = np.argsort(np.array(ids))
  return images[order], labels[order]


def _read_tfds(
  directory: pathlib.Path, spec: base.DatasetSpec
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads `data_dir/name/version`; in the official order, not in tfds'."""
  try:
    import tensorflow_datasets as tfds

    splits = {}
    for split in ("train", "test"):
      records = tfds.data_source(
        f"{spec.name}:{directory.name}",
        split=split,
        data_dir=str(directory.parent.parent),
        download=False,
        # Decoded here: one image at a time through tfds takes twice as long.
        decoders={"image": tfds.decode.SkipDecoding()},
        builder_kwargs={"file_format": "array_record"},
      )
      splits[split] = _decode_records(records, spec, split)
  except ImportError as error:
    raise UserError(
      f"{directory}: reading it needs the Python packages tensorflow-datasets,"
      f" array_record and pillow ({base.first_line(error)})"
    ) from error
  # Record files are read by C++ code with exceptions of its own.
  except Exception as error:
    raise UserError(
      f"{directory}: cannot be read as {spec.name} of tensorflow-datasets"
      f" ({type(error).__name__}: {base.first_line(error)}); remove it and"
      f" prepare it again: `{_prepare_command(spec, directory.parent.parent)}`"
    ) from error
  return splits


# --- Finding a source --------------------------------------------------------


class _Found(NamedTuple):
  """A source on disk: "cache" (a decoded copy), "tfds" or "archive"."""

  kind: str
  path: pathlib.Path
  files: tuple[pathlib.Path, ...]

  def origin(self) -> dict[str, object]:
    """What changes when the data change, without reading them."""
    stats = [(file.name, file.stat()) for file in self.files]
    return {
      "kind": self.kind,
      "path": str(self.path.resolve()),
      "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _prepare_command(spec: base.DatasetSpec, data_dir: pathlib.Path) -> str:
  return f"python -m atat_jax.data.prepare {spec.name} --data_dir={data_dir}"


def _find(
  spec: base.DatasetSpec, data_dir: pathlib.Path, source: str
) -> _Found | None:
  if data_dir.is_file():
    if data_dir.suffix == ".npz" and source == "auto":
      return _Found("cache", data_dir, (data_dir,))
    return (
      _Found("archive", data_dir, (data_dir,)) if source != "tfds" else None
    )
  if source in ("auto", "tfds"):
    for directory in tfds_versions(data_dir, spec.name):
      records = tfds_records(directory, spec.name)
      if records:
        info = directory / "dataset_info.json"
        return _Found("tfds", directory, (info, *records))
  for kind, layout in ARCHIVES[spec.name].items():
    archive = data_dir / layout.filename
    if source in ("auto", kind) and archive.is_file():
      return _Found("archive", archive, (archive,))
  return None


def _not_found(
  spec: base.DatasetSpec,
  data_dir: pathlib.Path,
  cache_dir: str | None,
  source: str,
) -> UserError:
  names = {
    "tfds": f"{spec.name}/<version>/{spec.name}-*.array_record*",
    **{kind: x.filename for kind, x in ARCHIVES[spec.name].items()},
  }
  looked_for = ", ".join(
    name for kind, name in names.items() if source in ("auto", kind)
  )
  copies = sorted(base.cache_root(cache_dir).glob(f"{spec.name}-*.npz"))
  return UserError(
    f"{spec.name} not found: looked for {looked_for} in {data_dir}; get it with"
    f" `{_prepare_command(spec, data_dir)}`, or train on data that need no"
    " download with `--config=configs/digits.py`"
    + (f"; or use the decoded copy data_dir={copies[0]}" if copies else "")
  )


def _read(
  spec: base.DatasetSpec,
  data_dir: str | None,
  cache_dir: str | None,
  source: str,
) -> tuple[base.Split, base.Split]:
  if source not in SOURCES:
    raise UserError(f"source={source!r}: must be one of {', '.join(SOURCES)}")
  root = pathlib.Path(data_dir).expanduser() if data_dir else default_data_dir()
  try:
    found = _find(spec, root, source)
    origin = found.origin() if found else {}
  except OSError as error:
    raise UserError(f"data_dir={root}: {error.strerror}") from error
  if found is None and root.suffix in (".npz", ".gz"):
    raise UserError(f"data_dir={root}: no such file")
  if found is None:
    raise _not_found(spec, root, cache_dir, source)
  if found.kind == "cache":
    return base.read_cache(found.path, spec)

  cache = base.cache_path(cache_dir, spec, origin)
  if cache.is_file():
    try:
      return base.read_cache(cache, spec, origin=origin)
    except UserError as error:
      _log.info("decoding again: %s", error)

  if found.kind == "tfds":
    arrays = _read_tfds(found.path, spec)
  else:
    arrays = read_archive(found.path, spec, source)
  train, test = (
    base.checked_split(
      spec, images, labels[:, -1], where=f"{found.path} ({split})"
    )
    for split, (images, labels) in arrays.items()
  )
  base.write_cache(cache, spec, train, test, origin=origin)
  return train, test


def read_cifar10(
  *,
  data_dir: str | None = None,
  cache_dir: str | None = None,
  source: str = "auto",
) -> tuple[base.Split, base.Split]:
  """Reads CIFAR-10, from its decoded copy where there is one.

  Args:
    data_dir: A directory with a tfds data set or an official archive in it, or
      the path of an archive or of a decoded `.npz`; default
      `default_data_dir()`.
    cache_dir: Where decoded copies are kept; default `base.cache_root(None)`.
    source: "tfds", "binary" or "python", or "auto": the first of these that is
      there.

  Returns:
    The training and the test split, in the official order. Sizes are those of
    the files, which may hold a part of the data only.

  Raises:
    UserError: Nothing found, or what was found is damaged or not this data set.
  """
  return _read(CIFAR10, data_dir, cache_dir, source)


def read_cifar100(
  *,
  data_dir: str | None = None,
  cache_dir: str | None = None,
  source: str = "auto",
) -> tuple[base.Split, base.Split]:
  """Reads CIFAR-100 with its fine labels; otherwise as `read_cifar10`."""
  return _read(CIFAR100, data_dir, cache_dir, source)
