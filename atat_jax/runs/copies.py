"""Whole folders on an object store: sent, fetched and removed by object.

A folder counts from the moment at which an object of its own, the mark, is
there. The mark is sent last and removed first, so that what a kill leaves of
either never counts.
"""

import pathlib
import shutil
from typing import Any

from atat_jax.runs import files, locations


def send(source: pathlib.Path, target: pathlib.Path, mark: str) -> None:
  """Sends a local folder to an object store.

  Args:
    source: The local folder.
    target: Its place on the store; what a kill has left there is removed.
    mark: Name of the object that says that the folder is complete.

  Raises:
    UserError: The store refuses.
  """
  with files.plain_errors(target):
    remove(target, mark)
    for path in sorted(source.rglob("*")):
      name = path.relative_to(source)
      if path.is_file() and str(name) != mark:
        _copy(path, target / name)
    (target / mark).write_bytes(b"complete\n")


def fetch(source: pathlib.Path, target: pathlib.Path) -> None:
  """Fetches a folder from an object store.

  Args:
    source: The folder on the store.
    target: Local folder, which is made.

  Raises:
    UserError: The store refuses.
  """
  with files.plain_errors(source):
    for place, names in locations.walk(source):
      folder = target / str(place)[len(str(source)) :].strip("/")
      folder.mkdir(parents=True, exist_ok=True)
      for name in names:
        _copy(place / name, folder / name)


def remove(folder: pathlib.Path, mark: str) -> None:
  """Removes a folder from an object store, if it is there.

  Args:
    folder: The folder on the store.
    mark: Name of the object that says that the folder is complete.

  Raises:
    UserError: The store refuses.
  """
  there: Any = folder
  with files.plain_errors(folder):
    if (folder / mark).exists():
      (folder / mark).unlink()
    if folder.exists():
      there.rmtree()


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
  with source.open("rb") as there, target.open("wb") as here:
    shutil.copyfileobj(there, here, 2**24)
