"""Classes that a targeted attack aims at, and in which order.

Of many classes, an attack can try a few. AutoAttack takes those of the highest
logits. MALT (Melamed et al., "MALT Powers Up Adversarial Attacks", NeurIPS
2024) takes those whose boundary is closest for the linearised classifier, which
also counts how fast a class comes nearer.
"""

import typing
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from atat_jax import checks, compilation, rng, sharding
from atat_jax.attacks import balls, base, nonfinite
from atat_jax.data import batches
from atat_jax.typing import Array, Classifier

Targeting: TypeAlias = Literal["logits", "malt"]
"""Ways to choose the classes: by the clean image's logits, or by MALT."""

TARGETINGS: tuple[str, ...] = typing.get_args(Targeting)

CANDIDATES = 100
"""Classes of the highest logits among which MALT chooses, as in the paper."""


def malt_norm(
  targeting: str, norm: str, num_targets: int, num_classes: int
) -> str | None:
  """Returns the norm for `malt`; None where the logits' order is to stay.

  It stays, too, where an attack aims at every class: nothing is to be chosen.

  Args:
    targeting: One of `TARGETINGS`.
    norm: Norm of the ball.
    num_targets: Number of classes that an attack aims at.
    num_classes: Number of classes, K.

  Raises:
    UserError: An unknown way to choose.
  """
  checks.choice("targeting", targeting, TARGETINGS)
  few = num_targets < num_classes - 1
  return norm if targeting == "malt" and few else None


def aiming(
  targeting: str, norm: str, num_targets: int, num_classes: int
) -> dict[str, Any]:
  """Returns the arguments of `search.run` for an attack that aims at classes.

  Args:
    targeting: One of `TARGETINGS`.
    norm: Norm of the ball.
    num_targets: Number of classes that are asked for.
    num_classes: Number of classes, K.

  Raises:
    UserError: An unknown way to choose.
  """
  return {
    "num_targets": min(num_targets, num_classes - 1),
    "malt": malt_norm(targeting, norm, num_targets, num_classes),
  }


def linear_distances(
  classifier: Classifier,
  key: Array,
  images: Array,
  labels: Array,
  candidates: Array,
  *,
  norm: str,
) -> Array:
  """Estimates how far an image is from the region of each candidate class.

  (z_y - z_c) / ||grad z_c - grad z_y||_*, at the clean image, in the dual norm:
  the distance to the boundary where the logits are linear. One forward pass and
  a backward pass for each candidate, one after the other, so that the memory
  does not grow with their number.

  Args:
    classifier: Callable from images to logits.
    key: Random key for a `Randomized` classifier, of which one draw counts.
    images: Clean images [B, H, W, C].
    labels: True classes, int32 [B].
    candidates: Classes, int32 [B, C].
    norm: Norm of the ball.

  Returns:
    [B, C], in the unit of the pixels; infinite where a number is not finite or
    the gradient is 0.
  """
  logits, pullback = jax.vjp(lambda x: base.apply(classifier, key, x), images)

  def one_hot(classes: Array) -> Array:
    return jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype)

  own = one_hot(labels)
  masked = jnp.where(nonfinite.usable(logits)[:, None], logits, jnp.nan)

  def distance(classes: Array) -> Array:
    direction = own - one_hot(classes)
    gradient = nonfinite.clean(pullback(direction)[0])
    # The squares of a very small gradient would be 0.
    largest = balls.length("linf", gradient)
    scale = jnp.where(largest > 0, largest, 1)
    steepness = balls.length(
      balls.DUAL[norm], gradient / scale.reshape(-1, 1, 1, 1)
    )
    lead = jnp.take_along_axis(masked, labels[:, None], 1)
    lead -= jnp.take_along_axis(masked, classes[:, None], 1)
    found = lead[:, 0] / scale / steepness
    return jnp.where(jnp.isfinite(found), found, jnp.inf)

  return lax.map(distance, candidates.T).T


def malt(
  classifier: Classifier,
  key: Array,
  images: Array,
  labels: Array,
  ranking: Array,
  *,
  norm: str,
) -> Array:
  """Sorts the first `CANDIDATES` classes of a ranking by linear distance.

  Args:
    classifier: Callable from images to logits.
    key: Random key for a `Randomized` classifier.
    images: Clean images [B, H, W, C].
    labels: True classes, int32 [B].
    ranking: Classes by falling logits, the true one left out, int32 [B, K - 1].
    norm: Norm of the ball.

  Returns:
    int32 [B, K - 1]: the closest candidates first, ties and the classes behind
    them in the order of `ranking`.
  """
  candidates = ranking[:, :CANDIDATES]
  distances = linear_distances(
    classifier, key, images, labels, candidates, norm=norm
  )
  order = jnp.argsort(distances, axis=-1, stable=True)
  closest = jnp.take_along_axis(candidates, order, axis=-1)
  return jnp.concatenate([closest, ranking[:, CANDIDATES:]], axis=-1)


_jitted_malt = compilation.jit(malt, static_argnames="norm")


def rank(
  key: Array,
  classifier: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  ranking: np.ndarray,
  chosen: np.ndarray,
  *,
  norm: str,
  batch_size: int,
  mesh: Mesh,
) -> np.ndarray:
  """Sorts the classes of some of any number of images by `malt`.

  Args:
    key: Random key for a `Randomized` classifier.
    classifier: A pytree callable, on the devices.
    images: Clean images [N, H, W, C], on the host.
    labels: True classes, int32 [N].
    ranking: Classes by falling logits, integers [N, K - 1].
    chosen: Images whose classes are to be sorted, bool [N].
    norm: Norm of the ball.
    batch_size: Images at a time.
    mesh: The devices.

  Returns:
    A copy of `ranking` with the rows of these images sorted.
  """
  ranking = ranking.copy()
  where = np.flatnonzero(chosen)
  if not len(where):
    return ranking
  key = sharding.put_replicated(mesh, rng.stream(key, "targets"))

  def sort(number: int, *rows: Any) -> Array:
    return _jitted_malt(
      classifier, jax.random.fold_in(key, number), *rows, norm=norm
    )

  ranking[where] = batches.map_batches(
    sort,
    images[where],
    labels[where],
    ranking[where].astype(np.int32),
    batch_size=batch_size,
    mesh=mesh,
  )
  return ranking
