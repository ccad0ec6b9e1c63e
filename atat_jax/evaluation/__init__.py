"""Evaluation: accuracy under named protocols, rules that judge it, audit."""

from atat_jax.evaluation.accuracies import (
  Judged,
  accuracy,
  class_counts,
  count_classes,
  judge,
)
from atat_jax.evaluation.auditing import audit
from atat_jax.evaluation.benchmarking import Rows, benchmark
from atat_jax.evaluation.protocols import Protocol, parse, parse_list
from atat_jax.evaluation.rules import diagnose

__all__ = [
  "Judged",
  "Protocol",
  "Rows",
  "accuracy",
  "audit",
  "benchmark",
  "class_counts",
  "count_classes",
  "diagnose",
  "judge",
  "parse",
  "parse_list",
]
