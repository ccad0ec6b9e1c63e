"""Accuracy against the radius of an attack.

In a ball that covers all images any classifier that has more than one answer
can be fooled: accuracy that is left there is the attack's failure (vanishing or
masked gradients), and casts doubt on every smaller radius. So does accuracy that
rises with the radius.

Arrays: `networks` [m], `num_examples`, `chance` (1 / K), `protocol`, `norm`,
`epsilons` float64 [e], and for each network
`<name>_accuracy` float64 [e] at the last iterate,
`<name>_worst_case` float64 [e], the share of images that no iterate in this or a
smaller ball has fooled, and
`<name>_correct` bool [e, n], image by image, at the last iterate.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from atat_jax import checks
from atat_jax.analyses import base
from atat_jax.attacks import balls
from atat_jax.drawing import panels, style
from atat_jax.errors import UserError
from atat_jax.evaluation import sweeps
from atat_jax.evaluation.auditing import growing
from atat_jax.evaluation.networks import Networks
from atat_jax.runs import files, wording
from atat_jax.typing import Array


def default_epsilons(
  epsilon: float, norm: str, num_pixels: int
) -> tuple[float, ...]:
  """Returns radii for `attack_epsilons` around one that matters.

  Args:
    epsilon: That radius, in the unit of the pixels.
    norm: Norm of the ball: linf, l2 or l1.
    num_pixels: H * W * C of an image.

  Returns:
    0, quarters of epsilon up to it, then one and a half of it and doublings to
    the radius that covers all images.
  """
  checks.choice("norm", norm, balls.BALLS)
  checks.epsilon(epsilon, norm)
  checks.count("num_pixels", num_pixels)
  first, *larger = growing(epsilon, norm, num_pixels)
  quarters = [first * part for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
  between = [first * 1.5] if larger and first * 1.5 < larger[0] else []
  return (*quarters, *between, *larger)


def _increasing(epsilons: Sequence[float], norm: str) -> list[float]:
  radii = []
  for radius in checks.sequence("epsilons", epsilons, "radii", empty=True):
    checks.not_negative("epsilons", radius)
    if radius != 0:
      checks.epsilon(radius, norm, "epsilons")
    radii.append(float(radius))
  if not radii or radii != sorted(set(radii)):
    raise UserError(f"epsilons: {epsilons!r}; allowed: one or more, increasing")
  return radii


def attack_epsilons(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  epsilons: Sequence[float],
  num_steps: int = 20,
  norm: str = "linf",
  loss: str = "margin",
  batch_size: int = 128,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Returns the accuracy under PGD with each of some radii of the ball.

  A step is a quarter of each radius; no radius compiles anew. The margin is the
  default because cross-entropy's own gradient vanishes in float32 where a
  network is sure of itself.

  Args:
    key: Random key of the starts, the same for each radius.
    networks: Name to (module, variables); more in `sweeps.prepare`.
    images: Float [n, H, W, C] in [0, 1].
    labels: Integers [n].
    epsilons: Radii in the unit of the pixels, increasing; 0 is no attack. See
      `default_epsilons`.
    num_steps: Number of steps of each attack.
    norm: Norm of the ball: linf, l2 or l1 (whose sparse steps stall at the box).
    loss: Loss that the attack increases.
    batch_size: Images at a time.
    mesh: The devices.

  Returns:
    The arrays that the module describes, by name.

  Raises:
    UserError: An argument of a wrong shape, dtype or range, by name.
  """
  checks.key(key)
  checks.choice("norm", norm, balls.BALLS)
  radii = _increasing(epsilons, norm)
  sweep = sweeps.prepare(
    networks, images, labels, num_steps, loss, batch_size, mesh
  )
  found = sweep.facts() | {
    "protocol": np.array(_describe(norm, num_steps, loss)),
    "norm": np.array(norm),
    "epsilons": np.array(radii),
  }
  attack = {"num_steps": num_steps, "norm": norm, "loss": loss}
  for name in sweep.classifiers:
    statistics = _statistics(
      [_correct(sweep, name, key, radius, attack) for radius in radii]
    )
    found |= {f"{name}_{what}": value for what, value in statistics.items()}
  return found


def _describe(norm: str, num_steps: int, loss: str) -> str:
  return (
    f"PGD, {norm}, {num_steps} steps of a quarter of epsilon, random start,"
    f" {loss} loss; running statistics"
  )


def _statistics(by_radius: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
  """Returns one network's arrays, from who is right at each iterate [s, n]."""
  last = np.array([correct[-1] for correct in by_radius])
  never_fooled = [correct.all(0) for correct in by_radius]
  return {
    "accuracy": last.mean(-1),
    "worst_case": np.logical_and.accumulate(never_fooled).mean(-1),
    "correct": last,
  }


def _correct(
  sweep: sweeps.Sweep,
  name: str,
  key: Array,
  radius: float,
  attack: dict[str, Any],
) -> np.ndarray:
  """Returns who is right at each iterate in the ball of a radius, bool [s, n]."""
  if radius == 0:
    return sweep.clean_correct(name)[None]
  return sweep.correct_by_step(
    name, key, epsilon=radius, step_size=radius / 4, **attack
  )


def _draw(data: files.Arrays, directory: pathlib.Path) -> list[pathlib.Path]:
  """Draws a line a network: accuracy at each radius of the ball."""
  names, epsilons = base.network_names(data), data["epsilons"]
  with style.context():
    fig, ax = panels.accuracy_axes(len(names), float(data["chance"]))
    accuracies = {name: 100 * data[f"{name}_accuracy"] for name in names}
    panels.lines(ax, epsilons, accuracies, marked=True)
    positive = epsilons[epsilons > 0]
    if len(positive) > 1 and positive[-1] > 10 * positive[0]:
      ax.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    levels = 255 * epsilons
    in_levels = bool(np.all(abs(levels - levels.round()) < 0.02))
    if in_levels and data["norm"] == "linf":
      panels.ticks(ax, epsilons, lambda x: f"{255 * x:.0f}")
      ax.set_xlabel(f"epsilon in 1/255 of the pixels' range, {data['norm']}")
    else:
      panels.ticks(ax, epsilons, "{:.3g}".format)
      ax.set_xlabel(f"epsilon, {data['norm']} (pixels in [0, 1])")
    left = ", ".join(_never_fooled(data)) or "no image of any model"
    style.legend(fig, ax)
    style.caption(
      fig,
      f"{data['protocol']}. {panels.sample(int(data['num_examples']))} Never"
      " fooled up to the largest epsilon, which only a failing attack leaves:"
      f" {left}.",
    )
    return [style.save(fig, directory / "attack_epsilons.png")]


def _never_fooled(data: files.Arrays) -> list[str]:
  """Returns the models with images that no radius fools, and their share."""
  return [
    f"{name} {wording.percent(data[f'{name}_worst_case'][-1])}"
    for name in base.network_names(data)
    if data[f"{name}_worst_case"][-1] > 0
  ]


def _find(data: files.Arrays) -> base.Finding:
  radii, parts = data["epsilons"], []
  for name in base.network_names(data):
    accuracy = data[f"{name}_accuracy"]
    half = np.flatnonzero(accuracy <= 0.5 * accuracy[0])
    parts.append(
      f"{name} from {wording.pixels(radii[half[0]])} on"
      if len(half)
      else f"{name} nowhere"
    )
  smallest, largest = (wording.pixels(radii[place]) for place in (0, -1))
  sentence = (
    f"Accuracy is at most half of that at epsilon {smallest} for"
    f" {'; '.join(parts)}. "
  )
  left = _never_fooled(data)
  if left:
    sentence += (
      f"Up to the largest epsilon, {largest}, some images are never fooled"
      f" ({wording.listed(left)}). In a ball that holds every image that is the"
      " attack's failure, not robustness."
    )
  else:
    sentence += f"No image withstands all of them, up to {largest}."
  caption = (
    "Accuracy under attacks with a growing radius, in the unit of the pixels."
    f" {wording.plural(int(data['num_examples']), 'image')},"
    f" {data['protocol']}."
  )
  return base.Finding("Accuracy against epsilon", sentence, caption)


def _arguments(
  settings: base.FigureSettings, shape: tuple[int, ...]
) -> dict[str, Any]:
  radii = settings.epsilons or default_epsilons(
    settings.epsilon, settings.norm, int(np.prod(shape))
  )
  return {
    "batch_size": settings.batch_size,
    "epsilons": radii,
    "norm": settings.norm,
  }


ANALYSIS = base.Analysis(
  stem="attack_epsilons",
  compute=attack_epsilons,
  arguments=_arguments,
  images=base.first("num_examples"),
  draw=_draw,
  find=_find,
  passes=lambda arguments: len(arguments["epsilons"]),
)
