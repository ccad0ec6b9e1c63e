"""Paths as users write them, and the folders of this user.

An address on an object store, gs:// or s3://, is a path of etils.epath, which
has the methods of pathlib's. What is atomic there is the writing of an object;
folders, renames, locks and appending do not exist (docs/files.md).
"""

import functools
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import cast

from etils import epath

from atat_jax.errors import UserError, shown

_log = logging.getLogger(__name__)

# pathlib makes gs:/bucket of gs://bucket, which would be a folder named "gs:".
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/(/?)")
_KNOWN_SCHEMES = frozenset(
  "abfs abfss adl az azure b2 cns dbfs file ftp gcs gs hdfs hf http https"
  " memory minio oci oss placer r2 s3 s3a s3n sftp ssh wasb wasbs webhdfs".split()
)


def scheme(path: str | os.PathLike[str]) -> str | None:
  """Returns the scheme of an address, in small letters; None for a local path.

  Args:
    path: The path as it was given, or what pathlib made of it.
  """
  found = _SCHEME.match(str(path))
  if found is None:
    return None
  name = found[1].lower()
  return name if found[2] or name in _KNOWN_SCHEMES else None


STORES = {"gs": "gcsfs", "s3": "s3fs"}
"""Schemes of object stores to the Python package that reaches them."""
COPIED = ("s3",)
"""Those to which Orbax does not write: whole checkpoints are copied there."""


def is_remote(path: os.PathLike[str]) -> bool:
  """Returns whether a path of `find` is on an object store."""
  return not isinstance(path, pathlib.Path)


def is_copied(path: os.PathLike[str]) -> bool:
  """Returns whether checkpoints at a path of `find` are copies of local ones."""
  return is_remote(path) and scheme(path) in COPIED


def of(text: str) -> pathlib.Path:
  """Returns the path that a path of `find` was, from its text."""
  if scheme(text):
    return cast(pathlib.Path, epath.Path(text))
  return pathlib.Path(text)


def walk(
  folder: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, list[str]]]:
  """Yields the folders below a remote one, itself included, and their files."""
  import fsspec

  # epath's own walk passes options that s3fs and gcsfs do not have.
  store, top = fsspec.url_to_fs(str(folder))
  for place, _, names in store.walk(top):
    yield of(f"{scheme(folder)}://{place.strip('/')}"), [*names]


def resolved(path: pathlib.Path) -> pathlib.Path:
  """Returns a path without links; on an object store there are none."""
  return path if is_remote(path) else path.resolve()


def find(field: str, path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a local path as `expand` does, or one on an object store.

  Args:
    field: Name of the argument, for the message.
    path: The path, as it was given.

  Returns:
    The path; of an address a `epath.Path`, see `is_remote`.

  Raises:
    UserError: Refused by `expand`; another scheme, no bucket, a store whose
      package is missing or that cannot be reached.
  """
  name = scheme(path) if isinstance(path, str | os.PathLike) else None
  if name is None:
    return expand(field, path)
  text = str(path).strip()
  bucket = text.removeprefix(f"{name}://").partition("/")[0]
  if name not in STORES or not text.startswith(f"{name}://") or not bucket:
    places = " or ".join(f"{one}://<bucket>/<folder>" for one in STORES)
    raise UserError(
      f"{field}: {text!r}; allowed: a path on this machine, or {places}"
    )
  try:
    _reach(name, bucket)
  except ImportError:
    raise UserError(
      f"{field}: {text!r} needs the Python package {STORES[name]}: pip install"
      f" {STORES[name]}"
    ) from None
  # Each store's library has errors of its own.
  except Exception as error:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(
      f"{field}: {text!r} cannot be reached ({reason}); allowed: a bucket that"
      " exists and that these credentials may read and write"
    ) from None
  return cast(pathlib.Path, epath.Path(text.rstrip("/")))


@functools.cache
def _reach(name: str, bucket: str) -> None:
  """Looks into a bucket, once; raises whatever the store's library does."""
  import fsspec

  fsspec.get_filesystem_class(name)
  # A listing shows at once what another process has written.
  fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
  # `exists` would take any failure for a no.
  next(iter(epath.Path(f"{name}://{bucket}").iterdir()), None)


def expand(field: str, path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path with `~` and `~user` replaced by the home folder.

  Args:
    field: Name of the argument, for the message.
    path: The path, as it was given.

  Raises:
    UserError: No path; "" or "None", as from an unset variable; an address; a
      home folder that is not known; a name that is too long; a null byte.
  """
  if not isinstance(path, str | os.PathLike):
    raise UserError(f"{field}: {shown(path)}; allowed: a path")
  text = str(path)
  if not text.strip() or text == "None":  # an unset variable
    raise UserError(f"{field}: {text!r}; allowed: a path")
  if "\0" in text:
    raise UserError(f"{field}: {text!r}; allowed: a path without a null byte")
  if scheme(text):
    raise UserError(
      f"{field}: {text!r}; allowed: a path on this machine, without"
      f" {scheme(text)}://"
    )
  if not _is_text(text):  # checkpoints cannot be written there
    raise UserError(
      f"{field}: {text!r}; allowed: a path of letters in this locale's encoding,"
      f" {sys.getfilesystemencoding()}; PYTHONUTF8=1 makes that UTF-8"
    )
  expanded = os.path.expanduser(text)
  if expanded.startswith("~"):
    raise UserError(
      f"{field}: {text!r}; allowed: a path without ~, the home folder of"
      f" {pathlib.Path(text).parts[0]} is not known"
    )
  found = pathlib.Path(expanded)
  try:
    found.exists()
  except OSError as error:  # the longest name is the system's
    raise UserError(f"{field}: {shown(text)}: {error.strerror}") from None
  # "./~" and "./None" stay what they are, however often they come here.
  return (
    found.absolute() if str(found)[0] == "~" or str(found) == "None" else found
  )


def _is_text(path: str) -> bool:
  """Returns whether a path has no bytes that are no letters."""
  try:
    path.encode()
  except UnicodeEncodeError:
    return False
  return True


def cache(name: str) -> pathlib.Path | None:
  """Returns a folder of this package in the user's cache.

  `$XDG_CACHE_HOME/atat_jax/<name>`, by default `~/.cache/atat_jax/<name>`.

  Args:
    name: Name of the folder.

  Returns:
    The folder, which exists and can be written; None where there can be none,
    which is told once.
  """
  root = os.environ.get("XDG_CACHE_HOME", "")
  try:
    if not os.path.isabs(root):  # the standard has relative paths ignored
      root = str(pathlib.Path("~").expanduser() / ".cache")
  except RuntimeError:
    _say_once("HOME is not set and this user has no home folder")
    return None
  path = pathlib.Path(root) / "atat_jax" / name
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    _say_once(f"{path}: {error.strerror}")
    return None
  if not os.access(path, os.W_OK | os.X_OK):
    _say_once(f"{path}: no permission to write")
    return None
  return path


@functools.cache
def _say_once(reason: str) -> None:
  _log.warning(
    "no cache (%s): programs are compiled, and data decoded, at every start;"
    " XDG_CACHE_HOME can name a folder",
    reason,
  )
