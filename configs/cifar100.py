"""CIFAR-100 with the paper's network and settings (WRN-32-10, epsilon 8/255).

  python main.py --config=configs/cifar100.py:atat --workdir=runs/atat100 \
    --config.data.dir=/data/tfds

Methods after the colon: atat (default), standard. Data: see
`python -m atat_jax.data.prepare --help`.
"""

import pathlib
import sys

from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import default


def get_config(method: str = "atat") -> ConfigDict:
  """As CIFAR-10, with the batch of 64 of the released code."""
  config = default.get_config(method)
  config.data.name = "cifar100"
  config.data.padding = 2
  config.train.batch_size = 64
  config.evaluation.attacks = "nominal,fgsm,ifgsm20,pgd10,pgd20,pgd20-margin"
  return config
