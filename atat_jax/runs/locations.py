"""Paths as users write them, and the folders of this user."""

import functools
import logging
import os
import pathlib
import re
import sys

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
