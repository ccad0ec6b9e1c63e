"""Files of a working directory: their names, readers, the atomic writer.

A file is written whole or not at all, and is on the disk before it takes its
name, so that neither a kill nor a loss of power leaves half of it. What is read
is what was written: JSON that results depend on carries a checksum, an `.npz`
the CRC-32 of each member and a list of them. Errors of the operating system
become a `UserError` of one line that names the file. docs/files.md has the
whole rule.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import locations, results_format, worst_case
from atat_jax.untrusted import arrays, regular, zips

try:
  import fcntl
except ImportError:  # Windows has no such locks
  fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
METRICS = "metrics.jsonl"
GRADIENT_RATIO = "gradient_ratio/"
"""Prefix, in a validation's line, of a term's gradient norm in units of the
cross-entropy's."""
RESULTS = "results.json"
REPORT = "report.html"
EXPLANATION = "explain.html"
CHECKPOINTS = "checkpoints"
FIGURES = "figures"
TENSORBOARD = "tensorboard"
DAMAGED = "damaged"
"""Folder of a working directory for what was found damaged."""

MAX_JSON = 64 * 2**20
"""Largest JSON file that is read, bytes."""
MAX_CONTAINERS = 2**21
"""Most lists and objects in a JSON file that is read."""
SEND_EVERY = 60.0
"""Seconds after which a file that grows is sent to an object store again."""
MAX_LINE = 2**20
"""Longest line of a `metrics.jsonl` that is read, bytes."""

_SEAL = "checksum"
_SEALED = re.compile(rb'"sha256:[0-9a-f]{64}"')
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp(\..*)?", re.DOTALL)
_CHUNK = 2**20

_log = logging.getLogger(__name__)


# --- Writing -----------------------------------------------------------------


@contextlib.contextmanager
def plain_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns errors of the operating system into a line that names the file.

  Args:
    path: File or folder that the block works on.

  Raises:
    UserError: The disk is full, the path may not be written, is too long, ...
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if locations.is_remote(path):  # each store's library has errors of its own
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      raise UserError(f"{path}: {reason}") from error
    if not isinstance(error, OSError):
      raise
    if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
      raise  # the network failed, not the file
    raise UserError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Replaces a file atomically: a reader sees the old or the new one, whole.

  On a disk, the new file is there whole before it gets its name. It is locked
  while it is written, so that `remove_temporaries` knows it from one that a
  killed process left. For an object store it is written in a local folder and
  sent in one piece, which the store shows when it has all of it.

  Args:
    path: File to be written; its folder is made.

  Yields:
    Path of a temporary file with the same suffix, on a disk beside it. It takes
    the place of `path` when the block ends, and is removed when the block fails.

  Raises:
    UserError: The operating system refuses.
  """
  if locations.is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = pathlib.Path(folder, path.name)
      yield temporary
      with plain_errors(path):
        path.write_bytes(temporary.read_bytes())
    return
  # A process id would not do: containers that share a disk share those, too.
  unique = uuid.uuid4().hex
  stem = path.stem.encode()[:100].decode(errors="ignore")
  suffix = path.suffix if len(path.suffix) < 20 else ""
  temporary = path.with_name(f".{stem}.{unique}.tmp{suffix}")
  with plain_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("xb") as held:
      try:
        _lock(held.fileno())
        yield temporary
        with temporary.open("rb") as written:
          os.fsync(written.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
      finally:
        temporary.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
  if fcntl is None:
    return False
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    return False  # held by another process; or a file system without locks
  return True


def _sync_folder(folder: pathlib.Path) -> None:
  # Some file systems refuse this; the file itself is safe without.
  with contextlib.suppress(OSError):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


@contextlib.contextmanager
def local(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes a file readable by what knows only local paths.

  Args:
    path: The file.

  Yields:
    The path itself, or that of a copy of what is on an object store, which is
    removed when the block ends.

  Raises:
    FileNotFoundError: There is no such file.
    UserError: The store refuses.
  """
  if not locations.is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, path.name)
    try:
      content = path.read_bytes()
    except FileNotFoundError:
      raise
    except Exception as error:
      with plain_errors(path):
        raise error
    copy.write_bytes(content)
    yield copy


def stamp(path: pathlib.Path) -> tuple[float, int]:
  """Returns time and size of a file, which change when it is written."""
  found: Any = path.stat()
  if locations.is_remote(path):
    return found.mtime or 0, found.length
  return found.st_mtime_ns, found.st_size


def remove_temporaries(directory: pathlib.Path, *, below: bool = True) -> None:
  """Removes what killed processes left half written.

  Object stores hold nothing half written.

  Args:
    directory: Folder. A file that a live process holds stays, and all stay
      where the file system has no locks.
    below: Whether the folders below are searched, too.
  """
  if locations.is_remote(directory):
    return
  for folder, folders, names in os.walk(directory):
    if not below:
      folders.clear()
    for name in filter(_TEMPORARY.fullmatch, names):
      path = pathlib.Path(folder) / name
      with contextlib.suppress(OSError, UserError):
        with regular.open_regular(path) as file:
          if _lock(file.fileno()):
            path.unlink()


def write_bytes(path: pathlib.Path, content: bytes) -> pathlib.Path:
  """Writes a whole file or none; returns its path.

  Raises:
    UserError: The operating system refuses.
  """
  with replacing(path) as temporary:
    temporary.write_bytes(content)
  return path


def write_text(path: pathlib.Path, text: str) -> pathlib.Path:
  """Writes a whole UTF-8 file or none; returns its path.

  What UTF-8 does not have, as in names of other encodings, is escaped.
  """
  return write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(
  path: pathlib.Path, value: Any, *, sealed: bool = False
) -> pathlib.Path:
  """Writes a whole JSON file or none; returns its path.

  Args:
    path: The file.
    value: JSON value with finite numbers; an object if it is sealed.
    sealed: Whether the object gets an entry "checksum" of all others, in its
      record "run" if it has one. `read_json` checks it and takes it off.

  Raises:
    ValueError: A number is not finite.
    UserError: The operating system refuses.
  """
  text = json.dumps(value, indent=1, allow_nan=False)
  if sealed:
    seal = {_SEAL: _checksum(json.loads(text))}
    if isinstance(value.get("run"), dict):
      value = {**value, "run": {**value["run"], **seal}}
    else:
      value = {**value, **seal}
    text = json.dumps(value, indent=1, allow_nan=False)
  return write_text(path, text + "\n")


def _checksum(value: dict[str, Any]) -> str:
  """Digest of an object as JSON reads it; spaces and order do not matter."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def write_arrays(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray]
) -> pathlib.Path:
  """Writes a whole `.npz` file or none; returns its path.

  A further array `checksums` lists the members and their CRC-32; `read_arrays`
  compares and takes it off.

  Raises:
    UserError: The operating system refuses.
  """
  with replacing(path) as temporary:
    with temporary.open("wb") as file:
      np.savez(file, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(temporary, "a") as archive:
      marks = np.array(json.dumps(_marks(archive.infolist())))
      with archive.open(_MARKS, "w") as member:
        np.lib.format.write_array(member, marks)
  return path


_MARKS = "checksums.npy"


def _marks(members: Iterable[zipfile.ZipInfo]) -> dict[str, int]:
  return {
    info.filename: info.CRC for info in members if info.filename != _MARKS
  }


def set_aside(
  path: pathlib.Path, workdir: pathlib.Path, *, copy: bool = False
) -> pathlib.Path:
  """Moves a damaged file or folder to `<workdir>/damaged`; nothing is deleted.

  Args:
    path: File or folder below `workdir`.
    workdir: Working directory of the run.
    copy: Whether the file stays in its place as well.

  Returns:
    Its new path, which no other file had.

  Raises:
    UserError: The operating system refuses.
  """
  name = "-".join(path.relative_to(workdir).parts)
  with plain_errors(path):
    (workdir / DAMAGED).mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
      target = workdir / DAMAGED / (f"{name}.{number}" if number else name)
      if not target.exists():
        if locations.is_remote(path):
          _move_remote(path, target, copy)
        elif copy:
          shutil.copyfile(path, target)
        else:
          os.rename(path, target)
        return target
  raise AssertionError


def _move_remote(path: pathlib.Path, target: pathlib.Path, copy: bool) -> None:
  """Copies a file or folder object by object, then deletes it unless `copy`."""
  source: Any = path
  if not path.is_dir():
    source.copy(target)
  else:
    for place, names in locations.walk(path):
      for name in names:
        there = target / place.relative_to(source) / name
        there.parent.mkdir(parents=True, exist_ok=True)
        here: Any = place / name
        here.copy(there)
  if not copy:
    source.rmtree() if path.is_dir() else source.unlink()


class Appender:
  """File that grows by lines, open for writing.

  Nothing can be appended to an object on a store: there, all of it is sent
  again when it is synced, closed, or a minute old.

  Args:
    path: The file.

  Raises:
    UserError: The operating system or the store refuses.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._content: bytearray | None = None
    self._sent = time.monotonic()
    with plain_errors(path):
      if locations.is_remote(path):
        self._content = bytearray(path.read_bytes() if path.exists() else b"")
      else:
        # Without a buffer: what a full disk refuses is not tried again.
        self._file = path.open("ab", buffering=0)

  @property
  def name(self) -> str:
    """Path of the file, as a file of Python's has it."""
    return str(self._path)

  def write(self, line: bytes, *, sync: bool) -> None:
    """Appends a line.

    Args:
      line: The line with its end.
      sync: Whether it is safe from a loss of power when the call returns.

    Raises:
      UserError: The operating system or the store refuses.
    """
    with plain_errors(self._path):
      if self._content is not None:
        self._content += line
        if sync or time.monotonic() - self._sent > SEND_EVERY:
          self._send()
        return
      if self._file.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      if sync:
        os.fsync(self._file.fileno())

  def _send(self) -> None:
    assert self._content is not None  # noqa: S101 - narrows the type
    self._path.write_bytes(bytes(self._content))
    self._sent = time.monotonic()

  def close(self) -> None:
    """Closes the file."""
    if self._content is None:
      self._file.close()
      return
    with plain_errors(self._path):
      self._send()


# --- JSON --------------------------------------------------------------------


def read_bytes(path: pathlib.Path, limit: int = MAX_JSON) -> bytes | None:
  """Reads a file; None if there is none.

  Args:
    path: The file.
    limit: Largest size that is read, bytes.

  Raises:
    UserError: Not a file, not readable, or larger.
  """
  with plain_errors(path):
    try:
      if locations.is_remote(path):
        return _download(path, limit)
      return regular.read_bytes(path, limit)
    except FileNotFoundError:
      return None


def _download(path: pathlib.Path, limit: int) -> bytes:
  size = stamp(path)[1]
  if size > limit:
    raise UserError(f"{path}: {size} bytes; allowed: at most {limit}")
  return path.read_bytes()


def parse_json(content: bytes, where: object, *, nan: bool = False) -> Any:
  """Reads JSON from outside.

  Args:
    content: UTF-8 text, with or without a byte order mark.
    where: Name of the file, for the message.
    nan: Whether NaN and Infinity are allowed, as Python writes them.

  Returns:
    The value. No name occurs twice in an object; numbers are finite unless
    `nan`.

  Raises:
    DamagedFileError: Anything else.
  """
  # An empty list of two bytes takes thirty times as much memory.
  if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
    raise DamagedFileError(
      f"{where}: more than {MAX_CONTAINERS} lists and objects"
    )
  try:
    return json.loads(
      content.decode("utf-8-sig"),
      object_pairs_hook=_unique,
      parse_constant=float if nan else _refuse,
      parse_float=float if nan else _finite,
    )
  except RecursionError:
    raise DamagedFileError(
      f"{where} is not valid JSON: nested too deeply"
    ) from None
  except ValueError as error:
    raise DamagedFileError(f"{where} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"{twice!r} occurs twice in an object")
  return value


def _refuse(text: str) -> float:
  raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
  value = float(text)
  if abs(value) == float("inf"):
    raise ValueError(f"{text} is too large")
  return value


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a JSON object; None if there is no such file.

  Raises:
    UserError: The file cannot be read.
    DamagedFileError: It does not hold a JSON object, or another one than was
      written.
  """
  path = locations.find("path", path)
  content = read_bytes(path)
  if content is None:
    return None
  value = parse_json(content, path)
  if not isinstance(value, dict):
    raise DamagedFileError(
      f"{path} must hold a JSON object, not a {type(value).__name__}"
    )
  run = value.get("run")
  seal = (run if isinstance(run, dict) else value).pop(_SEAL, None)
  # A value without its name: the damage is in the name.
  if seal is None and not _SEALED.search(content):
    return value  # as earlier versions wrote it
  if seal != _checksum(value):
    raise DamagedFileError(
      f"{path} is not what was written (its checksum differs); move it away,"
      ' or, if you edited it yourself, delete its entry "checksum"'
    )
  return value


def read_results(
  workdir: pathlib.Path, needed: Sequence[str] = ()
) -> dict[str, Any] | None:
  """Reads `results.json`; None if the run has not been evaluated.

  Args:
    workdir: Directory of the file.
    needed: Fields that each row must have besides those that all have.

  Returns:
    Its content; worst cases are computed from the rows, not believed.

  Raises:
    UserError: The file is damaged or of another format.
  """
  path = locations.find("workdir", workdir) / RESULTS
  results = read_json(path)
  if results is None:
    return None
  if results.get("format") != 1:
    raise UserError(
      f"{path}: format is {results.get('format')!r}, only 1 can be read"
    )
  if found := results_format.fault(results, needed):
    raise DamagedFileError(
      f"{path}: not a results file ({found}); move it away to evaluate again"
    )
  return {**results, "rows": worst_case.complete(results["rows"])}


def read_autoattack(
  workdir: pathlib.Path,
  epsilon: float,
  norm: str,
  num_examples: int | None = None,
) -> dict[str, dict[str, Any]]:
  """Reads AutoAttack's rows of `results.json`, running statistics only.

  Args:
    workdir: Directory of the file.
    epsilon: Radius that the rows must have, pixels in [0, 1].
    norm: Norm that the rows must have.
    num_examples: Number of images that the rows must have; None: any.

  Returns:
    {model: row}. Of several rows of a model, the one with the most images; of
    those, the one with the lowest accuracy. Empty if there is no such file.

  Raises:
    UserError: The file is damaged or of another format.
  """
  results = read_results(workdir) or {"rows": []}
  found: dict[str, dict[str, Any]] = {}
  for row in results["rows"]:
    if (
      row["attack"].startswith("autoattack")
      and row["batch_norm"] == "running"
      and row["norm"] == norm
      and abs(row["epsilon"] - epsilon) < 1e-6
      and num_examples in (None, row["num_examples"])
    ):
      best = found.setdefault(row["model"], row)
      found[row["model"]] = min(
        (best, row), key=lambda r: (-r["num_examples"], r["accuracy"])
      )
  return found


# --- Lines -------------------------------------------------------------------


class Lines(NamedTuple):
  """Lines of a `metrics.jsonl`.

  Attributes:
    found: (text with its line break, content) of each good line, in order.
    bad: Numbers of the lines that are none, from 1. A last line that a kill has
      cut off is not among them.
  """

  found: list[tuple[bytes, dict[str, Any]]]
  bad: list[int]


def read_lines(path: pathlib.Path) -> Lines:
  """Reads the lines of a `metrics.jsonl`; bad ones are left out and said.

  Args:
    path: File with one JSON object a line, each with "split" and "step".

  Returns:
    The lines; none if there is no such file.

  Raises:
    UserError: The file cannot be read.
  """
  found: list[tuple[bytes, dict[str, Any]]] = []
  bad: list[int] = []
  number = 0
  with plain_errors(path), contextlib.suppress(FileNotFoundError):
    with local(path) as here, regular.open_regular(here) as file:
      while text := _read_line(file):
        number += 1
        try:
          line = parse_json(text, path, nan=True)
        except DamagedFileError:
          line = None
        if _is_line(line):
          found.append((text.rstrip(b"\r\n") + b"\n", line))
        else:
          bad.append(number)
  if bad and bad[-1] == number:
    bad.pop()  # a kill has cut this line off
  if bad:
    which = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    _log.warning("%s: damaged, left out: line %s", path, which)
  return Lines(found, bad)


def _read_line(file: Any) -> bytes:
  text = file.readline(MAX_LINE)
  rest = text
  while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
    rest = file.readline(MAX_LINE)  # skips a line that is too long
  return text


def _is_line(line: Any) -> bool:
  return (
    isinstance(line, dict)
    and isinstance(line.get("split"), str)
    and type(line.get("step")) is int
  )


def read_metrics(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Reads a `metrics.jsonl`.

  Args:
    path: File with one JSON object a line, each with "split" and "step".

  Returns:
    {split: lines in order of step}; empty if there is no such file. Where a
    resumed run wrote a step again, the later line counts.

  Raises:
    UserError: The file cannot be read.
  """
  path = locations.find("path", path)
  splits: dict[str, dict[int, dict[str, Any]]] = {}
  for _, line in read_lines(path).found:
    splits.setdefault(line["split"], {})[line["step"]] = line
  return {
    split: [lines[step] for step in sorted(lines)]
    for split, lines in splits.items()
  }


# --- Arrays ------------------------------------------------------------------


class Arrays(dict[str, np.ndarray]):
  """Arrays of a file by name; a missing one raises a `UserError`.

  Attributes:
    path: Path of the file.
  """

  def __init__(self, path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    super().__init__(arrays)
    self.path = path

  def __missing__(self, name: str) -> np.ndarray:
    raise DamagedFileError(
      f"{self.path} cannot be read (it has no {name}): delete it and evaluate"
      " again"
    )


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads every array of an `.npz` and checks it against what was written.

  Args:
    path: A `.npz` of `write_arrays`, or of `numpy.savez`, whose CRC-32 are
      checked all the same.

  Returns:
    The arrays by name. Nothing is unpickled, and memory stays in proportion to
    the file (`untrusted.zips`).

  Raises:
    ValueError: Damaged, or not such a file.
    OSError: Not readable.
    Exception: Others that a damaged archive raises in the zip reader.
  """
  with local(path) as here, zips.open_zip(here) as archive:
    found = arrays.read_members(archive)
    marks = found.pop(_MARKS.removesuffix(".npy"), None)
    infos = archive.members.values()
    if marks is not None and json.loads(str(marks)) != _marks(infos):
      raise ValueError("its checksums differ")
  return found


def read_arrays(path: pathlib.Path) -> Arrays | None:
  """Reads an `.npz` of arrays; None if there is no such file.

  Raises:
    UserError: The file may not be read.
    DamagedFileError: It is not what was written.
  """
  path = locations.find("path", path)
  try:
    return Arrays(path, load_arrays(path))
  except FileNotFoundError:
    return None
  except PermissionError as error:
    raise UserError(f"{path}: {error.strerror}") from error
  # A damaged file can raise anything in the zip reader or the header parser.
  except Exception as error:
    reason = " ".join(str(error).split()) or type(error).__name__
    raise DamagedFileError(
      f"{path} cannot be read ({reason}): delete it and evaluate again"
    ) from error
