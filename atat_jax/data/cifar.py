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
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from atat_jax import checks
from atat_jax.data import archives, base, tfds_sets
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import locations

SOURCES = ("auto", "tfds", "binary", "python")
_IMAGE_SHAPE = (32, 32, 3)

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


def _png(spec: base.DatasetSpec) -> Callable[[bytes], np.ndarray]:
  """Makes a decoder of PNG pictures of the described shape."""

  def decode(content: bytes) -> np.ndarray:
    from PIL import Image

    picture = Image.open(io.BytesIO(content), formats=["PNG"])
    # Nothing has been unpacked yet.
    if picture.size != spec.image_shape[1::-1]:
      raise ValueError(f"it is {list(picture.size)}")
    image = np.asarray(picture)
    if image.shape != spec.image_shape or image.dtype != np.uint8:
      raise ValueError(f"it is {image.dtype} {list(image.shape)}")
    return image

  return decode


# --- Finding a source --------------------------------------------------------


class _Found(NamedTuple):
  """Source on disk.

  Attributes:
    kind: "cache" (a decoded copy), "tfds", "archive", or "folder", an archive
      that was extracted.
    path: File or folder.
    files: Files whose change makes a decoded copy old.
  """

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
    for directory in tfds_sets.versions(data_dir, spec.name):
      records = tfds_sets.records(directory, spec.name)
      if records:
        info = directory / "dataset_info.json"
        return _Found("tfds", directory, (info, *records))
  for kind, layout in archives.ARCHIVES[spec.name].items():
    if source not in ("auto", kind):
      continue
    archive = data_dir / layout.filename
    if archive.is_file():
      return _Found("archive", archive, (archive,))
    for folder in (data_dir / layout.folder, data_dir):
      parts = tuple(
        folder / x for names in layout.files.values() for x in names
      )
      if all(part.is_file() for part in parts):
        return _Found("folder", folder, parts)
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
  if data_dir is None or data_dir == "":
    root = tfds_sets.default_data_dir()
  else:
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
    prepare = _prepare_command(spec, found.path.parent.parent)
    arrays = tfds_sets.read(
      found.path,
      spec.name,
      _png(spec),
      splits={"train": "train", "test": "test"},
      remedy=f"remove it and prepare it again: `{prepare}`",
    )
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
      `tfds_sets.default_data_dir()`.
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
