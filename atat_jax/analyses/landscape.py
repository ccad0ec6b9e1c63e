"""The loss around images, over the plane of two directions (Fig. 7).

As in the paper, the second direction r is a Rademacher direction (each entry -1
or 1 with probability one half), drawn for each image and shared by the networks.
The first, sign(grad), is each network's own, at the clean image. The paper does
not say how far a and b go; here both go from -radius to radius, so that with the
radius of an attack the edge b = 0, a = radius is FGSM's point but for the clip.

Points are not clipped to [0, 1]: clipping would bend the plane wherever a pixel
is near 0 or 1. So a point may be no image that an attack could make.

Arrays: `networks` [m], `images` [n, H, W, C], `labels` int32 [n], `protocol`,
`coefficients` float32 [P], `random_direction` int8 [n, H, W, C], and for each
network `<name>_loss` float32 [n, P, P] (image, a, b), in nats,
`<name>_margin` float32 [n, P, P], the highest other logit minus the true class's
(positive where the prediction is wrong), and
`<name>_gradient_direction` int8 [n, H, W, C].
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from atat_jax import checks, compilation, losses, rng, sharding
from atat_jax.analyses import base
from atat_jax.data import batches
from atat_jax.drawing import style, surfaces
from atat_jax.errors import UserError
from atat_jax.evaluation.networks import (
  Networks,
  classifiers,
  refuse_nonfinite,
)
from atat_jax.runs import files, wording
from atat_jax.typing import Array, Classifier

PAPER_INDICES = (1450, 7558)
"""Test images of CIFAR-10 that the paper shows."""


def _direction(classifier: Classifier, images: Array, labels: Array) -> Array:
  """Returns sign(grad of the loss) at images [n, H, W, C]."""

  def total_loss(x: Array) -> Array:
    return losses.cross_entropy(classifier(x), labels).sum()

  return jnp.sign(jax.grad(total_loss)(images))


def _surface(
  classifier: Classifier,
  images: Array,
  labels: Array,
  random_direction: Array,
  coefficients: Array,
  gradient_direction: Array,
  points: Array,
  number: Array,
) -> Array:
  """Returns losses and margins [2, m, b] of the first batches of points [m, b].

  How many of them is a number on the device, so that the last part of a plane
  needs no program of its own.
  """
  side = len(coefficients)

  def measure(point: Array) -> Array:
    image, place = jnp.divmod(point, side * side)
    along, across = jnp.divmod(place, side)

    def scaled(place: Array, direction: Array) -> Array:
      return coefficients[place][:, None, None, None] * direction[image]

    x = images[image] + scaled(along, gradient_direction)
    logits = classifier(x + scaled(across, random_direction))
    y = labels[image]
    return jnp.stack(
      [losses.cross_entropy(logits, y), losses.margin(logits, y)]
    )

  def fill(batch: Array, found: Array) -> Array:
    return found.at[:, batch].set(measure(points[batch]))

  none = jnp.zeros((2, *points.shape), images.dtype)
  return lax.fori_loop(0, number, fill, none)


_jitted_direction = compilation.jit(_direction)
_jitted_surface = compilation.jit(_surface)


def loss_landscape(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  radius: float,
  num_points: int = 41,
  batch_size: int = 256,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Returns cross-entropy at x + a sign(grad of the loss) + b r for images x.

  One compiled program a network goes through the points, part by part, with
  exactly one forward pass a point, and one gradient an image.

  Args:
    key: Random key of the Rademacher directions.
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1], e.g. those of `PAPER_INDICES`.
    labels: Integers [n]: the true classes.
    radius: Half the side of the square, in the unit of the pixels.
    num_points: P, points a side; odd, so that the image itself is one.
    batch_size: Largest number of points at a time. So many are taken as divide
      their number: 82 of 41 x 41 points of 2 images.
    mesh: The devices over which points are split; None: one, where the
      variables are.

  Returns:
    The arrays that the module describes, by name.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  if mesh is not None:
    sharding.check_mesh(mesh)
  checks.key(key)
  checks.positive("radius", radius)
  checks.positive("batch_size", batch_size, integer=True)
  checks.positive("num_points", num_points, integer=True)
  if num_points % 2 == 0 or num_points < 3:
    raise UserError(f"num_points: {num_points}; allowed: odd, at least 3")
  named, images, labels, _ = classifiers(networks, images, labels)
  coefficients, signs = _plane(key, images.shape, radius, num_points)
  found = {
    "networks": np.array(list(named)),
    "images": images,
    "labels": labels,
    "protocol": np.array(_PROTOCOL),
    "coefficients": coefficients,
    "random_direction": signs,
  }
  for name, classifier in named.items():
    surface = _measure(
      (classifier, images, labels, signs, coefficients), batch_size, mesh
    )
    found |= _named(name, *surface)
  return found


def _measure(
  given: tuple[Any, ...], batch_size: int, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns losses and margins [n, P, P] of a network, and sign(grad)."""
  _, images, *_, coefficients = given
  side = len(coefficients)
  count = len(images) * side**2
  points = _points(count, batch_size, mesh)
  if mesh is not None:
    given = sharding.put_replicated(mesh, given)
  direction = _jitted_direction(*given[:3])
  parts, done = [], 0
  for part, number in _parts(points):
    here = part if mesh is None else sharding.put_batch(mesh, part, axis=1)
    found = _jitted_surface(*given, direction, here, number)
    parts.append(_fetched(found, mesh)[:, :number])
    done += number * points.shape[1]
    batches.tell(min(done, count), count)
  shape = (2, len(images), side, side)
  flat = np.concatenate(parts, 1).reshape(2, -1)[:, :count]
  loss, margin = flat.reshape(shape)
  return loss, margin, _fetched(direction, mesh)


_PARTS = 20
"""Parts in which a plane is measured, at most; a stop waits for one."""


def _parts(points: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
  """Cuts batches of points [m, b] into parts of one shape.

  Yields:
    A part, and the number of its batches that count: the last one may be filled
    up with a batch that was there before.
  """
  rows = -(-len(points) // _PARTS)
  for first in range(0, len(points), rows):
    number = min(rows, len(points) - first)
    places = np.minimum(np.arange(first, first + rows), len(points) - 1)
    yield points[places], number


def _fetched(array: Array, mesh: Mesh | None) -> np.ndarray:
  """Copies an array to the host."""
  return np.asarray(array if mesh is None else sharding.to_host(mesh, array))


def _points(count: int, limit: int, mesh: Mesh | None) -> np.ndarray:
  """Numbers of the points, [batches, points of a batch].

  A batch divides by the number of devices; on several, the last one is filled
  up with the first points again.
  """
  if mesh is None or mesh.size == 1:
    return np.arange(count).reshape(-1, _largest_divisor(count, limit))
  rows = max(1, min(limit, count) // mesh.size) * mesh.size
  return np.arange(-(-count // rows) * rows).reshape(-1, rows) % count


def _named(
  name: str, loss: np.ndarray, margin: np.ndarray, direction: np.ndarray
) -> dict[str, np.ndarray]:
  """Names the arrays of one network, all finite."""
  found = {"gradient_direction": direction, "loss": loss, "margin": margin}
  for what, array in found.items():
    refuse_nonfinite(name, f"numbers ({what.replace('_', ' ')})", array)
  found["gradient_direction"] = direction.astype(np.int8)
  return {f"{name}_{what}": array for what, array in found.items()}


def _plane(
  key: Array, shape: tuple[int, ...], radius: float, num_points: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns coefficients float32 [P] and Rademacher directions int8 [n, ...]."""
  # The point in the middle is 0 exactly.
  places = np.linspace(-1, 1, num_points, dtype=np.float32)
  signs = jax.random.rademacher(rng.stream(key, "rademacher"), shape, np.int8)
  return np.float32(radius) * places, np.asarray(signs)


_PROTOCOL = (
  "cross-entropy at x + a sign(gradient) + b Rademacher, not clipped to [0, 1];"
  " running statistics"
)


def _largest_divisor(number: int, limit: int) -> int:
  """Returns the largest divisor of a number up to a limit."""
  return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)


def _draw(data: files.Arrays, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws a figure for each image: a surface and its contours a network.

  Titles use `indices` [n] and `class_names` [K], where the file has them.
  """
  return [
    _draw_image(data, image, directory / f"loss_landscape_{image + 1}.png")
    for image in range(len(data["labels"]))
  ]


def _draw_image(
  data: files.Arrays, image: int, path: pathlib.Path
) -> pathlib.Path:
  shown = [
    surfaces.Surface(
      name, data[f"{name}_loss"][image], data[f"{name}_margin"][image]
    )
    for name in base.network_names(data)
  ]
  with style.context():
    fig = surfaces.draw(
      shown,
      title=_title(data, image),
      unit="nats",
      axis_names=("a, along sign(gradient)", "b, Rademacher"),
    )
    style.caption(
      fig,
      f"{data['protocol']}. a and b in units of {_radius(data)}. Surfaces: one scale for"
      " all models; below: the loss in nats on each model's own scale. Cross: the"
      " image. Thick line: where the prediction turns from right to wrong.",
    )
    return style.save(fig, path)


def _radius(data: files.Arrays) -> str:
  # The file has it in float32.
  return wording.pixels(float(f"{data['coefficients'][-1]:.6g}"))


def _title(data: files.Arrays, image: int) -> str:
  number = int(data["indices"][image]) if "indices" in data else image + 1
  label = data["labels"][image]
  name = data["class_names"][label] if "class_names" in data else label
  return f"Loss around image {number} (class {str(name).replace('_', ' ')})"


def _find(data: files.Arrays) -> base.Finding:
  parts = []
  for name in base.network_names(data):
    value = data[f"{name}_loss"]
    middle = value.shape[1] // 2
    along = value[:, -1, middle].mean() - value[:, middle, middle].mean()
    wrong = (data[f"{name}_margin"] > 0).mean()
    parts.append(
      f"{name}: the loss changes by {along:+.2g} nats from the image to the end"
      f" of the gradient's direction and reaches {value.max():.2g};"
      f" {wording.percent(wrong)} of the plane is classified wrongly."
    )
  count = wording.plural(len(data["labels"]), "image")
  protocol = str(data["protocol"])
  caption = (
    "The loss around an image: a along the sign of the gradient, b along random"
    f" signs, in units of {_radius(data)}. Surfaces: all models on one scale; below: each"
    " on a scale of its own. Vermilion line: where the prediction turns wrong."
    f" {protocol[0].upper()}{protocol[1:]}."
  )
  return base.Finding(
    "Loss landscape",
    f"Around {count}, on average. {' '.join(parts)}",
    caption,
  )


ANALYSIS = base.Analysis(
  stem="loss_landscape",
  compute=loss_landscape,
  arguments=lambda settings, _: {
    "radius": settings.epsilon,
    "num_points": settings.num_points,
  },
  images=lambda settings, _: settings.indices,
  draw=_draw,
  find=_find,
  passes=lambda arguments: arguments["num_points"] ** 2,
)
