"""Evaluation: accuracy under named protocols, rules that judge it, audit."""

from atat_jax.evaluation.accuracies import accuracy, class_counts
from atat_jax.evaluation.auditing import audit
from atat_jax.evaluation.protocols import Protocol, parse, parse_list
from atat_jax.evaluation.rules import diagnose

__all__ = [
  "Protocol",
  "accuracy",
  "audit",
  "class_counts",
  "diagnose",
  "parse",
  "parse_list",
]
