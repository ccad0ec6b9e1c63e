"""Configurations: all that ship are valid, and what is wrong is named at once."""

import dataclasses
import json
import math

import pytest
import tiny
from ml_collections import ConfigDict

from atat_jax import config, models, objectives
from atat_jax.errors import UserError
from atat_jax.training import options

NAMES = sorted(
  path.stem
  for path in (tiny.ROOT / "configs").glob("*.py")
  if path.stem != "__init__"
)
METHODS = (
  "standard",
  "at",
  "alp",
  "tla",
  "trades",
  "mart",
  "atat",
  "atat_released",
)


def leaves(tree, path=""):
  for key, value in tree.items():
    if isinstance(value, ConfigDict | dict):
      yield from leaves(value, f"{path}{key}.")
    else:
      yield f"{path}{key}", value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_shipped_configurations_are_valid(name, method):
  made = tiny.load_config(name, method)
  assert made.method == method
  plan = config.make_plan(made)
  # Every hyperparameter of the method and of the network can be set.
  assert set(made.objective) == {
    field.name for field in dataclasses.fields(plan.objective)
  }
  shape = {"num_classes", "mean", "std", "convolution"}  # not the user's
  fields = {field.name for field in dataclasses.fields(plan.model)}
  assert set(made.model) == fields - {"parent", "name"} - shape | {"name"}
  assert plan.model_spec["image_shape"] == list(plan.spec.image_shape)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_fields_and_types_are_those_of_the_default(name, method):
  def types(made):
    return {
      path: "placeholder" if value is None else type(value)
      for path, value in leaves(made)
    }

  expected = types(tiny.load_config("default", method))
  assert types(tiny.load_config(name, method)) == expected


def test_methods_are_those_that_exist():
  default = tiny.load_config("default", None)
  assert default.method == "atat"
  assert set(METHODS) == set(objectives.OBJECTIVES)
  with pytest.raises(ValueError, match=r"method: 'madry'.*standard.*atat"):
    tiny.load_config("cifar10", "madry")


def test_cifar10_is_the_papers():
  made = tiny.load_config("cifar10", "atat")
  plan = config.make_plan(made)
  objective = plan.objective
  assert isinstance(objective, objectives.OBJECTIVES["atat"])
  assert (objective.epsilon, objective.step_size) == (8 / 255, 2 / 255)
  assert (objective.num_steps, objective.norm, objective.p) == (7, "linf", 2)
  assert objective.attack_loss == "cross_entropy"
  assert objective.layers == ()
  assert objective.attack_batch_norm == "batch"
  assert objective.attack_moves_statistics
  assert (made.data.padding, made.data.flip) == (2, True)
  model = plan.model
  assert (model.depth, model.width, model.num_classes) == (32, 10, 10)
  assert (model.strides, model.stem_channels) == ((1, 2, 2), 16)
  assert (model.shortcut, model.padding) == ("pad", "same")
  assert (model.activation, model.negative_slope) == ("leaky_relu", 0.1)
  assert model.normalization == "per_image"
  assert (model.batch_norm_momentum, model.batch_norm_epsilon) == (0.9, 1e-3)
  settings = made.train
  assert settings.batch_size == 32
  assert (settings.momentum, settings.nesterov) == (0.9, False)
  assert settings.weight_decay == 2e-4
  steps = settings.num_epochs * ((50_000 - made.data.validation_size) // 32)
  assert steps == pytest.approx(80_000, rel=0.01)
  schedule, _ = config.make_optimizer(settings, total_steps=80_000)
  rates = {0: 0.1, 39_999: 0.1, 40_000: 0.01, 59_999: 0.01, 60_000: 0.001}
  for step, rate in {**rates, 79_999: 0.001}.items():
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-5), step
  numbers = {(p.epsilon, p.step_size) for p in plan.protocols[2:]}
  assert numbers == {(8 / 255, 2 / 255)}
  names = [protocol.name for protocol in plan.protocols]
  assert names[:5] == ["nominal", "fgsm", "ifgsm20", "pgd7", "pgd20"]


def test_cifar100_is_the_papers():
  made = tiny.load_config("cifar100", "atat")
  plan = config.make_plan(made)
  assert (plan.spec.name, plan.model.num_classes) == ("cifar100", 100)
  assert (made.train.batch_size, made.data.padding) == (64, 2)
  assert (plan.model.depth, plan.model.width) == (32, 10)
  names = [protocol.name for protocol in plan.protocols]
  assert {"nominal", "fgsm", "ifgsm20", "pgd10", "pgd20"} <= set(names)


def test_peers_are_their_authors():
  trades, mart, at, tla, alp = (
    tiny.load_config("cifar10", method)
    for method in ("trades", "mart", "at", "tla", "alp")
  )
  for made in (trades, mart):
    attack = made.objective
    assert (attack.epsilon, attack.step_size) == (0.031, 0.007)
    assert (attack.num_steps, attack.attack_start) == (10, "gaussian")
    assert attack.attack_batch_norm == "running" and attack.beta == 6
    assert attack.student_batch_norm == "in_turn"
    assert (made.data.padding, made.train.batch_size) == (4, 128)
  assert trades.objective.attack_loss == "kl"
  assert mart.objective.attack_loss == "cross_entropy"
  assert (trades.train.num_epochs, trades.train.weight_decay) == (76, 2e-4)
  assert (mart.train.num_epochs, mart.train.weight_decay) == (90, 7e-4)
  schedule, _ = config.make_optimizer(mart.train, total_steps=90)
  rates = {0: 0.1, 73: 0.1, 74: 0.01, 88: 0.01, 89: 0.001}
  for epoch, rate in rates.items():  # from 0: the 75th and the 90th
    assert float(schedule(epoch)) == pytest.approx(rate, rel=1e-5), epoch
  for made, steps in ((at, 80_000), (tla, 80_000)):
    per_epoch = (50_000 - made.data.validation_size) // made.train.batch_size
    assert made.train.num_epochs * per_epoch == pytest.approx(steps, rel=0.01)
    assert made.objective.num_steps == 7 and made.data.padding == 2
  assert at.objective.attack_batch_norm == "batch"
  assert (tla.objective.margin, tla.objective.lambda1) == (0.03, 2)
  assert tla.objective.attack_batch_norm == "running"
  assert alp.objective.weight == 0.5
  assert tiny.load_config("cifar10", "atat_released").objective.variant == (
    "logits"
  )
  released = tiny.load_config("cifar100", "atat_released")
  assert released.objective.variant == "maps"
  assert released.train == tiny.load_config("cifar100", "atat").train


@pytest.mark.parametrize(
  ("name", "recipe"),
  [("cifar10", "modern"), ("cifar100", "modern"), ("digits", None)],
)
def test_one_recipe_trains_all_methods_alike(name, recipe):
  def load(method):
    made = tiny.load_config(name, f"{method},{recipe}" if recipe else method)
    assert (made.method, made.recipe) == (method, "modern")
    config.make_plan(made)
    return made

  atat = load("atat")
  attack = ("epsilon", "step_size", "num_steps", "norm", "attack_batch_norm")
  for method in set(METHODS) - {"standard"}:
    made = load(method)
    assert (made.train, made.data) == (atat.train, atat.data)
    assert (made.model, made.teacher) == (atat.model, atat.teacher)
    for field in (*attack, "attack_moves_statistics"):
      assert made.objective[field] == atat.objective[field], (method, field)
  assert atat.train.weight_decay == 5e-4
  assert atat.train.schedule == "one_cycle"
  assert (atat.train.ema_decay > 0) == (name != "digits")
  standard = load("standard")
  assert standard.train == atat.teacher


@pytest.mark.parametrize(
  ("name", "choice", "message"),
  [
    ("cifar10", "at,new", "recipe: 'new'; allowed: paper, modern"),
    ("cifar100", "at,", "recipe: ''; allowed: paper, modern"),
    ("cifar10", "at,modern,paper", "recipe: 'modern,paper'; allowed: paper"),
    ("digits", "at,paper", "recipe: 'paper'; allowed: modern"),
    ("cifar10", "paper", "method: 'paper'; allowed: standard, at, alp"),
  ],
)
def test_unknown_choices_are_refused(name, choice, message):
  with pytest.raises(ValueError) as error:
    tiny.load_config(name, choice)
  assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_network_takes_the_fields_that_it_has(name):
  made = tiny.load_config("cifar100", "standard")
  made.model.update(name=name, normalization="dataset", batch_norm_epsilon=1e-5)
  plan = config.make_plan(made)
  assert type(plan.model) is models.MODELS[name]
  assert plan.model.num_classes == 100
  assert plan.model.mean == plan.spec.mean
  assert plan.model.batch_norm_epsilon == 1e-5
  # The others keep what the network says: a ResNet is not made 32 deep.
  others = models.create(name)
  for field in set(models.field_names(name)) - set(made.model):
    if field not in ("num_classes", "mean", "std"):
      assert getattr(plan.model, field) == getattr(others, field), field


def test_dataset_normalization_takes_the_data_sets_numbers():
  made = tiny.load_config("cifar10", "standard")
  made.model.normalization = "dataset"
  plan = config.make_plan(made)
  assert (plan.model.mean, plan.model.std) == (plan.spec.mean, plan.spec.std)
  # ... so that the network can be made again without the data set.
  fields = plan.model_spec["fields"]
  assert tuple(fields["mean"]) == plan.spec.mean


# (field, value, what the message names besides the value)
BAD = [
  ("data__name", "mnist", ["name", "digits", "cifar10"]),
  ("data__validation_size", 0, ["data.validation_size"]),
  ("data__padding", -1, ["data.padding"]),
  ("model__name", "resnet", ["model", "wide_resnet"]),
  ("model__depth", 11, ["depth", "6n + 2"]),
  ("model__depth", 2, ["depth", "6n + 2"]),
  ("model__width", 0, ["width"]),
  ("model__activation", "gelu", ["activation", "leaky_relu"]),
  ("model__shortcut", "none", ["shortcut", "pad", "conv"]),
  ("model__normalization", "x", ["normalization", "per_image"]),
  ("model__strides", (1, 2), ["strides"]),
  ("model__strides", (1, 0, 2), ["strides"]),
  ("model__padding", "valid", ["padding", "same"]),
  ("model__dtype", "float16", ["model.dtype", "bfloat16"]),
  ("objective__lambda1", -1.0, ["lambda1"]),
  ("objective__lambda2", math.nan, ["lambda2"]),
  ("objective__p", 3, ["p: "]),
  ("objective__epsilon", -1.0, ["epsilon"]),
  ("objective__epsilon", math.nan, ["epsilon"]),
  ("objective__step_size", 0.0, ["step_size"]),
  ("objective__num_steps", 0, ["num_steps"]),
  ("objective__norm", "l0", ["norm", "linf", "l2"]),
  ("objective__attack_loss", "hinge", ["attack_loss", "margin"]),
  ("objective__attack_batch_norm", "frozen", ["attack_batch_norm", "running"]),
  ("train__num_epochs", 0, ["train.num_epochs"]),
  ("train__batch_size", 0, ["train.batch_size"]),
  ("teacher__batch_size", -1, ["teacher.batch_size"]),
  ("train__schedule", "linear", ["train.schedule", "piecewise", "cosine"]),
  ("train__learning_rate", -0.1, ["train.learning_rate"]),
  ("teacher__learning_rate", math.inf, ["teacher.learning_rate"]),
  ("train__boundaries", (0.5, 2.0), ["train.boundaries", "between 0 and 1"]),
  ("train__warmup_fraction", 1.0, ["train.warmup_fraction"]),
  ("train__momentum", 1.0, ["train.momentum"]),
  ("train__weight_decay", -1.0, ["train.weight_decay"]),
  ("train__log_every_steps", 0, ["train.log_every_steps"]),
  ("train__clip_norm", -1.0, ["train.clip_norm"]),
  ("train__accumulate_steps", 3, ["train.accumulate_steps", "128"]),
  ("teacher__label_smoothing", 1.0, ["teacher.label_smoothing"]),
  ("train__epsilon_warmup", 1.0, ["train.epsilon_warmup", "share"]),
  ("train__awp_gamma", math.nan, ["train.awp_gamma"]),
  ("train__awp_start", -0.5, ["train.awp_start", "share"]),
  ("train__ema_decay", 1.0, ["train.ema_decay"]),
  ("teacher__swa_start", 2.0, ["teacher.swa_start", "share"]),
  ("train__statistics_batches", -1, ["train.statistics_batches"]),
  ("data__mix", "cutout", ["data.mix", "mixup", "cutmix"]),
  ("data__mix_alpha", 0.0, ["data.mix_alpha"]),
  ("data__extra_fraction", 1.0, ["data.extra_fraction"]),
  ("train__validate_every_epochs", 0.0, ["train.validate_every_epochs"]),
  ("evaluation__validation_attack", "cw", ["attack", "pgd<steps>"]),
  ("evaluation__attacks", "pgd", ["attack", "pgd<steps>"]),
  ("evaluation__attacks", "pgd0", ["attack", "pgd<steps>"]),
  ("evaluation__attacks", "pgd2,pgd2", ["attacks", "once"]),
  ("evaluation__attacks", "", ["attacks", "nominal"]),
  ("evaluation__attacks", "fgsm-margin", ["attack", "pgd<steps>-<loss>"]),
  ("evaluation__norm", "l0", ["norm", "l0", "linf"]),
  ("evaluation__norm", "l2", ["norm", "linf for fgsm"]),
  ("evaluation__epsilon", -1.0, ["epsilon"]),
  ("evaluation__step_size", 0.0, ["step_size"]),
  ("evaluation__num_restarts", 0, ["num_restarts"]),
  ("evaluation__batch_norm", ("train",), ["evaluation.batch_norm", "running"]),
  ("evaluation__batch_size", 0, ["evaluation.batch_size"]),
  ("evaluation__num_examples", -1, ["evaluation.num_examples"]),
  ("figures__attack", "x", ["attack", "pgd<steps>"]),
  ("figures__num_images", 0, ["figures.num_images"]),
  ("figures__analyses", "maps", ["figures.analyses", "maps", "landscape"]),
  ("figures__analyses", "steps,steps", ["figures.analyses", "once"]),
  ("figures__rounds", (8, 2), ["figures.rounds", "increasing"]),
  ("figures__rounds", (), ["figures.rounds", "above 0"]),
  ("figures__num_followed", 0, ["figures.num_followed"]),
  ("figures__num_examples", 0, ["figures.num_examples"]),
  ("figures__num_points", 4, ["figures.num_points", "odd"]),
  ("figures__num_steps", 0, ["figures.num_steps"]),
  ("figures__indices", (-1,), ["figures.indices"]),
  ("figures__epsilons", (0.2, 0.1), ["figures.epsilons", "increasing"]),
]


def one_line(error):
  message = str(error.value)
  assert len(message.splitlines()) == 1, message
  return message


@pytest.mark.parametrize(("field", "value", "named"), BAD)
def test_a_bad_value_is_named(field, value, named):
  with pytest.raises(UserError) as error:
    config.make_plan(tiny.config(**{field: value}))
  message = one_line(error)
  shown = value[0] if value == ("train",) else value
  for part in [*named, str(shown)]:
    assert part in message


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"train__schedule": "piecewise", "train__boundaries": ()}, "boundaries"),
    ({"train__boundaries": ("a",)}, "boundaries"),
    ({"train__schedule": "piecewise", "train__factor": -1.0}, "factor"),
    ({"model__strides": ("a", "b", "c")}, "strides"),
    ({"model__strides": (1, 1.5, 2)}, "strides"),
    ({"objective__layers": ("no_such_layer",)}, "no_such_layer"),
    ({"train__weight_decay": math.nan}, "weight_decay"),
    ({"train__weight_decay": math.inf}, "weight_decay"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"evaluation__seed": 2**64}, "seed"),
    ({"evaluation__batch_norm": ()}, "batch_norm"),
    ({"train__swa_start": 0.5}, r"train\.statistics_batches"),
    ({"train__swa_start": 0.5, "train__ema_decay": 0.9}, r"train\.ema_decay"),
    ({"data__extra": "x.npz", "data__extra_fraction": 0.001}, "batch_size"),
  ],
)
def test_a_bad_value_is_refused_before_any_work(fields, named):
  with pytest.raises(UserError, match=named):
    config.make_plan(tiny.config(**fields))


def test_shares_of_the_run_become_steps():
  shares = {
    "train__awp_start": 0.1,
    "train__swa_start": 0.75,
    "train__statistics_batches": 7,
    "teacher__epsilon_warmup": 0.25,
    "teacher__ema_decay": 0.99,
    "data__mix": "mixup",
  }
  made = tiny.config(**shares)
  student = config.make_options(made, "train", 40)
  assert (student.awp_start, student.swa_start) == (4, 30)
  assert (student.statistics_batches, student.epsilon_warmup) == (7, 0)
  teacher = config.make_options(made, "teacher", 40)
  assert (teacher.epsilon_warmup, teacher.ema_decay) == (10, 0.99)
  assert student.mix == teacher.mix == "mixup"
  # A start in a run too short for it is not "never".
  assert config.make_options(made, "train", 1).swa_start == 1


def test_options_are_off_by_default():
  for section in ("train", "teacher"):
    assert config.make_options(tiny.config(), section, 100) == options.OFF
    assert config.num_extra(tiny.config(), section) == 0


def test_extra_images_in_a_batch():
  made = tiny.config(data__extra="x.npz", data__extra_fraction=0.7)
  assert config.num_extra(made, "train") == round(0.7 * 128)


def test_a_running_attack_cannot_move_statistics():
  fields = {"objective__attack_batch_norm": "running"}
  with pytest.raises(UserError, match="attack_moves_statistics"):
    config.make_plan(tiny.config(**fields))
  fields["objective__attack_moves_statistics"] = False
  config.make_plan(tiny.config(**fields))


def test_a_workdir_belongs_to_one_training(tmp_path):
  made = tiny.config()
  config.check_workdir(made, tmp_path / "new")
  assert not (tmp_path / "new").exists()  # checking writes nothing
  config.write_config(made, tmp_path)
  path = tmp_path / "config.json"
  stored = json.loads(path.read_text())
  assert stored["train"]["num_epochs"] == 2
  assert stored["evaluation"]["batch_norm"] == ["running", "batch"]
  before = path.read_bytes()

  config.check_workdir(made, tmp_path)  # tuples have become lists
  for field, value in {
    "evaluation__attacks": "pgd3",
    "evaluation__batch_size": 7,
    "evaluation__num_examples": 5,
    "figures__num_images": 3,
    "data__dir": "elsewhere",
  }.items():
    config.check_workdir(tiny.config(**{field: value}), tmp_path)
  for field, value in {
    "seed": 1,
    "train__learning_rate": 0.3,
    "teacher__num_epochs": 9,
    "model__width": 2,
    "objective__lambda1": 0.5,
    "data__validation_size": 100,
    "data__flip": True,
    # Checkpoints are chosen by these.
    "evaluation__validation_attack": "pgd9",
    "evaluation__epsilon": 0.3,
  }.items():
    other = tiny.config(**{field: value})
    with pytest.raises(UserError) as error:
      config.check_workdir(other, tmp_path)
    message = one_line(error)
    assert f"config.{field.replace('__', '.')}: {value!r}" in message
    assert str(tmp_path) in message
  assert path.read_bytes() == before


def test_another_method_does_not_fit_a_workdir(tmp_path):
  config.write_config(tiny.config(), tmp_path)
  with pytest.raises(UserError, match=r"config\.method: 'standard'.*'atat'"):
    config.check_workdir(tiny.config("standard"), tmp_path)


def test_a_damaged_configuration_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": 0')
  with pytest.raises(UserError, match=r"config\.json: not JSON"):
    config.check_workdir(tiny.config(), tmp_path)


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="workdir"):
    config.write_config(tiny.config(), tmp_path / "file")


def test_model_spec_makes_the_same_model():
  for name in NAMES:
    plan = config.make_plan(tiny.load_config(name, "standard"))
    spec = json.loads(json.dumps(plan.model_spec))
    fields = {
      key: tuple(value) if isinstance(value, list) else value
      for key, value in spec["fields"].items()
    }
    assert models.create(spec["name"], **fields) == plan.model
