"""The modes of `main.py`: what is done already is not done again."""

import logging
import pathlib
import sys
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from atat_jax import evaluate, report, sharding, train
from atat_jax.config import make_plan
from atat_jax.data import Dataset
from atat_jax.plan import Plan
from atat_jax.runs import configuration

MODES = ("run", "train", "evaluate", "figures")

_log = logging.getLogger(__name__)


def run(mode: str, config: ConfigDict, workdir: pathlib.Path) -> None:
  """Runs one mode and says where its results are.

  Args:
    mode: One of `MODES`; "run" does everything that is not done yet.
    config: As `configs/default.py` makes it.
    workdir: Holds everything that the run writes.

  Raises:
    UserError: Bad input, one clear line.
    Interrupted: Stopped on request, state saved.
  """
  began = time.perf_counter()
  plan = make_plan(config)
  if mode == "figures":
    _figures(workdir, redraw=True)
    return
  configuration.check(plan.record, workdir)
  if mode == "evaluate":
    evaluate.find_checkpoints(plan, workdir)  # before data are loaded
  mesh = sharding.make_mesh()
  dataset = plan.data.load()
  extra = None
  if mode in ("run", "train"):
    extra = plan.data.open_extra()
    train.check_sizes(plan, dataset, extra)
  if jax.process_index() == 0:
    configuration.write(plan.record, workdir)
  if mode in ("run", "train"):
    train.train(plan, workdir, dataset, mesh, extra)
    _log.info("checkpoints: %s", workdir / "checkpoints")
  if mode in ("run", "evaluate"):
    _evaluate(plan, workdir, dataset, mesh)
  if mode == "run":
    _figures(workdir, redraw=report.is_old(workdir))
  _log.info("done in %.0f s", time.perf_counter() - began)


def _evaluate(
  plan: Plan, workdir: pathlib.Path, dataset: Dataset, mesh: Mesh
) -> None:
  results = evaluate.evaluate(plan, workdir, dataset, mesh)
  if jax.process_index():
    return
  sys.stdout.write(f"\n{report.results_table(results)}\n")
  sys.stdout.write(f"results: {workdir / 'results.json'}\n")


def _figures(workdir: pathlib.Path, *, redraw: bool) -> None:
  if jax.process_index():
    return
  page = workdir / "report.html"
  if redraw:
    report.write_report(workdir)
  sys.stdout.write(f"figures: {workdir / 'figures'}\nreport:  {page}\n")
