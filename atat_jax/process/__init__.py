"""Process of a command: how it begins, stops and ends. Needs no JAX."""
