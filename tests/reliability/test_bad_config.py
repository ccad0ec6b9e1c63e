"""Bad values of a configuration: refused in one line, before any training.

`SWEPT` puts the same wrong values into every field, by its type; `PLANTED` are
values that only a trace, or the real number of steps, shows to be wrong.
"""

import functools
import math
import pathlib

import jax
import pytest
import tiny

from atat_jax import config, errors, objectives, sharding, train
from atat_jax.errors import UserError
from atat_jax.trial import rehearsal

HUGE = 10**5000

SWEPT = {
  int: [
    *[True, "7", 1.5, math.nan, math.inf, -1, -(2**31), 2**31, 10**20, HUGE],
    *[None, (1,), [], "None", ""],
  ],
  float: [
    *["0.1", math.nan, math.inf, -math.inf, 1e39, 1e-60, None, (0.1,), "None"],
    {},
  ],
  bool: ["no", "False", "true", 1, 0, None, 1.0, ()],
  str: [True, 3, None, ("a",), 1.5],
  tuple: [
    *["a", ("a",), (True,), (math.nan,), (-1,), (10**20,), 3, None, ((1,),)],
    *[(1.5,), ({},), (HUGE,)],
  ],
  type(None): [True, 3, ("a",), 1.5],
}


def flat(tree, path=""):
  for name, value in tree.items():
    if hasattr(value, "items"):
      yield from flat(value, f"{path}{name}.")
    else:
      yield path + name, value


@functools.cache
def usual(method):
  return tiny.config(method)


def changed(method, changes):
  """The tiny configuration with values that its types would not let in."""
  made = usual(method).copy_and_resolve_references()
  made.unlock()
  for field, value in changes.items():
    *sections, name = field.split(".")
    place = made
    for section in sections:
      place = place[section]
    with place.ignore_type():
      place[name] = value
  return made


def refusal(method, changes, check):
  """The one line of a refusal; fails on anything else."""
  with pytest.raises(UserError) as error:
    check(changed(method, changes))
  message = str(error.value)
  assert len(message.splitlines()) == 1, message
  assert "; allowed: " in message, message
  return message


CASES = [
  (method, field, value)
  for method in ("atat", "tla", "trades", "alp", "atat_released")
  for field, default in flat(tiny.config(method))
  if method == "atat" or field.startswith("objective.")
  for value in SWEPT[type(default)]
]


def test_every_field_refuses_what_is_not_its_kind():
  """One test for all, as each takes a few milliseconds."""
  assert len(CASES) > 1000
  for method, field, value in CASES:
    message = refusal(method, {field: value}, config.make_plan)
    assert field.rpartition(".")[2] in message, (field, message)


@pytest.mark.parametrize("field", ["train", "objective.lambda1", "seed"])
def test_a_missing_field_is_named(field):
  made = tiny.config()
  made.unlock()
  *section, name = field.split(".")
  del (made[section[0]] if section else made)[name]
  with pytest.raises(UserError, match=f"{field}: missing"):
    config.make_plan(made)


@pytest.mark.parametrize("section", ["train", "data", "model", "figures"])
def test_a_misspelt_field_is_named(section):
  made = tiny.config()
  made.unlock()
  made[section].bath_size = 3
  with pytest.raises(UserError, match=rf"{section}\.bath_size: no such field"):
    config.make_plan(made)


def test_none_as_text_is_none():
  changes = {
    field: "None"
    for field in ("data.dir", "data.cache_dir", "data.extra", "teacher_workdir")
  }
  plan = config.make_plan(changed("atat", changes))
  assert (plan.data.dir, plan.data.cache_dir, plan.data.extra) == (None,) * 3
  assert plan.teacher == pathlib.Path("teacher")
  assert plan.record == config.make_plan(tiny.config()).record


# (method, changes, what the message names)
PLANTED = [
  ("atat", {"evaluation.attacks": "pgd99999999999"}, "evaluation.attacks"),
  ("atat", {"evaluation.attacks": "apgd5:enlarged=true"}, "enlarged"),
  ("atat", {"evaluation.attacks": "pgd5:epsilon=1e39:norm=l2"}, "epsilon"),
  ("atat", {"evaluation.attacks": "square9999999999"}, "evaluation.attacks"),
  ("atat", {"evaluation.validation_attack": "pgd99999999999"}, "validation_a"),
  ("atat", {"figures.attack": "pgd99999999999"}, "figures.attack"),
  ("atat", {"figures.epsilons": ("a",)}, "figures.epsilons"),
  (
    "atat",
    {"figures.indices": (100_000,), "figures.analyses": "landscape"},
    "figures.indices",
  ),
  ("tla", {"objective.layer": "nope"}, "objective.layer"),
  ("atat", {"objective.layers": ("nope",)}, "objective.layers"),
  (
    "atat",
    {"train.schedule": "cosine", "train.warmup_fraction": 0.99},
    "train.warmup_fraction",
  ),
  ("atat", {"train.num_epochs": 2**30}, "train.num_epochs"),
  ("atat", {"train.batch_size": 2000}, "train.batch_size"),
  ("atat", {"model.width": 10**6}, "model"),
  ("atat", {"model.depth": 6 * 10**6 + 2}, "model.depth"),
  ("atat", {"model.strides": (1, 2)}, "model.strides"),
  ("atat", {"data.padding": 10**6}, "data.padding"),
  ("atat", {"figures.num_points": 10**6 + 1}, "figures.num_points"),
  ("atat", {"evaluation.batch_size": 2**30}, "evaluation.batch_size"),
  ("atat", {"profile_steps": (3,)}, "profile_steps"),
  ("atat", {"profile_steps": (0, 2)}, "profile_steps"),
  ("atat", {"profile_steps": (True, 2)}, "profile_steps"),
  ("atat", {"train.nonfinite": "ignore"}, "train.nonfinite"),
]


@pytest.fixture(scope="module")
def dataset():
  return config.make_plan(tiny.config()).data.load()


def rehearsed(made, dataset):
  plan = config.make_plan(made)
  train.check_sizes(plan, dataset)
  mesh = sharding.make_mesh(jax.devices()[:1])
  rehearsal.rehearse(plan, pathlib.Path("nowhere"), dataset, mesh)


@pytest.mark.parametrize(("method", "changes", "named"), PLANTED)
def test_what_would_fail_after_training_is_found_before(
  method, changes, named, dataset
):
  message = refusal(method, changes, lambda made: rehearsed(made, dataset))
  assert named in message


def test_what_validations_compare_is_rehearsed(dataset, monkeypatch):
  """A method that does not say the weights of its terms would fail there."""
  monkeypatch.setattr(objectives.OBJECTIVES["alp"], "term_weights", {})
  made = tiny.config("alp", model__depth=8, train__term_gradients=True)
  with pytest.raises(UserError, match=r"^train: .*KeyError: 'cross_entropy'"):
    rehearsed(made, dataset)


@pytest.mark.parametrize("name", ["atat", "mart", "tla"])
def test_a_good_configuration_is_rehearsed_without_a_word(name, dataset):
  rehearsed(
    tiny.config(
      name,
      train__ema_decay=0.9,
      train__statistics_batches=2,
      train__accumulate_steps=2,
      train__nonfinite="skip",
      evaluation__attacks="nominal,apgd3-dlr,autoattack-fast",
      figures__analyses="",
    ),
    dataset,
  )


@pytest.mark.parametrize(
  ("method", "given", "named"),
  [
    ("atat", {"lamda1": 1.0}, "lamda1"),
    ("atat", {"lambda1": True}, "lambda1"),
    ("atat", {"lambda1": 1e39}, "lambda1"),
    ("atat", {"attack_moves_statistics": "no"}, "attack_moves_statistics"),
    ("atat", {"layers": "features"}, "layers"),
    ("atat", {"layers": ["a"]}, "layers"),
    ("at", {"step_size": 1e39}, "step_size"),
    ("at", {"num_steps": True}, "num_steps"),
    ("at", {"num_steps": None}, "num_steps"),
    ("at", {"epsilon": "0.1"}, "epsilon"),
    ("tla", {"margin": math.inf}, "margin"),
    (None, {}, "method"),
    (["at"], {}, "method"),
  ],
)
def test_an_objective_refuses_a_bad_field(method, given, named):
  with pytest.raises(UserError, match=named) as error:
    objectives.create(method, **given)
  assert len(str(error.value).splitlines()) == 1


def test_a_value_is_shown_in_one_short_line():
  assert errors.shown("a\nb") == r"'a\nb'"
  assert len(errors.shown("x" * 999)) < 300
  assert "int" in errors.shown(HUGE)
