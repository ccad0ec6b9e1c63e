"""What each analysis found, in a sentence, and how to read its picture.

Sentences are made of the numbers in the files, never fixed. Needs no model and
no JAX.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from atat_jax.report import page
from atat_jax.runs import files


class Finding(NamedTuple):
  """What a page says of a picture.

  Attributes:
    heading: Of its section.
    sentence: What was found.
    caption: How to read the picture, and its protocol.
  """

  heading: str
  sentence: str
  caption: str


# Their pictures have panels of their own, too small beside one another.
_WIDE = ("attention_shift",)


def section(path: pathlib.Path, pictures: list[pathlib.Path]) -> str:
  """The part of a page on one analysis.

  Args:
    path: Of its file; the name says which analysis it is. AutoAttack's
      accuracies are read from a `results.json` beside it.
    pictures: What was drawn from it.

  Returns:
    HTML; "" if there is no file or no picture.

  Raises:
    UserError: The file cannot be read.
  """
  data = files.read_arrays(path)
  if data is None or not pictures:
    return ""
  found = _FINDINGS[path.stem](data)
  return (
    f"<h2>{page.escape(found.heading)}</h2>\n"
    f"<p>{page.escape(found.sentence)}</p>\n"
    f"{page.figure(pictures, found.caption, wide=path.stem in _WIDE)}"
  )


def _names(data: files.Arrays) -> list[str]:
  return [str(name) for name in data["networks"]]


def _percent(share: float) -> str:
  return f"{100 * share:.1f}%"


def _list(parts: list[str]) -> str:
  """ "a", "a and b", "a, b and c"."""
  *first, last = parts
  return f"{', '.join(first)} and {last}" if first else last


def _plural(number: int, what: str) -> str:
  return f"{number:,} {what}" + ("" if number == 1 else "s")


def _attention(arrays: files.Arrays) -> Finding:
  data = files.read_attention(arrays.path)
  assert data is not None  # it has just been read
  names, kinds, labels = data.networks, data.kinds, data.labels
  right = {
    name: [data.views[name, kind].predictions == labels for kind in kinds]
    for name in names
  }
  if kinds[-1].startswith("round"):
    heading = "Attention as an attack goes on"
    rounds = _list([kind.removeprefix("round") for kind in kinds[1:]])
    when = f"on clean images and after {rounds} rounds"
  else:
    heading = "Attention"
    when = "on clean and on attacked images"
  counts = [
    f"{name} classifies {_list([str(int(r.sum())) for r in right[name]])}"
    " correctly"
    for name in names
  ]
  sentence = (
    f"Of {_plural(len(labels), 'image')}, {'; '.join(counts)} ({when})."
  )
  first = right[names[0]][-1]
  for name in names[1:]:
    mended = int((right[name][-1] & ~first).sum())
    sentence += (
      f" {name} is right on {mended} of the {int((~first).sum())} attacked"
      f" images on which {names[0]} is wrong."
    )
  caption = (
    f"Where the networks look for the true class: Grad-CAM at {data.layer}, over"
    " what they saw, in grey. A network's maps of one image share a scale, so a"
    " map that pales has lost attention; + marks the centre of mass. ✓:"
    " predicted correctly; ✗ and a dashed frame: wrongly; green and a full"
    f" frame: correctly where {names[0]} is wrong. The percentage is the"
    f" probability of the predicted class. {data.protocol}."
  )
  return Finding(heading, sentence, caption)


def _shift(data: files.Arrays) -> Finding:
  from atat_jax.figures import attention_shift  # slow: it imports matplotlib

  last = int(data["rounds"][-1])
  means = [
    f"{name} {float(data[f'{name}_cosine_mean'][-1]):.2g}"
    for name in _names(data)
  ]
  sentence = " ".join(
    [
      f"After {_plural(last, 'round')} the maps of clean and attacked images are"
      f" at a cosine distance of {_list(means)} on average. Does the shift tell"
      " who is fooled?",
      *attention_shift.sentences(data.path),
    ]
  )
  caption = (
    "Distances between the true class's maps of the clean image and of the image"
    " after so many rounds of the attack; 0: attention has not moved. Fooled:"
    " right on the clean image and wrong after that round; kept: right on both."
    " AUC: the probability that a fooled image's map has moved further than a"
    f" kept one's. Bands: {data['confidence']}."
    f" {_plural(len(data['labels']), 'image')}, Grad-CAM at {data['layer']},"
    f" {data['protocol']}."
  )
  return Finding("Attention shift", sentence, caption)


def _landscape(data: files.Arrays) -> Finding:
  parts = []
  for name in _names(data):
    value = data[f"{name}_loss"]
    middle = value.shape[1] // 2
    along = value[:, -1, middle].mean() - value[:, middle, middle].mean()
    wrong = (data[f"{name}_margin"] > 0).mean()
    parts.append(
      f"{name}: the loss changes by {along:+.2f} nats from the image to the end"
      f" of the gradient's direction and reaches {value.max():.2f};"
      f" {_percent(wrong)} of the plane is classified wrongly."
    )
  count = len(data["labels"])
  sentence = f"Around {_plural(count, 'image')}, on average. {' '.join(parts)}"
  caption = (
    "The loss around an image: a along the sign of the gradient, b along random"
    " signs, in the unit of the pixels; all models on one scale. Vermilion line:"
    f" where the prediction turns wrong. {data['protocol']}."
  )
  return Finding("Loss landscape", sentence, caption)


def _curvature(data: files.Arrays) -> Finding:
  names = _names(data)
  means = {name: float(data[f"{name}_mean"]) for name in names}
  parts = []
  for name in names:
    low, high = data[f"{name}_interval"]
    parts.append(f"{name} {means[name]:.3g} (95% {low:.3g} to {high:.3g})")
  sentence = (
    "The largest eigenvalue of the loss's Hessian in the pixels is on average"
    f" {_list(parts)}."
  )
  flattest = min(names, key=lambda name: abs(means[name]))
  steepest = max(names, key=lambda name: abs(means[name]))
  if flattest != steepest and means[flattest]:
    ratio = abs(means[steepest] / means[flattest])
    sentence += f" {steepest} bends {ratio:.3g} times as much as {flattest}."
  caption = (
    "How strongly the loss bends at the clean images. A network that is sure of"
    " itself looks flat there and need not be robust: the landscape and the"
    f" attacks say more. {_plural(int(data['num_examples']), 'image')},"
    f" {data['protocol']}."
  )
  return Finding("Curvature of the loss", sentence, caption)


def _steps(data: files.Arrays) -> Finding:
  names, last = _names(data), int(data["steps"][-1])
  middle = 20 if last > 20 else max(1, last // 2)
  parts, gains = [], []
  for name in names:
    accuracy = data[f"{name}_accuracy"]
    gains.append(100 * float(accuracy[middle] - accuracy[-1]))
    parts.append(
      f"{name} {_percent(float(data[f'{name}_clean']))},"
      f" {_percent(accuracy[middle])} and {_percent(accuracy[-1])}"
    )
  sentence = (
    f"Accuracy without attack, after {middle} and after"
    f" {_plural(last, 'step')}: {'; '.join(parts)}. The steps after the"
    f" {middle}th take {max(gains):.1f} points at most"
    + (
      ": the attack has nearly converged."
      if max(gains) <= 1
      else ", so fewer steps overstate robustness."
    )
  )
  caption = (
    "Accuracy at the iterate after each step of one attack, step 0 being its"
    f" random start. {_plural(int(data['num_examples']), 'image')},"
    f" {data['protocol']}."
  )
  rows = files.read_autoattack(
    data.path.parent, float(data["epsilon"]), str(data["norm"])
  )
  stronger = [
    f"{name} {_percent(rows[name]['accuracy'])} ({rows[name]['attack']},"
    f" {_plural(rows[name]['num_examples'], 'image')})"
    for name in names
    if name in rows
  ]
  if stronger:
    sentence += f" AutoAttack leaves {_list(stronger)}."
    caption += " Dotted lines: AutoAttack."
  return Finding("Accuracy against the attack's steps", sentence, caption)


def _epsilons(data: files.Arrays) -> Finding:
  radii, parts, left = data["epsilons"], [], []
  for name in _names(data):
    accuracy = data[f"{name}_accuracy"]
    half = np.flatnonzero(accuracy <= 0.5 * accuracy[0])
    parts.append(
      f"{name} from {radii[half[0]]:.3g} on" if len(half) else f"{name} nowhere"
    )
    if data[f"{name}_worst_case"][-1] > 0:
      left.append(f"{name} {_percent(data[f'{name}_worst_case'][-1])}")
  sentence = (
    "Of the radii tried, accuracy is at most half of that at"
    f" {radii[0]:.3g} for {'; '.join(parts)}. "
  )
  if left:
    sentence += (
      f"Up to the largest, {radii[-1]:.3g}, images are left that were never"
      f" fooled ({_list(left)}). In a ball that holds every image that is the"
      " attack's failure, not robustness."
    )
  else:
    sentence += f"No image withstands all of them, up to {radii[-1]:.3g}."
  caption = (
    "Accuracy under attacks with a growing radius, in the unit of the pixels."
    f" {_plural(int(data['num_examples']), 'image')}, {data['protocol']}."
  )
  return Finding("Accuracy against epsilon", sentence, caption)


_FINDINGS: dict[str, Callable[[files.Arrays], Finding]] = {
  "attack_steps": _steps,
  "attack_epsilons": _epsilons,
  "attention": _attention,
  "attention_rounds": _attention,
  "attention_shift": _shift,
  "loss_landscape": _landscape,
  "curvature": _curvature,
}
