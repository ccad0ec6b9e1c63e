"""Evaluations of a classifier and checks of arguments, for all attacks."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import checks, losses
from atat_jax.attacks import balls, classifiers
from atat_jax.attacks.classifiers import Randomized, as_pytree
from atat_jax.errors import UserError
from atat_jax.typing import Array, Classifier

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


def apply(classifier: Classifier, key: Array, images: Array) -> Array:
  """Computes logits [B, K]; a `Randomized` classifier draws from `key`.

  Raises:
    UserError: The result is no array of logits, one row an image.
  """
  if isinstance(classifier, Randomized):
    logits = classifier(images, key)
  else:
    logits = classifier(images)
  classifiers.check_logits(logits, images.shape[0])
  return logits


def evaluate(
  classifier: Classifier,
  key: Array,
  images: Array,
  loss_fn: Callable[[Array], Array],
  *,
  eot_samples: int = 1,
) -> tuple[Array, Array, Array]:
  """Evaluates the classifier once: logits, loss and gradient.

  Args:
    classifier: Callable from images to logits.
    key: Random key for a `Randomized` classifier.
    images: Images [B, H, W, C].
    loss_fn: Logits [B, K] to losses [B].
    eot_samples: Number of gradients to average (expectation over
      transformation; Athalye et al., 2018). Logits and losses are those of the
      last sample.

  Returns:
    Logits [B, K], losses [B], gradient of their sum [B, H, W, C].
  """

  def objective(x: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
    logits = apply(classifier, key, x)
    loss = loss_fn(logits)
    return loss.sum(), (logits, loss)

  gradient_fn = jax.grad(objective, has_aux=True)
  gradient, (logits, loss) = gradient_fn(images, key)
  if eot_samples > 1:

    def body(sample: Array, carry: Any) -> Any:
      total, _ = carry
      gradient, aux = gradient_fn(images, jax.random.fold_in(key, sample))
      return total + gradient, aux

    gradient, (logits, loss) = jax.lax.fori_loop(
      1, eot_samples, body, (gradient, (logits, loss))
    )
    gradient = gradient / eot_samples
  return logits, loss, gradient


def check_arguments(
  classifier: Classifier, images: Array, labels: Array, **positive: Any
) -> tuple[Classifier, Array, Array, int]:
  """Checks the arguments that every attack takes.

  Args:
    classifier: Callable from images to logits.
    images: Float [B, H, W, C] in [0, 1].
    labels: Integers [B] in [0, K).
    **positive: Arguments that must be > 0; those named `num_...` or
      `..._samples` must be integers.

  Returns:
    The classifier as a pytree, images, int32 labels, and K.

  Raises:
    UserError: Naming the argument, its value and what is allowed.
  """
  for name, value in positive.items():
    integer = name.startswith("num_") or name.endswith("_samples")
    checks.positive(name, value, integer=integer)
  classifier = as_pytree(classifier)
  images = checks.images(images)
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
    The classifier as a pytree, float32 images, int32 labels, and K.

  Raises:
    UserError: Naming the argument, its value and what is allowed.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  checks.inspect_images(images)
  classifier, *_, num_classes = check_arguments(
    classifier, jnp.asarray(images[:2]), jnp.zeros(len(images[:2]), jnp.int32)
  )
  checks.inspect_labels(labels, len(images), num_classes)
  images, labels = images.astype(np.float32), labels.astype(np.int32)
  return classifier, images, labels, num_classes


def check_norm(norm: str, epsilon: Any) -> None:
  """Checks the name of a norm and the radius of its ball.

  Raises:
    UserError: Unknown norm, or a radius out of range.
  """
  checks.choice("norm", norm, balls.BALLS)
  checks.epsilon(epsilon, norm)


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
