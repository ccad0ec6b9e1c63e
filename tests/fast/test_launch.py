"""Launch files: what each worker is started with, and that they are sound."""

import copy
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
ARGUMENTS = ["--config=configs/digits.py:at", "--workdir=runs/a b"]


def load(name):
  spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


local_cluster = load("local_cluster")
gke_jobset = load("gke_jobset")


def parsed(line):
  """Splits a printed command into variables and words."""
  words = shlex.split(line)
  variables = {}
  while "=" in words[0] and not words[0].startswith("-"):
    name, _, value = words.pop(0).partition("=")
    variables[name] = value
  return variables, words


def bash(script, *arguments, **environment):
  return subprocess.run(
    ["bash", str(LAUNCH / script), *arguments],
    cwd=ROOT,
    env={"PATH": os.environ["PATH"], "HOME": "/home/me", **environment},
    capture_output=True,
    text=True,
    timeout=60,
  )


# --- local_cluster.py ---------------------------------------------------------


def test_local_cluster_prints_the_command_of_every_worker(capsys, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/compiled")
  options = ["--num_processes=3", "--devices=4", "--port=1234", "--dry_run"]
  assert local_cluster.main([*options, "--", *ARGUMENTS]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3
  for number, line in enumerate(lines):
    variables, words = parsed(line)
    flags = variables.pop("XLA_FLAGS").split()
    assert flags[0] == "--xla_dump_to=/x" and len(flags) > 1
    assert variables == {
      "JAX_COMPILATION_CACHE_DIR": "/compiled",
      "JAX_COORDINATOR_ADDRESS": "localhost:1234",
      "JAX_NUM_PROCESSES": "3",
      "JAX_PROCESS_ID": str(number),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "4",
    }
    python, unbuffered, main, *rest = words
    assert (python, unbuffered) == (sys.executable, "-u")
    assert pathlib.Path(main) == ROOT / "main.py"
    assert rest == ["--distributed", *ARGUMENTS]


def test_gpus_of_two_processes_do_not_overlap():
  made = local_cluster.workers(
    ["a"], num_processes=2, devices=4, platform="gpu", port=1, environment={}
  )
  chosen = [one.environment["CUDA_VISIBLE_DEVICES"] for one in made]
  assert chosen == ["0,1,2,3", "4,5,6,7"]


def test_the_printed_command_is_the_one_that_is_run(tmp_path):
  """With another program in the place of main.py."""
  script = 'import os, sys; print(os.environ["A"], sys.argv[1:])'
  worker = local_cluster.Worker(
    {"A": "x 'y'"}, [sys.executable, "-c", script, "a b", "$HOME"]
  )
  shell = subprocess.run(
    ["bash", "-c", worker.describe()], capture_output=True, text=True
  )
  assert shell.stdout == "x 'y' ['a b', '$HOME']\n"


@pytest.mark.parametrize(
  ("statuses", "again"),
  [
    ([0, 0], False),
    ([1, 1], False),  # bad input: it stays bad
    ([1, -9], True),
    ([143, 143], True),
    ([134, -9], True),
    ([2], False),
  ],
)
def test_only_jobs_that_a_signal_ended_start_again(statuses, again):
  assert local_cluster._starts_again(statuses) is again


@pytest.mark.parametrize(
  "words",
  [
    ["--num_processes=0", "--", "a"],
    ["--devices=-1", "--", "a"],
    ["--max_restarts=-1", "--", "a"],
    ["--port=65536", "--", "a"],
    ["--platform=tpu", "--", "a"],
    ["--dry_run"],
    ["--dry", "--", "a"],
  ],
)
def test_bad_options_of_local_cluster_are_refused(words, capsys):
  with pytest.raises(SystemExit) as caught:
    local_cluster.main(words)
  assert caught.value.code == 2 and "error: " in capsys.readouterr().err


CHILD = """
import os, signal, sys, time
number, folder = int(os.environ["JAX_PROCESS_ID"]), sys.argv[1]
path = os.path.join(folder, f"starts{number}")
with open(path, "a") as file:
  file.write("x")
starts = os.path.getsize(path)
print("hello from", number, flush=True)
if starts == 1 and number == 1:
  os.kill(os.getpid(), signal.SIGKILL)
sys.exit(143 if starts == 1 else 0)
"""


def test_a_job_that_lost_a_process_starts_again_and_says_so(
  tmp_path, monkeypatch, capfd
):
  (tmp_path / "main.py").write_text(CHILD.replace("sys.argv[1]", "sys.argv[2]"))
  monkeypatch.setattr(local_cluster, "ROOT", tmp_path)
  found = local_cluster.main(["--max_restarts=2", "--", str(tmp_path)])
  said = capfd.readouterr().err
  assert found == 0 and "statuses 143, -9" in said and "statuses 0, 0" in said
  assert "[1] hello from 1" in said and "restart 1 of 2" in said
  assert (tmp_path / "starts0").read_text() == "xx"


@pytest.mark.parametrize(("dead", "statuses"), [(0, "3, -15"), (1, "-15, 3")])
def test_what_waits_for_a_failed_process_is_stopped_and_not_started_again(
  dead, statuses, tmp_path, monkeypatch, capfd
):
  (tmp_path / "main.py").write_text(
    "import os, sys, time\n"
    f"if os.environ['JAX_PROCESS_ID'] == '{dead}': sys.exit(3)\n"
    "time.sleep(60)\n"
  )
  monkeypatch.setattr(local_cluster, "ROOT", tmp_path)
  monkeypatch.setattr(local_cluster, "_OTHERS_ASKED_SECONDS", 0.2)
  assert local_cluster.main(["--max_restarts=1", "--", "a"]) != 0
  said = capfd.readouterr().err
  assert f"statuses {statuses}" in said and "restart 1" not in said


# --- slurm.sbatch, tpu_vm.sh --------------------------------------------------


def test_slurm_prints_the_command_of_every_process():
  found = bash("slurm.sbatch", "--dry_run", *ARGUMENTS, SLURM_NTASKS="3")
  assert found.returncode == 0, found.stderr
  lines = found.stdout.splitlines()
  assert len(lines) == 3
  for number, line in enumerate(lines):
    variables, words = parsed(line)
    assert variables["SLURM_PROCID"] == str(number)
    assert variables["XLA_FLAGS"].startswith("--xla_gpu_")
    folder = variables["JAX_COMPILATION_CACHE_DIR"]
    assert folder == "/home/me/.cache/atat_jax/compiled"
    assert words[:4] == ["python", "-u", "main.py", "--distributed"]
    assert words[-2:] == ARGUMENTS


SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
exit {status}
"""


@pytest.mark.parametrize(
  ("status", "ends", "requeues"), [(0, 0, False), (143, 0, True), (1, 1, False)]
)
def test_a_slurm_job_is_requeued_only_after_it_was_stopped(
  status, ends, requeues, tmp_path
):
  for name, text in (
    ("srun", SRUN.replace("{status}", str(status))),
    ("scontrol", '#!/bin/bash\necho "scontrol $*" >> "$LOG"\n'),
  ):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  log = tmp_path / "log"
  found = bash(
    "slurm.sbatch",
    *ARGUMENTS,
    PATH=f"{tmp_path}:{os.environ['PATH']}",
    LOG=str(log),
    SLURM_JOB_ID="77",
  )
  assert found.returncode == ends, found.stderr
  lines = log.read_text().splitlines()
  assert lines[0].endswith(" ".join(ARGUMENTS))
  assert lines[1:] == ["scontrol requeue 77"] * requeues


GCLOUD = """#!/bin/bash
echo "$*" >> "$LOG"
case "$*" in
  *describe*) echo PREEMPTED ;;
  *main.py*)
    count=$(grep -c main.py "$LOG")
    [ "$count" -gt {preemptions} ] || exit 255 ;;
esac
"""
TPU = ("--zone=z", "--name=n", "--type=v5p-16", "--max_restarts=2")


def gcloud(tmp_path, preemptions):
  """Runs tpu_vm.sh with a gcloud that notes what it is asked."""
  path, log = tmp_path / "gcloud", tmp_path / "log"
  path.write_text(GCLOUD.replace("{preemptions}", str(preemptions)))
  path.chmod(0o755)
  (tmp_path / "tar").write_text("#!/bin/bash\n")
  (tmp_path / "tar").chmod(0o755)
  found = bash(
    "tpu_vm.sh",
    *TPU,
    "--spot",
    f"--fetch={tmp_path / 'fetched'}",
    "--",
    "--config=c",
    "--workdir=gs://b/r",
    PATH=f"{tmp_path}:{os.environ['PATH']}",
    LOG=str(log),
  )
  verbs = []
  for line in log.read_text().splitlines():
    words = line.split()
    verbs.append("train" if "main.py" in line else words[3])
    if words[0] == "storage":
      verbs[-1] = "fetch"
  return found, verbs


def test_a_preempted_slice_is_created_again_and_deleted_in_the_end(tmp_path):
  found, verbs = gcloud(tmp_path, preemptions=1)
  assert found.returncode == 0, found.stderr
  once = ["create", "scp", "ssh", "train"]
  expected = [*once, "describe", "delete", *once, "fetch", "delete"]
  assert verbs == expected


def test_a_slice_that_is_always_preempted_is_given_up_and_deleted(tmp_path):
  found, verbs = gcloud(tmp_path, preemptions=9)
  assert found.returncode == 255
  assert verbs.count("train") == 3 and verbs[-1] == "delete"


def test_tpu_vm_prints_its_commands_in_dry_run():
  found = bash(
    "tpu_vm.sh", *TPU, "--dry_run", "--", "--workdir=gs://b/r", "a b"
  )
  assert found.returncode == 0, found.stderr
  lines = [shlex.split(line) for line in found.stdout.splitlines()]
  assert lines[0][:6] == "gcloud compute tpus tpu-vm create n".split()
  (train,) = (line for line in lines if "main.py" in line[-1])
  assert "--worker=all" in train
  command = train[-1].removeprefix("--command=")
  assert "JAX_COMPILATION_CACHE_DIR=" in command
  assert shlex.split(command)[-2:] == ["--workdir=gs://b/r", "a b"]
  assert lines[-1][4] == "delete"


@pytest.mark.parametrize(
  ("words", "extras", "fetched_by"),
  [
    (["--workdir=gs://b/r"], "tpu,gcs", "storage cp"),
    (["--workdir=s3://b/r"], "tpu,s3", "storage cp"),
    (
      ["--workdir=/disk", "--config.data.dir=gs://b/d"],
      "tpu,gcs",
      "tpu-vm scp",
    ),
    (["--workdir=/disk"], "tpu", "tpu-vm scp"),
  ],
)
def test_workers_install_what_reaches_the_bucket(words, extras, fetched_by):
  found = bash("tpu_vm.sh", *TPU, "--dry_run", "--", *words)
  assert found.returncode == 0, found.stderr
  said = " ".join(shlex.split(found.stdout))
  assert f"'./atat_jax[{extras}]'" in said
  assert fetched_by in found.stdout.splitlines()[-2]


@pytest.mark.parametrize(
  ("script", "words"),
  [
    ("slurm.sbatch", []),
    ("slurm.sbatch", ["--dry_run"]),
    ("tpu_vm.sh", ["--dry_run", "--", "--workdir=gs://b/r"]),
    ("tpu_vm.sh", ["--dry_run", "--zone=z"]),
    ("tpu_vm.sh", ["--dry_run", "--zone=z", "--", "--config=c"]),
    ("tpu_vm.sh", ["--dry_run", "--zone=z", "--name=A", "--", "--workdir=g"]),
    ("tpu_vm.sh", ["--dry_run", "--zone=z", "--max_restarts=x", "--", "a"]),
    ("tpu_vm.sh", ["--dry_runs", "--zone=z", "--", "--workdir=g"]),
  ],
)
def test_bad_options_of_scripts_are_refused(script, words):
  found = bash(script, *words)
  assert found.returncode == 2 and not found.stdout
  assert "error: " in found.stderr.strip().splitlines()[-1]


def test_scripts_pass_shellcheck():
  name = "shellcheck"
  beside = pathlib.Path(sysconfig.get_path("scripts")) / name
  program = str(beside) if beside.exists() else shutil.which(name)
  if program is None:
    pytest.skip("NOT CHECKED: no shellcheck; `pip install -e .[test]` has it")
  scripts = [LAUNCH / "tpu_vm.sh", LAUNCH / "slurm.sbatch"]
  found = subprocess.run(
    [program, *map(str, scripts)], capture_output=True, text=True
  )
  assert found.returncode == 0, found.stdout


# --- gke_jobset.yaml ----------------------------------------------------------

GKE = ["--image=registry/atat:1", "--claim=disk", "--name=mine", "--hosts=3"]


def filled(capsys, *more):
  assert gke_jobset.main([*GKE, *more, "--", *ARGUMENTS]) == 0
  return capsys.readouterr().out


def test_gke_prints_the_command_of_every_worker(capsys):
  lines = filled(capsys, "--dry_run").splitlines()
  assert len(lines) == 3
  for number, line in enumerate(lines):
    variables, words = parsed(line)
    assert variables["JAX_PROCESS_ID"] == str(number)
    assert variables["JAX_NUM_PROCESSES"] == "3"
    assert variables["JAX_COORDINATOR_ADDRESS"] == "mine-worker-0-0.mine:8476"
    assert {"XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"} <= set(variables)
    assert words[:4] == ["python", "-u", "main.py", "--distributed"]
    assert words[-2:] == ARGUMENTS


def test_the_filled_in_jobset_has_a_host_for_each_process(capsys):
  jobset = yaml.safe_load(filled(capsys, "--gpus=4"))
  (worker,) = jobset["spec"]["replicatedJobs"]
  job = worker["template"]["spec"]
  assert worker["replicas"] == 1
  assert job["parallelism"] == job["completions"] == 3
  (container,) = job["template"]["spec"]["containers"]
  assert container["image"] == "registry/atat:1"
  assert container["args"] == ARGUMENTS
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
  (index,) = (one for one in container["env"] if "valueFrom" in one)
  assert index["name"] == "JAX_PROCESS_ID"
  assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.fixture(scope="module")
def check():
  jsonschema = pytest.importorskip(
    "jsonschema", reason="NOT CHECKED: no jsonschema; the extra `test` has it"
  )
  path = ROOT / "tests" / "support" / "jobset_schema.json"
  return jsonschema.Draft202012Validator(json.loads(path.read_text()))


def test_the_jobset_is_what_the_api_takes(check, capsys):
  template = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  made = yaml.safe_load(filled(capsys))
  for one in (template, made):
    assert not [error.message for error in check.iter_errors(one)]


def test_a_planted_fault_in_the_jobset_is_found(check):
  template = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())

  def pod(one):
    job = one["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]

  def set_(where, **fields):
    where.update(fields)

  for fault in (
    lambda one: set_(one, apiVersion="jobset.x-k8s.io/v1"),
    lambda one: set_(one["spec"], maxRestarts=3),
    lambda one: set_(pod(one), restartPolicy="Sometimes"),
    lambda one: set_(pod(one)["containers"][0], image=""),
    lambda one: set_(pod(one)["containers"][0]["env"][1], value=2),
    lambda one: pod(one).pop("containers"),
  ):
    broken = copy.deepcopy(template)
    fault(broken)
    assert list(check.iter_errors(broken))


@pytest.mark.parametrize(
  "words",
  [
    ["--hosts=0"],
    ["--gpus=-1"],
    ["--max_restarts=-1"],
    ["--name=A_b"],
  ],
)
def test_bad_options_of_gke_are_refused(words, capsys):
  with pytest.raises(SystemExit) as caught:
    gke_jobset.main([*GKE, *words, "--", "a"])
  assert caught.value.code == 2 and "error: " in capsys.readouterr().err


def test_launch_files_name_no_server_of_a_registry():
  for path in LAUNCH.iterdir():
    if path.is_file():
      text = path.read_text()
      assert "http://" not in text and "https://" not in text, path
