"""A run that is killed anywhere ends like one that is not."""

import json
import time

import kills
import pytest

pytest_plugins = ("tiny",)


def differences(tmp_path, num_kills, arguments, phases=kills.PHASES):
  """Runs the harness with a new seed, which it prints."""
  return kills.run(
    tmp_path,
    num_kills=num_kills,
    seed=time.time_ns() % 2**31,
    arguments=arguments,
    phases=phases,
  )


def test_three_kills_change_nothing(tmp_path):
  arguments = kills.arguments(
    "standard",
    "--config.train.num_epochs=1",
    "--config.evaluation.attacks=nominal,apgd2",
    "--config.evaluation.batch_norm=running",
  )
  names = ("step", "checkpoint", "evaluation")
  phases = [phase for phase in kills.PHASES if phase.name in names]
  assert not differences(tmp_path, 3, arguments, phases)


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path):
  assert not differences(tmp_path, 50, kills.arguments("atat"))


def change_metrics(workdir):
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines()
  line = json.loads(lines[-1])
  line["epoch"] += 1e-9
  path.write_text("\n".join([*lines[:-1], json.dumps(line)]))


def repeat_metrics(workdir):
  path = workdir / "metrics.jsonl"
  path.write_text(path.read_text() * 2)


def change_results(workdir):
  path = workdir / "results.json"
  results = json.loads(path.read_text())
  results["rows"][0]["accuracy"] += 1e-9
  path.write_text(json.dumps(results))


def leave_a_file(workdir):
  (workdir / ".results.0123.tmp.json").write_text("{")


@pytest.mark.parametrize(
  "change", [change_metrics, repeat_metrics, change_results, leave_a_file]
)
def test_the_comparison_sees(change, finished, tmp_path):
  wanted = kills.contents(finished.workdir)
  copy = finished.copy(tmp_path / "copy")
  assert not kills.differences(wanted, kills.contents(copy))
  change(copy)
  assert kills.differences(wanted, kills.contents(copy))
