"""A run's working directory: its files, tables and provenance. Needs no JAX."""
