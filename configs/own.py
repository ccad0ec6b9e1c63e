"""Your own images: one .npz, pictures in folders, or any tfds data set.

  python main.py --config=configs/own.py:at --workdir=runs/mine \
    --config.data.name=npz --config.data.dir=mine.npz

`npz`: a file of `numpy.savez` with train_images (uint8 [N, H, W, C]),
train_labels, test_images, test_labels and maybe class_names. `folder`:
train/<class>/* and test/<class>/*, with --config.data.size=64 where pictures
differ in size. `tfds:<name>`: a prepared tfds set of images with labels.

After the colon a method, a name in `atat_jax.objectives.OBJECTIVES` (default: at).
All train a WRN-16-4 alike, with 8/255 for epsilon; both suit images of 32 to 64
pixels, larger ones want --config.model.strides=2,2,2 or a larger network.
"""

import pathlib
import sys

from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import default


def get_config(choice: str = "at") -> ConfigDict:
  """Returns the configuration of a method under the recipe `modern`."""
  config = default.get_config(choice, recipes=("modern",))
  default.make_cifar(config)
  config.data.update(name="npz", validation_size=200)
  config.model.update(depth=16, width=4, shortcut="conv")
  config.train.num_epochs = 30
  config.teacher.num_epochs = 15
  if config.method == "standard":  # trained as a teacher is
    config.train.update(config.teacher)
  return config
