"""Attention maps as one attack goes on (Fig. 3)."""

import functools
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from atat_jax import checks, compilation
from atat_jax.analyses import base
from atat_jax.analyses.attention import draw_maps, find_in_maps
from atat_jax.evaluation import iterates
from atat_jax.evaluation.attention_views import Attacked, attention_views
from atat_jax.evaluation.networks import Networks
from atat_jax.runs import files, wording
from atat_jax.typing import Array, Classifier

_jitted_iterates = compilation.jit(
  iterates.pgd_iterates, static_argnames=("norm", "loss")
)


def _attack(
  classifier: Classifier,
  images: Array,
  labels: Array,
  *,
  key: Array,
  attack: iterates.WatchedAttack,
) -> Attacked:
  kept = _jitted_iterates(
    key, classifier, images, labels, **attack.traced(), **attack.static()
  )
  return {f"round{k}": kept[i] for i, k in enumerate(attack.steps)}


def attention_rounds(
  key: Array,
  networks: Networks,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  *,
  epsilon: float,
  step_size: float,
  rounds: Sequence[int] = (2, 8, 16),
  norm: str = "linf",
  loss: str = "cross_entropy",
  random_start: bool = True,
  source: str | None = None,
  layer: str | None = None,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Returns maps of the true class after some rounds of one attack of PGD.

  Args:
    key: Random key of the attacks' start.
    networks: See `attention_maps`, as `images`, `labels`, `source`, `layer` and
      `mesh`.
    images: Float [n, H, W, C] in [0, 1].
    labels: Integers [n].
    epsilon: See `iterates.WatchedAttack`, as `step_size`, `norm`, `loss` and
      `random_start`. The paper: 16/255.
    step_size: Length of a step.
    rounds: Numbers of steps, increasing. The clean image, the paper's round 0,
      is always shown; 0 here is the attack's start.
    norm: Norm of the ball.
    loss: Loss that the attack increases.
    random_start: Whether the start is random.
    source: Network for which the attacked images are made.
    layer: Layer of the maps.
    mesh: The devices.

  Returns:
    The arrays of `attention_maps`, with the kinds "clean" and, for each k of the
    rounds, "round<k>"; and `rounds` [r].

  Raises:
    UserError: An argument of a wrong shape, dtype, range or name.
  """
  checks.key(key)
  attack = iterates.WatchedAttack(
    rounds, epsilon, step_size, norm, loss, random_start
  )
  found = attention_views(
    networks,
    images,
    labels,
    functools.partial(_attack, key=key, attack=attack),
    description=attack.describe(),
    source=source,
    layer=layer,
    mesh=mesh,
  )
  return found | {"rounds": attack.steps}


def _find(data: files.Arrays) -> base.Finding:
  kinds = [str(kind) for kind in data["kinds"][1:]]
  rounds = wording.listed([kind.removeprefix("round") for kind in kinds])
  return find_in_maps(
    data,
    "Attention as an attack goes on",
    f"on clean images and after {rounds} rounds",
  )


ANALYSIS = base.Analysis(
  stem="attention_rounds",
  compute=attention_rounds,
  arguments=lambda settings, _: {"rounds": settings.rounds, **settings.pgd()},
  images=base.first("num_followed"),
  draw=draw_maps,
  find=_find,
  passes=lambda arguments: 1 + len(arguments["rounds"]),
)
