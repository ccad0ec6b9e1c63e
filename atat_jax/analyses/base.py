"""An analysis: arrays that are computed, drawn, and summed up in a sentence.

A member of `ANALYSES` is one file that makes one `Analysis`. The functions here
take one member; those over the registry are in `analyses/__init__.py`.
"""

import dataclasses
import json
import logging
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from atat_jax import checks
from atat_jax.attacks import balls
from atat_jax.data.base import as_floats
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.evaluation import Protocol
from atat_jax.evaluation.networks import Networks
from atat_jax.runs import files
from atat_jax.typing import PyTree

_log = logging.getLogger(__name__)


class Finding(NamedTuple):
  """Text about the pictures of an analysis, made of the numbers in its file.

  Attributes:
    heading: Heading of its section.
    sentence: The result, with its numbers.
    caption: A guide to the pictures, and the protocol.
  """

  heading: str
  sentence: str
  caption: str


class Section(NamedTuple):
  """The part of a page on one analysis.

  Attributes:
    heading: Heading, plain text as the following.
    sentence: The result, with its numbers.
    caption: A guide to the pictures, and the protocol.
    pictures: PNG files.
    wide: Whether the pictures need the whole width of a page.
  """

  heading: str
  sentence: str
  caption: str
  pictures: list[pathlib.Path]
  wide: bool


@dataclasses.dataclass(frozen=True)
class FigureSettings:
  """Which analyses are computed, and with which numbers; checked when made.

  Attributes:
    analyses: Names of `ANALYSES`.
    attack: Attack of the attention maps.
    epsilon: Radius of the other attacks, pixels in [0, 1], and half the side of
      the landscapes.
    step_size: Length of a step, in the same unit.
    norm: Norm of the ball: linf, l2 or l1.
    num_images: Number of images of the attention maps, the first ones.
    rounds: Numbers of steps after which maps are followed; the clean image is
      shown besides.
    num_followed: Number of images that are followed, the first ones.
    num_examples: Number of images that are averaged over, the first ones.
    indices: Images around which landscapes are drawn.
    num_points: Points of a landscape on each side.
    num_steps: Number of steps of the longest attack in the sweep over steps.
    epsilons: Radii of the sweep over epsilon; (): some around `epsilon`.
    batch_size: Images at a time.
    seed: Seed of all random numbers.
  """

  analyses: tuple[str, ...]
  attack: Protocol
  epsilon: float
  step_size: float
  norm: str = "linf"
  num_images: int = 12
  rounds: tuple[int, ...] = (2, 8, 16)
  num_followed: int = 3
  num_examples: int = 500
  indices: tuple[int, ...] = (0, 1)
  num_points: int = 41
  num_steps: int = 100
  epsilons: tuple[float, ...] = ()
  batch_size: int = 128
  seed: int = 0

  def __post_init__(self) -> None:
    """Refuses what cannot be computed, naming the field."""
    for field in (
      "num_images",
      "num_followed",
      "num_examples",
      "num_points",
      "num_steps",
      "batch_size",
    ):
      checks.positive(field, getattr(self, field), integer=True)
    if self.num_points % 2 == 0 or self.num_points < 3:
      raise UserError(
        f"num_points: {self.num_points}; allowed: odd, at least 3"
      )
    checks.names("analyses", self.analyses, empty=True)
    checks.instance(
      "attack", self.attack, Protocol, "what evaluation.parse returns"
    )
    if not self.attack.measures("running"):
      raise UserError(
        f"attack: {self.attack.name!r}; allowed: without statistics=fixed, as"
        " the analyses have running statistics"
      )
    checks.integer("seed", self.seed, 0)
    checks.choice("norm", self.norm, balls.BALLS)
    checks.epsilon(self.epsilon, self.norm)
    checks.positive("step_size", self.step_size)
    for number in _increasing("rounds", self.rounds):
      checks.integer("rounds", number, 0)
    if not self.rounds or self.rounds[-1] < 1:
      raise UserError(f"rounds: {self.rounds}; allowed: at least one above 0")
    for radius in _increasing("epsilons", self.epsilons):
      if radius:
        checks.epsilon(radius, self.norm, "epsilons")
    checks.numbers("indices", self.indices, integers=True)

  def pgd(self) -> dict[str, Any]:
    """Returns `epsilon`, `step_size` and `norm`, as keyword arguments."""
    return {
      "epsilon": self.epsilon,
      "step_size": self.step_size,
      "norm": self.norm,
    }


def _increasing(field: str, values: Any) -> tuple[Any, ...]:
  """Checks that numbers increase from 0 on, and returns them."""
  values = checks.sequence(field, values, "numbers", empty=True)
  for value in values:
    checks.not_negative(field, value)
  if list(values) != sorted(set(values)):
    raise UserError(f"{field}: {values}; allowed: from 0, increasing")
  return values


Indices = Callable[[FigureSettings, int], Sequence[int]]


def first(field: str) -> Indices:
  """Returns a choice of images: the first ones, as many as a field says."""

  def chosen(settings: FigureSettings, count: int) -> Sequence[int]:
    return range(min(getattr(settings, field), count))

  return chosen


@dataclasses.dataclass(frozen=True)
class Analysis:
  """One entry of `ANALYSES`.

  Attributes:
    stem: Name of its file without suffix, `<stem>.npz`, and the beginning of
      its pictures' names.
    compute: (key, networks, images, labels, *, mesh, **arguments) to arrays by
      name; one of them is `networks`, their names.
    arguments: (settings, shape of an image) to the keyword arguments. Other
      arguments, weights or images make another result; nothing else does.
    images: (settings, number of images) to the indices of those it is made of.
    draw: (content of the file, directory) to the PNG files drawn there, in the
      order in which a reader wants them.
    find: Content of the file to its `Finding`. `data.path` is the file.
    passes: Arguments to how many times `compute` goes through the images of a
      network, as `data.batches` tells those who watch.
    wide: Whether its pictures need the whole width of a page.
    unknown: Ends of the names of the arrays that may hold NaN, which stands for
      a number that is not known; all others are finite.
  """

  stem: str
  compute: Callable[..., dict[str, np.ndarray]]
  arguments: Callable[[FigureSettings, tuple[int, ...]], dict[str, Any]]
  images: Indices
  draw: Callable[[files.Arrays, pathlib.Path], list[pathlib.Path]]
  find: Callable[[files.Arrays], Finding]
  passes: Callable[[Mapping[str, Any]], int] = lambda arguments: 1
  wide: bool = False
  unknown: tuple[str, ...] = ()

  def path(self, directory: pathlib.Path) -> pathlib.Path:
    """Returns the path of its file in a directory."""
    return directory / f"{self.stem}.npz"


class Inputs(NamedTuple):
  """Networks and images that are analysed.

  Attributes:
    networks: Name to (module, variables); running statistics.
    weights: Name to a digest of the variables.
    images: [N, H, W, C], uint8 or float in [0, 1].
    labels: int32 [N].
    class_names: Names of the classes, for the pictures.
  """

  networks: Networks
  weights: Mapping[str, int]
  images: np.ndarray
  labels: np.ndarray
  class_names: Sequence[str]


def write(
  analysis: Analysis,
  path: pathlib.Path,
  inputs: Inputs,
  settings: FigureSettings,
  mesh: Mesh,
) -> None:
  """Computes an analysis, unless its file is the result of the same inputs.

  Args:
    analysis: The analysis.
    path: Its file; process 0 writes it.
    inputs: Networks and images.
    settings: Numbers.
    mesh: The devices.

  Raises:
    UserError: An argument that the computation refuses.
  """
  rows = np.array(analysis.images(settings, len(inputs.labels)))
  images = as_floats(inputs.images[rows])
  labels = inputs.labels[rows]
  arguments = analysis.arguments(settings, inputs.images.shape[1:])
  identity = json.dumps(
    [
      {**arguments, "seed": settings.seed},
      inputs.weights,
      digest([images, labels]),
    ],
    default=str,
  )
  if _is_there(path, identity):
    return
  found = analysis.compute(
    jax.random.key(settings.seed),
    inputs.networks,
    images,
    labels,
    mesh=mesh,
    **arguments,
  )
  if jax.process_index() == 0:
    files.write_arrays(
      path,
      {
        **found,
        "indices": rows,
        "class_names": np.array(inputs.class_names),
        "identity": np.array(identity),
      },
    )


def digest(tree: PyTree) -> int:
  """Returns a checksum of all numbers of a tree of arrays on the host."""
  mark = 0
  for leaf in jax.tree.leaves(tree):
    mark = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), mark)
  return mark


def _is_there(path: pathlib.Path, identity: str) -> bool:
  try:
    old = files.read_arrays(path)
  except DamagedFileError as error:
    _log.warning("%s; computed again", error)
    return False
  return old is not None and str(old.get("identity")) == identity


def section(
  analysis: Analysis, path: pathlib.Path, directory: pathlib.Path
) -> Section | None:
  """Draws an analysis and says what it found; None if it has no file.

  Args:
    analysis: The analysis.
    path: Its file. `results.json` beside it may add AutoAttack's accuracies.
    directory: Directory for the pictures.

  Raises:
    UserError: The file cannot be read, or lacks an array.
  """
  data = files.read_arrays(path)
  if data is None:
    return None
  try:
    _check_finite(analysis, data)
    pictures = analysis.draw(data, directory)
    return Section(*analysis.find(data), pictures, analysis.wide)
  except UserError:
    raise
  except (IndexError, KeyError, TypeError, ValueError) as error:
    raise DamagedFileError(
      f"{path} cannot be read ({error}): delete it and evaluate again"
    ) from error


def _check_finite(analysis: Analysis, data: files.Arrays) -> None:
  """Refuses numbers that no picture would show."""
  for name, array in data.items():
    if array.dtype.kind != "f" or name.endswith(analysis.unknown):
      continue
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
      raise DamagedFileError(
        f"{data.path} cannot be read ({bad:,} of {array.size:,} numbers of"
        f" {name} are not finite): delete it and evaluate again"
      )


def network_names(data: files.Arrays) -> list[str]:
  """Returns the names of the networks that a file is about."""
  return [str(name) for name in data["networks"]]
