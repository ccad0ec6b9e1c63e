"""The attacks of each version of AutoAttack and their numbers.

The numbers are those of the reference (Croce and Hein, 2020; l1: 2021).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from atat_jax import checks, losses
from atat_jax.attacks import balls, base
from atat_jax.attacks.auto_pgd import APGD
from atat_jax.attacks.autoattack.slots import Job
from atat_jax.attacks.fast_boundary import FAB
from atat_jax.attacks.square_search import Square
from atat_jax.attacks.targeting import CANDIDATES, TARGETINGS, malt_norm
from atat_jax.errors import UserError
from atat_jax.runs import wording


@dataclasses.dataclass(frozen=True)
class Version:
  """Attacks of a version and what distinguishes their numbers.

  Attributes:
    attacks: Names of the attacks, in the order in which they run.
    num_restarts: Restarts of the untargeted attacks on gradients.
    eot_samples: Gradients that APGD averages; more than one is for
      `Randomized` classifiers.
    enlarged: Whether APGD in l1 starts with three times epsilon.
    targeting: Way to choose the classes of the targeted attacks.
    num_targets: Largest number of these classes.
  """

  attacks: tuple[str, ...]
  num_restarts: int = 1
  eot_samples: int = 1
  enlarged: bool = True
  targeting: str = "logits"
  num_targets: int = 9


VERSIONS: dict[str, Version] = {
  "standard": Version(("apgd-ce", "apgd-t", "fab-t", "square")),
  "fast": Version(("apgd-ce", "apgd-t")),
  "quick": Version(("apgd-ce", "apgd-t"), targeting="malt", num_targets=5),
  "rand": Version(("apgd-ce", "apgd-dlr"), eot_samples=20, enlarged=False),
  "plus": Version(
    ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    num_restarts=5,
    enlarged=False,
  ),
}

_APGD_LOSSES = {
  "apgd-ce": "cross_entropy",
  "apgd-dlr": "dlr",
  "apgd-t": "targeted_dlr",
}
NAMES = (*_APGD_LOSSES, "fab", "fab-t", "square")
_TARGETED = ("apgd-t", "fab-t")

_OPTIONS = {
  **dict.fromkeys(
    _APGD_LOSSES, ("num_steps", "num_targets", "num_restarts", "eot_samples")
  ),
  "fab": ("num_steps", "num_restarts"),
  "fab-t": ("num_steps", "num_targets", "num_restarts"),
  "square": ("num_queries", "num_restarts"),
}
_MOST_RUNS = 10_000
_MARGINS = {"dlr": "margin", "targeted_dlr": "targeted_margin"}


class Ensemble(NamedTuple):
  """Attacks to run, one after the other.

  Attributes:
    version: Name of the version, or "custom".
    jobs: Attacks with their numbers.
    needed: Attack to the number of classes that its loss needs.
    wanted: Attack to the number of classes that it would aim at.
    randomized: Whether the version is for `Randomized` classifiers.
  """

  version: str
  jobs: tuple[Job, ...]
  needed: dict[str, int]
  wanted: dict[str, int]
  randomized: bool = False

  @property
  def losses(self) -> tuple[str, ...]:
    """Losses whose gradients the attacks follow."""
    searches: list[Any] = [job.search for job in self.jobs]
    return tuple(str(x.loss) for x in searches if isinstance(x, APGD))

  def program(self, job: Job) -> tuple[Any, int]:
    """Returns the search whose program makes a job's steps.

    APGD's program is the same for all losses of the version, so that the
    network is compiled for one of them only.

    Args:
      job: One of the jobs.

    Returns:
      The search, and the place of the job's loss in it.
    """
    search: Any = job.search
    if not isinstance(search, APGD):
      return search, 0
    names = tuple(dict.fromkeys(self.losses))
    return dataclasses.replace(search, loss=names), names.index(search.loss)


def _defaults(name: str, version: Version, norm: str) -> dict[str, int]:
  if name == "square":
    return {"num_queries": 5000, "num_restarts": 1}
  numbers = {"num_steps": 100, "num_restarts": 1}
  if name in _APGD_LOSSES:
    numbers["eot_samples"] = version.eot_samples
  enlarged = norm == "l1" and version.enlarged
  if name in _TARGETED:
    few = enlarged and name == "apgd-t"
    numbers["num_targets"] = (
      min(5, version.num_targets) if few else version.num_targets
    )
  else:
    many = name == "apgd-ce" and enlarged
    numbers["num_restarts"] = 5 if many else version.num_restarts
  return numbers


def _job(
  name: str,
  numbers: Mapping[str, int],
  version: Version,
  norm: str,
  num_classes: int,
) -> Job:
  wanted = numbers.get("num_targets", 1)
  targets = min(wanted, num_classes - 1)
  restarts = numbers["num_restarts"]
  by_malt = name in _TARGETED and malt_norm(
    version.targeting, norm, wanted, num_classes
  )
  targeting = "malt" if by_malt else "logits"
  if name == "square":
    steps = numbers["num_queries"]
    return Job(name, Square(norm), steps, 1, restarts, steps_at_once=25)
  steps = numbers["num_steps"]
  if name in ("fab", "fab-t"):
    search = FAB(norm=norm, targeted=name == "fab-t")
    return Job(name, search, steps, targets, restarts, targeting=targeting)
  loss = _APGD_LOSSES[name]
  if num_classes < losses.MIN_CLASSES.get(loss, 2):
    loss = _MARGINS[loss]
  enlarged = norm == "l1" and version.enlarged
  apgd = APGD(norm, loss, numbers["eot_samples"], enlarged)
  return Job(name, apgd, steps, targets, restarts, targeting=targeting)


def _named(version: str | Sequence[str]) -> tuple[str, Version]:
  """Looks up a version; a list of attacks is one of its own."""
  if isinstance(version, str):
    checks.choice("version", version, VERSIONS)
    return version, VERSIONS[version]
  names = checks.names("version", version)
  for name in names:
    checks.choice("version", name, NAMES)
  if len(set(names)) < len(names):
    raise UserError(
      f"version: {names!r}; allowed: each of {', '.join(NAMES)} at most once"
    )
  return "custom", Version(names)


def make(
  version: str | Sequence[str],
  *,
  norm: str,
  num_classes: int,
  options: Mapping[str, Mapping[str, int]] | None = None,
  targeting: str | None = None,
) -> Ensemble:
  """Returns the attacks of a version.

  Args:
    version: One of `VERSIONS`, or the names of attacks in the order in which
      they are to run.
    norm: "linf", "l2" or "l1".
    num_classes: Number of classes, K; no attack aims at more than K - 1, and
      the margin replaces a DLR loss that needs more classes.
    options: Attack to numbers other than the version's, e.g.
      {"square": {"num_queries": 1000}}; the version is then "custom".
    targeting: Way to choose the classes of the targeted attacks, one of
      `TARGETINGS`, where there are more than these; None: the version's.

  Returns:
    The ensemble.

  Raises:
    UserError: An unknown name or number.
  """
  checks.choice("norm", norm, balls.BALLS)
  checks.count("num_classes", num_classes)
  options = {} if options is None else options
  checks.instance("options", options, Mapping, "attack to numbers, or None")
  label, chosen = _named(version)
  if targeting is not None:
    checks.choice("targeting", targeting, TARGETINGS)
    chosen = dataclasses.replace(chosen, targeting=targeting)
  for name, changes in options.items():
    checks.choice("options", name, chosen.attacks)
    checks.instance(
      f"options[{name!r}]", changes, Mapping, "numbers of the attack by name"
    )
    for option, value in changes.items():
      checks.choice(f"options[{name!r}]", option, _OPTIONS[name])
      # Each run of each image is kept account of.
      most = _MOST_RUNS if option.startswith("num_r") else base.MOST_STEPS
      checks.integer(f"options[{name!r}].{option}", value, 1, most)
  numbers = {
    name: _defaults(name, chosen, norm)
    | {option: int(value) for option, value in options.get(name, {}).items()}
    for name in chosen.attacks
  }
  return Ensemble(
    "custom" if options else label,
    tuple(_job(n, numbers[n], chosen, norm, num_classes) for n in numbers),
    needed={
      name: losses.MIN_CLASSES.get(_APGD_LOSSES.get(name, ""), 2)
      for name in numbers
    },
    wanted={n: numbers[n]["num_targets"] for n in numbers if n in _TARGETED},
    randomized=chosen.eot_samples > 1 and not options,
  )


def describe(job: Job) -> str:
  """Describes a job's numbers on one line."""
  search: Any = job.search
  apgd = search if isinstance(search, APGD) else None
  parts = [
    wording.attack(
      num_steps=job.num_steps,
      num_restarts=job.num_restarts,
      loss=search.loss if apgd else None,
      unit="query" if isinstance(search, Square) else "step",
    )
  ]
  if job.num_targets > 1 or job.targeting == "malt":
    targets = wording.plural(job.num_targets, "target")
    by_malt = f" by MALT among the first {CANDIDATES} classes"
    parts.append(targets + by_malt * (job.targeting == "malt"))
  if apgd and apgd.eot_samples > 1:
    parts.append(wording.plural(apgd.eot_samples, "EOT sample"))
  if apgd and apgd.enlarged:
    parts.append("radius from 3 epsilon")
  if job.screened:
    parts.append("on the screening network")
  return ", ".join(parts)


def as_json(job: Job) -> dict[str, Any]:
  """Returns a job's numbers as plain values, by which states are recognised."""
  fields = dataclasses.asdict(job)
  fields.pop("steps_at_once")
  if job.targeting == "logits":  # states of earlier versions do not say so
    fields.pop("targeting")
  if not job.screened:
    fields.pop("screened")
  fields["search"] = type(job.search).__name__, fields["search"]
  return fields
