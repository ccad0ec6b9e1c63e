"""Several finished runs side by side, the published figures with them.

Reads the files that runs leave behind; needs no model and no JAX.
"""

from atat_jax.report.layout import Table, as_html, as_markdown, tables
from atat_jax.report.merge import METHODS, compare

__all__ = [
  "METHODS",
  "Table",
  "as_html",
  "as_markdown",
  "compare",
  "tables",
]
