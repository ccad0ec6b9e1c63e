"""2-D convolution in the form that is fast on the backend at hand.

On CPU, XLA runs the transposed convolutions that autodiff makes on a slow path
(inside loops a single-threaded one). Written out as ordinary NHWC x HWIO
convolutions, with operands transposed explicitly, they take the fast path in
loops too. What is faster still as products of matrices is written so: few
channels, the input gradient of a stride, many channels (`winograd`). GPU and
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
  """Rows and columns to add on each side.

  Args:
    padding: "same" is TensorFlow's rule, as in the paper's code: as much as
      the output size ceil(n / stride) needs, the odd one below and to the
      right. "symmetric" is PyTorch's `padding=kernel // 2`. They differ at
      stride 2 only.
    size: Height and width of the input.
    kernel: Side of the kernel.
    stride: Stride.

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
  # A network's first convolution: XLA's takes twice as long for so few channels
  # as products of matrices do, its transpose three times.
  return x.shape[-1] <= 4 and stride == 1 and x.dtype != jnp.bfloat16


def _thin(x: Array, kernel: Array, padding: Padding) -> Array:
  """Columns of pixels beside each other, a product for each row of the kernel."""
  size, _, _, features = kernel.shape
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  height, width = (n - size + 1 for n in x.shape[1:3])
  columns = [x[:, :, j : j + width] for j in range(size)]
  beside = jnp.concatenate(columns, axis=-1)
  rows = [
    beside[:, i : i + height] @ kernel[i].reshape(-1, features)
    for i in range(size)
  ]
  return functools.reduce(jnp.add, rows)


def _thin_input_gradient(g: Array, kernel: Array, padding: Padding) -> Array:
  """What each pixel of g gives to each pixel under the kernel, then the sums."""
  size, _, channels, features = kernel.shape
  last = size - 1
  margins = [(last - before, last - after) for before, after in padding]
  g = jnp.pad(g, ((0, 0), *margins, (0, 0)))
  height, width = (n - last for n in g.shape[1:3])
  parts = g @ kernel.reshape(-1, features).T
  parts = parts.reshape(*g.shape[:3], size, size, channels)
  # The kernel's pixel (i, j) is met from as far on the other side.
  shifted = [
    parts[:, last - i : last - i + height, last - j : last - j + width, i, j]
    for i in range(size)
    for j in range(size)
  ]
  return functools.reduce(jnp.add, shifted)


def _spread(
  parts: list[Array], axis: int, size: int, stride: int, before: int
) -> Array:
  """Adds up parts[a][i] at stride * i + a - before, for every a and i.

  Args:
    parts: A part for each place of the kernel, of equal shapes.
    axis: The axis that i counts and that is spread.
    size: What becomes its length.
    stride: Stride.
    before: Padding before the first place.

  Returns:
    The sums, length `size` along the axis.
  """
  # Places of one remainder lie beside each other: plain shifts make their sums,
  # and the remainders are interleaved at the end.
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
  """What each pixel of g gives to the pixels under the kernel, then the sums.

  Spreading g by the stride and convolving it, as XLA does, multiplies stride**2
  times as often, mostly by zero.
  """
  side, _, channels, features = kernel.shape
  parts = g @ kernel.reshape(-1, features).T
  parts = parts.reshape(*g.shape[:3], side, side, channels)
  (top, _), (left, _) = padding
  rows = [
    _spread(
      [parts[..., i, j, :] for j in range(side)], 2, size[1], stride, left
    )
    for i in range(side)
  ]
  return _spread(rows, 1, size[0], stride, top)


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
    # Convolved with the kernel turned round and its channels exchanged.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    (top, bottom), (left, right) = padding
    margins = (last - top, last - bottom), (last - left, last - right)
    x_gradient = _canonical(g, turned, 1, margins)
  kernel_padding = []
  for axis in (0, 1):
    before = padding[axis][0]
    dilated = (g.shape[1 + axis] - 1) * stride + 1
    kernel_padding.append((before, dilated + last - x.shape[1 + axis] - before))
  # Kernel gradient: channels act as the batch, the batch as the channels.
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
    x: Input.
    kernel: Kernel, of x's dtype.
    stride: Stride of both axes.
    padding: "same" or "symmetric" (see `explicit_padding`).
    convolution: "canonical", "xla", or "auto": canonical on CPU, xla elsewhere.
      The canonical form has no forward-mode derivative (`jax.jvp`); take "xla"
      for that. Its reverse mode can be differentiated again.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), F].
  """
  pads = explicit_padding(padding, x.shape[1:3], kernel.shape[0], stride)
  if convolution == "auto":
    on_cpu = jax.default_backend() == "cpu"
    convolution = "canonical" if on_cpu else "xla"
  function = _canonical if convolution == "canonical" else _xla
  return function(x, kernel, stride, pads)


class Conv(nn.Module):
  """A convolution: `kernel` [k, k, C, F] and, with `use_bias`, `bias` [F]."""

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: str = "same"
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32
  convolution: str = "auto"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, H, W, C] to [B, h, w, features]."""
    # Normal with std sqrt(2 / (k * k * out)), as in the released code.
    kernel = self.param(
      "kernel",
      nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
      (self.kernel_size, self.kernel_size, x.shape[-1], self.features),
    )
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    x = convolve(
      x,
      kernel,
      stride=self.stride,
      padding=self.padding,
      convolution=self.convolution,
    )
    return x if bias is None else x + bias
