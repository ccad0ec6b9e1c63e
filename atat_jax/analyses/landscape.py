"""The loss around images, over the plane of two directions (Fig. 7)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atat_jax import checks, compilation, losses, rng
from atat_jax.errors import UserError
from atat_jax.evaluation.networks import Networks, classifiers
from atat_jax.typing import Array, Classifier

PAPER_INDICES = (1450, 7558)
"""The test images of CIFAR-10 that the paper shows."""


def _surface(
  classifier: Classifier,
  images: Array,
  labels: Array,
  random_direction: Array,
  coefficients: Array,
  *,
  rows: int,
) -> tuple[Array, Array, Array]:
  """Losses and margins [n, P, P] over the plane, and sign(grad)."""

  def total_loss(x: Array) -> Array:
    return losses.cross_entropy(classifier(x), labels).sum()

  gradient_direction = jnp.sign(jax.grad(total_loss)(images))
  count, side = len(images), len(coefficients)
  points = jnp.arange(count * side * side).reshape(-1, rows)

  def look(point: Array) -> tuple[Array, Array]:
    image, place = jnp.divmod(point, side * side)
    along, across = jnp.divmod(place, side)

    def scaled(place: Array, direction: Array) -> Array:
      return coefficients[place][:, None, None, None] * direction[image]

    x = images[image] + scaled(along, gradient_direction)
    logits = classifier(x + scaled(across, random_direction))
    y = labels[image]
    return losses.cross_entropy(logits, y), losses.margin(logits, y)

  value, margin = lax.map(look, points)
  shape = (count, side, side)
  return value.reshape(shape), margin.reshape(shape), gradient_direction


_jitted = compilation.jit(_surface, static_argnames=("rows",))


def loss_landscape(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  radius: float,
  num_points: int = 41,
  batch_size: int = 256,
) -> dict[str, np.ndarray]:
  """Cross-entropy at x + a * sign(grad of the loss) + b * r for each image x.

  As in Fig. 7 of the paper, r is a Rademacher direction (each entry -1 or 1
  with probability one half). sign(grad) is each network's own, at the clean
  image: the paper writes it with the gradient of the model that it shows. r is
  drawn for each image and shared by the networks. The paper does not say how
  far a and b go; here both go from -radius to radius, so that with the radius
  of an attack the edge b = 0, a = radius is FGSM's point but for the clip.

  Points are not clipped to [0, 1]: the surface is of the network's loss over
  its input space. Clipping would bend the plane wherever a pixel is near 0 or
  1, and show edges and plateaus that are the clip's and not the network's. So
  a point may lie outside the box, and be no image that an attack could make.

  One compiled program a network goes through all points, with exactly one
  forward pass a point, and one gradient an image.

  Args:
    key: Random key of the Rademacher directions.
    networks: Name to (module, variables); running statistics.
    images: Float [n, H, W, C] in [0, 1]: those to look at, e.g. `PAPER_INDICES`
      of CIFAR-10's test images.
    labels: Integers [n]: the true classes.
    radius: Half the side of the square, in the unit of the pixels.
    num_points: P, points a side; odd, so that the image itself is one.
    batch_size: The most points at a time. So many are taken as divide their
      number: 82 of 41 x 41 points of 2 images.

  Returns:
    `networks` [m], `images` [n, H, W, C], `labels` int32 [n], `protocol`,
    `coefficients` float32 [P], `random_direction` int8 [n, H, W, C], and for
    each network
    `<name>_loss` float32 [n, P, P] (image, a, b), in nats,
    `<name>_margin` float32 [n, P, P], the highest other logit minus the true
    class's (positive where the prediction is wrong), and
    `<name>_gradient_direction` int8 [n, H, W, C].

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  checks.positive("radius", radius)
  checks.positive("batch_size", batch_size, integer=True)
  checks.positive("num_points", num_points, integer=True)
  if num_points % 2 == 0 or num_points < 3:
    raise UserError(f"num_points: {num_points}; allowed: odd, at least 3")
  named, images, labels, _ = classifiers(networks, images, labels)
  # The point in the middle is 0 exactly.
  coefficients = np.float32(radius) * np.linspace(
    -1, 1, num_points, dtype=np.float32
  )
  random_direction = np.asarray(
    jax.random.rademacher(rng.stream(key, "rademacher"), images.shape, np.int8)
  )
  found = {
    "networks": np.array(list(named)),
    "images": images,
    "labels": labels,
    "protocol": np.array(
      "cross-entropy at x + a sign(gradient) + b Rademacher, not clipped to"
      " [0, 1]; running statistics"
    ),
    "coefficients": coefficients,
    "random_direction": random_direction,
  }
  for name, classifier in named.items():
    value, margin, direction = _jitted(
      classifier,
      images,
      labels,
      random_direction,
      coefficients,
      rows=_largest_divisor(len(images) * num_points**2, batch_size),
    )
    found[f"{name}_loss"] = np.asarray(value)
    found[f"{name}_margin"] = np.asarray(margin)
    found[f"{name}_gradient_direction"] = np.asarray(direction).astype(np.int8)
  return found


def _largest_divisor(number: int, limit: int) -> int:
  """Of the number, among those up to the limit."""
  return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)
