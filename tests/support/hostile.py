"""Hostile files, and a process that reads them all within bounds.

`python tests/support/hostile.py FOLDER` plants every threat in FOLDER, reads
each with the function that reads such files, and prints what came of it as
JSON. One process does it, so that the package is imported once; a thief that
was called, a socket, or memory beyond the limit shows in the answer.
"""

import gzip
import io
import json
import os
import pathlib
import pickle
import resource
import socket
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

MEMORY = 400 << 20
"""Bytes that reading may take beyond those taken after the imports."""

MARKER = "executed"

Make = Callable[[pathlib.Path], pathlib.Path]
THREATS: dict[str, tuple[str, Make]] = {}
"""{name: (reader, function that plants it in a folder and returns its path)}."""

HARMLESS: dict[str, tuple[str, Make]] = {}
"""The same for files that look alike and must be read."""


def _threat(reader: str, name: str, make: Make) -> None:
  assert name not in THREATS
  THREATS[name] = reader, make


class Thief:
  """Pickles to a call that leaves a marker in the working directory."""

  def __reduce__(self) -> tuple[Any, ...]:
    return os.system, (f"touch {MARKER}",)


# --- Parts -------------------------------------------------------------------


def _written(name: str, content: bytes) -> Make:
  def make(folder: pathlib.Path) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content)
    return path

  return make


def _zeros(size: int) -> bytes:
  """Raw deflate stream of zeros, about a thousandth of their number."""
  engine = zlib.compressobj(9, zlib.DEFLATED, -15)
  block = engine.compress(bytes(1 << 20)) + engine.flush(zlib.Z_FULL_FLUSH)
  # A block after a full flush does not depend on the one before it.
  block = engine.compress(bytes(1 << 20)) + engine.flush(zlib.Z_FULL_FLUSH)
  return block * (size >> 20) + engine.flush(zlib.Z_FINISH)


def _member(
  name: str, content: bytes, claimed: int, method: int, offset: int
) -> tuple[bytes, bytes]:
  """Local part and directory entry of a member of a zip archive."""
  encoded, big = name.encode(), claimed >= 1 << 32
  sizes = (len(content), 0xFFFFFFFF if big else claimed)
  extra = struct.pack("<HHQ", 1, 8, claimed) if big else b""
  head = (20, 0, method, 0, 0, 0, *sizes, len(encoded))
  local = struct.pack("<4s5H3L2H", b"PK\3\4", *head, 0) + encoded + content
  entry = struct.pack(
    "<4s6H3L5H2L", b"PK\1\2", 20, *head, len(extra), 0, 0, 0, 0, offset
  )
  return local, entry + encoded + extra


def _zip(
  members: Iterable[tuple[str, bytes, int, int]], same_place: bool = False
) -> bytes:
  """Zip archive of (name, stored content, claimed size, method)."""
  locals_, entries, offset = [], [], 0
  for member in members:
    local, entry = _member(*member, offset=offset)
    locals_.append(local)
    entries.append(entry)
    offset += 0 if same_place else len(local)
  body = b"".join(locals_[:1] if same_place else locals_)
  directory, count = b"".join(entries), len(entries)
  end = struct.pack(
    "<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0
  )
  return body + directory + end


def _stored(members: dict[str, bytes]) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return buffer.getvalue()


def _npy(descr: str, shape: str, data: bytes = b"", pad: int = 128) -> bytes:
  header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
  text = header.ljust(pad - 11) + "\n"
  return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + data


# --- Things that are no files ------------------------------------------------


def _pipe(name: str) -> Make:
  def make(folder: pathlib.Path) -> pathlib.Path:
    os.mkfifo(folder / name)
    return folder / name

  return make


def _link(name: str, target: str) -> Make:
  def make(folder: pathlib.Path) -> pathlib.Path:
    (folder / name).symlink_to(target)
    return folder / name

  return make


def _sparse(name: str) -> Make:
  def make(folder: pathlib.Path) -> pathlib.Path:
    with open(folder / name, "wb") as file:
      file.truncate(1 << 40)
    return folder / name

  return make


for _reader, _name in (
  ("weights", "w.pth"),
  ("weights", "w.safetensors"),
  ("archive", "a.tar.gz"),
  ("copy", "c.npz"),
  ("arrays", "a.npz"),
  ("attention", "attention.npz"),
  ("state", "s.npz"),
  ("extra", "e.npz"),
  ("photograph", "p.jpg"),
  ("json", "config.json"),
  ("names", "n.txt"),
):
  _threat(_reader, f"{_name}: a pipe", _pipe(_name))
  _threat(_reader, f"{_name}: a device", _link(_name, "/dev/zero"))
  if _reader != "state":  # a state that does not exist is a new one
    _threat(_reader, f"{_name}: a loop of links", _link(_name, _name))
  _threat(_reader, f"{_name}: a terabyte of holes", _sparse(_name))
_threat("lines", "metrics.jsonl: a pipe", _pipe("metrics.jsonl"))
_threat("lines", "metrics.jsonl: a device", _link("metrics.jsonl", "/dev/zero"))


# --- Pickles of weights ------------------------------------------------------

_STOP = b"."


def _text(value: str) -> bytes:
  return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _long(value: int) -> bytes:
  data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
  return b"\x8a" + bytes([len(data)]) + data


def _tensor(
  offset: bytes, shape: bytes, strides: bytes, *, key: str = "0", size: int = 4
) -> bytes:
  """Program that makes a tensor; numbers and tuples are programs, too."""
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + _text("storage")
    + b"ctorch\nFloatStorage\n"
    + _text(key)
    + _text("cpu")
    + _long(size)
    + b"tQ"
    + offset
    + shape
    + strides
    + b"\x89}tR"
  )


def _weights(program: bytes, numbers: bytes = bytes(16)) -> Make:
  members = {"x/data.pkl": program, "x/data/0": numbers}
  return _written("w.pth", _stored(members))


def _one(tensor: bytes) -> bytes:
  return b"\x80\x02}" + _text("w") + tensor + b"s" + _STOP


_SIX = b"Nr\xff\xff\xff\x7f."
_STEAL = f"cposix\nsystem\n(S'touch {MARKER}'\n"
_PROGRAMS = {
  "a place in the memo beyond memory": _SIX,
  "a call": pickle.dumps({"w": Thief()}, 2),
  "a call, protocol 0": pickle.dumps({"w": Thief()}, 0),
  "a call, protocol 5": pickle.dumps({"w": Thief()}, 5),
  "a call by INST": f"(S'touch {MARKER}'\niposix\nsystem\n.".encode(),
  "a call by OBJ": f"(cposix\nsystem\nS'touch {MARKER}'\no.".encode(),
  "a call by NEWOBJ": f"{_STEAL}t\x81.".encode(),
  "a call of something from a dict": b"cbuiltins\ngetattr\n(}S'x'\ntR.",
  "an extension": b"\x80\x02\x82\x01.",
  "a buffer from outside": b"\x80\x05\x97.",
  "a persistent id as text": b"Px\n.",
  "bytes beyond memory": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.",
  "a bytearray beyond memory": b"\x80\x05\x96"
  + struct.pack("<Q", 1 << 40)
  + b"x.",
  "text beyond memory": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"x.",
  "4 GB of bytes": b"B\xff\xff\xff\xffx.",
  "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f\1.",
  "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
  "a frame beyond memory": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
  "lists in lists": b"]" * 150_000 + b"a" * 149_999 + b".",
  "tuples in tuples": b")" + b"\x85" * 150_000 + b".",
  "tuples in tuples as a key": b"})" + b"\x85" * 150_000 + b"Ns.",
  "a list that holds itself": b"]q\0h\0a.",
  "a dict that holds itself": b"}q\0" + _text("model") + b"h\0s.",
  "doubled sixty times": b"}q\0"
  + b"".join(
    b"}q" + bytes([i]) + _text("state_dict") + b"h" + bytes([i - 1]) + b"s"
    b"h" + bytes([i]) + _text("model") + b"h" + bytes([i - 1]) + b"s"
    for i in range(1, 61)
  )
  + b".",
  "three million instructions": b"\x80\x02" + b"N0" * 1_600_000 + b"N.",
  "an empty stack": b"0.",
  "nothing": b"",
  "keys that are numbers": b"\x80\x02}K\1"
  + _tensor(b"K\0", b"K\4\x85", b"K\1\x85")
  + b"s.",
  "a storage that is no storage": b"\x80\x02}" + _text("w") + b"(K\1tQs.",
  "attributes of a class": b"ccollections\nOrderedDict\n}S'x'\nNsb.",
}
for _name, _program in _PROGRAMS.items():
  _threat("weights", f"pickle: {_name}", _weights(_program))
  _threat("weights", f"pickle alone: {_name}", _written("w.pth", _program))

_BIG = _long(1 << 200)
_TENSORS = {
  "beyond its storage": (b"K\1", b"K\4\x85", b"K\1\x85"),
  "before its storage": (_long(-1), b"K\4\x85", b"K\1\x85"),
  "stride backwards": (b"K\3", b"K\4\x85", _long(-1) + b"\x85"),
  "huge strides": (b"K\0", b"K\2K\2\x86", _BIG + b"K\1\x86"),
  "huge offset": (_BIG, b"K\1\x85", b"K\1\x85"),
  "sizes beyond 64 bits": (b"K\0", _BIG * 2 + b"\x86", b"K\0K\0\x86"),
  "a hundred thousand axes": (
    b"K\0",
    b"(" + _BIG * 100_000 + b"t",
    b"(" + b"K\0" * 100_000 + b"t",
  ),
  "a Boolean for a size": (b"K\0", b"\x88\x85", b"K\1\x85"),
  "a list in a list for a size": (b"K\0", b"]]a\x85", b"K\1\x85"),
}
for _name, _parts in _TENSORS.items():
  _threat("weights", f"tensor: {_name}", _weights(_one(_tensor(*_parts))))

_SHARED = b"(" + b"".join(
  _text(f"w{i}") + _tensor(b"K\0", b"J\0\0@\0\x85", b"K\1\x85", size=1 << 22)
  for i in range(300)
)
HARMLESS["300 tensors on one storage of 16 MiB"] = (
  "weights",
  _weights(b"\x80\x02}" + _SHARED + b"u.", bytes(1 << 24)),
)
_threat(
  "weights",
  "two dtypes of one storage",
  _weights(
    b"\x80\x02}("
    + _text("a")
    + _tensor(b"K\0", b"K\4\x85", b"K\1\x85")
    + _text("b")
    + _tensor(b"K\0", b"K\4\x85", b"K\1\x85").replace(b"Float", b"Int")
    + b"u."
  ),
)


# --- Zip archives ------------------------------------------------------------

_GOOD = _one(_tensor(b"K\0", b"K\4\x85", b"K\1\x85"))
_EIGHT_GB = _zeros(8 << 30)


def _both(name: str, content: bytes) -> None:
  _threat("weights", f"zip of weights: {name}", _written("w.pth", content))
  _threat("arrays", f"zip of arrays: {name}", _written("a.npz", content))
  _threat("extra", f"zip of images: {name}", _written("e.npz", content))


_NAMES = ("x/data.pkl", "x/data/0", "image.npy", "label.npy")
_both("8 GB", _zip((n, _EIGHT_GB, 8 << 30, 8) for n in _NAMES))
_both(
  "unpacks to more than it says", _zip((n, _EIGHT_GB, 9, 8) for n in _NAMES)
)
_both(
  "members in one place",
  _zip(((f"{i}/data.pkl", bytes(999), 999, 0) for i in range(500)), True),
)
_both("claims beyond its end", _zip((n, b"N.", 1 << 40, 0) for n in _NAMES))
_both("two of one name", _zip([("x/data.pkl", b"N.", 2, 0)] * 2))
_both("another compression", _zip((n, b"N.", 2, 12) for n in _NAMES))
_both("65,000 members", _zip((f"{i}" * 9, b"", 0, 0) for i in range(65_000)))
_NO_MEMBERS = b"PK\5\6" + bytes(18)
_threat("weights", "zip of weights: empty", _written("w.pth", _NO_MEMBERS))
_threat("extra", "zip of images: empty", _written("e.npz", _NO_MEMBERS))


# --- Safetensors -------------------------------------------------------------


def _safe(header: object, data: bytes = bytes(16)) -> Make:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return _written("w.safetensors", struct.pack("<Q", len(text)) + text + data)


def _f32(shape: Any, *offsets: int) -> dict[str, Any]:
  return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


_SAFE = {
  "overlap": {"a": _f32([4], 0, 16), "b": _f32([2], 8, 16)},
  "one place": {f"w{i}": _f32([4], 0, 16) for i in range(300)},
  "a hole": {"a": _f32([2], 8, 16)},
  "backwards": {"a": _f32([4], 16, 0)},
  "before the start": {"a": _f32([4], -16, 0)},
  "sizes beyond 64 bits": {"a": _f32([1 << 33, 1 << 31], 0, 16)},
  "an empty one beyond 64 bits": {"a": _f32([0, 1 << 62, 1 << 62], 0, 0)},
  "a negative size": {"a": _f32([-4], 0, 16)},
  "a size that is no number": {"a": _f32(["4"], 0, 16)},
  "a shape that is none": {"a": _f32(None, 0, 16)},
  "no shape": {"a": 3},
  "a list": [1],
  "one name twice": b'{"a":%b,"a":%b}'
  % ((json.dumps(_f32([4], 0, 16)).encode(),) * 2),
  "deep": b'{"a":' * 200_000,
  "deep metadata": b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
  "no text": b"\xff\xfe{}",
  "an endless number": b'{"a":' + b"9" * 1_000_000 + b"}",
}
for _name, _header in _SAFE.items():
  _threat("weights", f"safetensors: {_name}", _safe(_header))
_EMPTY = _f32([0, 3, 3, 3], 0, 0)
_FOUR = {"conv1.weight": _f32([1, 4, 1, 1], 0, 16)}
for _name, _header in {
  "ten thousand stages": _FOUR
  | {f"layer{i}.0.bn1.weight": _EMPTY for i in range(10_000)}
  | {"linear.weight": _EMPTY},
  "ten thousand blocks": _FOUR
  | {f"blocks.{i}.attn.qkv.weight": _EMPTY for i in range(10_000)},
  "a name of 100,000 parts": {"a." * 100_000 + "w": _f32([4], 0, 16)},
  "a name of control sequences": {"\x1b[2J\n" * 999: _f32([4], 0, 16)},
}.items():
  _threat("network", f"network: {_name}", _safe(_header))
for _name, _length in (
  ("2^63", 1 << 63),
  ("90 MB", 90 << 20),
  ("-1", 2**64 - 1),
):
  _threat(
    "weights",
    f"safetensors: a header of {_name}",
    _written("w.safetensors", struct.pack("<Q", _length) + b'{"a":1}'),
  )


# --- Arrays ------------------------------------------------------------------

_HEADERS = {
  "a terabyte": ("'|u1'", "(1099511627776,)"),
  "sizes beyond 64 bits": ("'<f8'", "(4294967296, 4294967296, 4294967296)"),
  "a negative size": ("'|u1'", "(-4,)"),
  "elements without bytes": ("'|S0'", "(1000000000000,)"),
  "objects": ("'|O'", "(1,)"),
  "objects in records": ("[('a', '|O')]", "(1,)"),
  "records": ("[('a', '<f4')]", "(1,)"),
  "code": (f"__import__('os').system('touch {MARKER}')", "(1,)"),
  "a million axes": ("'|u1'", "(" + "1," * 4000 + ")"),
  "deep": ("'|u1'", "(" * 3000 + ")" * 3000),
  "no dtype": ("'<q9'", "(1,)"),
  "times": ("'<M8[s]'", "(1,)"),
}
for _name, (_descr, _shape) in _HEADERS.items():
  _array = _npy(
    _descr, _shape, pickle.dumps(Thief()), 128 if len(_shape) < 99 else 9000
  )
  _members = dict.fromkeys(("image.npy", "label.npy", "header.npy"), _array)
  for _reader, _file in (
    ("arrays", "a.npz"),
    ("copy", "c.npz"),
    ("state", "s.npz"),
    ("extra", "e.npz"),
  ):
    _threat(_reader, f"{_file}: {_name}", _written(_file, _stored(_members)))
_threat(
  "arrays",
  "a Boolean of 7",
  _written("a.npz", _stored({"a.npy": _npy("'|b1'", "(1,)", b"\7")})),
)
_threat(
  "arrays",
  "text without characters",
  _written("a.npz", _stored({"a.npy": _npy("'<U1'", "(1,)", b"\xff" * 4)})),
)
_threat("arrays", "no arrays", _written("a.npz", _stored({"a": b"x"})))


def _attention(**change: Any) -> Make:
  def make(folder: pathlib.Path) -> pathlib.Path:
    arrays: dict[str, Any] = {
      "images": np.zeros((2, 4, 4, 1), np.float32),
      "labels": np.zeros(2, np.int32),
      "class_names": np.array(["a", "b"]),
      "networks": np.array(["n"]),
      "kinds": np.array(["clean"]),
      "layer": np.array("l"),
      "protocol": np.array("p"),
      "n_clean_map": np.zeros((2, 3, 3), np.float32),
      "n_clean_prediction": np.zeros(2, np.int32),
      "n_clean_probability": np.zeros(2, np.float32),
    }
    np.savez(folder / "attention.npz", **(arrays | change))
    return folder / "attention.npz"

  return make


HARMLESS["an attention file"] = "attention", _attention()
for _name, _change in {
  "a label without a name": {"labels": np.array([0, 9])},
  "a negative label": {"labels": np.array([0, -1])},
  "a prediction without a name": {"n_clean_prediction": np.array([0, 9])},
  "flat images": {"images": np.zeros((2, 16), np.float32)},
  "integers for images": {"images": np.zeros((2, 4, 4, 1), np.int32)},
  "a map too few": {"n_clean_map": np.zeros((1, 3, 3), np.float32)},
  "text for maps": {"n_clean_map": np.array(["x"])},
  "a network without maps": {"networks": np.array(["n", "m"])},
  "one name for all classes": {"class_names": np.array("ab")},
}.items():
  _threat("attention", f"attention: {_name}", _attention(**_change))


# --- JSON and text -----------------------------------------------------------

_TEXTS = {
  "deep lists": b'{"a":' + b"[" * 1_000_000,
  "deep objects": b'{"a":' * 1_000_000,
  "one key twice": b'{"method": "at", "method": "atat"}',
  "an endless number": b'{"a": ' + b"9" * 1_000_000 + b"}",
  "no object": b"[1]",
  "three million lists": b'{"a": [' + b"[]," * 3_000_000 + b"0]}",
  "no text": b"\xff\xfe\x00",
  "nothing": b"",
  "a control sequence": b"\x1b[2J\x1b]0;x\x07",
}
for _name, _content in _TEXTS.items():
  _threat("json", f"JSON: {_name}", _written("config.json", _content))
  _threat(
    "configuration",
    f"configuration: {_name}",
    _written("config.json", _content),
  )
  _threat("results", f"results: {_name}", _written("results.json", _content))
for _name, _rows in {
  "rows that are none": 3,
  "a row that is none": [3],
  "an empty row": [{}],
}.items():
  _threat(
    "results",
    f"results: {_name}",
    _written("results.json", json.dumps({"format": 1, "rows": _rows}).encode()),
  )
_threat("names", "names: no text", _written("n.txt", b"\xff\xfe\x00"))
_threat("names", "names: too many", _written("n.txt", b"x\n" * 2_000_000))
HARMLESS["a line of metrics of 50 MB, and a deep one"] = (
  "lines",
  _written(
    "metrics.jsonl",
    b'{"split": "train", "step": 1}\n' + b"x" * (50 << 20) + b"\n"
    b'{"a":' * 100_000 + b"\n"
    b'{"split": "train", "step": 2}\n',
  ),
)


# --- Archives of pictures ----------------------------------------------------

_FOLDER = "cifar-10-batches-bin"


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> Make:
  def make(folder: pathlib.Path) -> pathlib.Path:
    with tarfile.open(folder / "a.tar.gz", "w:gz", compresslevel=1) as tar:
      for info, content in members:
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return folder / "a.tar.gz"

  return make


def _info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Any:
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, link
  return info


_BATCH = f"{_FOLDER}/test_batch.bin"
for _name, _member_of_tar in {
  "a path out of it": (_info(f"../../{MARKER}"), b"x"),
  "an absolute path": (_info(f"/tmp/{MARKER}"), b"x"),
  "a link": (_info(_BATCH, tarfile.SYMTYPE, "/etc/passwd"), b""),
  "a hard link": (_info(_BATCH, tarfile.LNKTYPE, "/etc/passwd"), b""),
  "a pipe": (_info(_BATCH, tarfile.FIFOTYPE), b""),
  "a device": (_info(_BATCH, tarfile.CHRTYPE), b""),
  "a sparse file": (_info(_BATCH, tarfile.GNUTYPE_SPARSE), bytes(512)),
  "a name of 64 MB": (_info("x", tarfile.GNUTYPE_LONGNAME), bytes(64 << 20)),
  "attributes of 64 MB": (_info("x", tarfile.XHDTYPE), bytes(64 << 20)),
}.items():
  _threat("archive", f"archive: {_name}", _tar(_member_of_tar))
_threat(
  "archive",
  "archive: one file twice",
  _tar(*((_info(_BATCH), bytes(3073)) for _ in range(2))),
)
_threat(
  "archive",
  "archive: names of names",
  _tar(*((_info("x", tarfile.GNUTYPE_LONGNAME), b"x") for _ in range(5000))),
)
_threat(
  "archive",
  "archive: 20,000 members",
  _tar(*((_info(f"x{i}"), b"") for i in range(20_000))),
)


def _gzip_bomb(folder: pathlib.Path) -> pathlib.Path:
  info = _info("x")
  info.size = 8 << 30
  head = zlib.compressobj(9, zlib.DEFLATED, -15)
  start = head.compress(info.tobuf()) + head.flush(zlib.Z_FULL_FLUSH)
  path = folder / "a.tar.gz"
  path.write_bytes(gzip.compress(b"")[:10] + start + _EIGHT_GB + bytes(8))
  return path


_threat("archive", "archive: 8 GB", _gzip_bomb)


def _batches(content: bytes) -> Make:
  names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
  return _tar(*((_info(f"cifar-10-batches-py/{n}"), content) for n in names))


for _name, _program in _PROGRAMS.items():
  _threat("archive", f"batch: {_name}", _batches(_program))
_threat(
  "prepare", "prepare: a call", _batches(pickle.dumps({"data": Thief()}, 2))
)
_threat("prepare", "prepare: a pipe", _pipe("a.tar.gz"))


# --- Records of tensorflow-datasets ------------------------------------------


def _varint(n: int) -> bytes:
  out = b""
  while n > 127:
    out, n = out + bytes([n & 127 | 128]), n >> 7
  return out + bytes([n])


def _field(number: int, content: bytes) -> bytes:
  return _varint(number << 3 | 2) + _varint(len(content)) + content


def _example(picture: bytes) -> bytes:
  """A record of CIFAR-10 in protocol-buffer form."""
  features = {
    "id": _field(1, _field(1, b"train_00000")),
    "image": _field(1, _field(1, picture)),
    "label": _field(3, _field(1, _varint(1))),
  }
  return _field(
    1,
    b"".join(
      _field(1, _field(1, name.encode()) + _field(2, value))
      for name, value in features.items()
    ),
  )


def _png(
  width: int, height: int, extra: bytes = b"", rows: bytes = b""
) -> bytes:
  def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check

  head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
  data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  text = chunk(b"zTXt", b"a\0\0" + extra) if extra else b""
  return b"\x89PNG\r\n\x1a\n" + head + text + data


_PICTURE = _png(32, 32, rows=bytes(32 * 97))


_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def _notes(version: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """The JSON files of a prepared version with one picture in each split."""
  names = "features_dict.FeaturesDict text_feature.Text image_feature.Image"
  classes = [
    f"tensorflow_datasets.core.features.{name}"
    for name in (*names.split(), "class_label_feature.ClassLabel")
  ]
  info = {
    "fileFormat": "array_record",
    "moduleName": "tensorflow_datasets.image_classification.cifar",
    "name": "cifar10",
    "version": version,
    "splits": [
      {
        "name": split,
        "numBytes": "99",
        "shardLengths": ["1"],
        "filepathTemplate": _TEMPLATE,
      }
      for split in ("train", "test")
    ],
  }
  image = {"dtype": "uint8", "shape": {"dimensions": ["32", "32", "3"]}}
  features = {
    "id": {"pythonClassName": classes[1], "text": {}},
    "image": {"pythonClassName": classes[2], "image": image},
    "label": {
      "pythonClassName": classes[3],
      "classLabel": {"numClasses": "10"},
    },
  }
  top = {"pythonClassName": classes[0], "featuresDict": {"features": features}}
  return info, top


def _records(
  *,
  picture: bytes = _PICTURE,
  version: str = "3.0.2",
  change: Callable[[dict[str, Any], dict[str, Any]], None] = lambda *_: None,
  more: Callable[[pathlib.Path], None] = lambda _: None,
) -> Make:
  """A prepared version with one picture in each split."""

  def make(folder: pathlib.Path) -> pathlib.Path:
    place = folder / "cifar10" / version
    place.mkdir(parents=True)
    info, features = _notes(version)
    change(info, features)
    (place / "dataset_info.json").write_text(json.dumps(info))
    (place / "features.json").write_text(json.dumps(features))
    for split in ("train", "test"):
      _write_records(
        place / f"cifar10-{split}.array_record-00000-of-00001",
        "group_size:1",
        _example(picture),
      )
    more(place)
    return folder

  return make


def _write_records(path: pathlib.Path, options: str, *records: bytes) -> None:
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for record in records:
    writer.write(record)
  writer.close()


def _foreign(info: dict[str, Any], features: dict[str, Any]) -> None:
  pathlib.Path("stolen.py").write_text(f"open({MARKER!r}, 'w').close()")
  features["featuresDict"]["features"]["id"]["pythonClassName"] = "stolen.Text"


def _elsewhere(info: dict[str, Any], features: dict[str, Any]) -> None:
  info["splits"][0]["filepathTemplate"] = "/etc/{SPLIT}"


def _million(info: dict[str, Any], features: dict[str, Any]) -> None:
  info["splits"][0]["shardLengths"] = [str(10**12)]


def _holes(place: pathlib.Path) -> None:
  _sparse("label.labels.txt")(place)


def _piped(place: pathlib.Path) -> None:
  os.mkfifo(place / "label.labels.txt")


def _bomb(options: str, *records: bytes) -> Callable[[pathlib.Path], None]:
  def write(place: pathlib.Path) -> None:
    (path,) = place.glob("*train*")
    _write_records(path, options, *records)

  return write


def _noise(place: pathlib.Path) -> None:
  (path,) = place.glob("*train*")
  path.write_bytes(np.random.default_rng(0).bytes(1 << 17))


HARMLESS["records of one picture"] = "records", _records()
for _name, _make in {
  "a class of another module": _records(change=_foreign),
  "the same in an unknown version": _records(change=_foreign, version="9.9.9"),
  "a path to elsewhere": _records(change=_elsewhere),
  "a trillion pictures": _records(change=_million),
  "a picture of 60,000 x 60,000": _records(picture=_png(60_000, 60_000)),
  "no picture": _records(picture=b"%!PS-Adobe-3.0 EPSF-3.0\n"),
  "a record of 200 MB": _records(more=_bomb("group_size:1", bytes(200 << 20))),
  "columns of records": _records(
    more=_bomb("group_size:2,transpose", *[_example(_PICTURE)] * 2)
  ),
  "noise": _records(more=_noise),
  "labels of a terabyte": _records(more=_holes),
  "labels from a pipe": _records(more=_piped),
}.items():
  _threat("records", f"records: {_name}", _make)


# --- Photographs -------------------------------------------------------------

_EPS = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {MARKER}) (w) file\n"
for _name, _content in {
  "60,000 x 60,000": _png(60_000, 60_000),
  "one pixel high": _png(400_000, 1, rows=bytes(1 + 3 * 400_000)),
  "a text of 1 GB": _png(
    9, 9, zlib.compress(b"")[:2] + _zeros(1 << 30) + bytes(4), bytes(9 * 28)
  ),
  "PostScript": _EPS.encode(),
  "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
  "half of it": _png(32, 32, rows=bytes(99))[:60],
  "nothing": b"",
}.items():
  _threat("photograph", f"photograph: {_name}", _written("p.jpg", _content))


# --- The process -------------------------------------------------------------


def _readers() -> dict[str, Callable[[pathlib.Path], object]]:
  """Functions of the package by the kind of file."""
  from atat_jax import explain, interop
  from atat_jax.attacks.autoattack import progress
  from atat_jax.data import (
    archives,
    base,
    cifar,
    digits,
    extra,
    photographs,
    prepare,
  )
  from atat_jax.runs import attention_file, configuration, files

  def arrays(path: pathlib.Path) -> Any:
    found = files.read_arrays(path)
    assert found is not None
    return found

  def records(path: pathlib.Path) -> object:
    return cifar.read_cifar10(
      data_dir=str(path), cache_dir=str(path / "cache"), source="tfds"
    )

  def state(path: pathlib.Path) -> object:
    images, logits = np.zeros((2, 4, 4, 1), np.float32), np.eye(2)
    fresh = progress.EnsembleProgress.fresh(images, logits, np.arange(2), [])
    return progress.Store(path, "identity").restore(fresh)

  return {
    "weights": interop.read_state_dict,
    "archive": lambda path: archives.read_archive(path, cifar.CIFAR10),
    "records": records,
    "copy": lambda path: base.read_cache(path, cifar.CIFAR10),
    "extra": lambda path: extra.read(path, digits.SPEC),
    "photograph": photographs.read_photograph,
    "arrays": arrays,
    "attention": lambda path: attention_file.arrange(arrays(path)),
    "state": state,
    "json": files.read_json,
    "results": lambda path: files.read_results(path.parent),
    "configuration": lambda path: configuration.read(path.parent),
    "lines": files.read_metrics,
    "names": lambda path: explain._check_class_names(
      explain._read_class_names(str(path)), 3
    ),
    "network": interop.load,
    "prepare": lambda path: prepare.prepare(
      "cifar10", data_dir=str(path.parent / "d"), archive=str(path)
    ),
  }


def _peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _limit_memory() -> None:
  """Lets the process take `MEMORY` more, and some threads their stacks."""
  size = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = size * resource.getpagesize() + MEMORY + (256 << 20)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _try(read: Callable[[pathlib.Path], object], path: pathlib.Path) -> Any:
  before, began = _peak(), time.process_time()
  try:
    read(path)
    outcome, message = "", ""
  except Exception as error:
    outcome, message = type(error).__name__, str(error)
    names = [kind.__name__ for kind in type(error).__mro__]
    outcome = "UserError" if "UserError" in names else outcome
  return {
    "outcome": outcome,
    "message": message,
    "seconds": time.process_time() - began,
    "growth": _peak() - before,
  }


def main(folder: pathlib.Path) -> None:
  """Plants and reads everything; prints what came of it."""
  warnings.simplefilter("ignore")
  places = {}
  for number, (name, (_, make)) in enumerate((THREATS | HARMLESS).items()):
    place = folder / str(number)
    place.mkdir(parents=True)
    os.chdir(place)
    places[name] = make(place)
  readers = _readers()
  sockets: list[str] = []

  def refuse(*args: Any, **_: Any) -> None:
    sockets.append(str(args))
    raise OSError("no socket for a file")

  socket.socket.connect = refuse  # type: ignore[method-assign,assignment]
  socket.create_connection = refuse  # type: ignore[assignment]
  sys.path.insert(0, "")  # as in a notebook: the working directory is there
  readers["records"](places["records of one picture"])  # imports
  _limit_memory()
  found = {}
  for name, (reader, _) in (THREATS | HARMLESS).items():
    place = places[name]
    root = place if place.is_dir() else place.parent
    os.chdir(root)
    found[name] = _try(readers[reader], place)
    found[name]["executed"] = (root / MARKER).exists()
  json.dump({"files": found, "sockets": sockets}, sys.stdout)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
