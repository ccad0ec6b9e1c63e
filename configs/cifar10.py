"""CIFAR-10 with the paper's network and settings (WRN-32-10, epsilon 8/255).

  python main.py --config=configs/cifar10.py:atat --workdir=runs/atat \
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
  """The released code's settings: crop with 2 px, rate 0.1 / 0.01 / 0.001."""
  config = default.get_config(method)
  config.data.name = "cifar10"
  config.data.padding = 2
  # 80,000 steps of 32 images; the rate falls at 40,000 and at 60,000. (The
  # released configuration allows 400,000 steps, the last 340,000 at 0.001.)
  config.train.batch_size = 32
  # The natural network of the released code stopped at step 70,000.
  config.teacher.update(num_epochs=183, boundaries=(4 / 7, 6 / 7))
  if method == "standard":  # trained as a teacher is
    config.train.update(config.teacher)
  return config
