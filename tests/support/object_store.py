"""An object store for tests: buckets that are local folders.

What object stores do not have is missing: renames, appending, and folders that
exist without an object in them.
"""

import pathlib
import sys

import fsspec
from etils.epath.backend import fsspec_backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils

from atat_jax.runs import locations

SCHEMES = ("gs", "gcs", "s3")


def _make(root: pathlib.Path, written: list[str]) -> type[DirFileSystem]:
  class Store(DirFileSystem):
    protocol = SCHEMES

    def __init__(self, **_):
      super().__init__(str(root), LocalFileSystem(auto_mkdir=True))

    def open(self, path, mode="rb", **fields):
      if "a" in mode or "+" in mode:
        raise NotImplementedError("nothing can be appended to an object")
      if "w" in mode:
        written.append(self._strip_protocol(path))
      return super().open(path, mode=mode, **fields)

    def mv(self, *args, **kwargs):
      raise NotImplementedError("nothing can be renamed")

    mv_file = rename = move = mv

    def makedirs(self, path, exist_ok=False):
      pass

    def mkdir(self, path, *args, **kwargs):
      pass

    def isdir(self, path):
      found = pathlib.Path(self._join(path))
      return found.is_dir() and any(x.is_file() for x in found.rglob("*"))

    def exists(self, path, **_):
      return pathlib.Path(self._join(path)).is_file() or self.isdir(path)

  return Store


def install(monkeypatch, root: pathlib.Path) -> list[str]:
  """Puts a store in the place of gs:// and s3://.

  Args:
    monkeypatch: The fixture, which takes it away again.
    root: Folder of the buckets.

  Returns:
    Paths of the objects that were written, in order.
  """
  written: list[str] = []
  store = _make(root, written)
  for name in SCHEMES:
    fsspec.register_implementation(name, store, clobber=True)
  fsspec_backend._get_filesystem.cache_clear()

  def kvstore(path):
    place = root / path.removeprefix("gs://")
    place.parent.mkdir(parents=True, exist_ok=True)
    return {"driver": "file", "path": str(place)}

  def remove(path, missing_ok=False):
    del missing_ok
    store().rm(str(path), recursive=True)

  monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
  monkeypatch.setattr(
    gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False
  )
  monkeypatch.setattr(gcs_utils, "rmtree", remove)
  locations._reach.cache_clear()
  return written


def remove() -> None:
  """Forgets the store that `install` has put in place."""
  for name in SCHEMES:
    sys.modules["fsspec.registry"]._registry.pop(name, None)
  fsspec_backend._get_filesystem.cache_clear()
  locations._reach.cache_clear()
