"""Every field of a configuration, once, with its type and its default.

The other files change values, never add fields. `--config.<field>=<value>`
changes one from the command line; a misspelt field or a wrong type is refused.
Numbers of pixels are in [0, 1]: epsilon = 8/255 is 0.0313...
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

ATTACK = {
  "epsilon": 8 / 255,  # radius of the attack in training
  "step_size": 2 / 255,
  "num_steps": 7,
  "norm": "linf",  # linf, l2 or l1
  "attack_loss": "cross_entropy",  # margin, dlr, kl
  "attack_start": "uniform",  # gaussian: the clean image and a little noise
  "attack_batch_norm": "batch",  # statistics while attacking, or running
  "attack_moves_statistics": True,  # as the codes of AT and ATAT do
}
"""The attack of training, as the paper's code and Madry et al.'s have it."""

# Batches that BatchNorm normalises by: mixture, in_turn, separate.
PAIRED = {**ATTACK, "student_batch_norm": "mixture"}

# The codes of TRADES, MART and TLA attack a network in evaluation mode and pass
# clean and adversarial images one after the other.
_BY_ITSELF = {
  **PAIRED,
  "attack_batch_norm": "running",
  "attack_moves_statistics": False,
  "student_batch_norm": "in_turn",
}
_SMALL_START = {
  **_BY_ITSELF,
  "epsilon": 0.031,
  "step_size": 0.007,
  "num_steps": 10,
  "attack_start": "gaussian",
}

METHODS = {
  # Standard training: no attack, no teacher.
  "standard": {},
  # Adversarial training (Madry et al., 2018).
  "at": {**ATTACK},
  # Logit pairing (Kannan et al., 2018), under the paper's attack.
  "alp": {**PAIRED, "weight": 0.5},  # of the pairing
  # Triplets of embeddings (Mao et al., 2019).
  "tla": {
    **_BY_ITSELF,
    "lambda1": 2.0,  # weight of the triplets
    "lambda2": 0.002,  # weight of the embeddings' squares
    "margin": 0.03,
    "layer": "",  # what is embedded; "": the topmost convolutional tensor
  },
  # Zhang et al., 2019.
  "trades": {
    **_SMALL_START,
    "attack_loss": "kl",
    "beta": 6.0,  # weight of the KL
  },
  # Wang et al., 2020.
  "mart": {**_SMALL_START, "beta": 6.0},  # weight of the KL
  # Attention transfer, Eq. (4) to (7). The paper does not give the lambdas.
  "atat": {
    **PAIRED,
    "lambda1": 1.0,  # weight of attention transfer, Eq. (5)
    "lambda2": 0.1,  # weight of logit pairing, Eq. (6)
    "layers": (),  # the set J; (): the topmost convolutional tensor
    "pairs": ("teacher_adversarial", "teacher_clean"),  # clean_adversarial
    "maps": "grad_cam",  # channel_sum
    "normalization": "raw",  # of the maps: l2, min_max
    "distance": "norm",  # mean_square
    "p": 2,  # norm in Eq. (5): 1 or 2
    "starts_from_teacher": True,  # the student; False: fresh
  },
  # What the paper's code trains instead.
  "atat_released": {
    **PAIRED,
    "variant": "logits",  # CIFAR-10; maps: CIFAR-100
    "weight": 1.0,  # of each term of transfer
    "starts_from_teacher": False,
  },
}
"""Hyperparameters of each method: the fields of `config.objective`."""

PUBLISHED = {
  # 80,000 steps of 128 images; the rate falls at 40,000 and at 60,000.
  "at": {"num_epochs": 209, "batch_size": 128},
  # The paper's, as ATAT: no other is published for CIFAR.
  "alp": {"num_epochs": 52, "batch_size": 32},
  # At most 80,000 steps of 50 images. (It is tuned from a network of AT; here
  # it starts afresh, with the schedule of AT.)
  "tla": {"num_epochs": 82, "batch_size": 50},
  # The rate falls in epoch 75.
  "trades": {"num_epochs": 76, "boundaries": (74 / 76,)},
  # ... and again in epoch 90.
  "mart": {
    "num_epochs": 90,
    "boundaries": (74 / 90, 89 / 90),
    "weight_decay": 7e-4,
  },
  # 80,000 steps of 32 images; the rate falls at 40,000 and at 60,000. (The
  # released configuration allows 400,000 steps, the last 340,000 at 0.001.)
  "atat": {"num_epochs": 52, "batch_size": 32},
  "atat_released": {"num_epochs": 52, "batch_size": 32},
}
"""Training on CIFAR as each method's authors have it: of `config.train`."""

MODERN = {
  "batch_size": 128,
  "schedule": "one_cycle",
  "learning_rate": 0.2,
  "warmup_fraction": 0.25,
  "nesterov": True,
  "weight_decay": 5e-4,
  "ema_decay": 0.999,
}
"""Training that is the same for all methods, to compare them."""

RECIPES = ("paper", "modern")


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
      # Options for every method (docs/training.md); 0, or 1 part: off.
      "clip_norm": 0.0,  # longest gradient
      "accumulate_steps": 1,  # parts of a batch, one after another, for memory
      "remat": False,  # compute what is cheap twice rather than keep it
      "label_smoothing": 0.0,
      "epsilon_warmup": 0.0,  # share of the run in which the attack grows
      "awp_gamma": 0.0,  # weight perturbation: 0.01 AT, 0.005 TRADES
      "awp_start": 0.0,  # share of the run without it
      "ema_decay": 0.0,  # averaged weights: 0.999, 0.9999 in long runs
      "swa_start": 0.0,  # equal average from this share of the run on
      # Batches that estimate the averaged weights' statistics before each
      # validation; 0: averaged like the weights (ema), refused with swa.
      "statistics_batches": 0,
      "log_every_steps": 50,
      "steps_per_dispatch": 1,  # in one program; more where steps are short
      "validate_every_epochs": 1.0,  # ... and save a checkpoint
    }
  )


def parse(choice: str, recipes: tuple[str, ...] = RECIPES) -> tuple[str, str]:
  """What stands after the colon: "atat" or "atat,modern".

  Args:
    choice: A method, or a method and a recipe.
    recipes: Those that there are; the first is taken where none is named.

  Returns:
    Method and recipe.

  Raises:
    ValueError: Unknown method or recipe.
  """
  method, *rest = choice.split(",")
  if method not in METHODS:
    raise ValueError(f"method: {method!r}; allowed: {', '.join(METHODS)}")
  recipe = ",".join(rest) if rest else recipes[0]
  if recipe not in recipes:
    raise ValueError(f"recipe: {recipe!r}; allowed: {', '.join(recipes)}")
  return method, recipe


def make_cifar(config: ConfigDict) -> None:
  """What the CIFAR configurations share: the recipe.

  Both select the checkpoint by robust accuracy on validation images.

  Args:
    config: Of `get_config`; changed in place.
  """
  method = config.method
  if config.recipe == "modern":
    config.data.padding = 4
    config.train.update(MODERN, num_epochs=100)
    config.teacher.update(MODERN, num_epochs=50)
    if method != "standard":
      config.objective.update(
        epsilon=8 / 255,
        step_size=2 / 255,
        num_steps=10,
        attack_batch_norm="running",
        attack_moves_statistics=False,
      )
  else:
    # TRADES and MART pad 4 pixels, the others as Madry et al. 2.
    config.data.padding = 4 if method in ("trades", "mart") else 2
    config.train.update(PUBLISHED.get(method, {}))


def get_config(
  choice: str = "atat", recipes: tuple[str, ...] = RECIPES
) -> ConfigDict:
  """The default configuration: the paper's network and settings.

  Args:
    choice: A method of `METHODS`, and after a comma a recipe.
    recipes: See `parse`.

  Returns:
    The configuration.

  Raises:
    ValueError: Unknown method or recipe.
  """
  method, recipe = parse(choice, recipes)
  return ConfigDict(
    {
      "seed": 0,
      "method": method,
      # A note of what was chosen after the colon, as in cifar10.py:at,modern.
      "recipe": recipe,
      "profile_steps": (),  # first and last of what is recorded, e.g. 10,12
      "data": {
        "name": "cifar10",  # digits, cifar10, cifar100
        "dir": placeholder(str),  # tfds directory, archive or .npz; None: usual
        "cache_dir": placeholder(str),  # of decoded copies; None: user's cache
        "source": "auto",  # tfds, binary, python
        "validation_size": 1024,  # held out of the training split
        "padding": 4,  # pixels before the random crop; 0: no crop
        "flip": True,  # mirror at random
        "mix": "none",  # mixup, cutmix
        "mix_alpha": 1.0,  # share of an image: Beta(alpha, alpha)
        "extra": placeholder(str),  # .npz or directory of further images
        "extra_fraction": 0.7,  # of every batch, where there are any
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
      # What the report shows besides; with the attack of `evaluation`.
      "figures": {
        # attention, rounds, shift, landscape, curvature, steps, epsilons
        "analyses": "attention,rounds,shift,landscape,curvature,steps,epsilons",
        "attack": "pgd20",  # of the attention maps
        "num_images": 12,  # attention maps: of the first test images
        "rounds": (2, 8, 16),  # rounds, shift: of the attack that is followed
        "num_followed": 3,  # rounds: of the first so many test images
        "indices": (1450, 7558),  # landscapes: around these test images
        "num_points": 41,  # landscapes: points a side
        # shift, curvature, steps, epsilons: over the first test images
        "num_examples": 500,
        "num_steps": 100,  # steps: of the longest attack
        "epsilons": (),  # epsilons: radii; (): about evaluation.epsilon
      },
    }
  )
