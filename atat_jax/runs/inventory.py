"""Inventory of a folder: the size and the SHA-256 of each of its files.

It is written with the files and lies beside them, so that whatever happens to
one of them later is found before it is used.
"""

import errno
import hashlib
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import files, locations
from atat_jax.untrusted import regular

NAME = "checksums.json"


def write(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
  """Writes the inventory of all files below the folders of a folder.

  Args:
    folder: Folder whose own files are left out; its folders are the parts.
    about: JSON values that say what the folder holds.
  """
  found = {
    name: list(_measure(folder / name))
    for part in sorted(folder.iterdir())
    if part.is_dir()
    for name in _names(folder, part.name)
  }
  content = {"format": 1, "about": dict(about), "files": found}
  files.write_json(folder / NAME, content, sealed=True)


def check(
  folder: pathlib.Path,
  about: Mapping[str, Any],
  parts: Collection[str] | None = None,
) -> None:
  """Compares a folder with its inventory.

  Args:
    folder: Folder with an inventory.
    about: Values that it was written with.
    parts: Names of the folders in it that are compared; None: all.

  Raises:
    DamagedFileError: A file is missing, another one, or too many; the message
      names it.
    UserError: A file cannot be read.
  """
  content = files.read_json(folder / NAME)
  if content is None:
    raise DamagedFileError(f"{folder / NAME}: missing")
  listed = content.get("files")
  if content.get("format") != 1 or not isinstance(listed, dict):
    raise DamagedFileError(f"{folder / NAME}: not an inventory")
  if content.get("about") != dict(about):
    raise DamagedFileError(
      f"{folder}: holds {content.get('about')}, not {dict(about)}"
    )
  for name, measured in listed.items():
    if parts is None or name.split("/")[0] in parts:
      if list(_measure(folder / name)) != measured:
        raise DamagedFileError(f"{folder / name}: not what was written")
  for part in sorted(folder.iterdir()):
    if part.is_dir() and (parts is None or part.name in parts):
      for name in _names(folder, part.name):
        if name not in listed:
          raise DamagedFileError(f"{folder / name}: does not belong here")


def _names(folder: pathlib.Path, part: str) -> Iterator[str]:
  """Files of a part, without what file systems and desktops hide in it."""
  if locations.is_remote(folder):
    for place, names in locations.walk(folder / part):
      for name in sorted(names):
        if not name.startswith("."):
          yield (place / name).relative_to(folder).as_posix()
    return
  for path in sorted((folder / part).rglob("*")):
    if not path.is_dir() and not path.name.startswith("."):
      yield path.relative_to(folder).as_posix()


def _measure(path: pathlib.Path) -> tuple[int, str]:
  """Returns size and digest of a file."""
  try:
    with files.local(path) as here, regular.open_regular(here) as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
      return file.tell(), digest
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
    raise DamagedFileError(f"{path}: missing") from None
  except OSError as error:
    kind = DamagedFileError if error.errno == errno.EIO else UserError
    raise kind(f"{path}: {error.strerror or error}") from error
