"""Winograd convolution F(2x2, 3x3): 16 multiplications instead of 36.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016). Each
square of 2x2 outputs comes from 4x4 inputs: with x = B' d B and w = G g G',
the outputs are A' (x * w) A. All factors are 0, 1 and 1/2, so the result is
about as exact as the direct sum.
"""

import jax.numpy as jnp
import numpy as np

from atat_jax.typing import Array

_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])

# With fewer channels, moving data costs more than the multiplications save.
_MIN_CHANNELS = 64


def fits(
  x: Array,
  kernel: Array,
  stride: int,
  padding: tuple[tuple[int, int], tuple[int, int]],
) -> bool:
  """Returns whether `convolve` applies and is faster on CPU than the direct sum.

  Args:
    x: Input [B, H, W, C].
    kernel: Kernel [k, k, C, F].
    stride: Stride of both axes.
    padding: Rows and columns added on each side.
  """
  return (
    kernel.shape[:2] == (3, 3)
    and stride == 1
    and tuple(map(tuple, padding)) == ((1, 1), (1, 1))
    and x.shape[1] % 2 == x.shape[2] % 2 == 0
    and min(kernel.shape[2:]) >= _MIN_CHANNELS
    and x.dtype in (jnp.float32, jnp.float64)
  )


def convolve(x: Array, kernel: Array) -> Array:
  """Convolves with a 3x3 kernel, stride 1 and one row of zeros on each side.

  Args:
    x: Input [B, H, W, C], H and W even.
    kernel: Kernel [3, 3, C, F].

  Returns:
    Output [B, H, W, F].
  """
  batch, height, width, channels = x.shape
  factors = jnp.asarray(_G, x.dtype)
  weights = jnp.einsum("ai,bj,ijcf->abcf", factors, factors, kernel)

  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  x = x.reshape(batch, height // 2 + 1, 2, width + 2, channels)
  even, odd = x[:, :, 0], x[:, :, 1]
  rows = []
  for row in _inputs(even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]):
    row = row.reshape(batch, height // 2, width // 2 + 1, 2, channels)
    even, odd = row[:, :, :, 0], row[:, :, :, 1]
    rows.append(
      _inputs(even[:, :, :-1], odd[:, :, :-1], even[:, :, 1:], odd[:, :, 1:])
    )

  # Sixteen products, transformed along the columns first, then along the rows.
  products = []
  for a in range(4):
    four = [rows[a][b] @ weights[a, b] for b in range(4)]
    columns = jnp.stack(_outputs(*four), 3)
    products.append(columns.reshape(batch, height // 2, width, -1))
  return jnp.stack(_outputs(*products), 2).reshape(batch, height, width, -1)


def _inputs(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
  """Applies B' along one axis: four neighbours to four sums."""
  return [a - c, b + c, c - b, b - d]


def _outputs(a: Array, b: Array, c: Array, d: Array) -> list[Array]:
  """Applies A' along one axis: four products to two outputs."""
  return [a + b + c, b - c - d]
