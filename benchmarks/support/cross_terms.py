"""Gradients of images whose network normalises by their own batch, in parts.

With the statistics of the batch, the logits of image j depend on image i: by
the mean and the variance of every BatchNorm. The gradient of sum_j loss_j with
respect to image i is therefore a sum of three,

  direct      d loss_i / d x_i with all statistics held fixed,
  statistics  the rest of d loss_i / d x_i: its own way through the statistics,
  cross       sum_{j != i} d loss_j / d x_i.

A loss enters by its gradient with respect to the logits, [B, K], so that its
scale can be changed image by image.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from atat_jax import losses, models
from atat_jax.attacks import balls, projected_gradient
from atat_jax.typing import Array, Classifier, Scalar, Variables

ROUTES = ("through", "fixed", "own", "cross")
"""Parts of the gradient that an attack can follow: all, the direct one, direct
and statistics, or the cross terms alone."""

LOSSES = ("cross_entropy", "unit", "unfooled", "margin")
"""Losses of `pull`: cross-entropy; with gradients at the logits of length 1;
of the images not fooled yet; and the difference of two logits."""

_AT_ONCE = 20


class Terms(NamedTuple):
  """Parts of a gradient with respect to images, [B, H, W, C] each."""

  direct: Array
  statistics: Array
  cross: Array


class Passes(NamedTuple):
  """A network on one batch, [B, H, W, C] to logits [B, K].

  Attributes:
    through: Statistics of the batch, a function of its images.
    fixed: The same logits; the statistics are constants of differentiation.
  """

  through: Classifier
  fixed: Classifier


def passes(model: nn.Module, variables: Variables) -> Passes:
  """Makes both passes of a network with BatchNorm; a pytree."""
  make = functools.partial(
    models.classifier, model, variables, batch_norm="batch"
  )
  return Passes(make(), make(fixed_statistics=True))


def pull(loss: str | Array, logits: Array, labels: Array) -> Array:
  """Computes the gradient of the summed loss with respect to the logits.

  Args:
    loss: Name in `LOSSES`, or its number there, which may be traced.
    logits: [B, K].
    labels: int32 [B].

  Returns:
    [B, K].
  """
  if not isinstance(loss, str):
    every = [pull(name, logits, labels) for name in LOSSES]
    return jnp.stack(every)[loss]
  name = "margin" if loss == "margin" else "cross_entropy"
  found = jax.grad(lambda z: losses.ATTACK_LOSSES[name](z, labels).sum())(
    logits
  )
  if loss == "unit":
    # By the largest entry first: a square of 1e-20 would be 0.
    found = found / jnp.maximum(jnp.abs(found).max(-1, keepdims=True), 1e-37)
    found = found / jnp.maximum(jnp.linalg.norm(found, axis=-1)[:, None], 1e-12)
  if loss == "unfooled":
    found = jnp.where((logits.argmax(-1) == labels)[:, None], found, 0.0)
  return found


def _own(pullback: Callable[[Array], tuple[Array]], cotangent: Array) -> Array:
  """Computes d loss_i / d x_i for each i, by one backward pass an image."""

  def row(number: Array) -> Array:
    alone = jnp.where(
      (jnp.arange(len(cotangent)) == number)[:, None], cotangent, 0.0
    )
    return pullback(alone)[0][number]

  return jax.lax.map(row, jnp.arange(len(cotangent)), batch_size=_AT_ONCE)


def terms(network: Passes, images: Array, cotangent: Array) -> Terms:
  """Splits the gradient of a summed loss with respect to the images.

  Args:
    network: Passes of the network.
    images: [B, H, W, C].
    cotangent: Gradient of the loss with respect to the logits, [B, K].

  Returns:
    The parts; their sum is the gradient.
  """
  total_fn = jax.vjp(network.through, images)[1]
  (direct,) = jax.vjp(network.fixed, images)[1](cotangent)
  own = _own(total_fn, cotangent)
  return Terms(direct, own - direct, total_fn(cotangent)[0] - own)


def gradient(
  network: Passes,
  images: Array,
  labels: Array,
  *,
  loss: str | Array,
  route: str,
) -> Array:
  """Computes the part of a gradient that an attack follows.

  Args:
    network: Passes of the network.
    images: [B, H, W, C].
    labels: int32 [B].
    loss: Name or number, see `pull`.
    route: Name in `ROUTES`.

  Returns:
    [B, H, W, C].
  """
  forward = network.fixed if route == "fixed" else network.through
  logits, pullback = jax.vjp(forward, images)
  cotangent = pull(loss, logits, labels)
  if route == "own":
    return _own(pullback, cotangent)
  (total,) = pullback(cotangent)
  if route == "cross":
    return total - _own(pullback, cotangent)
  return total


def attack(
  key: Array,
  network: Passes,
  images: Array,
  labels: Array,
  *,
  loss: str | Array,
  route: str,
  epsilon: Scalar,
  step_size: Scalar,
  num_steps: Array | int,
  random_start: Array | bool = True,
) -> Array:
  """Runs PGD in linf along one part of the gradient.

  With loss "cross_entropy" and route "through" it is `attacks.pgd`.

  Args:
    key: Random key of the start.
    network: Passes of the network.
    images: Clean images, [B, H, W, C].
    labels: int32 [B].
    loss: Name or number, see `pull`.
    route: Name in `ROUTES`.
    epsilon: Radius of the ball, in the unit of the pixels.
    step_size: Length of a step, in the same unit.
    num_steps: Number of steps.
    random_start: Whether the first iterate is uniform in the ball, or clean.

  Returns:
    The last iterate, [B, H, W, C].
  """
  ball = balls.BALLS["linf"]

  def body(_: Array, x: Array) -> Array:
    found = gradient(network, x, labels, loss=loss, route=route)
    x = x + step_size * ball.direction(found)
    return balls.project(ball, x, images, epsilon)

  drawn = projected_gradient.random_start(key, images, epsilon=epsilon)
  start = jnp.where(random_start, drawn, images)
  return jax.lax.fori_loop(0, num_steps, body, start)
