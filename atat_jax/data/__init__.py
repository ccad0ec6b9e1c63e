"""Data sets by name: uint8 images in three disjoint splits.

Adding a data set is one file and one line in `DATASETS`: a module with a
`DatasetSpec` and a function `read(*, data_dir, cache_dir, source)` that returns
the official training and test splits (see `base.Source`).
"""

from atat_jax.process import commands

if commands.is_running("atat_jax.data.prepare"):
  commands.begin("stopped; the same command starts again")

from atat_jax import checks
from atat_jax.data import base, cifar, digits, extra
from atat_jax.data.base import Dataset, DatasetSpec, Split
from atat_jax.data.extra import Extra
from atat_jax.runs import locations

__all__ = [
  "DATASETS",
  "Dataset",
  "DatasetSpec",
  "Extra",
  "Split",
  "extra",
  "load",
  "spec",
]

DATASETS: dict[str, base.Source] = {
  "digits": base.Source(digits.SPEC, digits.read),
  "cifar10": base.Source(cifar.CIFAR10, cifar.read_cifar10),
  "cifar100": base.Source(cifar.CIFAR100, cifar.read_cifar100),
}


def _source(name: str) -> base.Source:
  checks.choice("name", name, DATASETS)
  return DATASETS[name]


def spec(name: str) -> DatasetSpec:
  """Returns the description of a data set without reading it.

  Raises:
    UserError: No data set has this name.
  """
  return _source(name).spec


def load(
  name: str,
  *,
  data_dir: str | None = None,
  cache_dir: str | None = None,
  validation_size: int = 1024,
  source: str = "auto",
) -> Dataset:
  """Loads a data set into memory.

  The validation split is taken from the official training split by a fixed
  permutation that depends on nothing but the labels: not on a run's seed, so
  that all runs choose their checkpoints on the same images, and not on where
  the data came from. It has the classes in proportion, and a smaller one is
  part of a larger one. The test split is the official one, untouched.

  Args:
    name: Name in `DATASETS`.
    data_dir: Place of the data. For CIFAR a directory with a tfds data set or
      an official archive, or the path of an archive or of a decoded `.npz`;
      default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    cache_dir: Directory for decoded copies; default
      `$XDG_CACHE_HOME/atat_jax/data` or `~/.cache/atat_jax/data`.
    validation_size: Number of training images held out.
    source: "auto", or one kind of source, for CIFAR "tfds", "binary", "python".

  Returns:
    Disjoint splits; images uint8 `[N, H, W, C]`, labels int32 `[N]`.

  Raises:
    UserError: Unknown name or source, no such data (the message says how to get
      them), damaged data, or a `validation_size` that leaves nothing to train
      on.
  """
  member = _source(name)
  checks.count("validation_size", validation_size)
  for field, place in (("data_dir", data_dir), ("cache_dir", cache_dir)):
    if place is not None:
      locations.expand(field, place)
  checks.instance("source", source, str, "'auto', or a kind of source")
  official_train, test = member.read(
    data_dir=data_dir, cache_dir=cache_dir, source=source
  )
  train, validation = base.hold_out(official_train, validation_size)
  return Dataset(member.spec, train, validation, test)
