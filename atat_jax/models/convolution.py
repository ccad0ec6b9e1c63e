"""2-D convolution in the form that is fast on the backend at hand.

On CPU, XLA runs the transposed convolutions that autodiff makes on a slow path
(inside loops a single-threaded one). Written out as ordinary NHWC x HWIO
convolutions, with operands transposed explicitly, they take the fast path in
loops too. Three cases are faster still as matrix products: few channels, the
input gradient of a strided convolution, and many channels (`winograd`). GPU and
TPU need none of this and get plain XLA convolutions.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from jax import lax

from atat_jax.models import winograd
from atat_jax.typing import Array

Padding: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
Strides: TypeAlias = tuple[int, int]

# Name by which a program says that its convolutions stay.
_KEPT = "convolutions_as_written"

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = ("auto", "canonical", "xla")

# The canonical form has one matrix product or sum for each pixel of a kernel;
# beyond the kernels of classifiers, such programs would take long to compile.
_MOST_PIXELS = 121


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


def _xla(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=_DIMENSIONS
  )


def _is_thin(x: Array, strides: Strides) -> bool:
  # XLA takes twice as long as matrix products for a network's first convolution
  # with its few channels, and three times as long for the transpose.
  return x.shape[-1] <= 4 and strides == (1, 1) and x.dtype != jnp.bfloat16


def _thin(x: Array, kernel: Array, padding: Padding) -> Array:
  """Convolves with stride 1 as one matrix product for each row of the kernel."""
  *sides, _, features = kernel.shape
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  height, width = (
    n - side + 1 for n, side in zip(x.shape[1:3], sides, strict=True)
  )
  columns = [x[:, :, j : j + width] for j in range(sides[1])]
  windows = jnp.concatenate(columns, axis=-1)
  rows = [
    windows[:, i : i + height] @ kernel[i].reshape(-1, features)
    for i in range(sides[0])
  ]
  return functools.reduce(jnp.add, rows)


def _margins(kernel: Array, padding: Padding) -> Padding:
  """Padding of the convolution that is the transpose, at stride 1."""
  (top, bottom), (left, right) = padding
  last, end = (side - 1 for side in kernel.shape[:2])
  return (last - top, last - bottom), (end - left, end - right)


def _thin_input_gradient(g: Array, kernel: Array, padding: Padding) -> Array:
  """Returns the input gradient of `_thin`: one product, then shifted sums."""
  rows, columns, channels, features = kernel.shape
  last, end = rows - 1, columns - 1
  g = jnp.pad(g, ((0, 0), *_margins(kernel, padding), (0, 0)))
  height, width = g.shape[1] - last, g.shape[2] - end
  parts = g @ kernel.reshape(-1, features).T
  parts = parts.reshape(*g.shape[:3], rows, columns, channels)
  # The transpose reads the kernel's pixel (i, j) mirrored.
  shifted = [
    parts[:, last - i : last - i + height, end - j : end - j + width, i, j]
    for i in range(rows)
    for j in range(columns)
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


def _is_patches(sides: tuple[int, ...], strides: Strides) -> bool:
  """Whether windows do not overlap, as where an image is cut into patches."""
  return sides != (1, 1) and sides[0] <= strides[0] and sides[1] <= strides[1]


def _patches_input_gradient(
  parts: Array, strides: Strides, padding: Padding, size: tuple[int, ...]
) -> Array:
  """Puts the gradients [B, h, w, rows, columns, C] of all windows in place."""
  _, height, width, *sides, channels = parts.shape
  zero = jnp.zeros((), parts.dtype)
  gaps = [(0, step - n, 0) for step, n in zip(strides, sides, strict=True)]
  none = (0, 0, 0)
  parts = lax.pad(parts, zero, [none, none, none, *gaps, none])
  whole = height * strides[0], width * strides[1]
  image = parts.swapaxes(2, 3).reshape(-1, *whole, channels)
  pads = [
    (-before, before + n - there, 0)
    for (before, _), n, there in zip(padding, size, whole, strict=True)
  ]
  return lax.pad(image, zero, [none, *pads, none])


def _strided_input_gradient(
  g: Array,
  kernel: Array,
  strides: Strides,
  padding: Padding,
  size: tuple[int, ...],
) -> Array:
  """Returns the input gradient of a strided convolution.

  One matrix product gives the contribution of each pixel of g to every pixel
  under the kernel; overlapping contributions are added. Dilating g by the
  stride and convolving it, as XLA does, takes stride**2 times as many
  multiplications, most of them by zero.
  """
  *sides, channels, features = kernel.shape
  parts = g @ kernel.reshape(-1, features).T
  parts = parts.reshape(*g.shape[:3], *sides, channels)
  if _is_patches(kernel.shape[:2], strides):
    return _patches_input_gradient(parts, strides, padding, size)
  (top, _), (left, _) = padding
  rows = [
    _overlap_add(
      [parts[..., i, j, :] for j in range(sides[1])],
      2,
      size[1],
      strides[1],
      left,
    )
    for i in range(sides[0])
  ]
  return _overlap_add(rows, 1, size[0], strides[0], top)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def canonical(
  x: Array, kernel: Array, strides: Strides, padding: Padding
) -> Array:
  """Convolves in the form that is fast on CPU, in reverse mode and loops too.

  Args:
    x: Input [B, H, W, C].
    kernel: Kernel [k, l, C, F], in x's dtype, that `fits`.
    strides: Strides of the rows and of the columns.
    padding: Rows and columns of zeros to add on each side.

  Returns:
    [B, h, w, F].
  """
  if _is_thin(x, strides):
    return _thin(x, kernel, padding)
  if winograd.fits(x, kernel, strides[0], padding) and strides[1] == 1:
    return winograd.convolve(x, kernel)
  return _xla(x, kernel, strides, padding)


def _canonical_fwd(
  x: Array, kernel: Array, strides: Strides, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
  return canonical(x, kernel, strides, padding), (x, kernel)


def _canonical_bwd(
  strides: Strides, padding: Padding, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  if _is_thin(x, strides):
    x_gradient = _thin_input_gradient(g, kernel, padding)
  elif strides != (1, 1):
    x_gradient = _strided_input_gradient(
      g, kernel, strides, padding, x.shape[1:3]
    )
  else:
    # The transpose is a convolution with the kernel flipped and its input and
    # output channels exchanged.
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    x_gradient = canonical(g, flipped, (1, 1), _margins(kernel, padding))
  kernel_padding = []
  for axis, stride in enumerate(strides):
    before, last = padding[axis][0], kernel.shape[axis] - 1
    dilated = (g.shape[1 + axis] - 1) * stride + 1
    kernel_padding.append((before, dilated + last - x.shape[1 + axis] - before))
  # In the kernel gradient channels act as the batch, the batch as channels.
  kernel_gradient = lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    g.transpose(1, 2, 0, 3),
    (1, 1),
    kernel_padding,
    rhs_dilation=strides,
    dimension_numbers=_DIMENSIONS,
  ).transpose(1, 2, 0, 3)
  return x_gradient, kernel_gradient


canonical.defvjp(_canonical_fwd, _canonical_bwd)


def fits(sides: tuple[int, ...], strides: Strides, padding: Padding) -> bool:
  """Returns whether `canonical` takes a convolution.

  Args:
    sides: Rows and columns of the kernel.
    strides: Strides of the rows and of the columns.
    padding: Rows and columns of zeros to add on each side.

  Returns:
    Whether every window has a pixel of the image in it, and the kernel is so
    small that the canonical form compiles fast.
  """
  within = all(
    0 <= n < side
    for pads, side in zip(padding, sides, strict=True)
    for n in pads
  )
  small = math.prod(sides) <= _MOST_PIXELS or _is_patches(sides, strides)
  return within and small


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
  """Keeps the convolutions of a function as they are, inside attacks too.

  There, on CPU, a classifier's plain convolutions get the form that is fast
  (`attacks.convolutions`), which has no forward-mode derivative and other
  rounding errors. This is for those who need the one or measure the other.

  Args:
    function: Function of arrays that JAX can trace, such as a classifier.

  Returns:
    The same function under `jax.jit`.
  """
  return jax.jit(_named(function))


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
  def kept(*args: Any) -> Any:
    return function(*args)

  kept.__name__ = _KEPT
  return kept


_xla_as_written = jax.jit(_named(_xla), static_argnums=(2, 3))


def is_kept(name: str | None) -> bool:
  """Returns whether a program of this name is `as_written`."""
  return name == _KEPT


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
      for that, which stays inside attacks (`as_written`). Reverse mode can be
      differentiated again in both.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), F].
  """
  pads = explicit_padding(padding, x.shape[1:3], kernel.shape[0], stride)
  forms: dict[str, Callable[..., Array]] = {
    "canonical": canonical,
    "xla": _xla_as_written,
    "auto": _xla,
  }
  if convolution == "auto" and jax.default_backend() == "cpu":
    convolution = "canonical"
  return forms[convolution](x, kernel, (stride, stride), pads)


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
