"""Reader of safetensors files."""

import math
import pathlib
import struct
from typing import Any

import numpy as np
import safetensors

from atat_jax.errors import UserError
from atat_jax.runs import files
from atat_jax.untrusted import regular

_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 1 << 24  # 16 MiB: some 100,000 tensors


def texts(path: pathlib.Path) -> dict[str, Any]:
  """Reads the texts of a file, and checks what the library does not.

  These are the size of the header, and its names.

  Args:
    path: File in the format of safetensors.

  Returns:
    The texts beside the tensors, by name.

  Raises:
    Exception: The file is none of that format, mostly `ValueError` or `OSError`.
  """
  with regular.open_regular(path) as file:
    start = file.read(_LENGTH.size)
    if len(start) < _LENGTH.size:
      raise ValueError("the file ends early")
    (length,) = _LENGTH.unpack(start)
    if length > min(_LONGEST_HEADER, regular.size(file)):
      raise ValueError(f"a header of {length} bytes")
    header = files.parse_json(file.read(length), "the header")
  if not isinstance(header, dict):
    raise ValueError("the header is no JSON object")
  for name, tensor in header.items():
    # No element takes no place, whatever the other axes claim.
    if name != "__metadata__" and math.prod(_shape(tensor)) > 1 << 62:
      raise ValueError(f"{name}: a shape beyond all memory")
  return header.get("__metadata__") or {}


def _shape(tensor: Any) -> list[int]:
  """Returns the axes of a tensor that are not empty."""
  shape = tensor["shape"]
  if len(shape) > 32 or not all(type(n) is int for n in shape):
    raise ValueError("a shape that is none")
  return [n for n in shape if n]


def read(
  path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads all tensors of a file, and the texts beside them.

  Args:
    path: File in the format of safetensors; its tensors do not overlap.

  Returns:
    Arrays by name in their stored dtype, and texts by name.

  Raises:
    UserError: The file is damaged or of another format, or has no tensors.
    OSError: The file cannot be read.
  """
  regular.require_regular(path)
  try:
    beside = texts(path)
    # NumPy knows the dtype bfloat16 once JAX has been imported.
    with safetensors.safe_open(path, framework="numpy") as file:
      found = {name: file.get_tensor(name) for name in file.keys()}
  except OSError:
    raise
  except Exception as error:  # also dtypes that NumPy lacks, e.g. 8-bit floats
    reason = " ".join(str(error).split())
    raise UserError(f"{path}: no safetensors file ({reason})") from None
  if not found:
    raise UserError(f"{path}: no state dict; allowed: tensors by name")
  return found, beside
