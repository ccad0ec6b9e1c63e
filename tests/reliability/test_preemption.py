"""Signals to one of several processes at random moments of a whole run.

A job of two processes trains, evaluates and reports. At a moment drawn from the
whole time that it takes, one process is asked to stop or killed; both must end
within a minute, and what starts again must end with the numbers of a job that
nobody disturbed.
"""

import json
import os
import pathlib
import random
import signal
import time
from typing import NamedTuple

import cluster
import pytest
import tiny

pytest_plugins = ("tiny",)

TRIALS = 20
ENDS_WITHIN_SECONDS = 60

FLAGS = (
  "--config.train.num_epochs=2",
  "--config.evaluation.attacks=nominal,fgsm",
  "--config.evaluation.batch_norm=('running',)",
  "--config.figures.analyses=",
)
OPTIONS = ("--num_processes=2", "--devices=1")


class Undisturbed(NamedTuple):
  """A job from its start to its end."""

  workdir: pathlib.Path
  seconds: float


def start(workdir, *options):
  arguments = tiny.flags(workdir, *FLAGS, method="standard")
  return cluster.Job(arguments, workdir.with_suffix(".log"), *options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("undisturbed")
  for name in ("compiles", "run"):
    began = time.monotonic()
    job = start(folder / name, *OPTIONS)
    assert job.wait() == 0, job.text
  return Undisturbed(folder / "run", time.monotonic() - began)


def complete_checkpoints(workdir):
  """Names of the checkpoints, all of them whole."""
  folder = workdir / "checkpoints"
  if not folder.exists():
    return []
  found = [path for path in folder.iterdir() if path.name.isdigit()]
  for path in found:
    assert (path / "run").is_dir() and (path / "params").is_dir(), path
  return sorted(int(path.name) for path in found)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_job_outlives_what_happens_to_one_process(
  trial, undisturbed, tmp_path, capsys
):
  draw = random.Random(trial)
  victim, when = draw.randrange(2), draw.uniform(0.02, 0.98)
  signum = (signal.SIGTERM, signal.SIGKILL)[trial % 2]
  workdir = tmp_path / "run"
  job = start(workdir, *OPTIONS, "--max_restarts=1")
  began = time.monotonic()
  job.until(lambda: len(job.pids()) == 2)
  time.sleep(max(0.0, when * undisturbed.seconds - time.monotonic() + began))
  if not job.statuses():
    os.kill(job.pids()[victim], signum)
  sent = time.monotonic()
  while not job.statuses():
    assert time.monotonic() - sent < ENDS_WITHIN_SECONDS, job.text
    time.sleep(0.02)
  took = time.monotonic() - sent
  text, first = job.text, job.statuses()[0]
  kept = complete_checkpoints(workdir)
  assert job.wait() == 0, job.text
  with capsys.disabled():
    print(
      f"\ntrial {trial}: {signal.Signals(signum).name} to process {victim} after"
      f" {when:.0%} of {undisturbed.seconds:.0f} s: statuses {first} after"
      f" {took:.1f} s, checkpoints {kept}"
    )
  if first != [0, 0]:
    check_the_end(signum, victim, first, text)
  if kept and kept[-1] < 20 and first != [0, 0]:
    assert f"resumed at step {kept[-1]} of 20" in job.text, job.text
  assert cluster.metrics(workdir) == cluster.metrics(undisturbed.workdir)
  assert tiny_results(workdir) == tiny_results(undisturbed.workdir)


def check_the_end(signum, victim, statuses, text):
  """Checks how the processes ended and what they said."""
  if signum == signal.SIGTERM:
    # Whatever has finished already stays finished.
    assert set(statuses) <= {143, 0}, text
    assert "stopped" in text
    return
  assert statuses[victim] == -signal.SIGKILL, text
  # 143: the two had not met yet, and the launcher stopped the one that waited.
  assert statuses[1 - victim] in (1, 143, 0), text
  if statuses[1 - victim] == 1:
    assert f"error: process {victim} on " in text, text


def tiny_results(workdir):
  results = json.loads((workdir / "results.json").read_text())
  return [
    {k: v for k, v in row.items() if k != "seconds"} for row in results["rows"]
  ]
