"""ImageNet at 224 pixels, streamed from the disk: epsilon 4/255.

  python main.py --config=configs/imagenet.py:at --workdir=runs/imagenet \
    --config.data.dir=/data/imagenet --config.data.workers=16

`--config.data.dir`: a folder with train/<class>/* and val/<class>/*, or, with
--config.data.name=tfds:imagenet2012, a tfds directory in array_record form.

After the colon a method, a name in `atat_jax.objectives.OBJECTIVES` (default:
at). After a comma the network, each with the training of its source:

resnet50 (default). Salman et al., "Do adversarially robust ImageNet models
  transfer better?" (2020): SGD, batches of 512, 90 epochs, learning rate 0.1,
  divided by 10 every 30 epochs, momentum 0.9, weight decay 1e-4, PGD of 3 steps
  of 2/3 epsilon in evaluation mode. Published: 34.96 % under AutoAttack
  (RobustBench, Salman2020Do_R50). These numbers are from memory of the paper:
  its code (microsoft/robust-models-transfer at cea2c37) trains by the library
  MadryLab/robustness and does not hold the command; the library's defaults have
  the same rate, momentum and weight decay. The library also jitters brightness,
  contrast and saturation by 0.1 and adds lighting noise, which is missing here,
  and attacks from the image itself, where here it is a random start.
convnext_t, vit_s. Singh et al., "Revisiting adversarial training for ImageNet"
  (2023), and its code (nmndeep/revisiting-at at 0a86862, read): a stem of
  convolutions, no normalisation of the pixels, AdamW with decays of 0.9 and
  0.95, learning rate 1e-3, 10 epochs of warm-up (20 where there are more than
  100) and a cosine, weight decay 0.05 of kernels, label smoothing 0.1, averages
  of 0.9999, RandAugment of magnitude 9, 2 steps of the attack in evaluation
  mode. Published: 49.5 % and 48.1 % after 300 epochs from standardly trained
  weights. What differs: CutMix in each image, where the code draws CutMix or
  MixUp (of 0.8) for each batch; no random erasing (a quarter of its pictures);
  bilinear instead of bicubic crops; PGD instead of APGD; 100 epochs from fresh
  weights (300 and the warm-up of 20: --config.train.num_epochs=300
  --config.train.warmup_fraction=0.0667). The batch of 1,024 is ours: the code
  has 80 images a GPU and leaves their number open.

None of this has been trained here. How many cores reading takes, and the rate
that a device needs: docs/training.md.
"""

import pathlib
import sys
from typing import Any

from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import default

from atat_jax import models

DERIVED = {"num_classes", "mean", "std", "image_size", "convolution"}
NETWORKS = ("resnet50", "convnext_t", "vit_s")

SALMAN = {
  "num_epochs": 90,
  "batch_size": 512,
  "schedule": "piecewise",
  "learning_rate": 0.1,
  "boundaries": (1 / 3, 2 / 3),
  "factor": 0.1,
  "momentum": 0.9,
  "weight_decay": 1e-4,
}
SINGH = {
  "num_epochs": 100,
  "batch_size": 1024,
  "optimizer": "adamw",
  "schedule": "cosine",
  "learning_rate": 1e-3,
  "warmup_fraction": 0.1,
  "momentum": 0.9,
  "second_momentum": 0.95,
  "weight_decay": 0.05,
  "label_smoothing": 0.1,
  "ema_decay": 0.9999,
}
LOGGING = {
  "log_every_steps": 100,
  "validate_every_epochs": 1.0,
  "term_gradients": False,  # a program more to compile
}


def _data(config: ConfigDict, augments: bool) -> None:
  config.data.update(
    name="folder:imagenet",
    stream=True,
    size=224,
    validation_size=2000,
    padding=0,  # crops are made where pictures are read
    flip=True,
    smallest_crop=0.08,
    shard_size=1000,
  )
  if augments:
    config.data.update(rand_augment=9.0, mix="cutmix", mix_alpha=1.0)


def _model(network: str) -> ConfigDict:
  """Returns the fields of a network, those that differ from its defaults too."""
  networks: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet50": ("resnet50", {"batch_norm_epsilon": 1e-5}),
    "convnext_t": ("convnext", {"conv_stem": (48, 96)}),
    "vit_s": (
      "vit",
      {
        "conv_stem": (48, 96, 192, 384),
        "channels": 384,
        "num_heads": 6,
        "hidden": 1536,
      },
    ),
  }
  name, changed = networks[network]
  made = models.create(name)
  # The others follow from the data.
  fields = set(models.field_names(name)) - DERIVED
  return ConfigDict(
    {
      "name": name,
      **{field: getattr(made, field) for field in sorted(fields)},
      "normalization": "dataset" if network == "resnet50" else "none",
      "dtype": "bfloat16",
      **changed,
    }
  )


def get_config(choice: str = "at") -> ConfigDict:
  """Returns the configuration of a method, and after a comma a network."""
  config = default.get_config(choice, recipes=NETWORKS)
  few = config.recipe != "resnet50"
  _data(config, augments=few)
  config.model = _model(config.recipe)
  config.train.update(SALMAN if config.recipe == "resnet50" else SINGH)
  config.train.update(LOGGING)
  config.teacher.update(config.train)
  config.teacher.num_epochs = 90
  epsilon = 4 / 255
  default.update_attack(
    config,
    epsilon=epsilon,
    step_size=epsilon if few else 2 / 3 * epsilon,
    num_steps=2 if few else 3,
    attack_batch_norm="running",
    attack_moves_statistics=False,
  )
  config.evaluation.update(
    validation_attack="pgd5",
    attacks="nominal,fgsm,pgd20,pgd20-margin,autoattack",
    epsilon=epsilon,
    step_size=1 / 255,
    batch_norm=("running",),
    batch_size=250,
    num_examples=5000,  # RobustBench's number
  )
  config.figures.update(analyses="attention", indices=(0, 1))
  if config.method == "standard":
    config.train.num_epochs = config.teacher.num_epochs
  return config
