"""CIFAR-10 and CIFAR-100: from tensorflow-datasets or the official archives.

Three sources hold the same images: a tensorflow-datasets directory in
array_record form (read without TensorFlow), and the official archives in their
binary and their python version. All return the images in the official order, so
that a run does not depend on where its data came from.

Decoding takes seconds, so the arrays are kept as an `.npz` in a cache
directory. It is used as long as the files it was made from have not changed.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

import io
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm

from atat_jax import checks
from atat_jax.data import archives, base, record_files
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, locations
from atat_jax.untrusted import regular

SOURCES = ("auto", "tfds", "binary", "python")
_IMAGE_SHAPE = (32, 32, 3)
_CHUNK = 1000  # records decoded at a time

_SMALLEST_RECORD = 60  # bytes of a PNG picture
_LARGEST_NOTE = 1 << 20  # bytes of a file of a tfds version without records
# Entries of its JSON files that make tfds import or open something.
_TFDS_VALUES = {
  "pythonclassname": [
    f"tensorflow_datasets.core.features.{name}"
    for name in (
      "class_label_feature.ClassLabel",
      "features_dict.FeaturesDict",
      "image_feature.Image",
      "text_feature.Text",
    )
  ],
  "filepathtemplate": ["{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"],
}

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


# --- tensorflow-datasets -----------------------------------------------------


def default_data_dir() -> pathlib.Path:
  """Returns tfds' own directory: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`."""
  root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return locations.expand("data_dir", root)


def tfds_versions(data_dir: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Returns the directories of a data set's prepared versions, newest first.

  Leftovers of an interrupted preparation have other names and are not found.
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
  """Returns the array_record files of a prepared version, [] if it has none."""
  return sorted(directory.glob(f"{name}-*.array_record*"))


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields every key of a JSON tree with its value."""
  if isinstance(tree, dict):
    yield from tree.items()
  if isinstance(tree, dict | list):
    for value in tree.values() if isinstance(tree, dict) else tree:
      yield from _entries(value)


def _check_tfds(directory: pathlib.Path, name: str) -> int:
  """Checks what tfds would believe of a prepared version.

  Its files name classes, whose modules tfds imports, and paths, which it opens.

  Returns:
    Number of bytes of all record files.

  Raises:
    Exception: The version is not one of this data set, mostly `UserError`,
      `ValueError` or `OSError`.
  """
  records = tfds_records(directory, name)
  for path in directory.iterdir():
    if not path.is_dir() and path not in records:
      regular.read_bytes(path, _LARGEST_NOTE)
  for path in sorted(directory.glob("*.json")):
    for key, value in _entries(files.read_json(path)):
      plain = key.replace("_", "").lower()
      known = _TFDS_VALUES.get(plain)
      if known is not None and value not in known:
        raise ValueError(f"{path.name}: {key} is {value!r}")
  for path in records:
    record_files.check(path)
  return sum(path.stat().st_size for path in records)


def _decode_records(
  records: Any, spec: base.DatasetSpec, split: str, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes a data source of PNG bytes to images and labels `[N, 1]`.

  Args:
    records: The data source.
    spec: Description of the data set.
    split: Name of the split, for the progress bar.
    size: Number of bytes of the files of the data source.
  """
  from PIL import Image

  total = len(records)
  if total * _SMALLEST_RECORD > size:
    raise ValueError(f"{total} records in {size} bytes")
  images = np.empty((total, *spec.image_shape), np.uint8)
  labels = np.empty((total, 1), np.int64)
  ids = []
  progress = tqdm.tqdm(
    total=total,
    desc=f"decoding {spec.name} {split}, once",
    unit=" images",
    disable=None,  # where the output is no terminal
  )
  with progress:
    for start in range(0, total, _CHUNK):
      chunk = range(start, min(start + _CHUNK, total))
      found = records.__getitems__(list(chunk))
      for i, record in zip(chunk, found, strict=True):
        picture = Image.open(io.BytesIO(record["image"]), formats=["PNG"])
        # Nothing has been unpacked yet.
        if picture.size != spec.image_shape[1::-1]:
          raise ValueError(f"image {i} is {list(picture.size)}")
        image = np.asarray(picture)
        if image.shape != spec.image_shape or image.dtype != np.uint8:
          raise ValueError(f"image {i} is {image.dtype} {list(image.shape)}")
        images[i], labels[i] = image, record["label"]
        ids.append(record["id"])
      progress.update(len(chunk))
  # tfds shuffles the examples; their ids carry the official number.
  order = np.argsort(np.array(ids))
  return images[order], labels[order]


def _read_tfds(
  directory: pathlib.Path, spec: base.DatasetSpec
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads `data_dir/name/version` in the official order, not in tfds'."""
  try:
    import tensorflow_datasets as tfds

    size = _check_tfds(directory, spec.name)
    splits = {}
    for split in ("train", "test"):
      records = tfds.data_source(
        f"{spec.name}:{directory.name}",
        split=split,
        data_dir=str(directory.parent.parent),
        download=False,
        # Decoding one image at a time through tfds takes twice as long.
        decoders={"image": tfds.decode.SkipDecoding()},
        builder_kwargs={"file_format": "array_record"},
      )
      splits[split] = _decode_records(records, spec, split, size)
  except ImportError as error:
    raise UserError(
      f"{directory}: reading it needs the Python packages tensorflow-datasets,"
      f" array_record and pillow ({base.first_line(error)})"
    ) from error
  # The C++ code that reads record files raises exceptions of its own.
  except Exception as error:
    raise UserError(
      f"{directory}: cannot be read as {spec.name} of tensorflow-datasets"
      f" ({type(error).__name__}: {base.first_line(error)}); remove it and"
      f" prepare it again: `{_prepare_command(spec, directory.parent.parent)}`"
    ) from error
  return splits


# --- Finding a source --------------------------------------------------------


class _Found(NamedTuple):
  """Source on disk of the kind "cache" (a decoded copy), "tfds" or "archive"."""

  kind: str
  path: pathlib.Path
  files: tuple[pathlib.Path, ...]

  def origin(self) -> dict[str, object]:
    """Returns what changes whenever the data do, without reading them."""
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
  for kind, layout in archives.ARCHIVES[spec.name].items():
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
    **{kind: x.filename for kind, x in archives.ARCHIVES[spec.name].items()},
  }
  looked_for = ", ".join(
    name for kind, name in names.items() if source in ("auto", kind)
  )
  cache = base.cache_root(cache_dir)
  copies = sorted(cache.glob(f"{spec.name}-*.npz")) if cache else []
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
  checks.choice("source", source, SOURCES)
  root = default_data_dir()
  if data_dir is not None and data_dir != "":
    root = locations.expand("data_dir", data_dir)
  if cache_dir is not None:
    locations.expand("cache_dir", cache_dir)
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
  if cache and cache.is_file():
    try:
      return base.read_cache(cache, spec, origin=origin)
    except DamagedFileError as error:
      _log.warning("%s; decoding again", error)
    except UserError as error:
      _log.info("decoding again: %s", error)

  if found.kind == "tfds":
    arrays = _read_tfds(found.path, spec)
  else:
    arrays = archives.read_archive(found.path, spec, source)
  train, test = (
    base.checked_split(
      spec, images, labels[:, -1], where=f"{found.path} ({split})"
    )
    for split, (images, labels) in arrays.items()
  )
  if cache:
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
    cache_dir: Directory for decoded copies; default `base.cache_root(None)`.
    source: "tfds", "binary" or "python", or "auto": the first of these that
      exists.

  Returns:
    The training and the test split, in the official order. Sizes are those of
    the files, which may hold only a part of the data.

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
  """Reads CIFAR-100 with its fine labels; otherwise like `read_cifar10`."""
  return _read(CIFAR100, data_dir, cache_dir, source)
