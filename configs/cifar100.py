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
  # 7,000 steps at most: the rate of 0.1 never falls, as in the released code.
  config.train.update(num_epochs=9, schedule="constant")
  # The natural network of the released code stopped at step 100,000.
  config.teacher.update(num_epochs=261, boundaries=(0.4, 0.6))
  config.evaluation.attacks = "nominal,fgsm,ifgsm20,pgd10,pgd20,pgd20-margin"
  if method == "standard":  # trained as a teacher is
    config.train.update(config.teacher)
  return config
