"""Data sets by name: uint8 images in three disjoint splits.

Adding a data set is one file and one line in `DATASETS`: a module with a
`DatasetSpec` and a function `read(*, data_dir, cache_dir, source)` that returns
the official training and test splits (see `base.Source`). Data that need no code:
`npz`, one file with arrays; `folder`, pictures in a folder for each class;
`tfds:<name>`, any prepared tfds set of images with labels. After a colon, the
first two take a name for the results (`npz:flowers`), by default the file's.
"""

import functools

from atat_jax.process import commands

if commands.is_running("atat_jax.data.prepare"):
  commands.begin("stopped; the same command starts again")

from atat_jax import checks
from atat_jax.data import (
  base,
  cifar,
  digits,
  extra,
  folder,
  npz,
  streamed,
  tfds_sets,
)
from atat_jax.data.base import Dataset, DatasetSpec, Split
from atat_jax.data.extra import Extra
from atat_jax.data.streamed import Pictures, Streaming
from atat_jax.errors import UserError
from atat_jax.runs import locations

__all__ = [
  "DATASETS",
  "Dataset",
  "DatasetSpec",
  "Extra",
  "Pictures",
  "Split",
  "Streaming",
  "check_name",
  "extra",
  "load",
  "spec",
]

LARGEST_SIDE = 4096
"""Largest side in pixels to which pictures can be resized."""

DATASETS: dict[str, base.Source] = {
  "digits": base.Source(digits.SPEC, digits.read),
  "cifar10": base.Source(cifar.CIFAR10, cifar.read_cifar10),
  "cifar100": base.Source(cifar.CIFAR100, cifar.read_cifar100),
  "npz": base.Source(None, npz.find),
  "folder": base.Source(None, folder.find, folder.stream),
  "tfds": base.Source(None, tfds_sets.find_any, tfds_sets.stream),
}


def check_name(name: str) -> None:
  """Checks the name of a data set.

  Raises:
    UserError: Not a name in `DATASETS`; or a colon behind one that knows what
      it is.
  """
  _source(name)


def _source(name: str) -> tuple[base.Source, str]:
  """Returns the member and what stands behind the colon."""
  checks.instance("name", name, str, ", ".join(DATASETS))
  key, colon, rest = name.partition(":")
  checks.choice("name", key, DATASETS)
  if colon and (DATASETS[key].spec is not None or not rest):
    raise UserError(f"name: {name!r}; allowed: {', '.join(DATASETS)}")
  return DATASETS[key], rest


def spec(
  name: str,
  *,
  data_dir: str | None = None,
  cache_dir: str | None = None,
  source: str = "auto",
  size: int = 0,
  streaming: Streaming | None = None,
) -> DatasetSpec:
  """Returns the description of a data set.

  That of a known data set needs no data. Others are read for it where there is
  no decoded copy, and `load` takes what was read; but for those that stay on the
  disk: they get the mean and deviation of ImageNet.

  Args:
    name: See `load`.
    data_dir: See `load`.
    cache_dir: See `load`.
    source: See `load`.
    size: See `load`.
    streaming: See `load`.

  Raises:
    UserError: No data set has this name; or it describes itself and cannot be
      read.
  """
  member, rest = _source(name)
  _check_place(name, data_dir, cache_dir, source, size, streaming)
  if streaming is not None:
    return _find(name, data_dir, source, size).describe(size)
  if member.spec is not None:
    return member.spec
  where = {"data_dir": data_dir, "source": source}
  found: DatasetSpec = member.read(rest, **where, size=size).describe(cache_dir)
  return found


@functools.lru_cache(maxsize=2)  # a million files are listed once
def _find(
  name: str, data_dir: str | None, source: str, size: int
) -> streamed.Found:
  """Finds the pictures of a data set that stays on the disk."""
  member, rest = _source(name)
  if member.stream is None:
    allowed = [key for key, one in DATASETS.items() if one.stream is not None]
    raise UserError(
      f"name: {name!r} with stream=True; allowed: {', '.join(allowed)}, the"
      " others fit into memory"
    )
  if not size:
    raise UserError(
      "size: 0 with stream=True; allowed: the side of the images in pixels, such"
      " as 224"
    )
  found: streamed.Found = member.stream(rest, data_dir=data_dir, source=source)
  return found


def _check_place(
  name: str,
  data_dir: str | None,
  cache_dir: str | None,
  source: str,
  size: int,
  streaming: Streaming | None,
) -> None:
  """Checks where and how data are to be read."""
  checks.integer("size", size, 0, LARGEST_SIDE)
  if streaming is not None:
    checks.instance("streaming", streaming, Streaming, "a data.Streaming")
  for field, place in (("data_dir", data_dir), ("cache_dir", cache_dir)):
    if place is not None:
      reads = locations.find if field == "data_dir" else locations.expand
      reads(field, place)
  checks.instance("source", source, str, "'auto', or a kind of source")
  if size and _source(name)[0].spec is not None:
    raise UserError(f"size: {size}; allowed: 0, {name} has images of one size")


def load(
  name: str,
  *,
  data_dir: str | None = None,
  cache_dir: str | None = None,
  validation_size: int = 1024,
  source: str = "auto",
  size: int = 0,
  streaming: Streaming | None = None,
) -> Dataset:
  """Loads a data set into memory, or finds one that stays on the disk.

  The validation split is taken from the official training split by a fixed
  permutation that depends on nothing but the labels: not on a run's seed, so
  that all runs choose their checkpoints on the same images, and not on where
  the data came from. It has the classes in proportion, and a smaller one is
  part of a larger one. The test split is the official one, untouched.

  Args:
    name: Name in `DATASETS`, maybe with a colon and more.
    data_dir: Place of the data. For CIFAR a directory with a tfds data set, an
      official archive or what was extracted from it, or the path of an archive
      or of a decoded `.npz`; default `$TFDS_DATA_DIR` or
      `~/tensorflow_datasets`, as for `tfds:<name>`. For `npz` the file, for
      `folder` the folder.
    cache_dir: Directory for decoded copies; default
      `$XDG_CACHE_HOME/atat_jax/data` or `~/.cache/atat_jax/data`.
    validation_size: Number of training images held out.
    source: "auto", or one kind of source, for CIFAR "tfds", "binary", "python".
    size: Side in pixels to which pictures in folders or in a tfds set are
      resized and cropped; 0: they have one size and keep it.
    streaming: Reading of pictures that stay on the disk, for `folder` and
      `tfds`; None: all are read at once.

  Returns:
    Disjoint splits; uint8 `[N, H, W, C]` and int32 `[N]`, or `Pictures`.

  Raises:
    UserError: Unknown name or source, no such data (the message says how to get
      them), damaged data, or a `validation_size` that leaves nothing to train
      on.
  """
  member, rest = _source(name)
  checks.count("validation_size", validation_size)
  _check_place(name, data_dir, cache_dir, source, size, streaming)
  if streaming is not None:
    there = _find(name, data_dir, source, size)
    streamed.check_installed()
    all_, on_disk = there.pictures(size, streaming)
    return Dataset(
      there.describe(size), *all_.hold_out(validation_size), on_disk
    )
  where = {"data_dir": data_dir, "source": source}
  if member.spec is None:
    unread = member.read(rest, **where, size=size)
    found, train, test = unread.read(cache_dir)
  else:
    found = member.spec
    train, test = member.read(**where, cache_dir=cache_dir)
  return Dataset(found, *base.hold_out(train, validation_size), test)
