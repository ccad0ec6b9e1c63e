"""Packs a data set into files that fit into two trips, and unpacks them.

  python -m benchmarks.accelerator.pack_data pack cifar10 --data_dir=DIR \\
    --out=benchmarks/accelerator/carry
  python -m benchmarks.accelerator.pack_data unpack cifar10 \\
    --carry=benchmarks/accelerator/carry --out=cifar10.npz

The images stand on contact sheets in lossless WebP: 4.41 bits a value on
CIFAR-10, where PNG takes 5.64 and xz of what a predictor leaves 4.45. The parts
are the folders <out>/<name>-1, <name>-2, ..., each with a manifest of SHA-256
sums. Unpacked they are the very same arrays, as the .npz that
`config.data.dir` accepts.
"""

import argparse
import hashlib
import io
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from atat_jax import data
from atat_jax.data import base
from atat_jax.errors import UserError
from atat_jax.runs import files
from atat_jax.runs.files import write_json

COLUMNS = 50
SHEET = 5000  # images
PART_BYTES = 56 * 2**20  # of a trip of 64 MiB, the rest is for code and wheels
MANIFEST = "manifest.json"


def encode(images: np.ndarray) -> bytes:
  """Images uint8 [N, H, W, 3] as one lossless WebP, `COLUMNS` in a row."""
  from PIL import Image

  count, height, width, channels = images.shape
  rows = -(-count // COLUMNS)
  sheet = np.zeros((rows * COLUMNS, height, width, channels), np.uint8)
  sheet[:count] = images
  sheet = sheet.reshape(rows, COLUMNS, height, width, channels).swapaxes(1, 2)
  pixels = sheet.reshape(rows * height, COLUMNS * width, channels)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(
    buffer, format="webp", lossless=True, quality=100, method=4
  )
  return buffer.getvalue()


def decode(content: bytes, count: int, shape: Sequence[int]) -> np.ndarray:
  """What `encode` was given: uint8 [count, *shape]."""
  from PIL import Image

  pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
  height, width, channels = shape
  sheet = pixels.reshape(-1, height, COLUMNS, width, channels).swapaxes(1, 2)
  return sheet.reshape(-1, height, width, channels)[:count]


def digest(train: base.Split, test: base.Split) -> str:
  """SHA-256 of all pixels and labels, in order."""
  found = hashlib.sha256()
  for split in (train, test):
    found.update(np.ascontiguousarray(split.images))
    found.update(split.labels.astype("<i4"))
  return found.hexdigest()


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def pack(
  name: str, splits: tuple[base.Split, base.Split], out: pathlib.Path
) -> list[pathlib.Path]:
  """Writes the parts of a data set; those of an earlier time are removed.

  Args:
    name: In `data.DATASETS`; images have three channels.
    splits: The official training and test split.
    out: Where the folders go.

  Returns:
    The folders, one for each trip.
  """
  sheets: list[tuple[dict[str, Any], bytes]] = []
  for split, (images, labels) in zip(("train", "test"), splits, strict=True):
    for start in range(0, len(labels), SHEET):
      part = slice(start, start + SHEET)
      content = encode(images[part])
      entry = {
        "file": f"{split}-{start:05d}.webp",
        "split": split,
        "start": start,
        "sha256": _sha256(content),
        "labels": labels[part].tolist(),
      }
      sheets.append((entry, content))
  parts: list[list[tuple[dict[str, Any], bytes]]] = [[]]
  for sheet in sheets:
    size = sum(len(content) for _, content in parts[-1])
    if parts[-1] and size + len(sheet[1]) > PART_BYTES:
      parts.append([])
    parts[-1].append(sheet)
  for old in out.glob(f"{name}-[0-9]"):
    shutil.rmtree(old)
  folders = []
  for number, part_sheets in enumerate(parts, start=1):
    folder = out / f"{name}-{number}"
    folder.mkdir(parents=True)
    for entry, content in part_sheets:
      (folder / entry["file"]).write_bytes(content)
    manifest = {
      "format": 1,
      "name": name,
      "parts": len(parts),
      "sha256": digest(*splits),
      "sheets": [entry for entry, _ in part_sheets],
    }
    write_json(folder / MANIFEST, manifest)
    folders.append(folder)
  return folders


def check(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a part, all of whose files are as they were.

  Raises:
    UserError: A file is missing, or another.
  """
  manifest = files.read_json(folder / MANIFEST)
  if manifest is None:
    raise UserError(f"carry: no {MANIFEST} in {folder}")
  for entry in manifest["sheets"]:
    path = folder / entry["file"]
    found = _sha256(path.read_bytes()) if path.is_file() else "missing"
    if found != entry["sha256"]:
      raise UserError(
        f"{path}: SHA-256 {found}; expected {entry['sha256']}: pack again"
      )
  return manifest


def unpack(
  name: str, folders: Sequence[pathlib.Path], out: pathlib.Path
) -> str:
  """Writes a decoded copy from the parts, all of which have arrived.

  Args:
    name: Of the data set.
    folders: Its parts, in any order.
    out: The .npz file.

  Returns:
    SHA-256 of the arrays.

  Raises:
    UserError: A part is missing, a file is not what was sent.
  """
  manifests = [check(folder) for folder in folders]
  if not manifests or len(manifests) != manifests[0]["parts"]:
    wanted = manifests[0]["parts"] if manifests else "at least 1"
    raise UserError(f"{name}: {len(manifests)} parts; expected {wanted}")
  spec = data.spec(name)
  splits = {}
  for split in ("train", "test"):
    found = sorted(
      (entry["start"], folder / entry["file"], entry["labels"])
      for folder, manifest in zip(folders, manifests, strict=True)
      for entry in manifest["sheets"]
      if entry["split"] == split
    )
    splits[split] = base.checked_split(
      spec,
      np.concatenate(
        [
          decode(path.read_bytes(), len(labels), spec.image_shape)
          for _, path, labels in found
        ]
      ),
      np.concatenate([np.array(labels) for *_, labels in found]),
      where=f"{name} ({split})",
    )
  sha256 = digest(splits["train"], splits["test"])
  if sha256 != manifests[0]["sha256"]:
    raise UserError(
      f"{name}: decoded SHA-256 {sha256}; expected {manifests[0]['sha256']}"
    )
  origin = {"kind": "packed", "sha256": sha256}
  base.write_cache(out, spec, splits["train"], splits["test"], origin=origin)
  if not out.is_file():
    raise UserError(f"out: {out} cannot be written")
  return sha256


def toy(seed: int = 0) -> tuple[base.Split, base.Split]:
  """Noise in the shape of CIFAR-10, for dry runs: 96 and 32 images."""
  generator = np.random.default_rng(seed)

  def split(count: int) -> base.Split:
    images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return base.Split(images, np.arange(count, dtype=np.int32) % 10)

  return split(96), split(32)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("mode", choices=("pack", "unpack"))
  made.add_argument("name", choices=("cifar10", "cifar100"))
  made.add_argument("--data_dir", help="tfds directory, archive or .npz")
  made.add_argument("--toy", action="store_true", help="pack noise instead")
  made.add_argument("--carry", type=pathlib.Path, help="holds the parts")
  made.add_argument("--out", type=pathlib.Path, required=True)
  args = made.parse_args(argv)
  try:
    if args.mode == "pack":
      splits = (
        toy()
        if args.toy
        else data.DATASETS[args.name].read(data_dir=args.data_dir)
      )
      for folder in pack(args.name, splits, args.out):
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB")
      return
    if args.carry is None:
      raise UserError("carry: missing; allowed: the folder of the parts")
    folders = sorted(args.carry.glob(f"{args.name}-[0-9]"))
    print(f"{args.out}: sha256 {unpack(args.name, folders, args.out)}")
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
