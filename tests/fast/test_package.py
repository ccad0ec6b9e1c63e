"""The package: what an installation has, and what is said about it."""

import importlib
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import atat_jax
from atat_jax.cli import shipped

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def script(name):
  """Module of a script in `.ci`, which is no package."""
  spec = importlib.util.spec_from_file_location(name, ROOT / f".ci/{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_version_is_in_one_place():
  assert "version" not in PROJECT["project"]
  assert PROJECT["project"]["dynamic"] == ["version"]
  source = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
  assert source == "atat_jax.__version__"
  number = atat_jax.__version__
  citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
  assert f"\nversion: {number}\n" in citation
  changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  assert f"\n## [{number}]" in changes and "\n## [Unreleased]\n" in changes


def test_the_console_command_exists():
  ((name, target),) = PROJECT["project"]["scripts"].items()
  module, _, function = target.partition(":")
  assert name == "atat-jax"
  assert callable(getattr(importlib.import_module(module), function))


def test_every_accelerator_has_an_extra():
  extras = PROJECT["project"]["optional-dependencies"]
  for name, extra in (("gpu", "cuda12"), ("cuda13", "cuda13"), ("tpu", "tpu")):
    assert extras[name][0].startswith(f"jax[{extra}]>=")


def test_the_oldest_versions_are_the_lower_bounds():
  oldest = script("oldest").oldest
  found = oldest(PROJECT["project"]["dependencies"])
  assert len(found) == len(PROJECT["project"]["dependencies"])
  assert "jax==0.10.2" in found
  assert oldest(["B>=2.0; python_version < '4'", "a[x]>=1"]) == [
    "a==1",
    "b==2.0",
  ]
  with pytest.raises(ValueError, match="'jax' has no lower bound"):
    oldest(["jax"])


def test_a_citation_has_what_citation_files_need():
  text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
  for field in ("cff-version: 1.2.0", "message: ", "title: ", "authors:"):
    assert re.search(rf"^{field}", text, re.M), field
  yaml = pytest.importorskip("yaml", reason="PyYAML reads the file")
  tree = yaml.safe_load(text)
  assert tree["license"] == PROJECT["project"]["license"]
  assert len(tree["references"][0]["authors"]) == 6


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps(path):
  """Steps of all jobs of a workflow."""
  yaml = pytest.importorskip("yaml", reason="PyYAML reads the file")
  jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
  assert all("timeout-minutes" in job for job in jobs.values())
  return jobs, [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_uses_known_actions_and_scripts_that_exist(path):
  _, found = steps(path)
  known = {
    "actions/checkout",
    "actions/setup-python",
    "actions/upload-artifact",
  }
  used = {step["uses"].partition("@")[0] for step in found if "uses" in step}
  assert "actions/checkout" in used and used <= known
  commands = "\n".join(step.get("run", "") for step in found)
  assert "://" not in commands  # registries are the client's own
  for script in re.findall(r"python (\S+\.py)", commands):
    assert (ROOT / script).exists(), script


def test_the_tests_run_on_every_python_and_on_the_oldest_dependencies():
  jobs, found = steps(ROOT / ".github/workflows/ci.yml")
  assert {"lint", "types", "tests", "docs", "wheel"} <= set(jobs)
  matrix = jobs["tests"]["strategy"]["matrix"]
  named = [
    line.rpartition(" ")[2]
    for line in PROJECT["project"]["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
  ]
  assert matrix["python"] == named
  oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
  assert matrix["include"] == [{"python": oldest, "dependencies": "oldest"}]
  for words in ("ruff check .", "ruff format --check .", "actionlint", "mypy"):
    assert any(step.get("run") == words for step in found), words


def test_actionlint_finds_nothing():
  command = shutil.which("actionlint")
  if command is None:
    # No dependency: its package loads the program from github.com to install.
    pytest.skip("NOT CHECKED: no actionlint; the lint job of ci.yml has it")
  done = subprocess.run([command, *map(str, WORKFLOWS)], capture_output=True)
  assert done.returncode == 0, done.stdout.decode()


@pytest.mark.slow
def test_a_wheel_has_everything_and_works_elsewhere(tmp_path):
  source = tmp_path / "source"  # setuptools leaves its work where it builds
  for name in ("atat_jax", "configs"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, source / name, ignore=ignored)
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  subprocess.run(
    [
      *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
      *("--no-build-isolation", f"--wheel-dir={tmp_path}", str(source)),
    ],
    check=True,
  )
  (wheel,) = tmp_path.glob("*.whl")
  site = tmp_path / "site"
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    archive.extractall(site)
  expected = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "atat_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  expected |= {f"atat_jax/configs/{name}.py" for name in shipped.names()}
  assert not expected - names
  assert not {name for name in names if name.startswith(("tests", "bench"))}
  code = (
    "from atat_jax import cli\nfrom atat_jax.cli import shipped\n"
    "print(shipped.folder())\ncli.main(['fields', 'seed', '--config=digits:at'])"
  )
  empty = tmp_path / "empty"
  empty.mkdir()
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=empty,
    env={"PYTHONPATH": str(site), "HOME": str(empty), "PATH": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  first, second, *_ = done.stdout.splitlines()
  assert pathlib.Path(first) == site / "atat_jax/configs"
  assert second == "evaluation.seed = 0" or second == "seed = 0"
