"""CIFAR-10 with the paper's network (WRN-32-10, epsilon 8/255).

  python main.py --config=configs/cifar10.py:atat --workdir=runs/atat \
    --config.data.dir=/data/tfds

After the colon a method, a name in `atat_jax.objectives.OBJECTIVES` (default:
atat). After a comma the recipe: paper (default), each method trained as its
authors did; modern, one training for all methods; or fast, one for all methods
that is meant to take five minutes on one GPU, of a PreActResNet-18 in bfloat16:

  python main.py --config=configs/cifar10.py:trades,modern --workdir=runs/trades
  python main.py --config=configs/cifar10.py:at,fast --workdir=runs/fast

The paper's ablation of Eq. (7) is four runs: this one, atat_attention,
atat_pairing and atat_mixture, named settings of `atat_jax.objectives.SETTINGS`.
Data: see `python -m atat_jax.data.prepare --help`.

These sizes have not been trained here. Published numbers: docs/reproduction.md;
measured ones, of smaller networks: docs/results.md.
"""

import pathlib
import sys

from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import default


def get_config(choice: str = "atat") -> ConfigDict:
  """Returns the configuration of a method, and after a comma a recipe."""
  config = default.get_config(choice)
  config.data.name = "cifar10"
  default.make_cifar(config)
  config.figures.indices = (1450, 7558)  # landscapes of the paper's Figure 1
  if config.recipe == "paper":
    # The natural network of the released code stopped at step 70,000.
    config.teacher.update(num_epochs=183, boundaries=(4 / 7, 6 / 7))
  if config.method == "standard":  # trained as a teacher is
    config.train.update(config.teacher)
  return config
