"""Cache of compiled programs, on by default and of limited size.

It is JAX's own cache, which holds for the whole process. So it is turned on by
the first call of this package that compiles, not by an import, and only where
nobody has chosen a folder of their own or turned caches off.
"""

import contextlib
import logging
import os
import pathlib
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from atat_jax.runs import locations

VARIABLE = "ATAT_JAX_PROGRAM_CACHE"
"""Environment variable: size limit in MiB; 0: no cache unless it is asked for."""

_DEFAULT_MIB = 2048
_MIB = 2**20
# Programs that compile faster are not worth a file; JAX waits for a second.
_MIN_SECONDS, _JAX_SECONDS = 0.1, 1.0

_log = logging.getLogger(__name__)
_decided = False


def _config(name: str) -> Any:
  """Value of an option of JAX."""
  return getattr(jax.config, name)


def _limit() -> int:
  """Size limit of the folder in bytes."""
  text = os.environ.get(VARIABLE, "").strip()
  if not text:
    return _DEFAULT_MIB * _MIB
  if text.isascii() and text.isdecimal():
    return int(text) * _MIB
  _log.warning(
    "%s: %r; allowed: a size in MiB, 0 for no cache; taken for %d",
    VARIABLE,
    text,
    _DEFAULT_MIB,
  )
  return _DEFAULT_MIB * _MIB


def _last_used(found: os.stat_result) -> float:
  # Many file systems note a read once a day only.
  return max(found.st_atime, found.st_mtime)


def trim(folder: pathlib.Path, limit: int) -> None:
  """Deletes the files of a folder that were used longest ago.

  Another process may read or delete files at the same time: it then compiles
  the program again, or has done the work of this one.

  Args:
    folder: The folder.
    limit: Size in bytes that the rest may have.
  """
  files = []
  with contextlib.suppress(OSError), os.scandir(folder) as entries:
    for entry in entries:
      with contextlib.suppress(OSError):
        if entry.is_file(follow_symlinks=False):
          files.append((entry.stat(follow_symlinks=False), entry.path))
  total = sum(found.st_size for found, _ in files)
  for found, path in sorted(files, key=lambda file: _last_used(file[0])):
    if total <= limit:
      return
    with contextlib.suppress(OSError):
      os.unlink(path)
      total -= found.st_size


def _use_own_folder(min_seconds: float) -> None:
  """Makes the folder of this package that of JAX's cache."""
  path = locations.cache("compiled")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
  jax.config.update("jax_compilation_cache_dir", path and str(path))
  if path is not None:
    trim(path, _limit() or _DEFAULT_MIB * _MIB)


def enable_persistent_cache() -> None:
  """Keeps all compiled programs in the user's cache directory between runs.

  JAX by default keeps only programs that take over a second to compile; here
  all are kept, so that the second start of a command compiles nothing.
  `JAX_COMPILATION_CACHE_DIR` is respected where it is set. Without a folder that
  can be written nothing is kept, which is told.
  """
  global _decided
  _decided = True
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return
  _use_own_folder(0)


def disable_persistent_cache() -> None:
  """Keeps no compiled programs from now on; folders of others are left alone."""
  global _decided
  _decided = True
  own = locations.cache("compiled")
  if own is None or _config("jax_compilation_cache_dir") != str(own):
    return
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()


def enable_by_default() -> None:
  """Turns the cache on, once, where nobody has decided about it.

  Nothing changes where `jax_compilation_cache_dir` is set, where
  `jax_enable_compilation_cache` is off, and where `ATAT_JAX_PROGRAM_CACHE` is 0.
  """
  global _decided
  if _decided:
    return
  _decided = True
  if _config("jax_compilation_cache_dir") is not None:
    return
  if _config("jax_enable_compilation_cache") and _limit():
    chosen = _config("jax_persistent_cache_min_compile_time_secs")
    _use_own_folder(_MIN_SECONDS if chosen == _JAX_SECONDS else chosen)
