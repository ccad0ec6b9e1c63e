"""Reader of pictures in a folder for each class.

  mine/train/<class>/*.png
  mine/test/<class>/*.png      (or val, validation)

Classes are numbered in the order of their names, as torchvision's ImageFolder
does.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tqdm

from atat_jax import checks
from atat_jax.data import base, own, streamed
from atat_jax.errors import UserError
from atat_jax.runs import files, locations

_SUFFIXES = {
  f".{name}"
  for name in "jpg jpeg png webp bmp gif tif tiff ppm pgm pbm pnm".split()
}
_TESTS = ("test", "val", "validation")
_LARGEST_FILE = 1 << 28  # bytes of a picture file


def find(
  name: str,
  *,
  data_dir: str | None = None,
  source: str = "auto",
  size: int = 0,
) -> own.Unread:
  """Finds pictures in folders, in the order of their paths.

  Pictures of one data set get the same channels: colour where any picture has
  colour, alpha only where all have it.

  Args:
    name: Name of the data set in results; "": the folder's.
    data_dir: Folder with `train` and `test` in it.
    source: "auto", the only one.
    size: Side of the square images in pixels, see `own.decoder`; 0: pictures
      have one size and keep it.

  Returns:
    The data set; reading it fails where a picture cannot be read, or pictures
    have several sizes while `size` is 0.

  Raises:
    UserError: No such folder, no pictures.
  """
  root, classes, found = _open(data_dir, source)

  def decode() -> own.Contents:
    paths = [path for part in found for path, _ in part]
    images = _decode(paths, size)
    labels = np.array([label for part in found for _, label in part], np.int64)
    cut = len(found[0])
    return own.Contents(
      base.Split(images[:cut], labels[:cut]),
      base.Split(images[cut:], labels[cut:]),
      tuple(classes),
    )

  return own.Unread(
    f"folder:{name or locations.resolved(root).name}",
    root,
    [path for part in found for path, _ in part],
    decode,
    size,
  )


def _open(
  data_dir: str | None, source: str
) -> tuple[pathlib.Path, list[str], list[list[tuple[pathlib.Path, int]]]]:
  """Finds a data set: its folder, and what `_list` finds there."""
  checks.choice("source", source, ("auto",))
  if not data_dir:
    raise UserError(
      "data_dir: missing; allowed: a folder with train/<class>/* and"
      " test/<class>/*"
    )
  root = locations.find("data_dir", data_dir)
  try:
    return root, *_list(root)
  except OSError as error:
    raise UserError(f"data_dir={root}: {error.strerror or error}") from None


class PictureFiles:
  """Pictures in folders, for `streamed.Pictures`.

  Args:
    found: Path and label of each.
  """

  def __init__(self, found: list[tuple[pathlib.Path, int]]):
    self._paths = [str(path) for path, _ in found]
    self._labels = np.array([label for _, label in found], np.int32)

  def __len__(self) -> int:
    """Returns the number of pictures."""
    return len(self._paths)

  def name(self, number: int) -> str:
    """Returns the path of a picture."""
    return self._paths[number]

  def read(self, number: int) -> streamed.Record:
    """Reads a picture; raises what the operating system does."""
    content = _read(locations.of(self._paths[number]))
    return streamed.Record(content, int(self._labels[number]))

  @property
  def labels(self) -> np.ndarray:
    """Labels, int32 [N]."""
    return self._labels


def stream(
  name: str,
  *,
  data_dir: str | None = None,
  source: str = "auto",
) -> streamed.Found:
  """Finds pictures in folders; reads none of them.

  Args:
    name: Name of the data set in results; "": the folder's.
    data_dir: Folder with `train` and `test` in it.
    source: "auto", the only one.

  Returns:
    The pictures of both splits, in the order of their paths.

  Raises:
    UserError: No such folder, no pictures.
  """
  root, classes, found = _open(data_dir, source)
  train, test = (PictureFiles(part) for part in found)
  return streamed.Found(
    f"folder:{name or locations.resolved(root).name}",
    tuple(classes),
    train,
    test,
  )


def _list(
  root: pathlib.Path,
) -> tuple[list[str], list[list[tuple[pathlib.Path, int]]]]:
  """Lists the classes, and the pictures of both splits with their labels."""
  train, test = _splits(root)
  classes = _folders(train)
  unknown = [x for x in _folders(test) if x not in classes]
  if unknown:
    raise UserError(f"{test / unknown[0]}: a class that {train} does not have")
  found = [_pictures(part, classes) for part in (train, test)]
  filled = {label for _, label in found[0]}
  for label, name in enumerate(classes):
    if label not in filled:
      raise UserError(f"{train / name}: no pictures; allowed: some in each")
  return classes, found


def _splits(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Finds the folders of the two splits."""
  if not root.exists():
    raise UserError(f"data_dir={root}: no such folder")
  tests = [root / name for name in _TESTS if (root / name).is_dir()]
  if not (root / "train").is_dir() or not tests:
    raise UserError(
      f"data_dir={root}: allowed: a folder with train/<class>/* and"
      f" {', '.join(_TESTS[:-1])} or {_TESTS[-1]}/<class>/*"
    )
  return root / "train", tests[0]


def _folders(split: pathlib.Path) -> list[str]:
  return sorted(
    path.name
    for path in split.iterdir()
    if path.is_dir() and not path.name.startswith(".")
  )


def _pictures(
  split: pathlib.Path, classes: list[str]
) -> list[tuple[pathlib.Path, int]]:
  """Lists the pictures of a split with their labels, in a fixed order."""
  found = [
    (path, label)
    for label, name in enumerate(classes)
    for path in sorted(_walk(split / name))
  ]
  if not found:
    raise UserError(
      f"{split}: no pictures; allowed: <class>/*, files of"
      f" {', '.join(sorted(_SUFFIXES))}"
    )
  return found


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the pictures of a class, also those in folders of the folder."""
  if not folder.is_dir():  # a split may lack a class
    return
  found: Iterable[tuple[Any, list[str]]]
  if locations.is_remote(folder):
    found = locations.walk(folder)
  else:
    found = ((x, names) for x, _, names in os.walk(folder, onerror=_fail))
  for place, names in found:
    for name in names:
      suffix = os.path.splitext(name)[1].lower()
      if suffix in _SUFFIXES and not name.startswith("."):
        yield locations.of(f"{place}/{name}")


def _read(path: pathlib.Path) -> bytes:
  content = files.read_bytes(path, _LARGEST_FILE)
  if content is None:
    raise UserError(f"{path}: no such file")
  return content


def _fail(error: OSError) -> None:
  raise error


def _decode(paths: list[pathlib.Path], size: int) -> np.ndarray:
  """Decodes pictures to uint8 [N, H, W, C]."""
  decode = own.decoder(size)
  decoded = []
  for path in tqdm.tqdm(
    paths, desc="decoding pictures, once", unit=" images", disable=None
  ):
    try:
      decoded.append(decode(_read(path)))
    except UserError:
      raise
    except Exception as error:  # a damaged file can raise anything in a decoder
      raise UserError(
        f"{path}: not a picture that can be used ({base.first_line(error)})"
      ) from None
  return base.stack(decoded, paths)
