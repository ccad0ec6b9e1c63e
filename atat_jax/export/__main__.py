"""Writes a trained network for PyTorch: `python -m atat_jax.export`."""

from atat_jax.process import commands

if __name__ == "__main__":
  commands.begin("stopped; the same command starts again")

from atat_jax import export, runtime

if __name__ == "__main__":
  with runtime.plain_exits():
    runtime.set_up(distributed=False)
    export.main()
