"""Every field of a configuration, once, with its type and its default.

The other files change values, they never add fields, but for a network's own. The
fields of `config.objective` are those of the method's dataclass in
`atat_jax.objectives`.
`--config.<field>=<value>` changes a field from the command line; a misspelt
field or a wrong type is refused. Pixels are in [0, 1]: epsilon = 8/255 is
0.0313...
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from atat_jax import analyses
from atat_jax.errors import near
from atat_jax.objectives import OBJECTIVES, SETTINGS, defaults, setting

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

FAST = MODERN | {
  "batch_size": 512,
  "learning_rate": 0.4,
  "label_smoothing": 0.1,
  "log_every_steps": 95,  # an epoch of CIFAR-10
  "steps_per_dispatch": 19,
  "validate_every_epochs": 10.0,
  "term_gradients": False,  # a program more to compile
}
"""Training of all methods in minutes on one accelerator."""

RECIPES = ("paper", "modern", "fast")


def training() -> dict[str, Any]:
  """Returns the fields of `config.train` and of `config.teacher`."""
  return {
    "num_epochs": 52,
    "batch_size": 128,
    # constant, piecewise, cosine, one_cycle, triangular
    "schedule": "piecewise",
    "learning_rate": 0.1,  # the highest
    "boundaries": (0.5, 0.75),  # piecewise: shares of the run where it falls
    "factor": 0.1,  # piecewise: factor of each fall
    "warmup_fraction": 0.0,  # the last three: share in which it rises
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 2e-4,  # on kernels only
    "optimizer": "sgd",  # adamw: momentum is its first decay
    "second_momentum": 0.999,  # adamw: its second
    # Options for every method (docs/training.md); 0, or 1 part: off.
    "clip_norm": 0.0,  # longest gradient
    "accumulate_steps": 1,  # parts of a batch, one after another, for memory
    "remat": False,  # compute cheap results twice rather than keep them
    "label_smoothing": 0.0,
    "epsilon_warmup": 0.0,  # share of the run in which the attack grows
    "awp_gamma": 0.0,  # weight perturbation: 0.01 for AT, 0.005 for TRADES
    "awp_start": 0.0,  # share of the run without it
    "ema_decay": 0.0,  # averaged weights: 0.999, or 0.9999 in long runs
    "swa_start": 0.0,  # equal average from this share of the run on
    # Batches that estimate the averaged weights' statistics before each
    # validation; 0: averaged like the weights (ema), refused with swa.
    "statistics_batches": 0,
    "log_every_steps": 50,
    "steps_per_dispatch": 1,  # in one program; more where steps are short
    # A step whose numbers are not finite: stop, skip, rollback.
    "nonfinite": "stop",
    "validate_every_epochs": 1.0,  # each validation also saves a checkpoint
    # Validations compare the gradients of the loss's terms.
    "term_gradients": True,
    # Validations also measure one step, and say where only that is withstood.
    "overfitting_alarm": True,
  }


def _data() -> dict[str, Any]:
  return {
    # A name in atat_jax.data.DATASETS; your own: npz, folder, tfds:<name>.
    "name": "cifar10",
    "dir": placeholder(
      str
    ),  # tfds directory, archive, folder, .npz; None: usual
    "cache_dir": placeholder(str),  # decoded copies; None: the user's cache
    "source": "auto",  # tfds, binary, python
    "size": 0,  # side of pictures in folders, resized and cropped; 0: as they are
    "validation_size": 1024,  # held out of the training split
    "padding": 4,  # pixels before the random crop; 0: no crop
    "flip": True,  # mirror at random
    "mix": "none",  # mixup, cutmix
    "mix_alpha": 1.0,  # share of an image: Beta(alpha, alpha)
    "extra": placeholder(str),  # .npz or directory of further images
    "extra_fraction": 0.7,  # share of every batch, where there are any
    # Leaves the pictures of folder and tfds on the disk (docs/training.md).
    "stream": False,
    "workers": 0,  # stream: processes that read ahead; 0: threads
    "prefetch": 2,  # stream: batches that are read ahead
    "smallest_crop": 0.08,  # stream: share of a picture; 1: no random crop
    "rand_augment": 0.0,  # stream: magnitude of RandAugment, up to 10; 0: none
    "shard_size": 1000,  # stream: test images in memory at a time
  }


def _model() -> dict[str, Any]:
  return {
    "name": "wide_resnet",  # a name in atat_jax.models.MODELS
    # Fields that every network has. per_image is the paper's, and costs
    # robustness (docs/reproduction.md); recipe modern: dataset, mean and std.
    "normalization": "per_image",  # dataset, none
    "batch_norm_momentum": 0.9,
    "batch_norm_epsilon": 1e-3,
    # Consecutive images that share statistics in training; 0: the whole batch.
    "batch_norm_group_size": 0,
    "dtype": "float32",  # bfloat16 on accelerators
    # Fields that only some have, as wide_resnet; the others ignore them.
    "depth": 32,  # 6n + 2 or 6n + 4
    "width": 10,
    "activation": "leaky_relu",  # relu, silu
    "negative_slope": 0.1,  # slope of the leaky ReLU
    "shortcut": "pad",  # the paper's; conv: the usual WRN-28-10, 34-10
    "strides": (1, 2, 2),  # one a stage
    "stem_channels": 16,
    "padding": "same",  # TensorFlow's; symmetric: PyTorch's
  }


def _evaluation() -> dict[str, Any]:
  return {
    # Attack that chooses checkpoints, on the validation split.
    "validation_attack": "pgd10",
    # Names as `atat_jax.evaluation.parse` has them, for example pgd20-margin,
    # apgd100, autoattack-fast; other numbers as in square:norm=l2:epsilon=0.5.
    "attacks": "nominal,fgsm,ifgsm20,pgd7,pgd20,pgd20-margin",
    "norm": "linf",
    "epsilon": 8 / 255,
    "step_size": 2 / 255,
    "num_restarts": 1,
    # running: a fixed classifier. batch: the paper's released protocol.
    "batch_norm": ("running", "batch"),
    "batch_size": 500,
    "batch_statistics_size": 100,  # images a batch in the mode batch
    "num_examples": 0,  # test images, from the first on; 0: all
    "seed": 0,
    "teacher": True,  # whether it is evaluated beside the student
    # Corrupted test images, beside the attacks: generated, or the folder of
    # CIFAR-10-C or CIFAR-100-C; "": none.
    "corruptions": "",
  }


def _figures() -> dict[str, Any]:
  return {
    "analyses": ",".join(analyses.ANALYSES),
    "attack": "pgd20",  # attack of the attention maps
    "num_images": 12,  # attention maps: the first test images
    "rounds": (2, 8, 16),  # rounds, shift: steps of the attack that are shown
    "num_followed": 3,  # rounds: the first test images
    "indices": (0, 1),  # landscapes: around these test images
    "num_points": 41,  # landscapes: points a side
    # shift, curvature, steps, epsilons: over the first test images
    "num_examples": 500,
    "num_steps": 100,  # steps: length of the longest attack
    "epsilons": (),  # epsilons: radii; (): around evaluation.epsilon
  }


def parse(choice: str, recipes: tuple[str, ...] = RECIPES) -> tuple[str, str]:
  """Splits the text after the colon: "atat" or "atat_mixture,modern".

  Args:
    choice: A method or a named setting of one, and maybe a recipe.
    recipes: Recipes that exist; the first one is the default.

  Returns:
    Method or setting, and recipe.

  Raises:
    ValueError: Unknown method, setting or recipe.
  """
  method, *rest = choice.split(",")
  known = (*OBJECTIVES, *SETTINGS)
  if method not in known:
    raise ValueError(
      f"method: {method!r}; allowed: {', '.join(known)}{near(method, known)}"
    )
  recipe = ",".join(rest) if rest else recipes[0]
  if recipe not in recipes:
    raise ValueError(
      f"recipe: {recipe!r}; allowed: {', '.join(recipes)}"
      f"{near(recipe, recipes)}"
    )
  return method, recipe


def get_config(
  choice: str = "atat", recipes: tuple[str, ...] = RECIPES
) -> ConfigDict:
  """Returns the default configuration: the paper's network and settings.

  Args:
    choice: A method of `OBJECTIVES` or a named setting of `SETTINGS`, and after
      a comma a recipe.
    recipes: See `parse`.

  Returns:
    The configuration.

  Raises:
    ValueError: Unknown method or recipe.
  """
  name, recipe = parse(choice, recipes)
  method, fields = setting(name)
  return ConfigDict(
    {
      "seed": 0,
      "method": method,
      # A note of the choice after the colon, as in cifar10.py:at,modern.
      "recipe": recipe,
      "profile_steps": (),  # first and last step of a profile, e.g. 10,12
      # Devices that share parameters, optimizer state and averages, for memory.
      "model_axis": 1,
      "data": _data(),
      "model": _model(),
      "objective": defaults(method) | fields,
      "train": training(),
      "teacher": training(),
      # A finished run to take the teacher from; None: train one.
      "teacher_workdir": placeholder(str),
      "evaluation": _evaluation(),
      # Analyses of the report, under the attack of `evaluation`.
      "figures": _figures(),
    }
  )


def update_attack(config: ConfigDict, **numbers: Any) -> None:
  """Changes the attack of training, as far as the method has these fields.

  Args:
    config: The configuration; changed in place.
    **numbers: Fields of `config.objective` to their values.
  """
  known = {k: v for k, v in numbers.items() if k in config.objective}
  config.objective.update(known)


def make_cifar(config: ConfigDict) -> None:
  """Applies the recipe, as both CIFAR configurations do.

  Args:
    config: The configuration; changed in place.
  """
  if config.recipe == "paper":
    method = OBJECTIVES[config.method]
    config.data.padding = method.cifar_padding
    config.train.update(method.cifar_training)
    return
  config.data.padding = 4
  config.model.normalization = "dataset"
  update_attack(
    config,
    epsilon=8 / 255,
    step_size=2 / 255,
    num_steps=10,
    attack_batch_norm="running",
    attack_moves_statistics=False,
    student_batch_norm="mixture",
  )
  if config.recipe == "modern":
    config.train.update(MODERN, num_epochs=100)
    config.teacher.update(MODERN, num_epochs=50)
  else:
    _make_fast(config)


def _make_fast(config: ConfigDict) -> None:
  """Applies what the recipe `fast` has beyond those of all methods."""
  config.model.update(
    name="preact_resnet18", dtype="bfloat16", batch_norm_epsilon=1e-5
  )
  # Channels of the first of four stages; each stage doubles them.
  config.model.base_channels = 64
  config.train.update(FAST, num_epochs=60)
  config.teacher.update(FAST, num_epochs=20)
  update_attack(config, step_size=2.5 / 255, num_steps=5)
  config.evaluation.attacks = "nominal,fgsm,pgd20,pgd20-margin,autoattack"
  config.figures.analyses = "attention,shift"
