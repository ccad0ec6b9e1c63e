"""Training objectives, one method a file.

A method is added by one file and one line in `OBJECTIVES`.
"""

import dataclasses
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
  "Batch",
  "Objective",
  "Outcome",
  "attack_is_finite",
  "create",
  "defaults",
  "make_batch",
]
