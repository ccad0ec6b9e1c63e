"""AutoAttack's versions, their numbers, and the sizes of its batches."""

import pytest

from atat_jax.attacks.auto_pgd import APGD
from atat_jax.attacks.autoattack import slots, versions
from atat_jax.attacks.fast_boundary import FAB
from atat_jax.attacks.square_search import Square
from atat_jax.errors import UserError

# Written out from the specification: name to (algorithm, loss, steps, targets,
# restarts, EOT samples).
_LINF = {
  "standard": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 1, 1),
    "apgd-t": (APGD, "targeted_dlr", 100, 9, 1, 1),
    "fab-t": (FAB, None, 100, 9, 1, None),
    "square": (Square, None, 5000, 1, 1, None),
  },
  "fast": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 1, 1),
    "apgd-t": (APGD, "targeted_dlr", 100, 9, 1, 1),
  },
  "quick": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 1, 1),
    "apgd-t": (APGD, "targeted_dlr", 100, 5, 1, 1),
  },
  "rand": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 1, 20),
    "apgd-dlr": (APGD, "dlr", 100, 1, 1, 20),
  },
  "plus": {
    "apgd-ce": (APGD, "cross_entropy", 100, 1, 5, 1),
    "apgd-dlr": (APGD, "dlr", 100, 1, 5, 1),
    "fab": (FAB, None, 100, 1, 5, None),
    "square": (Square, None, 5000, 1, 1, None),
    "apgd-t": (APGD, "targeted_dlr", 100, 9, 1, 1),
    "fab-t": (FAB, None, 100, 9, 1, None),
  },
}


def _numbers(job):
  return (
    type(job.search),
    getattr(job.search, "loss", None),
    job.num_steps,
    job.num_targets,
    job.num_restarts,
    getattr(job.search, "eot_samples", None),
  )


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("version", _LINF)
def test_versions_are_those_of_the_specification(version, norm):
  made = versions.make(version, norm=norm, num_classes=10)
  assert made.version == version
  found = {job.name: _numbers(job) for job in made.jobs}
  assert found == _LINF[version] and list(found) == list(_LINF[version])
  assert all(job.search.norm == norm for job in made.jobs)
  for job in made.jobs:
    if job.name in ("fab", "fab-t"):
      assert job.search.targeted == (job.name == "fab-t")


def test_l1_restarts_and_begins_with_a_larger_radius():
  made = {
    job.name: job
    for job in versions.make("standard", norm="l1", num_classes=10).jobs
  }
  assert made["apgd-ce"].num_restarts == 5 and made["apgd-ce"].search.enlarged
  assert made["apgd-t"].num_targets == 5 and made["apgd-t"].search.enlarged
  assert made["apgd-t"].num_restarts == 1
  assert made["fab-t"].num_targets == 9
  assert made["square"].num_steps == 5000


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 1000])
def test_few_and_many_classes(classes):
  made = versions.make("standard", norm="linf", num_classes=classes)
  jobs = {job.name: job for job in made.jobs}
  loss = "targeted_margin" if classes < 4 else "targeted_dlr"
  assert jobs["apgd-t"].search.loss == loss
  for name in ("apgd-t", "fab-t"):
    assert jobs[name].num_targets == min(9, classes - 1)


def test_a_list_and_other_numbers():
  made = versions.make(
    ["square", "apgd-dlr"],
    norm="linf",
    num_classes=10,
    options={"square": {"num_queries": 7}},
  )
  assert [job.name for job in made.jobs] == ["square", "apgd-dlr"]
  assert made.version == "custom" and made.jobs[0].num_steps == 7


def test_stored_states_are_recognised_by_these_numbers():
  """Other names would make an evaluation begin anew."""
  made = versions.make("standard", norm="linf", num_classes=10)
  options = {
    "apgd": {"norm": "linf", "eot_samples": 1, "enlarged": False},
    "fab": {"norm": "linf", "targeted": True},
    "square": {"norm": "linf", "p_init": 0.8},
  }
  expected = [
    ("apgd-ce", 100, 1, ("APGD", options["apgd"] | {"loss": "cross_entropy"})),
    ("apgd-t", 100, 9, ("APGD", options["apgd"] | {"loss": "targeted_dlr"})),
    ("fab-t", 100, 9, ("FAB", options["fab"])),
    ("square", 5000, 1, ("Square", options["square"])),
  ]
  assert [versions.as_json(job) for job in made.jobs] == [
    {
      "name": name,
      "num_steps": num_steps,
      "num_targets": num_targets,
      "num_restarts": 1,
      "search": search,
    }
    for name, num_steps, num_targets, search in expected
  ]


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ({"version": "best"}, "version: 'best'; allowed: fast, plus, quick, rand"),
    ({"version": []}, "version: "),
    ({"version": ["square", "square"]}, "at most once"),
    ({"version": ["pgd"]}, "version: 'pgd'; allowed: apgd-ce"),
    ({"options": {"fab": {"num_steps": 3}}}, "options: 'fab'; allowed: "),
    (
      {"options": {"square": {"num_steps": 3}}},
      r"options\['square'\]: 'num_steps'; allowed: num_queries",
    ),
    (
      {"options": {"square": {"num_queries": 0}}},
      r"options\['square'\].num_queries: 0; allowed: an integer > 0",
    ),
  ],
)
def test_unknown_versions_and_numbers(arguments, named):
  with pytest.raises(UserError, match=named):
    versions.make(
      **{"version": "standard", "norm": "linf", "num_classes": 10, **arguments}
    )


def test_sizes_of_batches(monkeypatch):
  assert slots.sizes(128, 1) == [48, 36, 24, 18, 12, 9, 6]  # of CPU's caches
  assert slots.sizes(1000, 8)[0] == 384
  monkeypatch.setattr(slots, "_costs", lambda: slots._Costs(64, 1))
  assert slots.sizes(128, 1) == [128, 96, 64, 48, 32, 24, 16]
  assert slots.sizes(100, 8) == [104, 80, 56, 40, 32, 24, 16]
  assert slots.sizes(3, 1) == [3, 2, 1]
  assert slots.sizes(4, 8) == [8]


@pytest.mark.parametrize(
  ("pending", "size"),
  [(500, 128), (130, 128), (120, 96), (85, 64), (70, 48), (30, 32), (3, 16)],
)
def test_the_size_that_wastes_least(pending, size, monkeypatch):
  """70 are 48 and 22, which fit into 24; a batch of 96 would idle a quarter."""
  monkeypatch.setattr(slots, "_costs", lambda: slots._Costs(batch=4, program=1))
  assert slots._best_size(slots.sizes(128, 1), pending, 100) == size


@pytest.mark.parametrize(
  ("pending", "steps", "size"),
  [
    (35, 101, 40),  # 30 rows would need a program of their own, and then 5
    (63, 100, 40),  # in thirties a third batch would stay as wide
    (7, 5001, 8),  # thousands of steps are worth a program
    (7, 100, 40),
  ],
)
def test_a_smaller_batch_has_to_pay_for_its_program(
  pending, steps, size, monkeypatch
):
  costs = slots._Costs(batch=4, program=4096)
  monkeypatch.setattr(slots, "_costs", lambda: costs)
  assert slots._best_size(slots.sizes(40, 1), pending, steps) == size


def test_losses_of_apgd_share_a_program():
  made = versions.make("standard", norm="linf", num_classes=10)
  programs = {job.name: made.program(job) for job in made.jobs}
  (first, place), (second, other) = programs["apgd-ce"], programs["apgd-t"]
  assert first == second
  assert first.loss[place] == "cross_entropy"
  assert first.loss[other] == "targeted_dlr"
  for name in ("fab-t", "square"):
    (job,) = (job for job in made.jobs if job.name == name)
    assert programs[name] == (job.search, 0)
  assert made.losses == ("cross_entropy", "targeted_dlr")
