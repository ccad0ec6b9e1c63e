"""The command `atat-jax` as `python -m atat_jax.cli`."""

from atat_jax import cli

if __name__ == "__main__":
  cli.start()
