"""Sanity check of loaded weights: do they classify, and with which images?

Weights that load can classify at chance, because their code normalised images
elsewhere. The usual ways to prepare images are tried on a few hundred; a
network keeps its own unless another is better beyond doubt.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atat_jax import checks, models
from atat_jax.data.base import as_floats
from atat_jax.errors import UserError
from atat_jax.interop import layouts
from atat_jax.interop.loaded import (
  Loaded,
  normalization_in_words,
  with_channels_reversed,
)
from atat_jax.models import base

_BATCH = 32
_SCREENED = 64  # images on which every preparation is tried
_SIGMAS = 3.0  # beyond doubt, with some ten preparations to choose from


@dataclasses.dataclass(frozen=True)
class Sanity:
  """Clean accuracy of a loaded network, its images prepared in the best way.

  Attributes:
    loaded: The network with the preparation that was chosen.
    accuracy: Share of the images that it classifies correctly, in [0, 1].
    num_examples: Number of these images.
    tried: Preparation in words to accuracy; of most on the first images only.
    told: The outcome, in one line.
  """

  loaded: Loaded
  accuracy: float
  num_examples: int
  tried: dict[str, float]
  told: str


class _Preparation(NamedTuple):
  """Preparation of images [B, H, W, C] in [0, 1] before the first layer."""

  words: str
  normalization: str
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  reverse: bool = False

  def apply(self, images: np.ndarray) -> np.ndarray:
    if self.reverse:
      images = images[..., ::-1]
    if self.normalization == "per_image":
      return np.asarray(base.standardize_images(jnp.asarray(images)))
    if self.normalization == "none":
      return images
    mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
    return np.asarray((images - mean) / std)


def _own(model: Any) -> _Preparation:
  words = normalization_in_words(model)
  return _Preparation(words, model.normalization, model.mean, model.std)


def _usual(channels: int) -> Iterator[_Preparation]:
  """Yields the usual preparations for images of so many channels."""
  yield _Preparation("none", "none")
  ones = (1.0,) * channels
  half = tuple(0.5 * x for x in ones)
  yield _Preparation("pixels from -1 to 1", "dataset", half, half)
  zero, small = tuple(0.0 * x for x in ones), tuple(x / 255 for x in ones)
  yield _Preparation("pixels from 0 to 255", "dataset", zero, small)
  yield _Preparation("image by image", "per_image")
  if channels == 3:
    for words, (mean, std) in {
      "mean and std of CIFAR-10": layouts.CIFAR10,
      "mean of CIFAR-10, std 0.2023, 0.1994, 0.201": (
        layouts.CIFAR10_OTHER_STD
      ),
      "mean and std of CIFAR-100": layouts.CIFAR100,
      "mean and std of ImageNet": layouts.IMAGENET,
    }.items():
      yield _Preparation(words, "dataset", mean, std)


def _same(one: _Preparation, other: _Preparation) -> bool:
  """Returns whether two preparations do the same, to three digits."""
  if one.normalization != other.normalization:
    return False
  numbers = ((one.mean, other.mean), (one.std, other.std))
  return one.normalization != "dataset" or all(
    np.allclose(a, b, atol=1e-3)  # type: ignore[arg-type]
    for a, b in numbers
  )


def _preparations(loaded: Loaded) -> list[_Preparation]:
  """Returns the network's own preparation, and then the usual others."""
  own = _own(loaded.model)
  found = [own]
  for other in _usual(loaded.num_channels):
    if not _same(own, other):
      found.append(other)
  if loaded.num_channels == 3:
    words = f"blue, green, red, and {own.words}"
    # The numbers stay with the channel: the network sees the third one first.
    found.append(own._replace(words=words, reverse=True))
  return found


class _Judge:
  """Compares logits and labels; one program for all preparations."""

  def __init__(
    self, loaded: Loaded, images: np.ndarray, labels: np.ndarray
  ) -> None:
    self.loaded, self.images, self.labels = loaded, images, labels
    model: Any = loaded.model
    plain = model.clone(normalization="none")
    self._classifier = models.classifier(plain, loaded.variables)
    self._predict = jax.jit(lambda classifier, x: classifier(x).argmax(-1))

  def __call__(self, how: _Preparation, start: int, end: int) -> np.ndarray:
    """Returns the classes [end - start] that are predicted."""
    found = []
    for first in range(start, end, _BATCH):
      batch = how.apply(self.images[first : min(first + _BATCH, end)])
      count = len(batch)
      batch = np.resize(batch, (_BATCH, *batch.shape[1:]))
      found.append(np.asarray(self._predict(self._classifier, batch))[:count])
    return np.concatenate(found) if found else np.empty(0, np.int32)


def _is_better(right: np.ndarray, than: np.ndarray) -> bool:
  """Whether more are right beyond doubt (McNemar's test)."""
  gained, lost = (right & ~than).sum(), (than & ~right).sum()
  return bool(gained - lost > _SIGMAS * math.sqrt(gained + lost))


class _Trial(NamedTuple):
  """One network, its images prepared in one way."""

  loaded: Loaded
  how: _Preparation
  classes: np.ndarray
  right: np.ndarray


def _is_chance(trial: _Trial, labels: np.ndarray, of: int) -> bool:
  """Whether predictions are right no more often than drawn ones.

  Of a few images that cannot be said.
  """
  share, number = 1 / of, len(labels)
  bound = share + _SIGMAS * math.sqrt(share * (1 - share) / number)
  constant = len(np.unique(trial.classes)) == 1 < len(np.unique(labels))
  return bound < 1 and (constant or bool(trial.right.mean() <= bound))


def _try(
  loaded: Loaded, images: np.ndarray, labels: np.ndarray
) -> list[_Trial]:
  """Returns the trial of the own preparation, and those of others.

  The others are judged on all images where they are ahead on the first ones.
  """
  judge, number = _Judge(loaded, images, labels), len(labels)
  trials: list[_Trial] = []
  for how in _preparations(loaded):
    few = number if not trials else min(number, _SCREENED)
    classes = judge(how, 0, few)
    right = classes == labels[:few]
    if few < number and right.sum() > trials[0].right[:few].sum():
      classes = np.concatenate([classes, judge(how, few, number)])
      right = classes == labels
    trials.append(_Trial(loaded, how, classes, right))
  return trials


def _with(trial: _Trial) -> Loaded:
  """Returns the network with the preparation of a trial."""
  loaded, how = trial.loaded, trial.how
  if how == _own(loaded.model):
    return loaded
  variables = loaded.variables
  mean, std = how.mean, how.std
  if how.reverse:
    variables = with_channels_reversed(loaded)
    mean, std = (x[::-1] if x else x for x in (mean, std))
  fields: dict[str, Any] = {"normalization": how.normalization}
  if mean is not None:
    fields |= {"mean": mean, "std": std}
  model: Any = loaded.model.clone(**fields)
  words = how.words if how.reverse else normalization_in_words(model)
  return dataclasses.replace(
    loaded, model=model, variables=variables, normalization=words
  )


def _best(trials: Sequence[_Trial]) -> _Trial:
  """Returns the first trial, or the best that is better beyond doubt."""
  number = len(trials[0].right)
  best = trials[0]
  for trial in trials[1:]:
    full = len(trial.right) == number
    if full and _is_better(trial.right, trials[0].right):
      if best is trials[0] or trial.right.sum() > best.right.sum():
        best = trial
  return best


def examples(
  images: Any, labels: Any, num_examples: int
) -> tuple[np.ndarray, np.ndarray]:
  """Checks images and labels, and returns some of them, evenly spread.

  Args:
    images: [N, H, W, C], uint8 or float in [0, 1].
    labels: True classes [N].
    num_examples: Most images to return.

  Returns:
    float32 [n, H, W, C] in [0, 1], and labels [n].

  Raises:
    UserError: Arrays of another shape, dtype or range.
  """
  checks.count("num_examples", num_examples)
  images, labels = checks.host("images", images), checks.host("labels", labels)
  if images.ndim == 4 and labels.shape == images.shape[:1]:
    # Data can be in the order of the classes.
    number = min(len(images), num_examples)
    spread = np.arange(number) * len(images) // max(number, 1)
    images, labels = images[spread], labels[spread]
  if images.dtype == np.uint8:
    images = as_floats(images)
  checks.inspect_images(images)
  checks.inspect_labels(labels, len(images), base.LARGEST)
  return images.astype(np.float32), labels


def _check_fit(loaded: Loaded, images: np.ndarray, labels: np.ndarray) -> None:
  checks.inspect_labels(labels, len(images), _num_classes(loaded))
  if images.shape[-1] != loaded.num_channels:
    raise UserError(
      f"images: {images.shape[-1]} channels; allowed: {loaded.num_channels}, as"
      " the weights have"
    )


def _num_classes(loaded: Loaded) -> int:
  model: Any = loaded.model
  return int(model.num_classes)


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"


def _words(best: _Trial, trials: Sequence[_Trial]) -> str:
  own, others = trials[0], trials[1:]
  number = len(own.right)
  found = f"clean accuracy {_percent(best.right.mean())} on {number} images"
  if best is not own:
    return (
      f"{found} with normalisation {best.how.words}, which was taken for"
      f" {own.how.words} ({_percent(own.right.mean())})"
    )
  ahead = [x for x in others if x.right.mean() > own.right.mean()]
  ahead = [x for x in ahead if len(x.right) == number]
  if not ahead:
    return f"{found}; none of {len(others)} other preparations is better"
  best = max(ahead, key=lambda x: x.right.mean())
  return (
    f"{found}; {best.how.words} gives {_percent(best.right.mean())}, no clear"
    f" difference; {len(others)} other preparations were tried"
  )


def decide(
  candidates: Sequence[Loaded], images: Any, labels: Any, num_examples: int
) -> Sanity:
  """Chooses among networks of one file, and the preparation of their images.

  Args:
    candidates: Networks that differ in fields that the file does not show.
    images: [N, H, W, C], uint8 or float in [0, 1].
    labels: True classes [N].
    num_examples: Number of images that are taken, evenly spread.

  Returns:
    The best network, and its accuracy.

  Raises:
    UserError: See `sanity`; two networks that are equally good.
  """
  images, labels = examples(images, labels, num_examples)
  _check_fit(candidates[0], images, labels)
  trials = [_try(loaded, images, labels) for loaded in candidates]
  chosen = [_best(group) for group in trials]
  order = sorted(
    range(len(chosen)), key=lambda i: int(chosen[i].right.sum()), reverse=True
  )
  best, group = chosen[order[0]], trials[order[0]]
  tried = {x.how.words: float(x.right.mean()) for x in group}
  number, of = len(best.right), _num_classes(best.loaded)
  if _is_chance(best, labels, of):
    listed = ", ".join(f"{k} {_percent(v)}" for k, v in tried.items())
    raise UserError(
      f"weights: chance level, {_percent(best.right.mean())} of {number} images"
      f" of {of} classes; tried: {listed}; allowed: images and labels of the"
      " classes that the network was trained on, in their order"
    )
  if len(order) > 1:
    second = chosen[order[1]]
    if not _is_better(best.right, second.right):
      raise UserError(
        f"weights: two networks fit, with {_percent(best.right.mean())} and"
        f" {_percent(second.right.mean())} of {number} images; allowed: more"
        " images, or the field that tells them apart"
      )
  told = _words(best, group)
  loaded = _with(best)
  loaded = dataclasses.replace(loaded, told=f"{loaded.told}; {told}")
  return Sanity(loaded, float(best.right.mean()), number, tried, told)


def sanity(
  loaded: Loaded, images: Any, labels: Any, *, num_examples: int = 256
) -> Sanity:
  """Measures the clean accuracy of loaded weights.

  Images are prepared in the usual ways: as the network does it, not at all,
  from -1 to 1, from 0 to 255, image by image, by mean and deviation of
  CIFAR-10, CIFAR-100 and ImageNet, and blue before red. The network's own way
  stays unless another is better by three standard deviations.

  Args:
    loaded: Result of `load`.
    images: Clean images [N, H, W, C], uint8 or float in [0, 1].
    labels: True classes [N].
    num_examples: Number of images that are taken, evenly spread.

  Returns:
    Accuracy, what was tried, and the network with the best preparation.

  Raises:
    UserError: Images or labels that do not fit the network, or an accuracy that
      is no better than chance, with all that was tried.
  """
  checks.instance("loaded", loaded, Loaded, "what interop.load returns")
  return decide([loaded], images, labels, num_examples)
