"""2-D convolution in the form that is fast on the backend at hand.

On CPU, XLA runs the transposed convolutions that autodiff makes on a slow path
(inside loops a single-threaded one). Written out as ordinary NHWC x HWIO
convolutions, with operands transposed explicitly, they take the fast path in
loops too. Three cases are faster still as matrix products: few channels, the
input gradient of a strided convolution, and many channels (`winograd`). GPU and
TPU need none of this and get plain XLA convolutions.
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from jax import lax

from atat_jax.models import winograd
from atat_jax.typing import Array

Padding: TypeAlias = tuple[tuple[int, int], tuple[int, int]]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = ("auto", "canonical", "xla")


def explicit_padding(
  padding: str, size: tuple[int, ...], kernel: int, stride: int
) -> Padding:
  """Returns the rows and columns of zeros to add on each side.

  Args:
    padding: "same" is TensorFlow's rule, as in the paper's code: as much as
      the output size ceil(n / stride) needs, the odd one below and to the
      right. "symmetric" is PyTorch's `padding=kernel // 2`. They differ only
      where the stride is above 1.
    size: Height and width of the input.
    kernel: Side of the kernel.
    stride: Stride of both axes.

  Returns:
    ((top, bottom), (left, right)).
  """
  if padding == "symmetric":
    return ((kernel // 2,) * 2,) * 2
  height, width = (
    max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in size
  )
  return (
    (height // 2, height - height // 2),
    (width // 2, width - width // 2),
  )


def _xla(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=_DIMENSIONS
  )


def _is_thin(x: Array, stride: int) -> bool:
  # XLA takes twice as long as matrix products for a network's first convolution
  # with its few channels, and three times as long for the transpose.
  return x.shape[-1] <= 4 and stride == 1 and x.dtype != jnp.bfloat16


def _thin(x: Array, kernel: Array, padding: Padding) -> Array:
  """Convolves with stride 1 as one matrix product for each row of the kernel."""
  size, _, _, features = kernel.shape
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  height, width = (n - size + 1 for n in x.shape[1:3])
  columns = [x[:, :, j : j + width] for j in range(size)]
  windows = jnp.concatenate(columns, axis=-1)
  rows = [
    windows[:, i : i + height] @ kernel[i].reshape(-1, features)
    for i in range(size)
  ]
  return functools.reduce(jnp.add, rows)


def _thin_input_gradient(g: Array, kernel: Array, padding: Padding) -> Array:
  """Returns the input gradient of `_thin`: one product, then shifted sums."""
  size, _, channels, features = kernel.shape
  last = size - 1
  margins = [(last - before, last - after) for before, after in padding]
  g = jnp.pad(g, ((0, 0), *margins, (0, 0)))
  height, width = (n - last for n in g.shape[1:3])
  parts = g @ kernel.reshape(-1, features).T
  parts = parts.reshape(*g.shape[:3], size, size, channels)
  # The transpose reads the kernel's pixel (i, j) mirrored.
  shifted = [
    parts[:, last - i : last - i + height, last - j : last - j + width, i, j]
    for i in range(size)
    for j in range(size)
  ]
  return functools.reduce(jnp.add, shifted)


def _overlap_add(
  parts: list[Array], axis: int, size: int, stride: int, before: int
) -> Array:
  """Adds up parts[a][i] at position stride * i + a - before, for all a and i.

  Args:
    parts: One array for each offset a in the kernel, all of one shape.
    axis: Axis of the positions i.
    size: Length of the axis in the result.
    stride: Stride of the convolution.
    before: Rows or columns of padding before the first pixel.

  Returns:
    The sums, with length `size` along the axis.
  """
  # Positions with the same remainder modulo the stride are contiguous: their
  # sums are plain shifts, and the remainders are interleaved at the end.
  length = -(-size // stride)
  remainders = []
  for remainder in range(stride):
    total = jnp.zeros((), parts[0].dtype)
    for a, part in enumerate(parts):
      shift, other = divmod(a - before - remainder, stride)
      if other == 0:
        pads = [(0, 0, 0)] * part.ndim
        pads[axis] = (shift, length - part.shape[axis] - shift, 0)
        total = total + lax.pad(part, jnp.zeros((), part.dtype), pads)
    shape = list(parts[0].shape)
    shape[axis] = length
    remainders.append(jnp.broadcast_to(total, shape))
  stacked = jnp.stack(remainders, axis + 1)
  shape = list(stacked.shape)
  shape[axis : axis + 2] = [length * stride]
  return lax.slice_in_dim(stacked.reshape(shape), 0, size, axis=axis)


def _strided_input_gradient(
  g: Array, kernel: Array, stride: int, padding: Padding, size: tuple[int, ...]
) -> Array:
  """Returns the input gradient of a strided convolution.

  One matrix product gives the contribution of each pixel of g to every pixel
  under the kernel; overlapping contributions are added. Dilating g by the
  stride and convolving it, as XLA does, takes stride**2 times as many
  multiplications, most of them by zero.
  """
  side, _, channels, features = kernel.shape
  parts = g @ kernel.reshape(-1, features).T
  parts = parts.reshape(*g.shape[:3], side, side, channels)
  (top, _), (left, _) = padding
  rows = [
    _overlap_add(
      [parts[..., i, j, :] for j in range(side)], 2, size[1], stride, left
    )
    for i in range(side)
  ]
  return _overlap_add(rows, 1, size[0], stride, top)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
  if _is_thin(x, stride):
    return _thin(x, kernel, padding)
  if winograd.fits(x, kernel, stride, padding):
    return winograd.convolve(x, kernel)
  return _xla(x, kernel, stride, padding)


def _canonical_fwd(
  x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
  return _canonical(x, kernel, stride, padding), (x, kernel)


def _canonical_bwd(
  stride: int, padding: Padding, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  last = kernel.shape[0] - 1
  if _is_thin(x, stride):
    x_gradient = _thin_input_gradient(g, kernel, padding)
  elif stride > 1:
    x_gradient = _strided_input_gradient(
      g, kernel, stride, padding, x.shape[1:3]
    )
  else:
    # The transpose is a convolution with the kernel flipped and its input and
    # output channels exchanged.
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    (top, bottom), (left, right) = padding
    margins = (last - top, last - bottom), (last - left, last - right)
    x_gradient = _canonical(g, flipped, 1, margins)
  kernel_padding = []
  for axis in (0, 1):
    before = padding[axis][0]
    dilated = (g.shape[1 + axis] - 1) * stride + 1
    kernel_padding.append((before, dilated + last - x.shape[1 + axis] - before))
  # In the kernel gradient channels act as the batch, the batch as channels.
  kernel_gradient = lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    g.transpose(1, 2, 0, 3),
    (1, 1),
    kernel_padding,
    rhs_dilation=(stride, stride),
    dimension_numbers=_DIMENSIONS,
  ).transpose(1, 2, 0, 3)
  return x_gradient, kernel_gradient


_canonical.defvjp(_canonical_fwd, _canonical_bwd)


def convolve(
  x: Array,
  kernel: Array,
  *,
  stride: int = 1,
  padding: str = "same",
  convolution: str = "auto",
) -> Array:
  """Convolves [B, H, W, C] with a square kernel [k, k, C, F].

  Args:
    x: Input [B, H, W, C].
    kernel: Kernel [k, k, C, F], in x's dtype.
    stride: Stride of both axes.
    padding: "same" or "symmetric" (see `explicit_padding`).
    convolution: "canonical", "xla", or "auto": canonical on CPU, xla elsewhere.
      The canonical form has no forward-mode derivative (`jax.jvp`); use "xla"
      for that. Reverse mode can be differentiated again in both.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), F].
  """
  pads = explicit_padding(padding, x.shape[1:3], kernel.shape[0], stride)
  if convolution == "auto":
    on_cpu = jax.default_backend() == "cpu"
    convolution = "canonical" if on_cpu else "xla"
  function = _canonical if convolution == "canonical" else _xla
  return function(x, kernel, stride, pads)


def both_halves(
  x: Array, kernel: Array, dtype: jnp.dtype
) -> tuple[Array, Array]:
  """Splits a wide input in two, for a convolution in 16 bits that sees it all.

  Near 1 the numbers of bfloat16 are 1/256 apart, further than the small steps of
  an attack. What rounding takes from x is appended to its channels, with the
  same weights, and products with both are summed in float32: 16 bits of x reach
  the result. The derivative is that of the rounded input.

  Args:
    x: Input [B, H, W, C].
    kernel: Kernel [k, k, C, F].
    dtype: Dtype with fewer bits than x.

  Returns:
    Input [B, H, W, 2C] and kernel [k, k, 2C, F], still to be cast.
  """
  # Compilers may leave out a cast there and back, but not this rounding.
  info = jnp.finfo(dtype)
  rest = x - lax.reduce_precision(x, info.nexp, info.nmant)
  halves = jnp.concatenate([x, lax.stop_gradient(rest)], axis=-1)
  return halves, jnp.concatenate([kernel, kernel], axis=2)


class Conv(nn.Module):
  """Convolution with `kernel` [k, k, C, F] and, if `use_bias`, `bias` [F]."""

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: str = "same"
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32
  convolution: str = "auto"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, H, W, C] to [B, h, w, features]."""
    # The released code initialises with std sqrt(2 / (k * k * out)).
    kernel = self.param(
      "kernel",
      nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
      (self.kernel_size, self.kernel_size, x.shape[-1], self.features),
    )
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
    if jnp.finfo(self.dtype).bits < min(32, jnp.finfo(x.dtype).bits):
      x, kernel = both_halves(x, kernel, self.dtype)
    x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    x = convolve(
      x,
      kernel,
      stride=self.stride,
      padding=self.padding,
      convolution=self.convolution,
    )
    return x if bias is None else x + bias
