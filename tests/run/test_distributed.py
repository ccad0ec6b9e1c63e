"""Several processes: `--distributed`, as SLURM starts them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny

pytest_plugins = ("tiny",)


def _start(rank, workdir):
  environment = {
    **os.environ,
    **tiny.QUICK,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
    # Not a real job: the variables that jax recognises one by.
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(rank),
    "SLURM_LOCALID": str(rank),
  }
  return subprocess.Popen(
    [sys.executable, "main.py", "--distributed", *tiny.flags(workdir)],
    cwd=tiny.ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path):
  """Two processes of two devices agree with one process of four."""
  processes = [_start(rank, tmp_path / "two") for rank in range(2)]
  outputs = [process.communicate(timeout=500)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  # Only the first process prints.
  assert ["report:" in output for output in outputs] == [True, False]

  results = json.loads((tmp_path / "two" / "results.json").read_text())
  # Each network: the attacks of both modes, and their two worst cases.
  assert len(results["rows"]) == 2 * sum(
    len(attacks) + 1 for attacks in tiny.MEASURED.values()
  )
  assert {row["num_examples"] for row in results["rows"]} == {tiny.NUM_TEST}

  tiny.run(tmp_path / "one", "train", tiny.config(), num_devices=4)
  path = "teacher/metrics.jsonl"
  one, two = (tiny.metrics(tmp_path / run / path) for run in ("one", "two"))
  assert [line["step"] for line in one] == [line["step"] for line in two]
  # Later lines drift apart by rounding, and signs of gradients amplify it.
  np.testing.assert_allclose(one[0]["loss"], two[0]["loss"], rtol=1e-4)
