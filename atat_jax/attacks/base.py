"""Evaluations of a classifier and checks of arguments, for all attacks."""

import inspect
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import checks, losses
from atat_jax.attacks import balls, classifiers, convolutions, nonfinite
from atat_jax.attacks.classifiers import Randomized, as_pytree
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier

MOST_STEPS = checks.LARGEST_INTEGER // 100
"""Largest number of steps, as shares of them are computed in hundredths."""

LARGEST_LENGTH = 1e6
"""Largest radius and step size: more than any image needs, and so little that
its square, and its distance from a pixel, can be told in float32."""

LOSSES = (*losses.ATTACK_LOSSES, *losses.TARGETED_LOSSES)
"""Names of the losses that attacks can increase."""


def norms(attack: Callable[..., Any]) -> tuple[str, ...]:
  """Names the norms that an attack supports, read from its signature.

  An attack with a parameter `norm: str` supports all of `balls.BALLS`. One that
  supports fewer says so by the annotation, e.g. `norm: Literal["l2"] = "l2"`;
  one without the parameter is a linf attack.

  Args:
    attack: One of the functions in `attacks.ATTACKS`.

  Returns:
    Some of "linf", "l2", "l1".
  """
  parameter = inspect.signature(attack, eval_str=True).parameters.get("norm")
  if parameter is None:
    return ("linf",)
  if typing.get_origin(parameter.annotation) is typing.Literal:
    return typing.get_args(parameter.annotation)
  return tuple(balls.BALLS)


def score(classifier: Classifier, key: Array, images: Array) -> Array:
  """Computes logits [B, K]; a `Randomized` classifier draws from `key`.

  Logits of 16 bits become float32, as losses and comparisons need more.

  Raises:
    UserError: The result is no array of logits, one row an image.
  """
  if isinstance(classifier, Randomized):
    logits = classifier(images, key)
  else:
    logits = classifier(images)
  classifiers.check_logits(logits, images.shape[0])
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def apply(classifier: Classifier, key: Array, images: Array) -> Array:
  """Computes `score` in the form that is fast inside an attack.

  The two are equal up to rounding, see `convolutions`.
  """
  return convolutions.fast(lambda x: score(classifier, key, x))(images)


class Evaluation(NamedTuple):
  """Result of one evaluation of a classifier, as attacks see it.

  Attributes:
    logits: [B, K].
    loss: [B]; minus infinity where logits or loss are not finite.
    gradient: Gradient of the loss, [B, H, W, C]; 0 in entries that are not
      finite.
    counts: Evaluations that were not finite, int32 [B] each.
  """

  logits: Array
  loss: Array
  gradient: Array
  counts: nonfinite.Counts


def evaluate(
  classifier: Classifier,
  key: Array,
  images: Array,
  loss_fn: Callable[[Array], Array],
  *,
  eot_samples: int = 1,
) -> Evaluation:
  """Evaluates the classifier once: logits, loss and gradient.

  Args:
    classifier: Callable from images to logits.
    key: Random key for a `Randomized` classifier.
    images: Images [B, H, W, C].
    loss_fn: Logits [B, K] to losses [B].
    eot_samples: Number of gradients to average (expectation over
      transformation; Athalye et al., 2018). Logits and losses are those of the
      last sample. An entry of one sample's gradient that is not finite counts
      as 0 in the mean.

  Returns:
    Logits, loss and gradient of its sum; the counts of all samples.
  """

  def objective(x: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
    logits = apply(classifier, key, x)
    loss = loss_fn(logits)
    return loss.sum(), (logits, loss)

  def sample(key: Array) -> Evaluation:
    gradient, (logits, loss) = jax.grad(objective, has_aux=True)(images, key)
    usable = nonfinite.usable(logits, loss)
    return Evaluation(
      logits,
      jnp.where(usable, loss, -jnp.inf),
      nonfinite.clean(gradient),
      nonfinite.count(usable, gradient),
    )

  first = sample(key)
  if eot_samples == 1:
    return first

  def body(number: Array, before: Evaluation) -> Evaluation:
    new = sample(jax.random.fold_in(key, number))
    return new._replace(
      gradient=before.gradient + new.gradient,
      counts=nonfinite.add(before.counts, new.counts),
    )

  found = jax.lax.fori_loop(1, eot_samples, body, first)
  return found._replace(gradient=found.gradient / eot_samples)


def wide(dtype: Any) -> Any:
  """Names the dtype of perturbations: float64 for itself, otherwise float32."""
  return jnp.float64 if dtype == jnp.float64 else jnp.float32


def check_arguments(
  classifier: Classifier, images: Array, labels: Array, **positive: Any
) -> tuple[Classifier, Array, Array, int]:
  """Checks the arguments that every attack takes.

  Args:
    classifier: Callable from images to logits.
    images: Float [B, H, W, C] in [0, 1].
    labels: Integers [B] in [0, K).
    **positive: Arguments that must be > 0, integers but for `step_size`.

  Returns:
    The classifier as a pytree, images (16 bits become float32), int32 labels,
    and K.

  Raises:
    UserError: Naming the argument, its value and what is allowed.
  """
  for name, value in positive.items():
    if name == "step_size":
      checks.number(name, value, 0, LARGEST_LENGTH, above=True)
    else:
      checks.integer(name, value, 1, MOST_STEPS)
  classifier = as_pytree(classifier)
  images = checks.images(images)
  # Balls and perturbations are too coarse in 16 bits.
  images = images.astype(wide(images.dtype))
  num_classes = classifiers.num_classes(classifier, images)
  labels = checks.labels(labels, images.shape[0], num_classes)
  return classifier, images, labels, num_classes


def on_host(
  classifier: Classifier, images: Any, labels: Any
) -> tuple[Classifier, np.ndarray, np.ndarray, int]:
  """Checks any number of images on the host, without moving them to a device.

  Args:
    classifier: Callable from images to logits.
    images: Float [N, H, W, C] in [0, 1].
    labels: Integers [N] in [0, K).

  Returns:
    The classifier as a pytree, float32 images (float64 ones stay so under
    jax_enable_x64), int32 labels, and K.

  Raises:
    UserError: Naming the argument, its value and what is allowed.
  """
  images, labels = checks.host("images", images), checks.host("labels", labels)
  checks.inspect_images(images)
  classifier, *_, num_classes = check_arguments(
    classifier, jnp.asarray(images[:2]), jnp.zeros(len(images[:2]), jnp.int32)
  )
  checks.inspect_labels(labels, len(images), num_classes)
  dtype = jax.dtypes.canonicalize_dtype(images.dtype)  # float32 without x64
  images = images.astype(wide(dtype))
  return classifier, images, labels.astype(np.int32), num_classes


def check_runs(num_restarts: Any, num_targets: Any) -> None:
  """Checks that the number of runs of an attack fits into int32.

  Raises:
    UserError: Too many restarts.
  """
  if isinstance(num_restarts, jax.core.Tracer):
    return
  if num_restarts * num_targets > checks.LARGEST_INTEGER:
    raise UserError(
      f"num_restarts: {num_restarts} for each of {num_targets} targets;"
      f" allowed: at most {checks.LARGEST_INTEGER} runs"
    )


def check_norm(norm: str, epsilon: Any) -> None:
  """Checks the name of a norm and the radius of its ball.

  Raises:
    UserError: Unknown norm, or a radius out of range.
  """
  checks.choice("norm", norm, balls.BALLS)
  checks.epsilon(epsilon, norm)
  checks.number("epsilon", epsilon, 0, LARGEST_LENGTH, above=True)


def check_loss(loss: str, num_classes: int) -> bool:
  """Checks the name of a loss and that there are enough classes for it.

  Args:
    loss: One of `losses.ATTACK_LOSSES` or `losses.TARGETED_LOSSES`.
    num_classes: Number of classes, K.

  Returns:
    Whether the loss aims at one class after the other.

  Raises:
    UserError: Unknown loss, or too few classes.
  """
  checks.choice("loss", loss, LOSSES)
  needed = losses.MIN_CLASSES.get(loss, 2)
  if num_classes < needed:
    raise UserError(
      f"loss: {loss!r} with {num_classes} classes; allowed: at least {needed}"
      " classes, or another loss"
    )
  return loss in losses.TARGETED_LOSSES
