"""Downloads CIFAR and prepares it for tensorflow-datasets, without TensorFlow.

  python -m atat_jax.data.prepare cifar10 --data_dir=data

The builder of tensorflow-datasets unpacks the archive and encodes PNG through
TensorFlow. Here `archives` reads the archive and Pillow encodes the images;
everything else (features, names, keys, order, files) is left to the stock
builder, so that `tfds.data_source` reads the result like any other.
"""

import hashlib
import http.client
import io
import pathlib
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from atat_jax.data import archives, base, cifar, tfds_sets
from atat_jax.errors import UserError, near, shown
from atat_jax.process import arguments, commands, stops
from atat_jax.runs import files, locations, lock

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


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> None:
  """Prepares the data set that the command line names.

  Args:
    argv: Without the program; None: the command line.
    program: Command as it is typed, for the help.

  Raises:
    SystemExit: Status 1 after an error.
  """
  parser = arguments.Parser(
    program,
    "NAME [--data-dir=DIR] [--archive=PATH]",
    description="Downloads CIFAR and prepares it for tensorflow-datasets,"
    " without TensorFlow.",
    example="cifar10 --data-dir=data",
  )
  parser.add_argument(
    "name", choices=sorted(_SPECS), metavar="NAME", help=", ".join(_SPECS)
  )
  parser.add_argument(
    "--data-dir",
    "--data_dir",
    metavar="DIR",
    help="tfds data directory (default: $TFDS_DATA_DIR or"
    " ~/tensorflow_datasets)",
  )
  parser.add_argument(
    "--archive",
    metavar="PATH",
    help="official archive to use instead of downloading it",
  )
  args = parser.parse_args(argv)
  with commands.plain_exits():
    stops.started()
    found = prepare(args.name, data_dir=args.data_dir, archive=args.archive)
    commands.say_next(
      f"atat-jax run --config={args.name}:at,fast --workdir=runs/{args.name}"
      f" --config.data.dir={found.parents[1]}"
    )


if __name__ == "__main__":
  main()
