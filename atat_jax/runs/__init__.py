"""Working directory of a run: files, tables, provenance. Needs no JAX."""
