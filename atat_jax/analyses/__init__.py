"""Analyses behind the pictures, by name."""

from atat_jax.analyses.attention import attention_maps, attention_rounds
from atat_jax.analyses.base import ANALYSES, FigureSettings, parse, write
from atat_jax.analyses.curvature import curvature
from atat_jax.analyses.landscape import loss_landscape
from atat_jax.analyses.shift import attention_shift
from atat_jax.analyses.steps import (
  attack_epsilons,
  attack_steps,
  default_epsilons,
)

__all__ = [
  "ANALYSES",
  "FigureSettings",
  "attack_epsilons",
  "attack_steps",
  "attention_maps",
  "attention_rounds",
  "attention_shift",
  "curvature",
  "default_epsilons",
  "loss_landscape",
  "parse",
  "write",
]
