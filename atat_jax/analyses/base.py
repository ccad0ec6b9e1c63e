"""The analyses behind the pictures, by name: which files, which images.

`main.py` computes them for the networks of a run, `python -m atat_jax.explain`
for any networks. Adding one is a function in `evaluation/`, a line in
`ANALYSES`, its picture in `figures/` and its sentence in `findings.py`.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import checks, sharding
from atat_jax.analyses import attention, curvature, landscape, shift, steps
from atat_jax.attacks import balls
from atat_jax.errors import UserError
from atat_jax.evaluation import Protocol
from atat_jax.evaluation.networks import Networks
from atat_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class FigureSettings:
  """What is computed, and with which numbers; checked when it is made.

  Attributes:
    analyses: Names of `ANALYSES`.
    attack: Of the attention maps.
    epsilon: Radius of the other attacks, pixels in [0, 1], and half the side of
      the landscapes.
    step_size: Of a step.
    norm: Of the ball.
    num_images: Attention maps: of the first so many images.
    rounds: Of the attack whose maps are followed; the clean image is shown
      besides.
    num_followed: ... on the first so many images.
    num_examples: What is averaged: the first so many images.
    indices: Landscapes: around these images.
    num_points: Landscapes: points a side.
    num_steps: Of the longest attack of the sweep over steps.
    epsilons: Of the sweep over radii; (): about `epsilon`.
    batch_size: Images at a time.
    seed: Of all random numbers.
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
    for name in self.analyses:
      checks.choice("analyses", name, ANALYSES)
    if len(set(self.analyses)) < len(self.analyses):
      names = ",".join(self.analyses)
      raise UserError(f"analyses: {names!r}; allowed: each name once")
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
    if not 0 <= self.seed < 2**31:
      raise UserError(f"seed: {self.seed}; allowed: 0 to {2**31 - 1}")
    checks.choice("norm", self.norm, balls.BALLS)
    checks.epsilon(self.epsilon, self.norm)
    checks.positive("step_size", self.step_size)
    _check_increasing("rounds", self.rounds)
    if not self.rounds or self.rounds[-1] < 1:
      raise UserError(f"rounds: {self.rounds}; allowed: at least one above 0")
    _check_increasing("epsilons", self.epsilons)
    for radius in self.epsilons:
      if radius:
        checks.epsilon(radius, self.norm, "epsilons")
    if not self.indices or min(self.indices) < 0:
      raise UserError(f"indices: {self.indices}; allowed: one or more, from 0")

  def check_images(self, count: int) -> None:
    """Refuses indices beyond the images that there are.

    Args:
      count: How many images there are.

    Raises:
      UserError: An index is too large.
    """
    if "landscape" in self.analyses and max(self.indices) >= count:
      raise UserError(
        f"indices: {max(self.indices)}; allowed: 0 to {count - 1}, there are"
        f" {count} images"
      )


def _check_increasing(field: str, values: Sequence[float]) -> None:
  if list(values) != sorted(set(values)) or any(x < 0 for x in values):
    raise UserError(f"{field}: {values}; allowed: from 0, increasing")


class Analysis(NamedTuple):
  """One entry of `ANALYSES`.

  Attributes:
    stem: Of its file, `<stem>.npz`.
    function: Of `evaluation`, (key, networks, images, labels, **arguments).
    images: (settings, number of images) to the indices of those it is of.
    arguments: (settings, shape of an image) to its keyword arguments.
    sharded: Whether it takes the mesh.
  """

  stem: str
  function: Callable[..., dict[str, np.ndarray]]
  images: Callable[[FigureSettings, int], Sequence[int]]
  arguments: Callable[[FigureSettings, tuple[int, ...]], dict[str, Any]]
  sharded: bool = True


def _shown(settings: FigureSettings, count: int) -> Sequence[int]:
  return range(min(settings.num_images, count))


def _followed(settings: FigureSettings, count: int) -> Sequence[int]:
  return range(min(settings.num_followed, count))


def _sample(settings: FigureSettings, count: int) -> Sequence[int]:
  return range(min(settings.num_examples, count))


def _attack(settings: FigureSettings) -> dict[str, Any]:
  return {
    "epsilon": settings.epsilon,
    "step_size": settings.step_size,
    "norm": settings.norm,
  }


def _batched(settings: FigureSettings, **arguments: Any) -> dict[str, Any]:
  return {"batch_size": settings.batch_size, **arguments}


def _radii(
  settings: FigureSettings, shape: tuple[int, ...]
) -> tuple[float, ...]:
  if settings.epsilons:
    return settings.epsilons
  size = int(np.prod(shape))
  return steps.default_epsilons(settings.epsilon, settings.norm, size)


ANALYSES: dict[str, Analysis] = {
  "attention": Analysis(
    "attention",
    attention.attention_maps,
    _shown,
    lambda s, _: {"protocol": s.attack},
  ),
  "rounds": Analysis(
    "attention_rounds",
    attention.attention_rounds,
    _followed,
    lambda s, _: {"rounds": s.rounds, **_attack(s)},
  ),
  "shift": Analysis(
    "attention_shift",
    shift.attention_shift,
    _sample,
    lambda s, _: _batched(
      s, rounds=tuple(range(s.rounds[-1] + 1)), **_attack(s)
    ),
  ),
  "landscape": Analysis(
    "loss_landscape",
    landscape.loss_landscape,
    lambda s, _: s.indices,
    lambda s, _: {"radius": s.epsilon, "num_points": s.num_points},
    sharded=False,
  ),
  "curvature": Analysis(
    "curvature",
    curvature.curvature,
    _sample,
    lambda s, _: _batched(s),
    sharded=False,
  ),
  "steps": Analysis(
    "attack_steps",
    steps.attack_steps,
    _sample,
    lambda s, _: _batched(s, num_steps=s.num_steps, **_attack(s)),
  ),
  "epsilons": Analysis(
    "attack_epsilons",
    steps.attack_epsilons,
    _sample,
    lambda s, shape: _batched(s, epsilons=_radii(s, shape), norm=s.norm),
  ),
}
"""Name, as configurations and commands have it, to analysis."""


def parse(names: str) -> tuple[str, ...]:
  """The names of a comma-separated list; of "" none."""
  return tuple(name.strip() for name in names.split(",") if name.strip())


def write(
  directory: pathlib.Path,
  networks: Networks,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  settings: FigureSettings,
  class_names: Sequence[str],
  mesh: Mesh,
) -> list[pathlib.Path]:
  """Computes what is not there yet with these settings, networks and images.

  Args:
    directory: Gets `<stem>.npz` for each of the analyses.
    networks: Name to (module, variables); running statistics.
    images: [N, H, W, C], uint8 or float in [0, 1].
    labels: int32 [N].
    settings: What to compute.
    class_names: One a class, for the pictures.
    mesh: The devices.

  Returns:
    Paths of the files, also of those that were there.

  Raises:
    UserError: An index beyond the images; what `evaluation` refuses.
  """
  settings.check_images(len(labels))
  weights = {
    name: _digest(sharding.to_host(mesh, variables))
    for name, (_, variables) in networks.items()
  }
  paths = []
  with tqdm(
    settings.analyses,
    desc="explain",
    unit="analysis",
    dynamic_ncols=True,
    disable=jax.process_index() != 0,
  ) as bar:
    for name in bar:
      bar.set_postfix_str(name)
      analysis = ANALYSES[name]
      rows = np.array(analysis.images(settings, len(labels)))
      shown, classes = _as_float(images[rows]), labels[rows]
      arguments = analysis.arguments(settings, images.shape[1:])
      identity = json.dumps(
        [
          {**arguments, "seed": settings.seed},
          weights,
          _digest([shown, classes]),
        ],
        default=str,
      )
      path = directory / f"{analysis.stem}.npz"
      paths.append(path)
      if _is_there(path, identity):
        continue
      found = analysis.function(
        jax.random.key(settings.seed),
        networks,
        shown,
        classes,
        **arguments,
        **({"mesh": mesh} if analysis.sharded else {}),
      )
      _save(
        path,
        {
          **found,
          "indices": rows,
          "class_names": np.array(class_names),
          "identity": np.array(identity),
        },
      )
  return paths


def _as_float(images: np.ndarray) -> np.ndarray:
  if images.dtype != np.uint8:
    return np.asarray(images, np.float32)
  return images.astype(np.float32) / np.float32(255)


def _digest(tree: PyTree) -> int:
  """A mark of all numbers of a tree of arrays."""
  mark = 0
  for leaf in jax.tree.leaves(tree):
    mark = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), mark)
  return mark


def _is_there(path: pathlib.Path, identity: str) -> bool:
  try:
    with path.open("rb") as file, np.load(file) as old:
      return str(old.get("identity")) == identity
  except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile):
    return False  # not there, or damaged: made again


def _save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes a whole file or none (process 0 only)."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.stem}.partial.npz")
  np.savez(partial, **arrays)  # type: ignore[arg-type]
  os.replace(partial, path)
