"""Attention maps on clean and on attacked images (Fig. 1, 2, 5 and 6)."""

import functools
import pathlib

import numpy as np
from jax.sharding import Mesh

from atat_jax import checks
from atat_jax.analyses import base
from atat_jax.drawing import map_grid
from atat_jax.evaluation.attention_views import Attacked, attention_views
from atat_jax.evaluation.networks import Networks
from atat_jax.evaluation.protocols import Protocol
from atat_jax.runs import attention_file, files, wording
from atat_jax.typing import Array, Classifier


def _attack(
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  key: Array,
  protocol: Protocol,
) -> Attacked:
  return {"adversarial": protocol.run(key, classifier, images, labels)}


def attention_maps(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  protocol: Protocol,
  source: str | None = None,
  layer: str | None = None,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Returns maps of the true class on clean and on attacked images.

  Args:
    key: Random key of the attacks.
    networks: Name to (module, variables), any number, e.g. teacher and student;
      running statistics.
    images: Float [n, H, W, C] in [0, 1].
    labels: Integers [n]: the true classes.
    protocol: The attack.
    source: Name of the network for which the attacked images are made, the same
      for all; None: each network's own.
    layer: A submodule that all the networks have; None: the last convolutional
      tensor of each.
    mesh: The devices; None: all of them. Each computes everything.

  Returns:
    `networks` [m], `kinds` ("clean", "adversarial"), `images`, `labels`,
    `layer`, `protocol`, and for each network `<name>_adversarial` [n, H, W, C]
    and for kind in clean, adversarial `<name>_<kind>_map` float32 [n, h, w],
    `<name>_<kind>_prediction` [n] and `<name>_<kind>_probability` [n], of the
    predicted class.

  Raises:
    UserError: An argument of a wrong shape, dtype, range or name.
  """
  checks.key(key)
  checks.instance(
    "protocol", protocol, Protocol, "what evaluation.parse returns"
  )
  return attention_views(
    networks,
    images,
    labels,
    functools.partial(_attack, key=key, protocol=protocol),
    description=f"{protocol.describe()}; running statistics",
    source=source,
    layer=layer,
    mesh=mesh,
  )


def draw_maps(
  data: files.Arrays, directory: pathlib.Path
) -> list[pathlib.Path]:
  """Draws the maps of a few images on each figure; see `map_grid.draw`."""
  return map_grid.draw(attention_file.arrange(data), data.path.stem, directory)


def find_in_maps(data: files.Arrays, heading: str, when: str) -> base.Finding:
  """Counts the right predictions on each kind of images.

  Args:
    data: Arrays as `attention_maps` returns them.
    heading: Heading of the section.
    when: The kinds of images, in words.
  """
  maps = attention_file.arrange(data)
  names, labels = maps.networks, maps.labels
  right = {
    name: [maps.views[name, kind].predictions == labels for kind in maps.kinds]
    for name in names
  }
  counts = [
    f"{name} classifies"
    f" {wording.listed([str(int(r.sum())) for r in right[name]])} correctly"
    for name in names
  ]
  sentence = (
    f"Of {wording.plural(len(labels), 'image')}, {'; '.join(counts)} ({when})."
  )
  wrong = ~right[names[0]][-1]
  for name in names[1:]:
    corrected = int((right[name][-1] & wrong).sum())
    sentence += (
      f" {name} is right on {corrected} of the {int(wrong.sum())} attacked"
      f" images on which {names[0]} is wrong."
    )
  return base.Finding(heading, sentence, _caption(maps))


def _caption(maps: attention_file.Attention) -> str:
  corrected = (
    f"; green and a full frame: right where {maps.networks[0]} is wrong"
    if len(maps.networks) > 1
    else ""
  )
  return (
    "Where the networks find evidence for the true class: Grad-CAM at"
    f" {maps.layer}, over the image in grey. A network's maps of one image share"
    " a scale, so a map that pales has lost evidence; + marks the centre of"
    " mass. ✓: predicted correctly; ✗ and a dashed frame: wrongly"
    f"{corrected}. The percentage is the probability of the predicted class."
    " Below the attacked maps: the attacked image and the perturbation, magnified"
    f" {map_grid.magnification(maps):g} times around grey. {maps.protocol}."
  )


def _find(data: files.Arrays) -> base.Finding:
  return find_in_maps(data, "Attention", "on clean and on attacked images")


ANALYSIS = base.Analysis(
  stem="attention",
  compute=attention_maps,
  arguments=lambda settings, _: {"protocol": settings.attack},
  images=base.first("num_images"),
  draw=draw_maps,
  find=_find,
  passes=lambda arguments: 2,  # clean and attacked
)
