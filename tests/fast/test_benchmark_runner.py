"""Plans of commands: budget, resumption, failures and signals."""

import importlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from atat_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return importlib.import_module("benchmarks.run")


@pytest.fixture
def call(run, tmp_path, capsys):
  """Runs a plan; returns the exit status, the records and the output."""

  def make(*lines, budget=60.0, grace=0.2, flags=()):
    plan = tmp_path / "plan.txt"
    plan.write_text("\n".join(lines))
    command = [
      str(plan),
      f"--out={tmp_path / 'out'}",
      f"--budget={budget}",
      f"--grace={grace}",
      *flags,
    ]
    try:
      run.main(command)
      status = 0
    except SystemExit as error:
      status = error.code
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    return status, found["commands"], capsys.readouterr().out

  return make


def test_finished_commands_are_skipped_and_failed_ones_run_again(
  call, tmp_path
):
  lines = (
    "# a comment",
    "",
    "good | 60 | echo once >> $OUT/good.txt",
    "bad  | 60 | echo no such thing; test -e $OUT/allowed",
  )
  status, found, output = call(*lines)
  assert status == 1
  assert found["good"]["status"] == "done"
  assert (found["bad"]["status"], found["bad"]["exit_code"]) == ("failed", 1)
  assert found["bad"]["seconds"] >= 0 and found["bad"]["commit"]
  assert "no such thing" in output and "| bad " in output
  (tmp_path / "out" / "allowed").touch()
  status, found, output = call(*lines)
  assert status == 0 and "good: done before" in output
  assert found["bad"]["status"] == "done" and found["bad"]["attempts"] == 2
  assert (tmp_path / "out" / "good.txt").read_text() == "once\n"
  log = (tmp_path / "out" / "logs" / "bad.log").read_text()
  assert log.count("\nno such thing\n") == 2


def test_a_changed_command_runs_again(call):
  assert call("one | 60 | true")[0] == 0
  status, found, _ = call("one | 60 | exit 3")
  assert (status, found["one"]["exit_code"]) == (1, 3)


def test_commands_find_this_python_and_the_reference(call, tmp_path):
  line = f"one | 60 | test $REFERENCE = here && {pathlib.Path(sys.executable).name} -c 'import sys; print(sys.prefix)'"
  assert call(line, flags=["--reference=here"])[0] == 0
  log = (tmp_path / "out" / "logs" / "one.log").read_text()
  assert log.splitlines()[1] == sys.prefix


def test_a_command_is_stopped_at_its_limit_and_resumed(call):
  # Saves at SIGTERM, goes on where it was.
  line = (
    "long | 0.3 | test -e $OUT/saved && exit 0;"
    " trap 'touch $OUT/saved; exit 9' TERM; while :; do sleep 0.02; done"
  )
  status, found, _ = call(line, "next | 60 | true", grace=5)
  assert status == 75
  assert (found["long"]["status"], found["long"]["exit_code"]) == ("stopped", 9)
  assert found["next"]["status"] == "done"
  status, found, _ = call(line, "next | 60 | true")
  assert (status, found["long"]["status"]) == (0, "done")


def test_a_command_that_ignores_sigterm_is_killed_with_its_children(
  call, tmp_path
):
  child = "trap '' TERM; echo $$ > $OUT/child; while :; do sleep 0.02; done"
  status, found, _ = call(
    f"stubborn | 2 | trap '' TERM; sh -c {shlex.quote(child)}; true"
  )
  assert status == 75 and found["stubborn"]["exit_code"] == -signal.SIGKILL
  number = int((tmp_path / "out" / "child").read_text())
  end, state = time.monotonic() + 60, pathlib.Path(f"/proc/{number}/stat")
  while state.exists() and ") Z" not in state.read_text():
    assert time.monotonic() < end, "the child still runs"
    time.sleep(0.02)


def test_the_budget_ends_the_call(call):
  began = time.monotonic()
  status, found, output = call(
    "first | 300 | sleep 100", "second | 60 | true", budget=0.6
  )
  assert time.monotonic() - began < 50
  assert status == 75 and found["first"]["status"] == "stopped"
  assert "second" not in found and "second: not started" in output


def test_sigterm_stops_the_runner_and_the_next_call_resumes(tmp_path):
  plan = tmp_path / "plan.txt"
  plan.write_text(
    "first | 60 | touch $OUT/first\n"
    "long | 600 | test -e $OUT/started || { touch $OUT/started; sleep 300; }\n"
    "last | 60 | true\n"
  )
  out = tmp_path / "out"
  command = [sys.executable, "-m", "benchmarks.run", str(plan), f"--out={out}"]
  runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
  end = time.monotonic() + 60
  while not (out / "started").exists() and time.monotonic() < end:
    time.sleep(0.02)
  os.kill(runner.pid, signal.SIGTERM)
  output = runner.communicate(timeout=120)[0].decode()
  assert runner.returncode == 128 + signal.SIGTERM
  assert "| long " in output
  found = json.loads((out / "run.json").read_text())["commands"]
  assert found["long"]["status"] == "stopped" and "last" not in found
  (out / "first").unlink()
  subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  found = json.loads((out / "run.json").read_text())["commands"]
  assert {name: one["status"] for name, one in found.items()} == {
    "first": "done",
    "long": "done",
    "last": "done",
  }
  assert not (out / "first").exists()


@pytest.mark.parametrize(
  "plan",
  [
    "name | 60",
    "name | many | true",
    "name | 0 | true",
    "../name | 60 | true",
    "name | 60 |",
  ],
)
def test_a_wrong_line_is_refused_before_anything_runs(run, plan, tmp_path):
  with pytest.raises(SystemExit, match=r"line 1: .*allowed: NAME"):
    run.main([plan, f"--out={tmp_path / 'out'}"])
  assert not (tmp_path / "out").exists()


def test_wrong_names_are_refused(run, tmp_path):
  out = f"--out={tmp_path / 'out'}"
  for arguments, message in (
    (["a | 1 | true", "a | 1 | true"], "plan: 'a' twice"),
    (["a | 1 | true", "--part=b"], "part: 'b'; allowed: a"),
    ([str(tmp_path / "none.txt")], "plan: "),
  ):
    with pytest.raises(SystemExit, match=message):
      run.main([*arguments, out])


def test_the_plans_flags_are_valid(run):
  """Each line names a benchmark and flags that its parser takes."""
  for path in run.PLANS.glob("*.txt"):
    commands = run.read_plans([str(path)])
    assert commands, path
    for command in commands:
      text = command.text.replace("${REFERENCE:+--reference=$REFERENCE}", "")
      python, flag, module, *arguments = shlex.split(text)
      assert (python, flag) == ("python", "-m")
      parser = importlib.import_module(module).parser()
      args = parser.parse_args(arguments)
      if module == "benchmarks.methods":  # runs, which leave more than one file
        assert args.workdir.parent == pathlib.Path("$OUT")
        assert importlib.import_module(module).make_runs(args)
      else:
        assert args.out.parent == pathlib.Path("$OUT")
        assert args.out.stem == command.name


def test_results_of_uncommitted_code_are_not_published(
  run, monkeypatch, capsys
):
  from benchmarks.support import machine

  published = ROOT / "benchmarks" / "results" / "cpu" / "new.json"
  for commit in (None, "abc-dirty"):
    monkeypatch.setattr(machine.provenance, "commit", lambda c=commit: c)
    for path in (published, ROOT / "docs" / "results" / "new.json"):
      with pytest.raises(UserError, match=r"out: .*allowed: a committed tree"):
        machine.check_out(path)
    machine.check_out(pathlib.Path("runs/new.json"))
    assert "WARNING" in capsys.readouterr().out
  monkeypatch.setattr(machine.provenance, "commit", lambda: "abc")
  machine.check_out(published)
  machine.check_out(pathlib.Path("runs/new.json"))
  assert not capsys.readouterr().out
