"""Configurations and plans: those that ship are valid, bad values are named."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from atat_jax import config, models, objectives
from atat_jax.errors import UserError
from atat_jax.runs import configuration
from atat_jax.training import options

NAMES = sorted(
  path.stem
  for path in (tiny.ROOT / "configs").glob("*.py")
  if path.stem != "__init__"
)
METHODS = tuple(objectives.OBJECTIVES)


def leaves(tree, path=""):
  for key, value in tree.items():
    if isinstance(value, ConfigDict | dict):
      yield from leaves(value, f"{path}{key}.")
    else:
      yield f"{path}{key}", value


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
  """A data set of somebody's own."""
  path = tmp_path_factory.mktemp("own") / "mine.npz"
  images = np.arange(400 * 8 * 8 * 3).reshape(400, 8, 8, 3).astype(np.uint8)
  labels = np.arange(400) % 4
  arrays = {"train_images": images, "train_labels": labels}
  np.savez(path, **arrays, test_images=images[:8], test_labels=labels[:8])
  return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """A folder of pictures, which no test reads."""
  root = tmp_path_factory.mktemp("pictures")
  for split in ("train", "val"):
    for name in "ab":
      (root / split / name).mkdir(parents=True)
      (root / split / name / "1.jpg").touch()
  return str(root)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_shipped_configurations_are_valid(name, method, own_data, pictures):
  made = tiny.load_config(name, method)
  # Which the others do not read yet.
  made.data.dir = pictures if made.data.stream else own_data
  assert made.method == method
  plan = config.make_plan(made)
  # The user can set every hyperparameter of the method and of the network.
  assert set(made.objective) == {
    field.name for field in dataclasses.fields(plan.objective)
  }
  shape = {"num_classes", "mean", "std", "image_size", "convolution"}  # derived
  fields = {field.name for field in dataclasses.fields(plan.model)}
  assert set(made.model) == fields - {"parent", "name"} - shape | {"name"}
  assert plan.model_spec["image_shape"] == list(plan.data.spec.image_shape)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_fields_and_types_are_those_of_the_default(name, method):
  def types(made):
    return {
      path: "placeholder" if value is None else type(value)
      for path, value in leaves(made)
      # It has other networks, with their own fields.
      if name != "imagenet" or not path.startswith("model.")
    }

  expected = types(tiny.load_config("default", method))
  assert types(tiny.load_config(name, method)) == expected


def test_the_default_method_is_atat_and_others_are_refused():
  assert tiny.load_config("default", None).method == "atat"
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
  schedule, _ = plan.stages[-1].make_optimizer(80_000)
  rates = {0: 0.1, 39_999: 0.1, 40_000: 0.01, 59_999: 0.01, 60_000: 0.001}
  for step, rate in {**rates, 79_999: 0.001}.items():
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-5), step
  numbers = {(p.epsilon, p.step_size) for p in plan.evaluation.protocols[2:]}
  assert numbers == {(8 / 255, 2 / 255)}
  names = [protocol.name for protocol in plan.evaluation.protocols]
  assert names[:5] == ["nominal", "fgsm", "ifgsm20", "pgd7", "pgd20"]


def _evaluation(attacks, batch_norm=("running", "batch"), **fields):
  made = tiny.config(
    evaluation__attacks=attacks, evaluation__batch_norm=batch_norm, **fields
  )
  return config.make_plan(made).evaluation


def test_batch_statistics_are_measured_as_published_and_by_better_attacks():
  settings = _evaluation(
    "nominal,pgd2,autoattack,square9,pgd2-margin,fgsm,pgd3:statistics=fixed"
  )
  found = {
    mode: [protocol.name for protocol in settings.protocols_of(mode)]
    for mode in settings.batch_norm
  }
  assert found == {
    "running": "nominal pgd2 autoattack square9 pgd2-margin fgsm".split(),
    "batch": (
      "nominal pgd2 pgd2:statistics=fixed pgd2-margin square9 fgsm"
      " fgsm:statistics=fixed fgsm-margin pgd3:statistics=fixed"
    ).split(),
  }


def test_another_name_of_a_companion_is_not_measured_twice():
  settings = _evaluation("pgd2,pgd:loss=margin:num_steps=2", ("batch",))
  names = [protocol.name for protocol in settings.protocols_of("batch")]
  assert names == [
    "pgd2",
    "pgd2:statistics=fixed",
    "pgd:loss=margin:num_steps=2",
  ]


@pytest.mark.parametrize(
  ("attacks", "batch_norm", "fields", "named"),
  [
    (
      "nominal,pgd2:statistics=fixed",
      ("running",),
      {},
      "evaluation.attacks: 'pgd2:statistics=fixed' with batch_norm running",
    ),
    (
      "nominal,autoattack-fast",
      ("batch",),
      {},
      "evaluation.attacks: 'autoattack-fast' with batch statistics",
    ),
    (
      "nominal",
      ("running",),
      {"evaluation__validation_attack": "pgd2:statistics=fixed"},
      "evaluation.validation_attack: 'pgd2:statistics=fixed'; allowed: without",
    ),
    (
      "nominal",
      ("batch",),
      {"figures__attack": "pgd2:statistics=fixed"},
      "figures.attack: 'pgd2:statistics=fixed'; allowed: without",
    ),
  ],
)
def test_an_attack_that_no_mode_can_measure_is_refused(
  attacks, batch_norm, fields, named
):
  with pytest.raises(UserError) as error:
    _evaluation(attacks, batch_norm, **fields)
  assert str(error.value).startswith(named)
  assert "\n" not in str(error.value)


def test_cifar100_is_the_papers():
  made = tiny.load_config("cifar100", "atat")
  plan = config.make_plan(made)
  assert (plan.data.spec.name, plan.model.num_classes) == ("cifar100", 100)
  assert (made.train.batch_size, made.data.padding) == (64, 2)
  assert (plan.model.depth, plan.model.width) == (32, 10)
  names = [protocol.name for protocol in plan.evaluation.protocols]
  assert {"nominal", "fgsm", "ifgsm20", "pgd10", "pgd20"} <= set(names)


def test_peers_train_as_their_authors_do():
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
  schedule, _ = config.make_plan(mart).stages[-1].make_optimizer(90)
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
  [
    ("cifar10", "modern"),
    ("cifar100", "modern"),
    ("cifar10", "fast"),
    ("cifar100", "fast"),
    ("digits", None),
  ],
)
def test_one_recipe_trains_all_methods_alike(name, recipe):
  def load(method):
    made = tiny.load_config(name, f"{method},{recipe}" if recipe else method)
    assert (made.method, made.recipe) == (method, recipe or "modern")
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


def test_the_network_of_fast_is_a_resnet18_that_can_be_made_narrow():
  made = tiny.load_config("cifar10", "at,fast")
  plan = config.make_plan(made)
  assert isinstance(plan.model, models.MODELS["preact_resnet18"])
  assert (plan.model.base_channels, plan.model.dtype) == (64, "bfloat16")
  assert plan.model.mean == plan.data.spec.mean
  made.model.base_channels = 4
  assert config.make_plan(made).model.base_channels == 4
  # Another network is a matter of its name, as under the other recipes.
  made.model.update(name="wide_resnet", depth=16, width=4)
  assert config.make_plan(made).model.width == 4


@pytest.mark.parametrize("method", METHODS)
def test_fast_fits_in_five_minutes_at_a_quarter_of_the_peak(method):
  """The arithmetic of docs/training.md, with convolutions counted by hand."""
  made = tiny.load_config("cifar10", f"{method},fast")
  multiplications = 32**2 * 27 * 64  # the stem
  for stage, (size, channels) in enumerate(
    [(32, 64), (16, 128), (8, 256), (4, 512)]
  ):
    before = channels // 2 if stage else channels
    own = 9 * channels**2
    first = 9 * before * channels + (before * channels if stage else 0)
    multiplications += size**2 * (first + 3 * own)
  forward = 2 * (multiplications + 512 * 10)
  assert forward == pytest.approx(1.11e9, rel=1e-3)
  (*teacher, student) = config.make_plan(made).stages
  images = 50_000 - made.data.validation_size
  # In forward passes: an attack's step 2, a training pass 3, a teacher's 1.
  attacked = {"standard": 3, "at": 3 + 10, "trades": 6 + 10 + 1}
  passes = attacked.get(method, 6 + 10 + bool(teacher))
  work = student.num_epochs * passes + sum(
    3 * one.num_epochs for one in teacher
  )
  seconds = work * images * forward / (0.25 * 990e12)
  assert seconds < 250  # the rest of five minutes is start and compilation


@pytest.mark.parametrize(
  ("name", "choice", "message"),
  [
    ("cifar10", "at,new", "recipe: 'new'; allowed: paper, modern, fast"),
    ("cifar100", "at,", "recipe: ''; allowed: paper, modern"),
    ("cifar10", "at,modern,paper", "recipe: 'modern,paper'; allowed: "),
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
  known = set(models.field_names(name))
  for field, value in {
    "mean": plan.data.spec.mean,
    "std": plan.data.spec.std,
    "batch_norm_epsilon": 1e-5,
  }.items():
    assert field not in known or getattr(plan.model, field) == value, field
  # The other fields keep the network's defaults.
  others = models.create(name)
  for field in known - set(made.model):
    if field not in ("num_classes", "mean", "std", "image_size"):
      assert getattr(plan.model, field) == getattr(others, field), field


def test_dataset_normalization_takes_the_data_sets_numbers():
  made = tiny.load_config("cifar10", "standard")
  made.model.normalization = "dataset"
  plan = config.make_plan(made)
  assert (plan.model.mean, plan.model.std) == (
    plan.data.spec.mean,
    plan.data.spec.std,
  )
  # ... so that the network can be made again without the data set.
  fields = plan.model_spec["fields"]
  assert tuple(fields["mean"]) == plan.data.spec.mean


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
  ("evaluation__attacks", "fgsm-hinge", ["attack", "pgd<steps>-<loss>"]),
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
def test_a_bad_value_is_named_with_its_section(field, value, named):
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
  teacher, student = config.make_plan(tiny.config(**shares)).stages
  made = student.make_options(40)
  assert (made.awp_start, made.swa_start) == (4, 30)
  assert (made.statistics_batches, made.epsilon_warmup) == (7, 0)
  made = teacher.make_options(40)
  assert (made.epsilon_warmup, made.ema_decay) == (10, 0.99)
  assert student.mix == teacher.mix == "mixup"
  # A start in a run too short for it is not "never".
  assert student.make_options(1).swa_start == 1


def test_options_are_off_by_default():
  for stage in config.make_plan(tiny.config()).stages:
    assert stage.make_options(100) == options.OFF
    assert stage.num_extra == 0


def test_extra_images_are_their_share_of_a_batch():
  made = tiny.config(data__extra="x.npz", data__extra_fraction=0.7)
  for stage in config.make_plan(made).stages:
    assert stage.num_extra == round(0.7 * 128)


def test_stages_are_the_networks_to_train(tmp_path):
  plan = config.make_plan(tiny.config())
  assert [stage.name for stage in plan.stages] == ["teacher", "student"]
  teacher, student = plan.stages
  assert isinstance(teacher.objective, objectives.OBJECTIVES["standard"])
  assert isinstance(student.objective, objectives.OBJECTIVES["atat"])
  assert teacher.seed != student.seed == 0
  assert list(plan.networks) == ["teacher", "student"]
  assert tmp_path / plan.networks["teacher"] == tmp_path / "teacher"
  assert tmp_path / plan.networks["student"] == tmp_path

  assert plan.evaluated == ("teacher", "student")
  alone = config.make_plan(tiny.config(evaluation__teacher=False))
  assert list(alone.networks) == ["teacher", "student"]
  assert alone.evaluated == ("student",)

  # A teacher of another run is used, not trained.
  other = tmp_path / "other"
  plan = config.make_plan(tiny.config(teacher_workdir=str(other)))
  assert [stage.name for stage in plan.stages] == ["student"]
  assert tmp_path / "run" / plan.networks["teacher"] == other

  # A method without a teacher trains one network, named by the method.
  plan = config.make_plan(tiny.config("at", teacher_workdir=str(other)))
  assert [stage.name for stage in plan.stages] == ["at"]
  assert list(plan.networks) == ["at"]


def test_numbers_of_a_teacher_that_is_not_trained_are_checked_too():
  with pytest.raises(UserError, match=r"teacher\.num_epochs: 0"):
    config.make_plan(tiny.config("at", teacher__num_epochs=0))


def test_an_objective_in_the_registry_is_configured_like_any_other(
  monkeypatch, own_data, pictures
):
  """Its dataclass alone has its fields and their defaults."""

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Toy(objectives.OBJECTIVES["standard"]):
    weight: float = 0.25

  monkeypatch.setitem(objectives.OBJECTIVES, "toy", Toy)
  for name in NAMES:
    made = tiny.load_config(name, "toy")
    assert made.objective.to_dict() == {"weight": 0.25}
    made.objective.weight = 0.75
    made.data.dir = pictures if made.data.stream else own_data
    assert config.make_plan(made).objective == Toy(weight=0.75)
  assert tiny.config("toy", objective__weight=0.5).objective.weight == 0.5
  with pytest.raises(ValueError, match=r"method: 'madry'.*toy"):
    tiny.load_config("digits", "madry")


def test_a_running_attack_cannot_move_statistics():
  fields = {"objective__attack_batch_norm": "running"}
  with pytest.raises(UserError, match="attack_moves_statistics"):
    config.make_plan(tiny.config(**fields))
  fields["objective__attack_moves_statistics"] = False
  config.make_plan(tiny.config(**fields))


@pytest.mark.parametrize(
  ("attack", "norm", "expected"),
  [
    ("pgd10", "linf", 1),
    ("autoattack", "l2", 1),
    ("pgd1", "linf", None),
    ("fgsm", "linf", None),
    ("nominal", "linf", None),
  ],
)
def test_a_single_step_is_validated_by_several(attack, norm, expected):
  fields = {"evaluation__validation_attack": attack, "evaluation__norm": norm}
  # Of another norm, only the validation: FGSM is in the list of the table.
  fields["evaluation__attacks"] = "nominal"
  found = config.make_plan(tiny.config("at", **fields)).evaluation.single_step
  if expected:
    assert (found.num_steps, found.norm) == (1, norm)
    assert found.epsilon == found.step_size == 0.2
    assert ("random_start", False) in found.options
    return
  assert found is None
  made = tiny.config("at", objective__attack_method="fgsm_rs", **fields)
  message = rf"validation_attack: '{attack}'; allowed: of several steps"
  with pytest.raises(UserError, match=message):
    config.make_plan(made)


def test_a_workdir_belongs_to_one_training(tmp_path):
  made = tiny.config()
  record = config.make_plan(made).record
  configuration.check(record, tmp_path / "new")
  assert not (tmp_path / "new").exists()  # checking writes nothing
  configuration.write(record, tmp_path)
  path = tmp_path / "config.json"
  stored = json.loads(path.read_text())
  assert stored["train"]["num_epochs"] == 2
  assert stored["evaluation"]["batch_norm"] == ["running", "batch"]
  before = path.read_bytes()

  configuration.check(record, tmp_path)
  for field, value in {
    "evaluation__attacks": "pgd3",
    "evaluation__batch_size": 7,
    "evaluation__num_examples": 5,
    "figures__num_images": 3,
    "data__dir": "elsewhere",
  }.items():
    other = config.make_plan(tiny.config(**{field: value}))
    configuration.check(other.record, tmp_path)
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
    other = config.make_plan(tiny.config(**{field: value}))
    with pytest.raises(UserError) as error:
      configuration.check(other.record, tmp_path)
    message = one_line(error)
    assert f"config.{field.replace('__', '.')}: {value!r}" in message
    assert str(tmp_path) in message
  assert path.read_bytes() == before


FIRST = {
  "data": "name validation_size padding flip",
  "model": "name normalization batch_norm_momentum batch_norm_epsilon dtype"
  " depth width activation negative_slope shortcut strides stem_channels"
  " padding",
  "train": "num_epochs batch_size schedule learning_rate boundaries factor"
  " warmup_fraction momentum nesterov weight_decay log_every_steps"
  " validate_every_epochs",
  "objective": "epsilon step_size num_steps norm attack_loss attack_start"
  " attack_batch_norm attack_moves_statistics student_batch_norm weight beta"
  " lambda1 lambda2 margin layer layers pairs maps normalization distance p"
  " variant",
  "evaluation": "validation_attack norm epsilon step_size",
}
"""Fields of the first version, and those that came with a method."""

STORED = "standard at alp tla trades mart atat atat_released".split()
"""Methods of which working directories exist; a newer one has its own fields
from the start."""

LATER = {
  "data.mix": "mixup",
  "data.extra": "more.npz",
  "objective.attack_method": "fgsm_rs",
  "objective.single_step_size": 0.1,
  "objective.starts_from_teacher": True,
  "train.ema_decay": 0.9,
  "teacher.clip_norm": 1.0,
  "train.remat": True,
}
"""Later fields to a value that does not mean what the first version did."""


def older(record):
  """The configuration as the first version would have written it."""
  made = json.loads(json.dumps(record))
  for section, names in (FIRST | {"teacher": FIRST["train"]}).items():
    made[section] = {
      k: v for k, v in made[section].items() if k in names.split()
    }
  return made


@pytest.mark.parametrize("method", STORED)
def test_a_field_that_was_added_does_not_part_a_run_from_its_workdir(
  method, tmp_path
):
  record = config.make_plan(tiny.config(method)).record
  if record["objective"].get("starts_from_teacher"):
    record["objective"]["starts_from_teacher"] = False
  stored = older(record)
  left = configuration.training_fields(record).keys()
  left -= configuration.training_fields(stored).keys()
  assert not left, (
    f"{left}: give each the value that means what older versions did, in"
    " atat_jax/runs/configuration.py; or add it to FIRST if it came with its"
    " method, network or data set"
  )
  configuration.write(stored, tmp_path)
  configuration.check(record, tmp_path)
  assert configuration.read(tmp_path).training == (
    configuration.training_fields(record)
  )


@pytest.mark.parametrize(("field", "value"), LATER.items())
def test_an_added_field_with_another_meaning_is_another_training(
  field, value, tmp_path
):
  record = config.make_plan(tiny.config("atat")).record
  record["objective"]["starts_from_teacher"] = False
  stored = older(record)
  section, name = field.split(".")
  before = record[section][name]
  record[section][name] = value
  configuration.write(stored, tmp_path)
  with pytest.raises(UserError) as error:
    configuration.check(record, tmp_path)
  message = one_line(error)
  assert f"config.{field}: {value!r}" in message
  assert f"holds a run with {before!r}" in message


def test_a_field_that_is_there_is_compared_as_it_is(tmp_path):
  record = config.make_plan(tiny.config("at")).record
  stored = json.loads(json.dumps(record))
  stored["objective"]["attack_method"] = "n_fgsm"
  configuration.write(stored, tmp_path)
  with pytest.raises(UserError, match="holds a run with 'n_fgsm'"):
    configuration.check(record, tmp_path)


def test_a_field_whose_older_meaning_is_unknown_is_refused(tmp_path):
  record = config.make_plan(tiny.config("at")).record
  stored = json.loads(json.dumps(record))
  del stored["model"]["shortcut"]
  configuration.write(stored, tmp_path)
  with pytest.raises(
    UserError, match=r"model\.shortcut: .* without this field"
  ):
    configuration.check(record, tmp_path)


def test_another_method_does_not_fit_a_workdir(tmp_path):
  records = {m: config.make_plan(tiny.config(m)).record for m in ("atat", "at")}
  configuration.write(records["atat"], tmp_path)
  with pytest.raises(UserError, match=r"config\.method: 'at'.*'atat'"):
    configuration.check(records["at"], tmp_path)


def test_a_damaged_configuration_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": 0')
  with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
    configuration.check(config.make_plan(tiny.config()).record, tmp_path)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="workdir"):
    configuration.write({"seed": 0}, tmp_path / "file")


def test_a_finished_run_tells_its_data_and_its_attack(tmp_path):
  made = tiny.config("at", seed=3, data__dir="here", evaluation__epsilon=0.1)
  configuration.write(config.make_plan(made).record, tmp_path)
  for workdir in (tmp_path, tmp_path / "teacher"):
    found = configuration.read(workdir)
    assert (found.method, found.seed, found.batch_size) == ("at", 3, 128)
    assert found.data == {
      "name": "digits",
      "data_dir": "here",
      "cache_dir": None,
      "source": "auto",
      "size": 0,
      "validation_size": 128,
    }
    assert found.attack == {"epsilon": 0.1, "step_size": 0.05, "norm": "linf"}
  with pytest.raises(UserError, match=r"no run, it has no config\.json"):
    configuration.read(tmp_path / "other" / "run")
  with pytest.raises(UserError, match="has no configuration of a run"):
    configuration.parse({"seed": 0}, tmp_path)


def test_model_spec_makes_the_same_model(own_data, pictures):
  for name in NAMES:
    made = tiny.load_config(name, "standard")
    made.data.dir = pictures if made.data.stream else own_data
    plan = config.make_plan(made)
    spec = json.loads(json.dumps(plan.model_spec))
    fields = {
      key: tuple(value) if isinstance(value, list) else value
      for key, value in spec["fields"].items()
    }
    assert models.create(spec["name"], **fields) == plan.model
