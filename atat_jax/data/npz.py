"""Reader of a data set in one `.npz` file.

  numpy.savez("mine.npz", train_images=..., train_labels=..., test_images=...,
              test_labels=..., class_names=...)

Images are uint8 `[N, H, W, C]` (or `[N, H, W]`, grey), labels integers `[N]`,
0 to K - 1; `class_names` [K] is optional.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from atat_jax import checks
from atat_jax.data import base, own
from atat_jax.errors import UserError
from atat_jax.runs import files, locations
from atat_jax.untrusted import arrays, zips

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
"""Contents that a file must have."""

_OPTIONAL = "class_names"


def find(
  name: str,
  *,
  data_dir: str | None = None,
  source: str = "auto",
  size: int = 0,
) -> own.Unread:
  """Finds a data set in a `.npz` file, which needs no decoded copy.

  Args:
    name: Name of the data set in results; "": the file's.
    data_dir: Path of the file.
    source: "auto", the only one.
    size: 0, the only one: the images are not resized.

  Returns:
    The data set; reading it fails where arrays are missing, of another kind or
    damaged.

  Raises:
    UserError: No file is named.
  """
  checks.choice("source", source, ("auto",))
  if size:
    raise UserError(f"size: {size}; allowed: 0, a .npz has images of one size")
  if not data_dir:
    raise UserError(
      "data_dir: missing; allowed: the .npz file, as in"
      " --config.data.dir=mine.npz"
    )
  path = locations.find("data_dir", data_dir)
  return own.Unread(
    f"npz:{name or path.stem}",
    path,
    [path],
    lambda: _contents(path),
    is_copied=False,
  )


def _contents(path: pathlib.Path) -> own.Contents:
  """Reads all arrays of a file."""
  found = _load(path)
  names = found.get(_OPTIONAL)
  if names is not None and (names.dtype.kind not in "US" or names.ndim != 1):
    raise UserError(
      f"{path}: {_OPTIONAL} is {names.dtype.name} {list(names.shape)}; allowed:"
      " text [K]"
    )
  read_names = () if names is None else tuple(_text(x) for x in names.tolist())
  train, test = (
    base.Split(found[f"{part}_images"], _flat(found[f"{part}_labels"]))
    for part in ("train", "test")
  )
  return own.Contents(train, test, read_names)


def read_test(path: pathlib.Path | str) -> base.Split:
  """Reads the test images of a file, which may have no others.

  Args:
    path: A `.npz` with test_images and test_labels.

  Returns:
    Images uint8 `[N, H, W, C]` and labels int32 `[N]`.

  Raises:
    UserError: No such file, arrays missing or of another kind, or damage.
  """
  path = locations.find("path", path)
  found = _load(path, KEYS[2:])
  return own.checked_test(
    base.Split(found[KEYS[2]], _flat(found[KEYS[3]])), path
  )


def _text(name: str | bytes) -> str:
  return name.decode() if isinstance(name, bytes) else name


def _flat(labels: np.ndarray) -> np.ndarray:
  """Returns labels [N], of [N, 1] too, as Keras has them."""
  return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _load(
  path: pathlib.Path, needed: Sequence[str] = KEYS
) -> dict[str, np.ndarray]:
  """Reads the arrays of the file that are known."""
  try:
    with files.local(path) as here, zips.open_zip(here) as archive:
      there = [name.removesuffix(".npy") for name in archive.members]
      missing = [key for key in needed if key not in there]
      if missing:
        raise UserError(
          f"{path}: has no {missing[0]}, but {', '.join(there) or 'nothing'};"
          f" allowed: {', '.join(needed)}, and {_OPTIONAL} where classes have names"
        )
      return arrays.read_members(archive, {*needed, _OPTIONAL})
  except UserError:
    raise
  except OSError as error:
    raise UserError(f"data_dir={path}: {error.strerror or error}") from None
  # A damaged file can raise anything in the zip reader or the header parser.
  except Exception as error:
    raise UserError(
      f"{path}: not a .npz that can be used ({base.first_line(error)})"
    ) from error
