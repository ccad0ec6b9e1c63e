"""Signs, seen from a classifier alone, that an attack's result misleads.

Each diagnostic states the rule by which it judged. The first five are those of
the AutoAttack reference (its `flags_doc.md`), which has none for a classifier
whose prediction for an image depends on the other images of the batch.
`blind_loss` looks at the loss that an attack increases; it is for single
attacks, too. Images whose logits are not finite are left out of the numbers,
and raise the flag of every check that they leave undecided.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from atat_jax import checks, compilation, losses, rng, sharding
from atat_jax.attacks import base, nonfinite
from atat_jax.compilation.ahead import Ahead
from atat_jax.data import batches
from atat_jax.runs import wording
from atat_jax.typing import Array, Classifier


class Diagnostic(TypedDict):
  """Result of a check.

  Attributes:
    title: The result in a few words.
    rule: Rule by which the check judges.
    value: Number that it judges.
    flag: Whether the check warns.
    message: The result in a sentence.
  """

  title: str
  rule: str
  value: float
  flag: bool
  message: str


def diagnostic(
  flag: bool,
  *,
  flagged: tuple[str, str],
  passed: tuple[str, str],
  rule: str,
  value: float,
) -> Diagnostic:
  """Builds a diagnostic.

  Args:
    flag: Whether the check warns.
    flagged: Title and message if it does.
    passed: Title and message if it does not.
    rule: Rule by which the check judges.
    value: Number that it judges.

  Returns:
    The diagnostic.
  """
  decided = bool(np.isfinite(value))
  flag = bool(flag) or not decided
  title, message = flagged if flag else passed
  return Diagnostic(
    title=title,
    rule=rule,
    # JSON has no NaN and no infinity.
    value=float(value if decided else np.nan_to_num(float(value))),
    flag=flag,
    message=message,
  )


def _finite(logits: np.ndarray) -> np.ndarray:
  """Marks the rows [N] of logits [N, K] that are all finite."""
  return np.isfinite(logits).all(-1)


def correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Marks the images that are classified as their label.

  Args:
    logits: [N, K], on the host.
    labels: int [N].

  Returns:
    bool [N]; False where logits are not finite.
  """
  return (logits.argmax(-1) == labels) & _finite(logits)


def _undecided(found: Diagnostic, unusable: int, count: int) -> Diagnostic:
  """Raises the flag of a check that could not judge some images."""
  if not unusable:
    return found
  left_out = (
    f"{unusable} of {wording.plural(count, 'image')} left out: their logits are"
    " not finite."
  )
  if found["flag"]:
    return {**found, "message": f"{found['message']} {left_out}"}
  return {
    **found,
    "title": f"{found['title']}, where logits are finite",
    "flag": True,
    "message": f"{found['message']} {left_out}",
  }


Predict = Callable[[np.ndarray, int, Array], np.ndarray]
"""Function (images [N, H, W, C], batch size, key) to logits [N, K]."""

_jitted_logits = compilation.jit(base.score)


class Scorer:
  """Logits of any number of images, in batches of one size: a `Predict`.

  Args:
    classifier: Callable from images to logits, on the devices.
    mesh: The devices.
    ahead: Programs that are compiled in threads.
  """

  def __init__(
    self, classifier: Classifier, mesh: Mesh, ahead: Ahead | None = None
  ):
    self._classifier, self._mesh = classifier, mesh
    self._ahead = Ahead(enabled=False) if ahead is None else ahead

  def prepare(self, images: np.ndarray, batch_size: int, key: Array) -> None:
    """Has the program for batches of a size compiled in a thread."""
    first = np.zeros((batch_size, *images.shape[1:]), images.dtype)
    arguments = (
      self._classifier,
      jax.random.fold_in(sharding.put_replicated(self._mesh, key), 0),
      sharding.put_batch(self._mesh, first),
    )
    self._ahead.add(
      ("logits", batch_size),
      lambda: _jitted_logits.ahead(*arguments),  # type: ignore[attr-defined]
    )

  def __call__(
    self, images: np.ndarray, batch_size: int, key: Array
  ) -> np.ndarray:
    """Maps (images [N, H, W, C], batch size, key) to logits [N, K]."""
    self._ahead.wait(("logits", batch_size))
    return batches.map_batches(
      functools.partial(
        self._logits, sharding.put_replicated(self._mesh, key), batch_size
      ),
      images,
      batch_size=batch_size,
      mesh=self._mesh,
    )

  def _logits(
    self, key: Array, batch_size: int, number: int, images: Array
  ) -> Array:
    first = number * batch_size
    key = jax.random.fold_in(key, first)
    return _jitted_logits(self._classifier, key, images)


def _shuffled(key: Array, count: int) -> np.ndarray:
  """Draws an order on the host, as jax would compile for every count."""
  return np.random.default_rng(
    np.asarray(jax.random.key_data(key))
  ).permutation(count)


def _unit(logits: np.ndarray) -> np.ndarray:
  """Scales logits [N, K] to length 1."""
  largest = np.abs(logits).max(-1, keepdims=True)
  # Squares of larger numbers do not fit into float32.
  logits = logits / np.where(largest > 1e15, largest, 1)
  return logits / (np.linalg.norm(logits, axis=-1, keepdims=True) + 1e-10)


def randomized(
  evaluations: Sequence[np.ndarray], labels: np.ndarray
) -> Diagnostic:
  """Checks whether repeated evaluations of the same images differ.

  Args:
    evaluations: Logits [B, K] of two or more evaluations of the same batch.
    labels: True classes, int32 [B].

  Returns:
    The diagnostic.
  """
  finite = np.stack([_finite(x) for x in evaluations])
  always = finite.all(0)
  right = [int(correct(x, labels).sum()) for x in evaluations]
  unit = [_unit(logits[always]) for logits in evaluations]
  distance = max(
    float(np.linalg.norm(a - b, axis=-1).max(initial=0.0))
    for n, a in enumerate(unit)
    for b in unit[:n]
  )
  found = diagnostic(
    len(set(right)) > 1
    or distance > 1e-4
    or bool((finite.any(0) & ~always).any()),
    flagged=(
      "The classifier is randomised",
      "The classifier is randomised: an attack must average its gradients over"
      " the randomness (autoattack: version='rand').",
    ),
    passed=(
      "The classifier is deterministic",
      "The classifier gives the same answer every time.",
    ),
    rule=f"{len(evaluations)} evaluations of one batch; flag if the number of"
    " correct predictions differs or logits, scaled to length 1, differ by more"
    " than 1e-4",
    value=distance,
  )
  return _undecided(found, int((~always).sum()), len(labels))


def probabilities(logits: np.ndarray) -> Diagnostic:
  """Checks whether the outputs are probabilities rather than logits.

  Args:
    logits: Outputs of the classifier, [B, K].

  Returns:
    The diagnostic.
  """
  finite = logits[_finite(logits)]
  off = float(np.abs(finite.sum(-1) - 1.0).max(initial=0.0))
  found = diagnostic(
    len(finite) > 0
    and bool(finite.max() < 1 + 1e-5 and finite.min() > -1e-5 and off < 1e-5),
    flagged=(
      "The outputs are probabilities",
      "The outputs are probabilities: a softmax saturates and hides gradients;"
      " return the logits.",
    ),
    passed=("The outputs are logits", "The outputs are logits."),
    rule="flag if all outputs are in [0, 1] and each row sums to 1, to 1e-5;"
    " value: the largest deviation of a sum from 1",
    value=off,
  )
  return _undecided(found, len(logits) - len(finite), len(logits))


def num_classes(
  num_classes: int, needed: Mapping[str, int], targets: Mapping[str, int]
) -> Diagnostic:
  """Checks whether there are enough classes for the losses and targets.

  Args:
    num_classes: Number of classes, K.
    needed: Attack to the number of classes that its loss needs.
    targets: Attack to the number of classes that it aims at.

  Returns:
    The diagnostic.
  """
  without = [name for name, number in needed.items() if num_classes < number]
  fewer = [name for name, number in targets.items() if number > num_classes - 1]
  text = []
  if without:
    text.append(
      f"{', '.join(without)}: the DLR loss needs more than {num_classes}"
      " classes, the margin takes its place."
    )
  if fewer:
    text.append(
      f"{', '.join(fewer)}: only {num_classes - 1} classes to aim at."
    )
  return diagnostic(
    bool(text),
    flagged=("Too few classes for some attacks", " ".join(text)),
    passed=(
      "Enough classes for every attack",
      f"{num_classes} classes are enough.",
    ),
    rule="DLR needs 3 classes, targeted DLR 4, t targets t + 1 classes",
    value=num_classes,
  )


class _Sight(NamedTuple):
  """Gradients of losses at one point of each image.

  Attributes:
    blind: bool [L, B]: the gradient is 0 in every pixel, or logits, loss or
      gradient are not finite.
    saturated: bool [L, B]: the loss does not change with the true class's
      logit, in floating point.
    fooled: bool [B]: the point is misclassified.
  """

  blind: Array
  saturated: Array
  fooled: Array


def _sight(
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  names: tuple[str, ...],
) -> _Sight:
  """Evaluates the classifier once, and the gradients of all losses."""
  logits, pullback = jax.vjp(
    lambda x: base.apply(classifier, jax.random.key(0), x), images
  )
  is_label = jnp.arange(logits.shape[-1]) == labels[:, None]
  runner_up = jnp.where(is_label, -jnp.inf, logits).argmax(-1)

  def total(logits: Array, name: str) -> tuple[Array, Array]:
    value = losses.attack_loss(name, logits, labels, runner_up)
    return value.sum(), value

  found = [jax.grad(total, has_aux=True)(logits, name) for name in names]
  slopes, values = (jnp.stack(x) for x in zip(*found, strict=True))

  def has_gradient(slope: Array) -> Array:
    gradient = pullback(slope)[0].reshape(len(labels), -1)
    return jnp.isfinite(gradient).all(-1) & (gradient != 0).any(-1)

  usable = jax.vmap(functools.partial(nonfinite.usable, logits))(values)
  # One backward pass is compiled, however many losses there are.
  blind = ~(jax.lax.map(has_gradient, slopes) & usable)
  saturated = jnp.where(is_label, slopes, 0).sum(-1) == 0
  return _Sight(blind, saturated, nonfinite.misses(logits, labels))


# Truth values of one batch are all that is read of it.
_jitted_sight = compilation.jit(_sight, rough=True, static_argnames="names")


def _noise(key: Array, radius: Array, *, shape: tuple[int, ...]) -> Array:
  return jax.random.uniform(key, shape, radius.dtype, -radius, radius)


# Uniform numbers are the same however much the generator is optimised.
_jitted_noise = compilation.jit(_noise, light=True, static_argnames="shape")


def prepare_looks(
  ahead: Ahead,
  classifier: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  attack_losses: Sequence[str],
) -> None:
  """Has the program of `diagnose_classifier` compiled in a thread.

  Args:
    ahead: The threads; the program's name is "gradients".
    classifier: Callable from images to logits.
    images: Images of a batch [B, H, W, C].
    labels: True classes, int32 [B].
    attack_losses: Losses that attacks will increase.
  """
  names = _loss_names(attack_losses)
  ahead.add(
    "gradients",
    lambda: _jitted_sight.ahead(classifier, images, labels, names=names),  # type: ignore[attr-defined]
  )


def _loss_names(attack_losses: Sequence[str]) -> tuple[str, ...]:
  # The margin's own check is `zero_gradients`.
  return tuple(dict.fromkeys(("margin", *attack_losses)))


def _look(
  key: Array,
  classifier: Classifier,
  images: np.ndarray | Array,
  labels: np.ndarray | Array,
  *,
  names: tuple[str, ...],
  radius: float,
) -> _Sight:
  """Looks at the gradients of losses where gradient attacks start."""
  dtype = jax.dtypes.canonicalize_dtype(images.dtype)
  noise = _jitted_noise(key, np.asarray(radius, dtype), shape=images.shape)
  # On the host: the classifier may lie on the devices of several processes.
  start = np.clip(np.asarray(images) + np.asarray(noise), 0.0, 1.0)
  sight = _jitted_sight(classifier, start, labels, names=names)
  return _Sight(*map(np.asarray, sight))  # type: ignore[arg-type]


def _checked_look(
  key: Array,
  classifier: Classifier,
  images: np.ndarray | Array,
  labels: np.ndarray | Array,
  loss: str,
  radius: float,
) -> _Sight:
  """Checks the arguments and looks at the gradient of one loss."""
  checks.key(key)
  checks.number("radius", radius, 0, 1)
  classifier, images, labels, num_classes = base.check_arguments(
    classifier,
    images,  # type: ignore[arg-type]
    labels,  # type: ignore[arg-type]
  )
  base.check_loss(loss, num_classes)
  return _look(key, classifier, images, labels, names=(loss,), radius=radius)


def _judge_margin(zero: np.ndarray) -> Diagnostic:
  """Judges the gradient of the margin: `zero_gradients`."""
  return diagnostic(
    bool(zero.any()),
    flagged=(
      "Gradients vanish at some images",
      f"{int(zero.sum())} of {len(zero)} images have no gradient: gradient"
      " attacks are blind there and the result cannot be trusted.",
    ),
    passed=("Gradients reach the images", "Gradients reach the images."),
    rule="share of images at whose random start the gradient of the margin is"
    " zero in every pixel, or not finite; flag if there is any",
    value=zero.mean(),
  )


def _judge_loss(loss: str, sight: _Sight, index: int) -> Diagnostic:
  """Judges the gradient of a loss: `blind_loss`."""
  blind = np.asarray(sight.blind[index] & ~sight.fooled)
  saturated = np.asarray(sight.saturated[index] & ~sight.fooled) & ~blind
  none, lost, count = int(blind.sum()), int(saturated.sum()), len(blind)
  text = []
  if none:
    text.append(
      f"has no gradient at {none} of {wording.plural(count, 'image')}"
    )
  if lost:
    text.append(
      f"has saturated at {lost} of {wording.plural(count, 'image')}, where it"
      " no longer depends on the true class's logit"
    )
  return diagnostic(
    bool(text),
    flagged=(
      f"The loss {loss} is blind at some images",
      f"The loss {loss} {' and '.join(text)}: an attack that increases it does"
      " not show that these images are robust. Attack with another loss, too.",
    ),
    passed=(
      f"The loss {loss} sees every image",
      f"The gradient of the loss {loss} reaches every image.",
    ),
    rule="share of images, correctly classified at their random start, at which"
    f" the gradient of {loss} is zero in every pixel or not finite, or its"
    " derivative by the true class's logit is zero in floating point; flag if"
    " there is any",
    value=(none + lost) / count,
  )


def zero_gradients(
  key: Array,
  classifier: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  radius: float,
) -> Diagnostic:
  """Checks whether the gradient vanishes where gradient attacks start.

  Args:
    key: Random key of the starts.
    classifier: Callable from images to logits.
    images: Clean images [B, H, W, C] in [0, 1].
    labels: True classes, int32 [B].
    radius: Half-width of the box of the starts.

  Returns:
    The diagnostic.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  sight = _checked_look(key, classifier, images, labels, "margin", radius)
  return _judge_margin(np.asarray(sight.blind[0]))


def blind_loss(
  key: Array,
  classifier: Classifier,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  loss: str,
  radius: float,
) -> Diagnostic:
  """Checks whether the gradient of a loss vanishes where attacks start.

  Cross-entropy in float32 saturates where the margin exceeds about 17: the
  softmax of the true class is 1, and the gradient is that of the other classes
  or 0, whatever the margin's gradient is.

  Args:
    key: Random key of the starts.
    classifier: Callable from images to logits.
    images: Clean images [B, H, W, C] in [0, 1], as many as fit in a batch.
    labels: True classes, int32 [B].
    loss: One of `losses.ATTACK_LOSSES`, or of `losses.TARGETED_LOSSES`, whose
      target is then the highest logit besides the true class's.
    radius: Half-width of the box of the starts.

  Returns:
    The diagnostic.

  Raises:
    UserError: Unknown loss, or too few classes for it; another argument of a
      wrong shape, dtype or range, by name.
  """
  sight = _checked_look(key, classifier, images, labels, loss, radius)
  return _judge_loss(loss, sight, 0)


def finite_numbers(
  *, clean: int, judged: int, points: int, gradients: int
) -> Diagnostic:
  """Checks whether all numbers of an evaluation were finite.

  Args:
    clean: Number of clean images whose logits are not finite.
    judged: Number of adversarial images whose logits were not finite when they
      were classified again.
    points: Number of the attacks' evaluations whose logits or loss were not
      finite.
    gradients: Number of the attacks' gradients that were not finite.

  Returns:
    The diagnostic.
  """
  text = []
  if clean:
    text.append(
      f"{wording.plural(clean, 'clean image')} with logits that are not finite"
      f" {'counts' if clean == 1 else 'count'} as not robust."
    )
  if judged:
    text.append(
      f"{wording.plural(judged, 'adversarial image')} with logits that are not"
      f" finite {'counts' if judged == 1 else 'count'} as not fooled."
    )
  if points or gradients:
    text.append(f"In the attacks {nonfinite.describe(points, gradients)}")
  return diagnostic(
    bool(text),
    flagged=("Some numbers are not finite", " ".join(text)),
    passed=("All numbers are finite", "Logits and gradients are finite."),
    rule="clean images, adversarial images judged and evaluations of the"
    " attacks whose logits, loss or gradient are not finite; flag if there is"
    " any",
    value=clean + judged + points + gradients,
  )


def masking(accuracies: Mapping[str, float]) -> Diagnostic | None:
  """Checks whether Square, which uses no gradient, finds what others missed.

  Args:
    accuracies: Attack to robust accuracy after it, in order.

  Returns:
    The diagnostic; None if Square did not run after another attack.
  """
  before = [value for name, value in accuracies.items() if name != "square"]
  if "square" not in accuracies or len(before) < 2:
    return None
  gain = min(before) - accuracies["square"]
  return diagnostic(
    not gain <= 0.002 + 1e-9,  # tolerates the rounding of 0.002
    flagged=(
      "Square found what gradients had not",
      f"Square lowers the robust accuracy by another {100 * gain:.2f} points:"
      " gradients are masked.",
    ),
    passed=("Square found nothing more", "Square finds nothing more."),
    rule="robust accuracy before Square minus after it; flag above 0.002: a"
    " black-box attack should find nothing that gradients have not found",
    value=gain,
  )


def batch_dependence(
  key: Array,
  predict: Predict,
  images: np.ndarray,
  logits: np.ndarray,
  *,
  batch_size: int,
) -> Diagnostic:
  """Checks whether predictions depend on the other images of the batch.

  Args:
    key: Random key of the shuffle.
    predict: Classifier for any number of images.
    images: Clean images [N, H, W, C].
    logits: Logits [N, K] of the images in their own order.
    batch_size: Batch size with which `logits` were computed.

  Returns:
    The diagnostic.
  """
  count = min(len(images), batch_size)
  order = _shuffled(key, len(images))[:count]
  again = predict(images[order], max(1, batch_size // 2), key)
  before = logits[order]
  both = _finite(again) & _finite(before)
  appear = _finite(again) != _finite(before)
  largest = np.abs(logits[_finite(logits)]).max(initial=0.0)
  scale = float(largest) + 1e-12
  change = float(np.abs(again[both] - before[both]).max(initial=0.0)) / scale
  moved = int(((again.argmax(-1) != before.argmax(-1)) & both).sum())
  moved += int(appear.sum())
  found = diagnostic(
    # One prediction may be a tie that rounding decides.
    change > 1e-2 or moved > max(1.0, 0.01 * count) or bool(appear.any()),
    flagged=(
      "Predictions depend on the batch",
      "The prediction for an image depends on the images beside it"
      f" ({moved} of {count} predictions change): BatchNorm uses the batch's"
      " statistics. This is not a fixed classifier; no attack's result on it"
      " says how robust a deployed one is.",
    ),
    passed=(
      "Predictions do not depend on the batch",
      "The prediction for an image does not depend on the images beside it.",
    ),
    rule="logits of the same images with other images around them and another"
    " batch size: largest change, relative to the largest logit; flag above"
    " 0.01, or if more than 1 prediction and more than 1% of them change",
    value=change,
  )
  return _undecided(found, int((~both & ~appear).sum()), count)


def rescored(
  key: Array,
  predict: Predict,
  adversarial: np.ndarray,
  labels: np.ndarray,
  robust: np.ndarray,
  *,
  batch_size: int,
) -> Diagnostic:
  """Checks whether the returned images score as the attack reports.

  Args:
    key: Random key of the shuffle.
    predict: Classifier for any number of images.
    adversarial: Images that the attack returned, [N, H, W, C].
    labels: True classes, int32 [N].
    robust: Examples that are robust according to the attack, bool [N].
    batch_size: Batch size other than the attack's.

  Returns:
    The diagnostic.
  """
  order = _shuffled(key, len(labels))
  logits = predict(adversarial[order], batch_size, key)
  right = correct(logits, labels[order])
  accuracy, reported = float(right.mean()), float(robust.mean())
  differ = int((right != robust[order]).sum())
  numbers = (
    f"Scored again the images give {wording.percent(accuracy, 2)}, not"
    f" {wording.percent(reported, 2)} ({wording.plural(differ, 'image')}"
    f" differ{'s' if differ == 1 else ''})."
  )
  same = "The returned images score the same in another order and batch size."
  found = diagnostic(
    # One of 1000 images may differ, however the accuracies are rounded.
    abs(accuracy - reported) > 1e-3 + 1e-9 or differ > 2e-3 * len(labels),
    flagged=("The reported accuracy was not reproduced", numbers),
    passed=(
      "The reported accuracy was reproduced",
      numbers if differ else same,
    ),
    rule="accuracy of the returned images in another order and batch size minus"
    " the accuracy reported; flag if they differ by more than 0.001 or more"
    " than 0.2% of the images",
    value=accuracy - reported,
  )
  return _undecided(found, int((~_finite(logits)).sum()), len(labels))


def diagnose_classifier(
  key: Array,
  classifier: Classifier,
  predict: Predict,
  images: np.ndarray,
  labels: np.ndarray,
  logits: np.ndarray,
  *,
  batch_size: int,
  radius: float,
  attack_losses: Sequence[str] = (),
) -> dict[str, Diagnostic]:
  """Checks a classifier before any attack, mostly on its first batch.

  Args:
    key: Random key.
    classifier: Callable from images to logits.
    predict: The same classifier for any number of images.
    images: Clean images [N, H, W, C] in [0, 1].
    labels: True classes, int32 [N].
    logits: Logits [N, K] of the images in their own order.
    batch_size: Batch size with which `logits` were computed.
    radius: Half-width of the box in which gradients are computed.
    attack_losses: Losses that attacks will increase, see `blind_loss`.

  Returns:
    Name of the check to its diagnostic.
  """
  first, first_labels = images[:batch_size], labels[:batch_size]
  evaluations = [
    predict(first, batch_size, rng.stream(key, "looks", number))
    for number in range(5)
  ]
  names = _loss_names(attack_losses)
  sight = _look(
    rng.stream(key, "gradients"),
    classifier,
    first,
    first_labels,
    names=names,
    radius=radius,
  )
  found = {
    "probabilities": probabilities(logits[:batch_size]),
    "zero_gradients": _judge_margin(np.asarray(sight.blind[0])),
    "randomized": randomized(evaluations, first_labels),
  }
  for index, name in enumerate(names[1:], 1):
    found[f"blind_{name}"] = _judge_loss(name, sight, index)
  if not isinstance(classifier, base.Randomized):
    found["batch_dependence"] = batch_dependence(
      rng.stream(key, "others"), predict, images, logits, batch_size=batch_size
    )
  return found
