"""What AutoAttack consists of: the attacks of each version and their numbers.

The figures are those of the reference (Croce and Hein, 2020; l1: 2021).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from atat_jax import checks, losses
from atat_jax.attacks.auto_pgd import APGD
from atat_jax.attacks.autoattack.slots import Job
from atat_jax.attacks.fast_boundary import FAB
from atat_jax.attacks.square_search import Square
from atat_jax.errors import UserError

VERSIONS: dict[str, tuple[str, ...]] = {
  "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
  "fast": ("apgd-ce", "apgd-t"),
  "rand": ("apgd-ce", "apgd-dlr"),
  "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
}

_APGD_LOSSES = {
  "apgd-ce": "cross_entropy",
  "apgd-dlr": "dlr",
  "apgd-t": "targeted_dlr",
}
NAMES = (*_APGD_LOSSES, "fab", "fab-t", "square")

_OPTIONS = {
  **dict.fromkeys(
    _APGD_LOSSES, ("num_steps", "num_targets", "num_restarts", "eot_samples")
  ),
  "fab": ("num_steps", "num_restarts"),
  "fab-t": ("num_steps", "num_targets", "num_restarts"),
  "square": ("num_queries", "num_restarts"),
}
_MARGINS = {"dlr": "margin", "targeted_dlr": "targeted_margin"}


class Ensemble(NamedTuple):
  """The attacks to run, one after the other.

  Attributes:
    version: One of `VERSIONS`, or "custom".
    jobs: With the numbers they run with.
    needed: Attack to the classes that its loss would need.
    wanted: Attack to the classes that it would aim at.
  """

  version: str
  jobs: tuple[Job, ...]
  needed: dict[str, int]
  wanted: dict[str, int]


def _defaults(name: str, version: str, norm: str) -> dict[str, int]:
  if name == "square":
    return {"num_queries": 5000, "num_restarts": 1}
  numbers = {"num_steps": 100, "num_restarts": 1}
  if name in _APGD_LOSSES:
    numbers["eot_samples"] = 20 if version == "rand" else 1
  enlarged = norm == "l1" and version not in ("plus", "rand")
  if name in ("apgd-t", "fab-t"):
    numbers["num_targets"] = 5 if enlarged and name == "apgd-t" else 9
  elif version == "plus" or (name == "apgd-ce" and enlarged):
    numbers["num_restarts"] = 5
  return numbers


def _job(
  name: str, numbers: Mapping[str, int], version: str, norm: str, classes: int
) -> Job:
  targets = min(numbers.get("num_targets", 1), classes - 1)
  restarts = numbers["num_restarts"]
  if name == "square":
    steps = numbers["num_queries"]
    return Job(name, Square(norm), steps, 1, restarts, steps_at_once=25)
  steps = numbers["num_steps"]
  if name in ("fab", "fab-t"):
    search = FAB(norm=norm, targeted=name == "fab-t")
    return Job(name, search, steps, targets, restarts)
  loss = _APGD_LOSSES[name]
  if classes < losses.MIN_CLASSES.get(loss, 2):
    loss = _MARGINS[loss]
  enlarged = norm == "l1" and version not in ("plus", "rand")
  apgd = APGD(norm, loss, numbers["eot_samples"], enlarged)
  return Job(name, apgd, steps, targets, restarts)


def make(
  version: str | Sequence[str],
  *,
  norm: str,
  num_classes: int,
  options: Mapping[str, Mapping[str, int]] | None = None,
) -> Ensemble:
  """The attacks of a version.

  Args:
    version: One of `VERSIONS`, or the names of attacks in the order in which
      they are to run.
    norm: "linf", "l2" or "l1".
    num_classes: K; no attack aims at more than K - 1 classes, and where there
      are too few classes for a DLR loss the margin takes its place.
    options: Attack to numbers other than the version's, e.g.
      {"square": {"num_queries": 1000}}; the version is then "custom".

  Returns:
    The ensemble.

  Raises:
    UserError: An unknown name or number.
  """
  options = options or {}
  if isinstance(version, str):
    checks.choice("version", version, VERSIONS)
    names = VERSIONS[version]
  else:
    names, version = tuple(version), "custom"
    if not names or len(set(names)) < len(names):
      raise UserError(
        f"version: {names!r}; allowed: each of {', '.join(NAMES)} at most once"
      )
  for name in names:
    checks.choice("version", name, NAMES)
  for name, changes in options.items():
    checks.choice("options", name, names)
    for option, value in changes.items():
      checks.choice(f"options[{name!r}]", option, _OPTIONS[name])
      checks.positive(f"options[{name!r}].{option}", value, integer=True)
  numbers = {
    name: _defaults(name, version, norm) | dict(options.get(name, {}))
    for name in names
  }
  return Ensemble(
    "custom" if options else version,
    tuple(_job(n, numbers[n], version, norm, num_classes) for n in names),
    needed={
      name: losses.MIN_CLASSES.get(_APGD_LOSSES.get(name, ""), 2)
      for name in names
    },
    wanted={
      name: numbers[name]["num_targets"]
      for name in names
      if name in ("apgd-t", "fab-t")
    },
  )


def describe(job: Job) -> str:
  """A job's numbers in a line for people."""
  search: Any = job.search
  parts = []
  if isinstance(search, APGD):
    parts.append(f"{search.loss} loss")
  unit = "queries" if isinstance(search, Square) else "steps"
  parts.append(f"{job.num_steps} {unit}")
  if job.num_targets > 1:
    parts.append(f"{job.num_targets} targets")
  parts.append(f"{job.num_restarts} restart" + "s" * (job.num_restarts > 1))
  if isinstance(search, APGD) and search.eot_samples > 1:
    parts.append(f"{search.eot_samples} EOT samples")
  if isinstance(search, APGD) and search.enlarged:
    parts.append("radius from 3 epsilon")
  return ", ".join(parts)


def as_json(job: Job) -> dict[str, Any]:
  """A job's numbers as plain values."""
  fields = dataclasses.asdict(job)
  fields.pop("steps_at_once")
  fields["search"] = type(job.search).__name__, fields["search"]
  return fields
