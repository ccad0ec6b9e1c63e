"""Pages that people read: one run's report, and several runs compared."""

from atat_jax.process import commands

if commands.is_running("atat_jax.report"):
  commands.begin("stopped; nothing is half written")

from atat_jax.report.comparison import write_comparison
from atat_jax.report.run_page import is_old, write_report
from atat_jax.report.summary import verdict
from atat_jax.runs.terminal import results_table

__all__ = [
  "is_old",
  "results_table",
  "verdict",
  "write_comparison",
  "write_report",
]
