"""Trains, evaluates and explains a robust image classifier.

  python main.py --config=configs/digits.py --workdir=runs/digits

The same as `atat-jax run`; the code is in `atat_jax/cli/modes.py`.
"""

from atat_jax.process import commands

if __name__ == "__main__":
  commands.begin("stopped; the same command goes on from here")

import sys

from atat_jax.cli import modes

if __name__ == "__main__":
  modes.start(sys.argv)
