"""Honest evaluation: accuracy under named protocols, diagnostics, attention."""

from atat_jax.evaluation.audit import audit
from atat_jax.evaluation.diagnostics import diagnose
from atat_jax.evaluation.maps import attention_maps
from atat_jax.evaluation.protocols import Protocol, parse, parse_list
from atat_jax.evaluation.robustness import accuracy

__all__ = [
  "Protocol",
  "accuracy",
  "attention_maps",
  "audit",
  "diagnose",
  "parse",
  "parse_list",
]
