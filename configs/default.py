"""Every field of a configuration, once, with its type and its default.

The other files change values, never add fields. `--config.<field>=<value>`
changes one from the command line; a misspelt field or a wrong type is refused.
Numbers of pixels are in [0, 1]: epsilon = 8/255 is 0.0313...
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

METHODS = {
  # Standard training: no attack, no teacher.
  "standard": {},
  # Attention transfer, Eq. (4) to (7). The paper does not give the lambdas.
  "atat": {
    "lambda1": 1.0,  # weight of attention transfer, Eq. (5)
    "lambda2": 0.1,  # weight of logit pairing, Eq. (6)
    "p": 2,  # norm in Eq. (5): 1 or 2
    "layers": (),  # the set J; (): the topmost convolutional tensor
    "epsilon": 8 / 255,  # radius of the attack in training
    "step_size": 2 / 255,
    "num_steps": 7,
    "norm": "linf",  # linf, l2 or l1
    "attack_loss": "cross_entropy",  # or margin
    "attack_batch_norm": "batch",  # statistics while attacking, or running
    "attack_moves_statistics": True,  # as the released code does
  },
}
"""Hyperparameters of each method: the fields of `config.objective`."""


def training() -> ConfigDict:
  """How a network is trained; used for the student and for the teacher."""
  return ConfigDict(
    {
      "num_epochs": 52,
      "batch_size": 128,
      "schedule": "piecewise",  # constant, piecewise, cosine, one_cycle
      "learning_rate": 0.1,  # the highest
      "boundaries": (0.5, 0.75),  # piecewise: shares of the run where it falls
      "factor": 0.1,  # piecewise: ... by this factor
      "warmup_fraction": 0.0,  # cosine, one_cycle: share in which it rises
      "momentum": 0.9,
      "nesterov": False,
      "weight_decay": 2e-4,  # on kernels only
      "log_every_steps": 50,
      "validate_every_epochs": 1.0,  # ... and save a checkpoint
    }
  )


def get_config(method: str = "atat") -> ConfigDict:
  """The default configuration: the paper's network and settings.

  Args:
    method: One of `METHODS`.

  Returns:
    The configuration.

  Raises:
    ValueError: Unknown method.
  """
  if method not in METHODS:
    raise ValueError(f"method: {method!r}; allowed: {', '.join(METHODS)}")
  return ConfigDict(
    {
      "seed": 0,
      "method": method,
      "data": {
        "name": "cifar10",  # digits, cifar10, cifar100
        "dir": placeholder(str),  # tfds directory, archive or .npz; None: usual
        "cache_dir": placeholder(str),  # of decoded copies; None: user's cache
        "source": "auto",  # tfds, binary, python
        "validation_size": 1024,  # held out of the training split
        "padding": 4,  # pixels before the random crop; 0: no crop
        "flip": True,  # mirror at random
      },
      "model": {
        # wide_resnet, preact_resnet18, vgg16, vgg16_bn, resnet18, resnet50,
        # densenet121
        "name": "wide_resnet",
        # Of every network. (PreActResNets are usually trained with `dataset`
        # and 1e-5.)
        "normalization": "per_image",  # dataset (mean and std), none
        "batch_norm_momentum": 0.9,
        "batch_norm_epsilon": 1e-3,
        "dtype": "float32",  # bfloat16 on accelerators
        # Of wide_resnet alone; another network ignores them.
        "depth": 32,  # 6n + 2 or 6n + 4
        "width": 10,
        "activation": "leaky_relu",  # relu, silu
        "negative_slope": 0.1,  # of the leaky ReLU
        "shortcut": "pad",  # the paper's; conv: the usual WRN-28-10, 34-10
        "strides": (1, 2, 2),  # of the stages
        "stem_channels": 16,
        "padding": "same",  # TensorFlow's; symmetric: PyTorch's
      },
      "objective": dict(METHODS[method]),
      "train": training(),
      "teacher": training(),
      # A finished run to take the teacher from; None: train one.
      "teacher_workdir": placeholder(str),
      "evaluation": {
        # What checkpoints are chosen by, on the validation split.
        "validation_attack": "pgd10",
        # nominal, fgsm, ifgsm<steps>, pgd<steps>[-<loss>], apgd<steps>[-<loss>],
        # fab<steps>, square<queries>, autoattack[-fast, -rand, -plus]; with
        # other numbers as in square:norm=l2:epsilon=0.5
        "attacks": "nominal,fgsm,ifgsm20,pgd7,pgd20,pgd20-margin",
        "norm": "linf",
        "epsilon": 8 / 255,
        "step_size": 2 / 255,
        "num_restarts": 1,
        # running: a fixed classifier. batch: the paper's released protocol.
        "batch_norm": ("running", "batch"),
        "batch_size": 500,
        "batch_statistics_size": 100,  # images a batch in the mode batch
        "num_examples": 0,  # first so many of the test split; 0: all
        "seed": 0,
      },
      "figures": {
        "attack": "pgd20",  # of the attention maps
        "num_images": 12,  # the first test images
      },
    }
  )
