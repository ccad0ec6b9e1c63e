"""Names of evaluation protocols: their numbers, and names that are refused."""

import pytest

from atat_jax import evaluation
from atat_jax.errors import UserError
from atat_jax.runs import wording

NUMBERS = {"epsilon": 0.2, "step_size": 0.05}


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("nominal", ("nominal", None, None, None, None, None, None)),
    ("fgsm", ("fgsm", "linf", 0.2, 0.2, 1, 1, "cross_entropy")),
    ("fgsm-margin", ("fgsm", "linf", 0.2, 0.2, 1, 1, "margin")),
    ("ifgsm20-margin", ("ifgsm", "linf", 0.2, 0.05, 20, 1, "margin")),
    ("ifgsm20", ("ifgsm", "linf", 0.2, 0.05, 20, 1, "cross_entropy")),
    ("pgd7", ("pgd", "linf", 0.2, 0.05, 7, 3, "cross_entropy")),
    ("pgd100-margin", ("pgd", "linf", 0.2, 0.05, 100, 3, "margin")),
    ("pgd20-dlr", ("pgd", "linf", 0.2, 0.05, 20, 3, "dlr")),
    ("apgd", ("apgd", "linf", 0.2, None, 100, 1, "cross_entropy")),
    ("apgd50-dlr", ("apgd", "linf", 0.2, None, 50, 1, "dlr")),
    ("fab", ("fab", "linf", 0.2, None, 100, 1, None)),
    ("square700", ("square", "linf", 0.2, None, 700, 1, None)),
    ("autoattack", ("autoattack", "linf", 0.2, None, None, None, None)),
    (
      "square:norm=l2:epsilon=128/255:num_queries=9",
      ("square", "l2", 128 / 255, None, 9, 1, None),
    ),
    (
      "pgd:num_steps=5:step_size=0.1:loss=margin:num_restarts=2",
      ("pgd", "linf", 0.2, 0.1, 5, 2, "margin"),
    ),
  ],
)
def test_the_name_of_a_protocol_gives_its_numbers(name, expected):
  found = evaluation.parse(name, num_restarts=3, **NUMBERS)
  assert found.name == name
  assert (
    found.attack,
    found.norm,
    found.epsilon,
    found.step_size,
    found.num_steps,
    found.num_restarts,
    found.loss,
  ) == expected
  described = found.describe()
  assert len(described.splitlines()) == 1
  for number in expected[2:4]:
    assert number is None or wording.pixels(number) in described
  for number in expected[4:6]:
    assert number is None or str(number) in described


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("pgd20", {}),
    ("pgd20-targeted_margin", {"num_targets": 9}),
    ("pgd20:num_targets=3:loss=targeted_dlr", {"num_targets": 3}),
    (
      "pgd20:momentum=1:random_start=false",
      {"momentum": 1.0, "random_start": False},
    ),
    ("apgd100-targeted_dlr", {"num_targets": 9}),
    ("apgd:norm=l1:enlarged=true", {"enlarged": True}),
    ("fab:num_targets=4", {"num_targets": 4}),
    ("autoattack", {"version": "standard"}),
    ("autoattack-fast", {"version": "fast"}),
    ("autoattack:version=rand", {"version": "rand"}),
  ],
)
def test_numbers_that_differ_from_the_plain_attack_are_options(name, options):
  found = evaluation.parse(name, **NUMBERS)
  assert dict(found.options) == options
  for option, value in options.items():
    assert f"{option} {value}" in found.describe()
    assert found.arguments()[option] == value


@pytest.mark.parametrize(
  ("name", "named"),
  [
    (
      "pgd20:momentun=1",
      r"'momentun'; allowed: .* \(did you mean 'momentum'\?\)",
    ),
    ("pgd20:momentum", "once, as :<parameter>=<value>"),
    ("pgd20:norm=l2:norm=l1", "each parameter once"),
    ("pgd20:momentum=fast", "momentum: 'fast'; allowed: a number"),
    ("pgd20:momentum=-1", "momentum: -1.0; allowed"),
    ("pgd20:num_restarts=1.5", "num_restarts: '1.5'; allowed: an integer"),
    ("pgd20:num_restarts=0", "num_restarts: 0; allowed"),
    ("pgd20:random_start=no", "random_start: 'no'; allowed: true or false"),
    ("pgd20:epsilon=8/0", "epsilon: '8/0'; allowed: a number"),
    ("apgd:loss=hinge", "loss: 'hinge'; allowed: cross_entropy"),
    ("square:norm=l0", "norm: 'l0'; allowed: l1, l2, linf"),
    ("autoattack:version=best", "version: 'best'; allowed: fast, plus"),
    ("pgd20:statistics=off", "statistics: 'off'; allowed: fixed, through"),
    ("square:statistics=fixed", "'statistics'; allowed: "),
    ("autoattack:statistics=fixed", "'statistics'; allowed: "),
  ],
)
def test_an_unknown_parameter_or_value_is_named(name, named):
  with pytest.raises(UserError, match=named):
    evaluation.parse(name, **NUMBERS)


@pytest.mark.parametrize(
  "name",
  [
    "",
    "PGD20",
    "pgd",
    "pgd0",
    "pgd-3",
    "pgd1.5",
    "pgd020",
    "ifgsm",
    "fgsm2",
    "nominal3",
    "pgd20-hinge",
    "pgd20:num_steps=5",
    "pgd20-dlr:loss=margin",
    "square5-margin",
    "autoattack100",
    "autoattack-best",
    "nominal:epsilon=1",
    "ifgsm20-hinge",
    "fgsm-margin:loss=dlr",
    "nominal-margin",
    " pgd20",
  ],
)
def test_a_wrong_name_is_refused_with_the_allowed_ones(name):
  with pytest.raises(UserError) as error:
    evaluation.parse(name, **NUMBERS)
  assert repr(name) in str(error.value)
  assert "pgd<steps>" in str(error.value)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"epsilon": 0.0}, "epsilon: 0.0"),
    ({"epsilon": float("nan")}, "epsilon: nan"),
    ({"step_size": -1.0}, "step_size: -1.0"),
    ({"num_restarts": 0}, "num_restarts: 0"),
    ({"norm": "l0"}, "norm: 'l0'; allowed: l1, l2, linf"),
  ],
)
def test_a_number_out_of_range_is_named(options, named):
  with pytest.raises(UserError, match=named):
    evaluation.parse("pgd2", **{**NUMBERS, **options})
  evaluation.parse("nominal", **{**NUMBERS, **options})  # has no numbers


@pytest.mark.parametrize(
  "name", ["fgsm", "ifgsm20", "pgd20-margin", "apgd:norm=l2", "fab"]
)
def test_every_attack_by_gradients_can_hold_statistics_fixed(name):
  plain = evaluation.parse(name, **NUMBERS)
  through = evaluation.parse(f"{name}:statistics=through", **NUMBERS)
  assert through.options == plain.options
  found = evaluation.parse(f"{name}:statistics=fixed", **NUMBERS)
  assert dict(found.options) == {**dict(plain.options), "statistics": "fixed"}
  # No attack knows of BatchNorm: its arguments are the same.
  assert found.arguments() == plain.arguments()
  assert ", statistics fixed" in found.describe()
  assert [found.measures(mode) for mode in ("running", "batch")] == [
    False,
    True,
  ]


@pytest.mark.parametrize(
  ("name", "companions"),
  [
    ("fgsm", ["fgsm:statistics=fixed", "fgsm-margin"]),
    ("ifgsm20", ["ifgsm20:statistics=fixed", "ifgsm20-margin"]),
    (
      "pgd20-cross_entropy:momentum=1",
      [
        "pgd20-cross_entropy:momentum=1:statistics=fixed",
        "pgd20-margin:momentum=1",
      ],
    ),
    (
      "pgd:statistics=through:num_steps=5:loss=cross_entropy",
      [
        "pgd:num_steps=5:loss=cross_entropy:statistics=fixed",
        "pgd:statistics=through:num_steps=5:loss=margin",
      ],
    ),
    ("pgd20:statistics=fixed", []),
    ("pgd20-margin", []),
    ("apgd100", []),
    ("square", []),
    ("nominal", []),
  ],
)
def test_a_companion_is_what_its_name_says(name, companions):
  found = evaluation.parse(name, num_restarts=2, **NUMBERS).companions()
  assert [one.name for one in found] == companions
  for one in found:
    assert one == evaluation.parse(one.name, num_restarts=2, **NUMBERS)


def test_fgsm_and_ifgsm_are_linf_only():
  assert evaluation.parse("pgd2", norm="l2", **NUMBERS).norm == "l2"
  for name in ("fgsm", "ifgsm2"):
    with pytest.raises(UserError, match="norm: 'l2'; allowed: linf for"):
      evaluation.parse(name, norm="l2", **NUMBERS)


def test_a_list_of_protocols():
  found = evaluation.parse_list("nominal, pgd2 ,fgsm,", **NUMBERS)
  assert [protocol.name for protocol in found] == ["nominal", "pgd2", "fgsm"]
  for names in ("", " , "):
    with pytest.raises(UserError, match="attacks: "):
      evaluation.parse_list(names, **NUMBERS)
  with pytest.raises(UserError, match=r"'pgd2,fgsm,pgd2'; .*once"):
    evaluation.parse_list("pgd2,fgsm,pgd2", **NUMBERS)


@pytest.mark.parametrize(
  ("name", "named"),
  [
    (
      "apgd5:enlarged=true",
      "enlarged: True with norm 'linf'; allowed: with l1",
    ),
    ("pgd99999999999", "num_steps: 99999999999; allowed: 1 to"),
    ("square99999999999", "num_queries: 99999999999; allowed: 1 to"),
    ("pgd" + "9" * 5000, "num_steps: "),
    ("pgd20:num_restarts=99999999999", "num_restarts: 99999999999"),
    ("pgd20:step_size=1e39", "step_size: 1e.39"),
    ("pgd20:momentum=nan", "momentum: nan"),
    ("pgd２0", "attack: 'pgd２0'"),
    (None, "attack: None"),
    (5, "attack: 5"),
  ],
  ids=lambda value: str(value)[:30],
)
def test_what_an_attack_refuses_is_found_when_it_is_named(name, named):
  with pytest.raises(UserError, match=named) as error:
    evaluation.parse(name, **NUMBERS)
  assert "\n" not in str(error.value)


def test_numbers_that_only_some_images_allow_are_found_with_their_classes():
  protocol = evaluation.parse("pgd20-targeted_dlr", **NUMBERS)
  protocol.check((8, 8, 1), num_classes=4)
  with pytest.raises(UserError, match="'targeted_dlr' with 3 classes"):
    protocol.check((8, 8, 1), num_classes=3)


def test_trying_an_attack_computes_nothing(compilations):
  before = compilations()
  evaluation.parse("apgd77-targeted_dlr", epsilon=0.123, step_size=0.1)
  assert compilations() == before
