"""Hyperparameters of the methods: published defaults, and refused values.

The expected defaults are literal numbers from the papers and codes: a default
that changes by accident would change every configuration with it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from atat_jax import objectives
from atat_jax.errors import UserError

# Madry et al.'s code, which the code of ATAT uses.
ATTACK = {
  "attack_method": "pgd",
  "epsilon": 0.03137254901960784,
  "step_size": 0.00784313725490196,
  "num_steps": 7,
  "single_step_size": 0.0,
  "single_step_noise": 2.0,
  "norm": "linf",
  "attack_loss": "cross_entropy",
  "attack_start": "uniform",
  "attack_batch_norm": "batch",
  "attack_moves_statistics": True,
  "starts_from_teacher": False,
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
    "lambda2": 1.0,
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


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(epsilon=0.0), "epsilon: 0.0; allowed: a number > 0"),
    (dict(epsilon=float("nan")), "epsilon: nan; allowed: a number > 0"),
    (dict(epsilon=8), "epsilon: 8; allowed: at most 1 for linf"),
    (dict(step_size=-1), "step_size: -1; allowed: a number > 0"),
    (dict(num_steps=0), "num_steps: 0; allowed: an integer > 0"),
    (dict(num_steps=1.5), "num_steps: 1.5; allowed: an integer > 0"),
    (dict(lambda1=-0.1), "lambda1: -0.1; allowed: >= 0"),
    (dict(lambda2=float("inf")), "lambda2: inf; allowed: >= 0"),
    (dict(lambda2=float("nan")), "lambda2: nan; allowed: >= 0"),
    (dict(p=3), "p: 3; allowed: 1, 2"),
    (dict(norm="l0"), "norm: 'l0'; allowed: l1, l2, linf"),
    (
      dict(attack_loss="ce"),
      "attack_loss: 'ce'; allowed: cross_entropy, dlr, kl, margin",
    ),
    (
      dict(attack_batch_norm="train"),
      "attack_batch_norm: 'train'; allowed: batch, running",
    ),
    (
      dict(attack_batch_norm="running", attack_moves_statistics=True),
      "attack_moves_statistics: True; allowed: False where",
    ),
    (dict(attack_method="fgsm"), "attack_method: 'fgsm'; allowed: fgsm_rs, n_"),
    (
      dict(single_step_size=-1.0),
      "single_step_size: -1.0; allowed: a number >= 0",
    ),
    (
      dict(single_step_noise=float("inf")),
      "single_step_noise: inf; allowed: a number >= 0",
    ),
    (dict(attack_start="zero"), "attack_start: 'zero'; allowed: gaussian, un"),
    (
      dict(student_batch_norm="both"),
      "student_batch_norm: 'both'; allowed: in_turn, mixture, separate",
    ),
    (dict(pairs=("self",)), "pairs: 'self'; allowed: clean_adversarial, teac"),
    (dict(pairs=()), "pairs: (); allowed: one or more of teacher_adversarial"),
    (dict(pairs=("teacher_clean",) * 2), "pairs: ('teacher_clean', 'teacher"),
    (dict(maps="cam"), "maps: 'cam'; allowed: channel_sum, grad_cam"),
    (dict(normalization="l1"), "normalization: 'l1'; allowed: l2, min_max, r"),
    (dict(distance="l2"), "distance: 'l2'; allowed: mean_square, norm"),
    (dict(lambda3=1.0), "hyperparameter of 'atat': 'lambda3'; allowed: "),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_hyperparameters_are_named(fields, message):
  with pytest.raises(UserError) as error:
    objectives.create("atat", **fields)
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("method", "fields", "message"),
  [
    ("alp", dict(weight=-1.0), "weight: -1.0; allowed: >= 0"),
    ("trades", dict(beta=float("nan")), "beta: nan; allowed: >= 0"),
    ("mart", dict(beta=-0.5), "beta: -0.5; allowed: >= 0"),
    ("tla", dict(lambda1=-1.0), "lambda1: -1.0; allowed: >= 0"),
    ("tla", dict(margin=-1.0), "margin: -1.0; allowed: "),
    ("at", dict(num_steps=0), "num_steps: 0; allowed: an integer > 0"),
    ("atat_released", dict(variant="cam"), "variant: 'cam'; allowed: logits,"),
    ("atat_released", dict(weight=-1.0), "weight: -1.0; allowed: >= 0"),
  ],
)
def test_bad_hyperparameters_of_other_methods_are_named(
  method, fields, message
):
  with pytest.raises(UserError) as error:
    objectives.create(method, **fields)
  assert str(error.value).startswith(message)


@pytest.mark.parametrize("method", PUBLISHED)
def test_attention_transfer_needs_a_teacher_and_no_other_method(method):
  needs_teacher = objectives.create(method).needs_teacher
  assert needs_teacher == (method in ("atat", "atat_released"))


def test_atat_needs_a_teacher_unless_the_student_is_its_own():
  def atat(**fields):
    return objectives.create("atat", **fields)

  assert not atat(pairs=("clean_adversarial",)).needs_teacher
  assert atat(pairs=("clean_adversarial", "teacher_clean")).needs_teacher
  # The paper's ablation differs in its weights only.
  ablation = atat(lambda1=0.0, lambda2=0.0)
  assert ablation.needs_teacher and ablation.starts_from_teacher
  # The released script starts afresh, although the paper says otherwise.
  assert not objectives.create("atat_released").starts_from_teacher


@pytest.mark.parametrize("name", objectives.SETTINGS)
def test_a_setting_changes_its_fields_alone_and_is_told_from_them(name):
  method, changes = objectives.setting(name)
  made = {**objectives.defaults(method), **changes}
  assert {k: made[k] for k in changes} != {
    k: objectives.defaults(method)[k] for k in changes
  }
  assert objectives.setting_name(method, made) == name
  # Numbers that no setting has are told as the method, not as the nearest name.
  other = {**made, "epsilon": 0.3}
  assert objectives.setting_name(method, other) == name
  if method == "atat":
    assert objectives.setting_name(method, {**made, "lambda1": 7.0}) == method
  assert objectives.create(method, **made).starts_from_teacher == (
    name == "at_from_teacher"
    or (method == "atat" and not name.endswith("_fresh"))
  )


def test_only_methods_that_start_from_a_teacher_need_one():
  for method in ("at", "alp", "tla", "trades", "mart"):
    started = objectives.create(method, starts_from_teacher=True)
    assert started.needs_teacher
    assert not objectives.create(method).needs_teacher


@pytest.mark.parametrize("normalization", ["l2", "min_max"])
def test_a_map_without_contrast_has_a_finite_gradient(normalization):
  objective = objectives.create("atat", normalization=normalization)
  maps = jnp.stack([jnp.zeros((3, 3)), jnp.arange(9.0).reshape(3, 3)])

  @quick.jit
  def normalized_and_gradient(maps):
    def total(maps):
      normalized = objective._normalize(maps)
      return objective._distance(normalized, jnp.ones((2, 3, 3))).sum()

    return objective._normalize(maps), jax.grad(total)(maps)

  normalized, gradient = normalized_and_gradient(maps)
  assert (normalized[0] == 0).all()
  assert np.isfinite(gradient).all() and (gradient[1] != 0).any()
