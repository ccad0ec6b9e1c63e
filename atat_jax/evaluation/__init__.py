"""Honest evaluation: accuracy under named protocols, diagnostics, attention."""

from atat_jax.evaluation.attack_steps import (
  attack_epsilons,
  attack_steps,
  default_epsilons,
)
from atat_jax.evaluation.attention_shift import attention_shift
from atat_jax.evaluation.audit import audit
from atat_jax.evaluation.curvature import curvature
from atat_jax.evaluation.diagnostics import diagnose
from atat_jax.evaluation.loss_landscape import loss_landscape
from atat_jax.evaluation.maps import attention_maps, attention_rounds
from atat_jax.evaluation.protocols import Protocol, parse, parse_list
from atat_jax.evaluation.robustness import accuracy

__all__ = [
  "Protocol",
  "accuracy",
  "attack_epsilons",
  "attack_steps",
  "attention_maps",
  "attention_rounds",
  "attention_shift",
  "audit",
  "curvature",
  "default_epsilons",
  "diagnose",
  "loss_landscape",
  "parse",
  "parse_list",
]
