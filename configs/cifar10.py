"""CIFAR-10 with the paper's network (WRN-32-10, epsilon 8/255).

  python main.py --config=configs/cifar10.py:atat --workdir=runs/atat \
    --config.data.dir=/data/tfds

Methods after the colon: atat (default), atat_released, standard, at, alp, tla,
trades, mart. After a comma the recipe: paper (default), each method trained as
its authors did, or modern, one training for all methods:

  python main.py --config=configs/cifar10.py:trades,modern --workdir=runs/trades

The paper's ablation of Eq. (7) is four runs: this one, and with
--config.objective.lambda1=0, --config.objective.lambda2=0, and both. Data: see
`python -m atat_jax.data.prepare --help`.

Expected time and numbers: not measured yet at this size; it needs an
accelerator (benchmarks/accelerator/QUEUE.md, entry d). Published numbers:
docs/reproduction.md. A small network on a CPU: docs/results.md.
"""

import pathlib
import sys

from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import default


def get_config(choice: str = "atat") -> ConfigDict:
  """A method, and after a comma a recipe."""
  config = default.get_config(choice)
  config.data.name = "cifar10"
  default.make_cifar(config)
  if config.recipe == "paper":
    # The natural network of the released code stopped at step 70,000.
    config.teacher.update(num_epochs=183, boundaries=(4 / 7, 6 / 7))
  if config.method == "standard":  # trained as a teacher is
    config.train.update(config.teacher)
  return config
