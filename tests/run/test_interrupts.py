"""Signals to whole processes: they save, exit, and resume."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from atat_jax import checkpoints

pytest_plugins = ("tiny",)


class Process:
  """`python main.py` in a process of its own, which gets a signal."""

  def __init__(self, folder, *arguments):
    self.output = folder / "output"
    with self.output.open("w") as file:
      self._process = subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=tiny.ROOT,
        env={**os.environ, **tiny.QUICK},
        stdout=file,
        stderr=subprocess.STDOUT,
      )

  def signal_when(self, ready, signum):
    """Sends a signal to the running process once `ready()` is true."""
    deadline = time.monotonic() + 600
    while not ready():
      assert self._process.poll() is None, self.output.read_text()
      assert time.monotonic() < deadline, self.output.read_text()
      time.sleep(0.02)
    self._process.send_signal(signum)

  def wait(self):
    """Waits for the end; returns exit status and output."""
    try:
      return self._process.wait(600), self.output.read_text()
    finally:
      self._process.kill()


def count(path):
  return len(path.read_text().splitlines()) if path.exists() else 0


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, command_line):
  workdir = tmp_path / "run"
  total = 8 * tiny.STEPS_PER_EPOCH
  arguments = tiny.flags(
    workdir,
    "--config.train.num_epochs=8",
    "--config.train.log_every_steps=1",
    "--config.train.validate_every_epochs=8",
    method="standard",
    mode="train",
  )
  path = workdir / "metrics.jsonl"
  process = Process(tmp_path, *arguments)
  process.signal_when(lambda: count(path) > 5, signal.SIGINT)
  status, output = process.wait()
  assert status == 128 + signal.SIGINT == 130
  assert "Traceback" not in output
  last = output.strip().splitlines()[-1]
  step = checkpoints.checkpoint_step(workdir, which="last")
  assert 5 < step < total
  assert f"stopped at step {step} of {total}" in last
  assert str(workdir / "checkpoints") in last
  assert "the same command resumes" in last

  outcome = command_line(*arguments)
  assert outcome.status == 0, outcome.stderr
  assert f"resumed at step {step} of {total}" in outcome.stderr
  assert checkpoints.checkpoint_step(workdir, which="last") == total
  found = tiny.metrics(path)
  steps = [line["step"] for line in found if line["split"] == "train"]
  assert steps == list(range(1, total + 1))  # each once, in order


@pytest.mark.slow
def test_sigterm_at_every_stage_of_a_run(tmp_path):
  workdir = tmp_path / "run"
  arguments = tiny.flags(
    workdir,
    "--config.teacher.num_epochs=8",
    "--config.train.num_epochs=8",
    "--config.train.log_every_steps=1",
    "--config.teacher.log_every_steps=1",
    "--config.evaluation.attacks=nominal,pgd300,pgd2",
  )

  def grown(path, lines):
    return lambda: count(workdir / path) > lines

  stages = {
    "teacher": grown("teacher/metrics.jsonl", 10),
    "student": grown("metrics.jsonl", 10),
    "evaluation": grown("results.json", 10),
  }
  for name, ready in stages.items():
    process = Process(tmp_path, *arguments)
    process.signal_when(ready, signal.SIGTERM)
    status, output = process.wait()
    assert status == 128 + signal.SIGTERM == 143, (name, output)
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert "the same command" in last
    assert name == "evaluation" or last.startswith(f"{name}: stopped at step")
  assert not (workdir / "report.html").exists()
  status, output = Process(tmp_path, *arguments).wait()
  assert status == 0, output
  assert (workdir / "report.html").exists()
  for directory in (workdir, workdir / "teacher"):
    found = tiny.metrics(directory / "metrics.jsonl")
    steps = [line["step"] for line in found if line["split"] == "train"]
    assert steps == list(range(1, 8 * tiny.STEPS_PER_EPOCH + 1))
