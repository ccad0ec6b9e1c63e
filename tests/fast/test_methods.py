"""Published hyperparameters, as literal numbers from the papers and codes.

The expected values are written out here on purpose: a default that changes by
accident would otherwise change every configuration with it.
"""

import pytest

from atat_jax import objectives
from atat_jax.errors import UserError

# Madry et al.'s code, which the code of ATAT uses.
ATTACK = {
  "epsilon": 0.03137254901960784,
  "step_size": 0.00784313725490196,
  "num_steps": 7,
  "norm": "linf",
  "attack_loss": "cross_entropy",
  "attack_start": "uniform",
  "attack_batch_norm": "batch",
  "attack_moves_statistics": True,
}
# The codes of TLA, TRADES and MART attack a network in evaluation mode and pass
# clean and adversarial images one after the other.
IN_TURN = {
  "attack_batch_norm": "running",
  "attack_moves_statistics": False,
  "student_batch_norm": "in_turn",
}
SMALL_START = {
  **IN_TURN,
  "epsilon": 0.031,
  "step_size": 0.007,
  "num_steps": 10,
  "attack_start": "gaussian",
}

PUBLISHED = {
  "standard": {},
  "at": ATTACK,
  "alp": {**ATTACK, "student_batch_norm": "mixture", "weight": 0.5},
  "tla": {
    **ATTACK,
    **IN_TURN,
    "lambda1": 2.0,
    "lambda2": 0.002,
    "margin": 0.03,
    "layer": "",
  },
  "trades": {**ATTACK, **SMALL_START, "attack_loss": "kl", "beta": 6.0},
  "mart": {**ATTACK, **SMALL_START, "beta": 6.0},
  "atat": {
    **ATTACK,
    "student_batch_norm": "mixture",
    "lambda1": 1.0,
    "lambda2": 0.1,
    "layers": (),
    "pairs": ("teacher_adversarial", "teacher_clean"),
    "maps": "grad_cam",
    "normalization": "raw",
    "distance": "norm",
    "p": 2,
    "starts_from_teacher": True,
  },
  "atat_released": {
    **ATTACK,
    "student_batch_norm": "mixture",
    "variant": "logits",
    "weight": 1.0,
    "starts_from_teacher": False,
  },
}

CIFAR = {  # training, and pixels of padding
  "standard": ({}, 2),
  "at": ({"num_epochs": 209, "batch_size": 128}, 2),
  "alp": ({"num_epochs": 52, "batch_size": 32}, 2),
  "tla": ({"num_epochs": 82, "batch_size": 50}, 2),
  "trades": ({"num_epochs": 76, "boundaries": (0.9736842105263158,)}, 4),
  "mart": (
    {
      "num_epochs": 90,
      "boundaries": (0.8222222222222222, 0.9888888888888889),
      "weight_decay": 0.0007,
    },
    4,
  ),
  "atat": ({"num_epochs": 52, "batch_size": 32}, 2),
  "atat_released": ({"num_epochs": 52, "batch_size": 32}, 2),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_default_hyperparameters_are_the_published_ones(method):
  found = objectives.defaults(method)
  assert found == PUBLISHED[method]
  types = {name: type(value) for name, value in found.items()}
  assert types == {name: type(v) for name, v in PUBLISHED[method].items()}


@pytest.mark.parametrize("method", CIFAR)
def test_training_on_cifar_is_the_published_one(method):
  training, padding = CIFAR[method]
  objective = objectives.OBJECTIVES[method]
  assert objective.cifar_training == training
  assert objective.cifar_padding == padding


@pytest.mark.parametrize("method", objectives.OBJECTIVES)
def test_defaults_make_the_objective_that_no_arguments_make(method):
  """Every hyperparameter has a default, and the defaults are accepted."""
  defaults = objectives.defaults(method)
  assert objectives.create(method, **defaults) == objectives.create(method)


def test_defaults_of_an_unknown_method_are_refused():
  with pytest.raises(UserError, match=r"method: 'at7'; allowed: .*atat"):
    objectives.defaults("at7")
