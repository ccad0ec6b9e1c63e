"""CIFAR-100 with the paper's network (WRN-32-10, epsilon 8/255).

  python main.py --config=configs/cifar100.py:atat --workdir=runs/atat100 \
    --config.data.dir=/data/tfds

Methods after the colon, recipes after a comma, and the ablation as in
`cifar10.py`. Data: see `python -m atat_jax.data.prepare --help`.

This size has not been trained here. Published numbers: docs/reproduction.md.
"""

import pathlib
import sys

from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import default


def get_config(choice: str = "atat") -> ConfigDict:
  """Returns the configuration; ATAT has the released code's batch and steps."""
  config = default.get_config(choice)
  config.data.name = "cifar100"
  default.make_cifar(config)
  config.figures.indices = (1450, 7558)  # landscapes of the paper's Figure 1
  if config.recipe != "fast":
    attacks = "nominal,fgsm,ifgsm20,pgd10,pgd20,pgd20-margin"
    config.evaluation.attacks = attacks
  if config.recipe == "paper":
    # The natural network of the released code stopped at step 100,000.
    config.teacher.update(num_epochs=261, boundaries=(0.4, 0.6))
    if config.method in ("atat", "atat_released"):
      # 7,000 steps at most: the rate of 0.1 never falls there.
      config.train.update(batch_size=64, num_epochs=9, schedule="constant")
  if config.method == "atat_released":
    config.objective.variant = "maps"
  if config.method == "standard":  # trained as a teacher is
    config.train.update(config.teacher)
  return config
