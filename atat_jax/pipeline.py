"""The modes of `main.py`; finished work is not done again."""

import logging
import pathlib
import sys
import time

import jax
from ml_collections import ConfigDict

from atat_jax import evaluate, report, sharding, train
from atat_jax.config import make_plan
from atat_jax.runs import configuration, files

MODES = ("run", "train", "evaluate", "figures")

_log = logging.getLogger(__name__)


def run(mode: str, config: ConfigDict, workdir: pathlib.Path) -> None:
  """Runs one mode and prints where its results are.

  Args:
    mode: One of `MODES`; "run" does everything that is not done yet.
    config: Configuration with the fields of `configs/default.py`.
    workdir: Directory for everything that the run writes.

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
  if mode in ("run", "train"):
    # Writes the configuration with the first checkpoint, not before: a start
    # that is refused or diverges must leave its values free to be changed.
    train.train(plan, workdir, dataset, mesh, extra)
  if jax.process_index() == 0:
    configuration.write(plan.record, workdir)
  if mode in ("run", "train"):
    _log.info("checkpoints: %s", workdir / files.CHECKPOINTS)
  if mode in ("run", "evaluate"):
    results = evaluate.evaluate(plan, workdir, dataset, mesh)
    if jax.process_index() == 0:
      sys.stdout.write(f"\n{report.results_table(results)}\n")
      sys.stdout.write(f"results: {workdir / files.RESULTS}\n")
  if mode == "run":
    _figures(workdir, redraw=report.is_old(workdir))
  _log.info("done in %.0f s", time.perf_counter() - began)


def _figures(workdir: pathlib.Path, *, redraw: bool) -> None:
  if jax.process_index():
    return
  page = workdir / files.REPORT
  if redraw:
    report.write_report(workdir)
  sys.stdout.write(f"figures: {workdir / files.FIGURES}\nreport:  {page}\n")
