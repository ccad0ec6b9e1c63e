"""Tensors from a `.safetensors` file.

The format: the length of a header (uint64, little-endian), the header in JSON,
which gives each tensor's dtype, shape and place, then the numbers.
"""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np

from atat_jax.errors import UserError

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors by name.

  Raises:
    UserError: The file is damaged, or of another format.
  """
  content = path.read_bytes()
  start = 8 + int.from_bytes(content[:8], "little")
  try:
    if start > len(content):
      raise ValueError(f"a header of {start - 8} bytes")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    data = memoryview(content)[start:]
    return {name: _tensor(data, **entry) for name, entry in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path}: no safetensors file ({error})") from None


def _tensor(
  data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]
) -> np.ndarray:
  start, end = data_offsets
  kind = np.dtype(_DTYPES[dtype])
  if not 0 <= start <= end <= len(data):
    raise ValueError(f"bytes {start} to {end} of {len(data)}")
  if end - start != math.prod(shape) * kind.itemsize:
    raise ValueError(f"{end - start} bytes for {dtype} {shape}")
  return np.frombuffer(data[start:end], kind).reshape(shape)
