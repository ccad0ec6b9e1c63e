"""Training objectives, one method a file.

A method is added by one file and one line in `OBJECTIVES`, a named setting of its
fields by one line in `SETTINGS`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from atat_jax import checks
from atat_jax import fields as typed
from atat_jax.objectives.adversarial import attack_is_finite
from atat_jax.objectives.alp import ALP
from atat_jax.objectives.at import AT
from atat_jax.objectives.atat import ATAT
from atat_jax.objectives.atat_released import ATATReleased
from atat_jax.objectives.base import Batch, Objective, Outcome, make_batch
from atat_jax.objectives.mart import MART
from atat_jax.objectives.standard import Standard
from atat_jax.objectives.tla import TLA
from atat_jax.objectives.trades import TRADES

OBJECTIVES: dict[str, type[Objective]] = {
  "standard": Standard,
  "at": AT,
  "alp": ALP,
  "tla": TLA,
  "trades": TRADES,
  "mart": MART,
  "atat": ATAT,
  "atat_released": ATATReleased,
}

_ATAT: dict[str, dict[str, Any]] = {
  "atat_mixture": {"lambda1": 0.0, "lambda2": 0.0},
  "atat_attention": {"lambda2": 0.0},
  "atat_pairing": {"lambda1": 0.0},
  "atat_weak_pairing": {"lambda2": 0.1},
  "atat_l2": {"normalization": "l2"},
}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
  "at_from_teacher": ("at", {"starts_from_teacher": True}),
  **{name: ("atat", fields) for name, fields in _ATAT.items()},
  **{
    f"{name}_fresh": ("atat", fields | {"starts_from_teacher": False})
    for name, fields in {"atat": {}, **_ATAT}.items()
  },
  "atat_released_maps": ("atat_released", {"variant": "maps"}),
}
"""Named settings: method, and the fields that differ from its defaults.

The controls of ATAT: its mixture of clean and attacked images without the two
terms, with the attention alone, with the logit pairing alone, with a weak pairing
(lambda2 = 0.1, the default of earlier versions), with maps of length 1; each from
the teacher's parameters and from fresh ones. And adversarial training from the
teacher's parameters, and the released loss of CIFAR-100.
"""


def setting(name: str) -> tuple[str, dict[str, Any]]:
  """Looks up a method or a named setting.

  Args:
    name: One of `OBJECTIVES` or of `SETTINGS`.

  Returns:
    The method, and the fields that differ from its defaults.

  Raises:
    UserError: Unknown name.
  """
  typed.check_value("method", str, name)
  checks.choice("method", name, (*OBJECTIVES, *SETTINGS))
  return SETTINGS.get(name, (name, {}))


def setting_name(method: str, fields: Mapping[str, Any]) -> str:
  """Names the setting that the hyperparameters of a run are.

  Args:
    method: One of `OBJECTIVES`.
    fields: Hyperparameters of a run; missing ones have their defaults.

  Returns:
    One of `SETTINGS` if all fields that settings of this method change agree
    with it; otherwise the method.

  Raises:
    UserError: Unknown method.
  """
  _member(method)
  checks.instance("fields", fields, Mapping, "hyperparameters by name")
  own = {name: made for name, (of, made) in SETTINGS.items() if of == method}
  changed = {field for made in own.values() for field in made}
  given = {field: fields[field] for field in changed & fields.keys()}
  if not own:
    return method
  usual = defaults(method)
  for name, made in {method: {}, **own}.items():
    expected = {field: usual[field] for field in changed} | made
    if {field: usual[field] for field in changed} | given == expected:
      return name
  return method


def _member(name: str) -> Any:
  typed.check_value("method", str, name)
  checks.choice("method", name, OBJECTIVES)
  return OBJECTIVES[name]


def create(name: str, **fields: Any) -> Objective:
  """Creates an objective.

  Args:
    name: One of `OBJECTIVES`.
    **fields: Hyperparameters that differ from their defaults.

  Returns:
    The objective.

  Raises:
    UserError: Unknown name or field, a missing one, or a value of another type
      or out of range.
  """
  objective = _member(name)
  known = [field.name for field in dataclasses.fields(objective)]
  for field in fields:
    checks.choice(f"hyperparameter of {name!r}", field, known)
  typed.check_names(fields, known, typed.required(objective))
  typed.check_values(objective, fields, bits=False)
  made: Objective = objective(**fields)
  typed.check_values(objective, fields)
  return made


def defaults(name: str) -> dict[str, Any]:
  """Returns the default hyperparameters of an objective.

  Args:
    name: One of `OBJECTIVES`.

  Returns:
    Field to value, in the order of the fields.

  Raises:
    UserError: Unknown name.
  """
  return dataclasses.asdict(_member(name)())


__all__ = [
  "OBJECTIVES",
  "SETTINGS",
  "Batch",
  "Objective",
  "Outcome",
  "attack_is_finite",
  "create",
  "defaults",
  "make_batch",
  "setting",
  "setting_name",
]
