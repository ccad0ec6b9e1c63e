"""Analyses of networks behind the pictures of a page, by name.

`main.py` computes them for the networks of a run, `python -m atat_jax.explain`
for any networks. Adding one is a file beside this one, which says how its arrays
are computed, drawn and put into a sentence, and a line in `ANALYSES`.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from atat_jax import checks, sharding
from atat_jax.analyses import (
  attention,
  base,
  curvature,
  epsilons,
  landscape,
  rounds,
  shift,
  steps,
)
from atat_jax.analyses.attention import attention_maps
from atat_jax.analyses.base import Analysis, FigureSettings, Finding, Section
from atat_jax.analyses.curvature import loss_curvature
from atat_jax.analyses.epsilons import attack_epsilons, default_epsilons
from atat_jax.analyses.landscape import loss_landscape
from atat_jax.analyses.rounds import attention_rounds
from atat_jax.analyses.shift import attention_shift
from atat_jax.analyses.steps import attack_steps
from atat_jax.data import batches
from atat_jax.errors import UserError
from atat_jax.evaluation.networks import Networks, check_networks
from atat_jax.process import stops
from atat_jax.runs import locations

__all__ = [
  "ANALYSES",
  "Analysis",
  "FigureSettings",
  "Finding",
  "Section",
  "attack_epsilons",
  "attack_steps",
  "attention_maps",
  "attention_rounds",
  "attention_shift",
  "check_images",
  "default_epsilons",
  "draw",
  "for_images",
  "loss_curvature",
  "loss_landscape",
  "parse",
  "sections",
  "write",
]

ANALYSES: dict[str, Analysis] = {
  "steps": steps.ANALYSIS,
  "epsilons": epsilons.ANALYSIS,
  "attention": attention.ANALYSIS,
  "rounds": rounds.ANALYSIS,
  "shift": shift.ANALYSIS,
  "landscape": landscape.ANALYSIS,
  "curvature": curvature.ANALYSIS,
}
"""Name, as configurations and commands have it, in the order of a page."""


def parse(names: str) -> tuple[str, ...]:
  """Returns the names of a comma-separated list; none for "".

  Raises:
    UserError: A name is not one of `ANALYSES`, or is there twice.
  """
  checks.instance("analyses", names, str, "names between commas")
  found = tuple(name.strip() for name in names.split(",") if name.strip())
  _check_names(found)
  return found


def _check_names(names: Sequence[str]) -> None:
  for name in names:
    checks.choice("analyses", name, ANALYSES)
  if len(set(names)) < len(names):
    raise UserError(f"analyses: {','.join(names)!r}; allowed: each name once")


def check_images(settings: FigureSettings, count: int) -> None:
  """Checks that there are the images that the analyses are made of.

  Args:
    settings: Which analyses, of which images.
    count: Number of images.

  Raises:
    UserError: An index is too large.
  """
  checks.instance("settings", settings, FigureSettings, "FigureSettings")
  checks.count("count", count)
  _check_names(settings.analyses)
  for name in settings.analyses:
    last = max(ANALYSES[name].images(settings, count))
    if last >= count:
      raise UserError(
        f"indices: {last}; allowed: 0 to {count - 1}, there are {count} images;"
        " --config.figures.indices=0,1 takes the first two"
      )


def num_images(settings: FigureSettings, count: int) -> int:
  """Returns how many images the analyses need, from the first on.

  Args:
    settings: Which analyses, of which images.
    count: Number of images of the test set.
  """
  checks.instance("settings", settings, FigureSettings, "FigureSettings")
  checks.count("count", count)
  _check_names(settings.analyses)
  needed = [max(ANALYSES[x].images(settings, count)) for x in settings.analyses]
  return 1 + max(needed, default=0)


def for_images(settings: FigureSettings, count: int) -> FigureSettings:
  """Returns settings for a test set that may lack the paper's images.

  Args:
    settings: Which analyses, of which images.
    count: Number of images of the test set.

  Returns:
    The settings; landscapes around the first images rather than those of the
    paper, which are the default, where the test set is smaller.

  Raises:
    UserError: An index of the user's own is too large.
  """
  checks.instance("settings", settings, FigureSettings, "FigureSettings")
  checks.count("count", count)
  paper = landscape.PAPER_INDICES
  if settings.indices == paper and max(paper) >= count:
    first = tuple(range(min(len(paper), count)))
    settings = dataclasses.replace(settings, indices=first)
  check_images(settings, count)
  return settings


def _check_inputs(
  networks: Networks,
  images: np.ndarray,
  labels: np.ndarray,
  class_names: Sequence[str],
) -> None:
  """Checks networks and images that may be stored ones, uint8."""
  pixels = checks.host("images", images)
  if pixels.dtype != np.uint8:
    checks.inspect_images(pixels)
  elif pixels.ndim != 4 or 0 in pixels.shape:
    raise UserError(
      f"images: shape {pixels.shape}; allowed: [N, H, W, C], not empty"
    )
  names = checks.names("class_names", class_names)
  checks.inspect_labels(labels, len(pixels), len(names))
  check_networks(networks, pixels.shape)


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
    directory: Directory that gets `<stem>.npz` for each of the analyses.
    networks: Name to (module, variables); running statistics.
    images: [N, H, W, C], uint8 or float in [0, 1].
    labels: int32 [N].
    settings: Which analyses, with which numbers.
    class_names: Names of the classes, for the pictures.
    mesh: The devices.

  Returns:
    Paths of the files, also of those that were there.

  Raises:
    UserError: An analysis that does not exist, an index beyond the images, an
      argument that an analysis refuses.
  """
  _check_inputs(networks, images, labels, class_names)
  sharding.check_mesh(mesh)
  directory = locations.find("directory", directory)
  check_images(settings, len(labels))
  weights = {
    name: base.digest(sharding.to_host(mesh, variables))
    for name, (_, variables) in networks.items()
  }
  inputs = base.Inputs(networks, weights, images, labels, class_names)
  paths = []
  for number, name in enumerate(settings.analyses, 1):
    stops.check()
    paths.append(ANALYSES[name].path(directory))
    with _Progress(
      f"{name} ({number} of {len(settings.analyses)})",
      _num_images(ANALYSES[name], inputs, settings),
    ) as progress:
      base.write(ANALYSES[name], paths[-1], inputs, settings, mesh)
      progress.finish()
  return paths


def _num_images(
  analysis: Analysis, inputs: base.Inputs, settings: FigureSettings
) -> int:
  """Counts the images that an analysis goes through, of all networks."""
  rows = analysis.images(settings, len(inputs.labels))
  arguments = analysis.arguments(settings, inputs.images.shape[1:])
  return len(rows) * len(inputs.networks) * analysis.passes(arguments)


class _Progress(contextlib.AbstractContextManager["_Progress"]):
  """A bar that moves by the batches of one analysis.

  Args:
    name: Text in front of it.
    total: Number of images in all passes.
  """

  def __init__(self, name: str, total: int):
    self._bar = tqdm(
      total=total,
      desc=name,
      unit="img",
      dynamic_ncols=True,
      disable=jax.process_index() != 0,
    )
    self._watching = batches.watch(self._show)
    self._before = 0  # images done of the pass under way

  def __enter__(self) -> "_Progress":
    """Begins to watch."""
    self._watching.__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    """Closes the bar."""
    self._watching.__exit__(*error)
    self._bar.close()

  def _show(self, done: int, count: int) -> None:
    left = self._bar.total - self._bar.n
    self._bar.update(min(max(done - self._before, 0), left))
    self._before = done % count
    stops.check()

  def finish(self) -> None:
    """Moves the bar to its end, where the arrays were there already."""
    self._bar.update(self._bar.total - self._bar.n)


def sections(
  directory: pathlib.Path,
  figures_directory: pathlib.Path,
  only: Iterable[str] | None = None,
) -> list[Section]:
  """Draws the analyses whose files are there, and says what they found.

  Needs the files alone: no network, no device.

  Args:
    directory: Directory of the `.npz` files.
    figures_directory: Directory for the pictures.
    only: Names of the analyses that are shown; None: all.

  Returns:
    One section for each file that is there, in the order of `ANALYSES`.

  Raises:
    UserError: A file cannot be read.
  """
  directory = locations.find("directory", directory)
  figures_directory = locations.find("figures_directory", figures_directory)
  names = ANALYSES if only is None else checks.names("only", only, empty=True)
  wanted = set(names)
  found = (
    base.section(analysis, analysis.path(directory), figures_directory)
    for name, analysis in ANALYSES.items()
    if name in wanted
  )
  return [section for section in found if section is not None]


def draw(
  directory: pathlib.Path, figures_directory: pathlib.Path
) -> list[pathlib.Path]:
  """Draws the analyses whose files are there; returns the PNG files."""
  return [
    path
    for section in sections(directory, figures_directory)
    for path in section.pictures
  ]
