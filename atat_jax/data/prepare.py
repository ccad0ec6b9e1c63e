"""Downloads CIFAR and prepares it for tensorflow-datasets, without TensorFlow.

  python -m atat_jax.data.prepare cifar10 --data_dir=data
  python -m atat_jax.data.prepare digits

Data that need no preparation are read as a training would read them, which
leaves the decoded copy in the cache, and described.

The builder of tensorflow-datasets unpacks the archive and encodes PNG through
TensorFlow. Here `archives` reads the archive and Pillow encodes the images;
everything else (features, names, keys, order, files) is left to the stock
builder, so that `tfds.data_source` reads the result like any other.
"""

import hashlib
import http.client
import io
import pathlib
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from atat_jax import data
from atat_jax.data import archives, base, cifar, tfds_sets
from atat_jax.errors import UserError, near, printable, shown
from atat_jax.process import arguments, commands, stops
from atat_jax.runs import files, locations, lock, wording

PROGRAM = "python -m atat_jax.data.prepare"

_BLOCK = 1 << 18
_TIMEOUT_SECONDS = 60


class Download(NamedTuple):
  """Official archive: its address, size in bytes and SHA-256."""

  url: str
  size: int
  sha256: str


DOWNLOADS: dict[str, Download] = {
  "cifar10": Download(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
  ),
  "cifar100": Download(
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    168_513_733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
  ),
}

_SPECS = {spec.name: spec for spec in (cifar.CIFAR10, cifar.CIFAR100)}

_COARSE_NAMES = """
  aquatic_mammals fish flowers food_containers fruit_and_vegetables
  household_electrical_devices household_furniture insects large_carnivores
  large_man-made_outdoor_things large_natural_outdoor_scenes
  large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people
  reptiles small_mammals trees vehicles_1 vehicles_2
  """.split()


def _is_complete(path: pathlib.Path, wanted: Download) -> bool:
  if not path.is_file() or path.stat().st_size != wanted.size:
    return False
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256


def download(wanted: Download, directory: pathlib.Path) -> pathlib.Path:
  """Downloads an archive unless the directory already holds it.

  The file gets its name only when size and SHA-256 are right.

  Args:
    wanted: Archive to download.
    directory: Directory of the downloaded file.

  Returns:
    Path of the archive.

  Raises:
    UserError: The server cannot be reached or sends something else.
  """
  path = directory / wanted.url.rsplit("/", 1)[-1]
  if _is_complete(path, wanted):
    print(f"{path} is there already, its checksum is right")
    return path
  with files.replacing(path) as partial:
    try:
      _fetch(wanted, partial, description=f"downloading {path.name}")
    except (OSError, http.client.HTTPException) as error:
      raise UserError(
        f"{wanted.url}: cannot be downloaded to {directory}"
        f" ({base.first_line(error)}); download it elsewhere and pass it with"
        " --archive=PATH"
      ) from error
  return path


def _fetch(wanted: Download, path: pathlib.Path, *, description: str) -> None:
  """Writes the content at an address to a file and checks size and SHA-256."""
  digest = hashlib.sha256()
  size = 0
  with (
    open(path, "wb") as file,
    # The address is one of DOWNLOADS, and the content is compared with its SHA-256.
    urllib.request.urlopen(  # noqa: S310
      wanted.url, timeout=_TIMEOUT_SECONDS
    ) as response,
    tqdm.tqdm(
      total=wanted.size, desc=description, unit="B", unit_scale=True
    ) as progress,
  ):
    # One block too many is enough to know that the content is wrong.
    while size <= wanted.size and (block := response.read(_BLOCK)):
      file.write(block)
      digest.update(block)
      stops.check()
      size += len(block)
      progress.update(len(block))
  if (size, digest.hexdigest()) != (wanted.size, wanted.sha256):
    raise UserError(
      f"{wanted.url}: wrong content ({size} bytes, SHA-256"
      f" {digest.hexdigest()}), expected {wanted.size} bytes, SHA-256"
      f" {wanted.sha256}; try again, or pass a good copy with --archive=PATH"
    )


def _png(image: np.ndarray) -> bytes:
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="png")
  return buffer.getvalue()


def _version(name: str) -> str:
  """Returns the version that the installed tfds prepares."""
  import tensorflow_datasets as tfds

  return str(tfds.builder_cls(name).VERSION)


def _builder(
  spec: base.DatasetSpec,
  data_dir: pathlib.Path,
  splits: dict[str, tuple[np.ndarray, np.ndarray]],
) -> Any:
  """Makes the stock tfds builder without the two steps that need TensorFlow.

  Args:
    spec: Description of the data set.
    data_dir: Root of the tfds data directory.
    splits: Images and labels of `archives.read_archive`.
  """
  import tensorflow_datasets as tfds

  stock: Any = tfds.builder_cls(spec.name)
  names = {"label": spec.class_names, "coarse_label": _COARSE_NAMES}

  class Builder(stock, skip_registration=True):  # type: ignore[call-arg]
    name = stock.name
    VERSION = stock.VERSION
    __module__ = stock.__module__  # recorded in dataset_info.json

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager
      for key in self._cifar_info.label_keys:
        self.info.features[key].names = names[key]
      return {
        split: self._generate_examples(f"{split}_", arrays)
        for split, arrays in splits.items()
      }

    def _generate_examples(
      self, split_prefix: str, arrays: tuple[np.ndarray, np.ndarray]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
      # The stock builder's keys and ids give its order, too.
      keys = self._cifar_info.label_keys
      for i, (image, labels) in enumerate(zip(*arrays, strict=True)):
        yield (
          i,
          {
            "id": f"{split_prefix}{i:05d}",
            "image": _png(image),
            **dict(zip(keys, map(int, labels), strict=True)),
          },
        )

  return Builder(data_dir=str(data_dir), file_format="array_record")


def _checked(
  name: str, data_dir: str | None
) -> tuple[base.DatasetSpec, pathlib.Path]:
  """Checks the arguments; returns the data set and its directory."""
  if not isinstance(name, str) or name not in _SPECS:
    raise UserError(
      f"name: {shown(name)}; allowed: {', '.join(_SPECS)}{near(name, _SPECS)}"
    )
  spec = _SPECS[name]
  root = locations.expand("data_dir", data_dir) if data_dir else None
  try:
    root = (root or tfds_sets.default_data_dir()).resolve()
  except (OSError, RuntimeError) as error:  # links that lead in a circle
    raise UserError(f"data_dir={data_dir}: {base.first_line(error)}") from None
  return spec, root


def prepare(
  name: str,
  *,
  data_dir: str | None = None,
  archive: str | None = None,
) -> pathlib.Path:
  """Prepares a data set in `data_dir` so that `tfds.data_source` reads it.

  The data set appears under its name only when it is complete. The downloaded
  archive stays in `data_dir/downloads`.

  Args:
    name: "cifar10" or "cifar100".
    data_dir: Root of the tfds data directory; default
      `tfds_sets.default_data_dir()`.
    archive: Official archive (binary or python version) to use instead of
      downloading it.

  Returns:
    Directory of the prepared version.

  Raises:
    UserError: Unknown name, a failed download, a damaged or wrong archive, or
      a directory that cannot be used.
  """
  spec, root = _checked(name, data_dir)
  for directory in tfds_sets.versions(root, name):
    if tfds_sets.records(directory, name):
      print(f"{directory} is prepared already, nothing to do")
      return directory
  target = root / name / _version(name)
  if target.exists():
    raise UserError(
      f"{target}: exists, but holds no array_record files, the only form that"
      " can be read without TensorFlow; remove it or choose another --data_dir"
    )
  try:
    root.mkdir(parents=True, exist_ok=True)
    with lock.file("data_dir", root / f".{name}.lock", root / name):
      _prepare(spec, root, archive)
  except OSError as error:
    raise UserError(f"data_dir={root}: {base.first_line(error)}") from error
  print(f"{target} is ready: --config.data.dir={root}")
  return target


def _prepare(
  spec: base.DatasetSpec, root: pathlib.Path, archive: str | None
) -> None:
  if archive is not None:
    path = locations.expand("archive", archive)
  else:
    path = download(DOWNLOADS[spec.name], root / "downloads")
  print(f"reading {path}")
  splits = archives.read_archive(path, spec)
  for split, (images, labels) in splits.items():
    base.checked_split(spec, images, labels[:, -1], where=f"{path} ({split})")
  stops.check()
  _builder(spec, root, splits).download_and_prepare()


def describe(name: str, *, data_dir: str | None = None, size: int = 0) -> str:
  """Reads a data set and says what is in it, a line for each fact.

  Args:
    name: Name in `data.DATASETS`, see `data.load`.
    data_dir: Place of the data, see `data.load`.
    size: Side of pictures in a folder, see `data.load`.

  Returns:
    Shape of the images, numbers of images and of those of a class, classes.

  Raises:
    UserError: No such data, or damaged ones.
  """
  found = data.load(name, data_dir=data_dir, validation_size=1, size=size)
  spec, (height, width, channels) = found.spec, found.spec.image_shape
  splits = (found.train, found.validation, found.test)
  train, held_out, test = (base.in_memory(split).labels for split in splits)
  facts = {
    "data set": spec.name,
    "images": f"{height} x {width} pixels, {wording.plural(channels, 'channel')}",
    "training": _counts(np.concatenate([train, held_out]), spec.num_classes),
    "test": _counts(test, spec.num_classes),
    "classes": f"{spec.num_classes}: {_listed(spec.class_names)}",
  }
  return "".join(f"{fact + ':':<11}{text}\n" for fact, text in facts.items())


def _counts(labels: np.ndarray, num_classes: int) -> str:
  """Says how many images there are, in all and of a class."""
  each = np.bincount(labels, minlength=num_classes)
  least, most = each.min(), each.max()
  share = (
    f"{most:,} of each" if least == most else f"{least:,} to {most:,} of a"
  )
  return f"{len(labels):,} images, {share} class"


def _listed(names: Sequence[str], most: int = 8) -> str:
  """Lists names, and says how many more there are."""
  more = f" and {len(names) - most:,} more" if len(names) > most else ""
  return ", ".join(map(printable, names[:most])) + more


def _located(name: str, data_dir: str | None) -> tuple[str, str | None]:
  """Returns the name and the place of data that are named by their path."""
  path = pathlib.Path(name)
  if data_dir is None and name not in data.DATASETS:
    if path.suffix == ".npz":
      return "npz", name
    if path.is_dir():
      return "folder", name
  if name.partition(":")[0] not in data.DATASETS:
    raise UserError(
      f"name: {shown(name)}; allowed: {', '.join(data.DATASETS)}, or the path of"
      f" an .npz or of a folder that is there{near(name, data.DATASETS)}"
    )
  return name, data_dir


def _describe(name: str, data_dir: str | None, size: int) -> str:
  """Describes a data set on stdout; returns the command to go on with."""
  kind, place = _located(name, data_dir)
  sys.stdout.write(describe(kind, data_dir=place, size=size))
  if kind == "digits":
    return "atat-jax run --config=digits --workdir=runs/digits"
  flags = f"--config=own:at --workdir=runs/mine --config.data.name={kind}"
  flags += f" --config.data.dir={place}" if place else ""
  flags += f" --config.data.size={size}" if size else ""
  return f"atat-jax run {flags}"


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> None:
  """Prepares or describes the data set that the command line names.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help.

  Raises:
    SystemExit: Status 1 after an error.
  """
  parser = arguments.Parser(
    program,
    "DATA [--data-dir=DIR] [--archive=PATH] [--size=N]",
    description="Downloads CIFAR and prepares it, without TensorFlow; reads and"
    " describes any\nother data, and leaves the decoded copy in the cache.",
    example="digits",
  )
  parser.add_argument(
    "name",
    metavar="DATA",
    help="cifar10 or cifar100, a download of 170 MB; digits, tfds:NAME, an .npz,"
    " or a folder with train/<class>/* and test/<class>/*",
  )
  parser.add_argument(
    "--data-dir",
    "--data_dir",
    metavar="DIR",
    help="tfds data directory (default: $TFDS_DATA_DIR or"
    " ~/tensorflow_datasets), or place of other data",
  )
  parser.add_argument(
    "--archive",
    metavar="PATH",
    help="official archive to use instead of downloading it",
  )
  parser.add_argument(
    "--size", type=int, default=0, help="side of pictures in a folder"
  )
  args = parser.parse_args(argv)
  with commands.plain_exits():
    stops.started()
    if args.name not in _SPECS:
      if args.archive is not None:
        raise UserError(
          f"--archive: {shown(args.archive)}; allowed: with {', '.join(_SPECS)}"
        )
      commands.say_next(_describe(args.name, args.data_dir, args.size))
      return
    found = prepare(args.name, data_dir=args.data_dir, archive=args.archive)
    commands.say_next(
      f"atat-jax run --config={args.name}:at,fast --workdir=runs/{args.name}"
      f" --config.data.dir={found.parents[1]}"
    )


if __name__ == "__main__":
  main()
