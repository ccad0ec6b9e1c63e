"""Seeded corruptions of images: 15 kinds in 5 severities, on the device.

The kinds are those of CIFAR-10-C (Hendrycks and Dietterich, "Benchmarking
neural network robustness to common corruptions and perturbations", 2019,
arXiv:1903.12261), the formulas this package's own: frost and snow are drawn and
no photographs, glass moves pixels at random and does not swap them, kernels are
wider or narrower with the image, and each severity does more than the one
before. So the images are not those of CIFAR-10-C, and have a name of their own,
`GENERATED`; accuracies on the two must not be compared. Files of CIFAR-10-C are
read by `published`.

Any image [H, W, C] of 1 to 4 channels can be corrupted: three are red, green
and blue, a fourth is treated as a grey one, and two as two grey ones. Lengths
are in units of the image's shorter side (`geometry.unit`); noise, contrast,
brightness and the quality of JPEG do not depend on the size.

What becomes of an image depends on the key, the kind, the severity and the
number of the image, and not on its batch. The severities of a kind share their
random numbers. Adding a kind is a function from one image to another and a line
in `CORRUPTIONS`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import checks, compilation, rng
from atat_jax.data import augment
from atat_jax.data.corruptions import blur, digital, noise, weather
from atat_jax.errors import UserError
from atat_jax.runs.corrupted import SEVERITIES
from atat_jax.typing import Array, Scalar

GENERATED = "atat_jax-corruptions-v1"
"""Name of the images in results; another formula needs another number."""

MOST_CHANNELS = 4

CORRUPTIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
  "gaussian_noise": noise.gaussian_noise,
  "shot_noise": noise.shot_noise,
  "impulse_noise": noise.impulse_noise,
  "defocus_blur": blur.defocus_blur,
  "glass_blur": blur.glass_blur,
  "motion_blur": blur.motion_blur,
  "zoom_blur": blur.zoom_blur,
  "snow": weather.snow,
  "frost": weather.frost,
  "fog": weather.fog,
  "brightness": weather.brightness,
  "contrast": digital.contrast,
  "elastic_transform": digital.elastic_transform,
  "pixelate": digital.pixelate,
  "jpeg_compression": digital.jpeg_compression,
}
"""Kind to its function of (key, image [H, W, C], severity) to an image.

In the order of the paper's tables.
"""


def _apply(
  key: Array, images: Array, numbers: Array, severity: Array, *, kind: str
) -> Array:
  if images.dtype == jnp.uint8:
    images = augment.to_float(images)
  stream = rng.stream(key, kind)

  def one(number: Array, image: Array) -> Array:
    bits = jax.random.bits(jax.random.fold_in(stream, number))
    # The same draws whatever JAX's generator; others lack Poisson numbers.
    own = jax.random.key(bits, impl="threefry2x32")
    made = CORRUPTIONS[kind](own, image, severity)
    return jnp.clip(made, 0.0, 1.0).astype(jnp.float32)

  return jax.vmap(one)(numbers, images.astype(jnp.float32))


apply = compilation.jit(_apply, static_argnames=("kind",), light=True)
"""(key, images, numbers, severity, kind=) to corrupted images, unchecked.

Images float32 in [0, 1], or uint8, numbers int32 [B]; compiled once a kind.
"""


def corrupt(
  key: Array,
  images: Array,
  *,
  kind: str,
  severity: Scalar,
  numbers: Sequence[int] | Array | None = None,
) -> Array:
  """Corrupts images.

  Args:
    key: Random key.
    images: Floating point [B, H, W, C] in [0, 1], 1 to 4 channels.
    kind: Name in `CORRUPTIONS`.
    severity: 1 to 5; may be traced.
    numbers: Integers [B], >= 0, that stand for the images in the random numbers;
      None: 0 to B - 1.

  Returns:
    float32 [B, H, W, C] in [0, 1].

  Raises:
    UserError: An argument of a wrong kind, shape, dtype or range, by name.
  """
  checks.key(key)
  images = checks.images(images)
  if images.shape[-1] > MOST_CHANNELS:
    raise UserError(
      f"images: {images.shape[-1]} channels; allowed: 1 to {MOST_CHANNELS}"
    )
  checks.choice("kind", kind, CORRUPTIONS)
  checks.integer("severity", severity, 1, SEVERITIES[-1])
  found = range(len(images)) if numbers is None else numbers
  found = checks.classes(found, len(images), "numbers")  # type: ignore[arg-type]
  if not isinstance(found, jax.core.Tracer):
    low, high = int(np.min(found)), int(np.max(found))
    if low < 0 or high > checks.LARGEST_INTEGER:
      raise UserError(
        f"numbers: {low} to {high}; allowed: 0 to {checks.LARGEST_INTEGER}"
      )
  return apply(
    key,
    images.astype(jnp.float32),
    jnp.asarray(found, jnp.int32),
    jnp.asarray(severity, jnp.int32),
    kind=kind,
  )
