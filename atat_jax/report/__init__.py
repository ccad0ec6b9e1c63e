"""Pages that people read: one run's report, and several runs compared."""

from atat_jax.report.run_page import (
  is_old,
  results_table,
  verdict,
  write_comparison,
  write_report,
)

__all__ = [
  "is_old",
  "results_table",
  "verdict",
  "write_comparison",
  "write_report",
]
