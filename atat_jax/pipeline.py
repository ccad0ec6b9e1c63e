"""The modes of `main.py`; finished work is not done again."""

import contextlib
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from atat_jax import evaluate, report, sharding, train
from atat_jax.config import make_plan
from atat_jax.data import Dataset
from atat_jax.errors import UserError
from atat_jax.plan import Plan
from atat_jax.process import stops
from atat_jax.runs import configuration, files, locations, lock
from atat_jax.trial import rehearsal, replay

MODES = ("run", "train", "evaluate", "figures", "replay")

_log = logging.getLogger(__name__)


def run(
  mode: str,
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  step: int | None = None,
) -> None:
  """Runs one mode and prints where its results are.

  Args:
    mode: One of `MODES`; "run" does everything that is not done yet.
    config: Configuration with the fields of `configs/default.py`.
    workdir: Directory for everything that the run writes. One process at a
      time works in it; "figures", which only reads results, may run beside it.
    step: Number of the step that "replay" makes again, from 1.

  Raises:
    UserError: Bad input, one clear line.
    Interrupted: Stopped on request, state saved.
  """
  began = time.perf_counter()
  plan = make_plan(config)
  if (mode == "replay") != (step is not None):
    raise UserError(
      f"step: {step}; allowed: a step with mode replay, only there"
    )
  if plan.profile_steps and locations.is_remote(workdir):
    raise UserError(
      f"profile_steps: {plan.profile_steps}; allowed: () with a working"
      " directory on an object store"
    )
  if mode == "figures":
    _figures(workdir, redraw=True)
    return
  configuration.check(plan.record, workdir)
  if mode == "evaluate":
    evaluate.find_checkpoints(plan, workdir)  # before data are loaded
  if mode in ("run", "evaluate"):
    plan.open_corruptions()
  with _locked(workdir) as check:
    configuration.check(plan.record, workdir)  # another may have begun since
    if step is not None:
      _replay(plan, workdir, step)
    else:
      _work(mode, plan, workdir, check)
  _log.info("done in %.0f s", time.perf_counter() - began)


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
  """Locks the directory, in process 0; yields a check that it is still there."""
  if jax.process_index():
    yield stops.check
    return
  with lock.directory("workdir", workdir) as held:
    files.remove_temporaries(workdir)

    def check() -> None:
      held.check()
      stops.check()

    yield check


def _work(
  mode: str, plan: Plan, workdir: pathlib.Path, check: Callable[[], None]
) -> None:
  """Does the work of "run", "train" and "evaluate"."""
  before = _shown(workdir)
  mesh = sharding.split_mesh(sharding.make_mesh(), plan.model_axis)
  dataset = plan.data.load()
  if mode in ("run", "evaluate"):
    evaluate.open_corrupted(plan, dataset.test)  # before hours of training
  if mode in ("run", "train"):
    _train(plan, workdir, dataset, mesh, check)
  check()
  if jax.process_index() == 0:
    configuration.write(plan.record, workdir)
  if mode in ("run", "train"):
    _log.info("checkpoints: %s", workdir / files.CHECKPOINTS)
  if mode in ("run", "evaluate"):
    results = evaluate.evaluate(plan, workdir, dataset, mesh)
    check()
    if jax.process_index() == 0:
      sys.stdout.write(f"\n{report.results_table(results)}\n")
      sys.stdout.write(f"results: {workdir / files.RESULTS}\n")
  if mode == "run":
    # A clock that was set back makes a page look newer than what it lacks.
    changed = _shown(workdir) != before
    _figures(workdir, redraw=changed or report.is_old(workdir))
    check()


def _train(
  plan: Plan,
  workdir: pathlib.Path,
  dataset: Dataset,
  mesh: Mesh,
  check: Callable[[], None],
) -> None:
  """Trains what is not trained yet."""
  extra = plan.data.open_extra()
  train.check_sizes(plan, dataset, extra, mesh)
  with train.StepPrograms(plan, mesh) as step_programs:
    # Compiles while the other programs are traced and the data are moved.
    step_programs.compile(workdir, dataset)
    rehearsal.rehearse(plan, workdir, dataset, mesh)
    check()
    # Writes the configuration with the first checkpoint, not before: a start
    # that is refused or diverges must leave its values free to be changed.
    train.train(plan, workdir, dataset, mesh, extra, step_programs)


def _shown(workdir: pathlib.Path) -> dict[pathlib.Path, tuple[float, int]]:
  """Returns the files that the page shows, with their time and size."""
  names = (files.RESULTS, files.METRICS, f"*/{files.METRICS}", "*.npz")
  found = [path for name in names for path in workdir.glob(name)]
  return {path: files.stamp(path) for path in found}


def _replay(plan: Plan, workdir: pathlib.Path, step: int) -> None:
  """Makes a step of a training again."""
  dataset, extra = plan.data.load(), plan.data.open_extra()
  mesh = sharding.split_mesh(sharding.make_mesh(), plan.model_axis)
  train.check_sizes(plan, dataset, extra, mesh)
  path = replay.replay(plan, workdir, dataset, mesh, extra, step=step)
  if jax.process_index() == 0:
    sys.stdout.write(f"{replay.describe(path)}\n")


def _figures(workdir: pathlib.Path, *, redraw: bool) -> None:
  if jax.process_index():
    return
  page = workdir / files.REPORT
  if redraw:
    report.write_report(workdir)
  sys.stdout.write(f"figures: {workdir / files.FIGURES}\nreport:  {page}\n")
