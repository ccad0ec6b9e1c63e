"""Strange machines: paths, streams, locales, locks, disks, and how work ends."""

import ast
import contextlib
import errno
import json
import logging
import os
import pathlib
import pwd
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import cifar_archives
import numpy as np
import pytest
import tiny

from atat_jax import compilation, data, report
from atat_jax.data import base, cifar
from atat_jax.errors import UserError
from atat_jax.process import commands
from atat_jax.runs import files, locations, lock, provenance

pytest_plugins = ("tiny",)

ROOT = tiny.ROOT
PACKAGE = ROOT / "atat_jax"
AS_NOBODY = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]

# What scripts and notebooks leave behind for the processes they start.
_SHELL = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}


def run(*words, cwd=ROOT, env=None, **options):
  """Runs a command to its end; returns status, stdout and stderr."""
  made = subprocess.run(
    list(map(str, words)),
    cwd=cwd,
    env={**_SHELL, "PYTHONPATH": str(ROOT), **(env or {})},
    stdin=options.pop("stdin", subprocess.DEVNULL),
    stdout=options.pop("stdout", subprocess.PIPE),
    stderr=options.pop("stderr", subprocess.PIPE),
    timeout=900,
    check=False,
    **options,
  )
  out, errors = (
    (stream or b"").decode(errors="replace")
    for stream in (made.stdout, made.stderr)
  )
  return made.returncode, out, errors


def command(body, *words, wrapper=(), **options):
  """Runs code as a command, without JAX."""
  code = (
    "import os, sys\n"
    "from atat_jax.process import commands, stops\n"
    "commands.begin('stopped')\n"
    "with commands.plain_exits():\n"
    f"{textwrap.indent(textwrap.dedent(body), '  ')}\n"
  )
  return run(*wrapper, sys.executable, *words, "-c", code, **options)


def without_home(monkeypatch):
  """A container's user that the system does not know."""
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.delenv("TFDS_DATA_DIR", raising=False)

  def unknown(_):
    raise KeyError

  monkeypatch.setattr(pwd, "getpwuid", unknown)
  monkeypatch.setattr(pwd, "getpwnam", unknown)
  locations._say_once.cache_clear()


def write_archive(path):
  """An archive of CIFAR-10 with few images."""
  images = cifar_archives.random_images
  cifar_archives.cifar10_binary(path, images(1200, 10), images(10, 10, seed=1))


# --- Paths -------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", " ", "None", "a\0b", "~nobody-here/x"])
def test_a_path_that_is_none_is_refused(path):
  with pytest.raises(UserError, match=r"^out: .*; allowed: "):
    locations.expand("out", path)


def test_a_path_that_no_checkpoint_can_have_is_refused():
  with pytest.raises(UserError, match="PYTHONUTF8"):
    locations.expand("out", os.fsdecode(b"/tmp/\xff"))


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert locations.expand("out", "~/a b/é") == tmp_path / "a b/é"
  assert locations.expand("out", "~root").is_absolute()
  for name in ("~", "None"):
    once = locations.expand("out", f"./{name}")
    assert locations.expand("out", once) == pathlib.Path.cwd() / name


def test_without_a_home_there_is_no_cache_which_is_told_once(
  monkeypatch, caplog
):
  without_home(monkeypatch)
  with pytest.raises(RuntimeError):
    pathlib.Path.home()  # the situation that is tested
  monkeypatch.setattr(logging.getLogger("atat_jax"), "propagate", True)
  assert locations.cache("data") is None
  assert locations.cache("compiled") is None
  assert base.cache_root(None) is None
  assert len(caplog.records) == 1
  assert "HOME" in caplog.text
  assert len(data.load("digits").test.labels) == 360


def test_without_a_home_the_program_cache_is_off(monkeypatch):
  without_home(monkeypatch)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  updates = {}
  monkeypatch.setattr(compilation.jax.config, "update", updates.__setitem__)
  compilation.enable_persistent_cache()
  assert updates["jax_compilation_cache_dir"] is None


def test_without_a_home_named_data_are_read(monkeypatch, tmp_path):
  without_home(monkeypatch)
  write_archive(tmp_path / "cifar-10-binary.tar.gz")
  train, _ = cifar.read_cifar10(data_dir=str(tmp_path))
  assert len(train.labels)
  with pytest.raises(UserError, match="home"):
    cifar.read_cifar10()


@pytest.mark.parametrize("kind", ["file", "nowhere"])
def test_a_home_that_cannot_be_used_is_told(
  monkeypatch, tmp_path, caplog, kind
):
  home = tmp_path / "home"
  if kind == "file":
    home.write_text("")
  else:
    home = pathlib.Path("/proc/nowhere")
  without_home(monkeypatch)
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.setattr(logging.getLogger("atat_jax"), "propagate", True)
  assert locations.cache("data") is None
  assert str(home) in caplog.text


def refused(outcome, *parts):
  """Checks for one line that names all parts, and status 1."""
  status, _, errors = outcome
  assert status == 1, errors
  lines = errors.strip().splitlines()
  assert len(lines) == 1, errors
  assert lines[0].startswith("error: ")
  for part in parts:
    assert str(part) in lines[0], errors


@pytest.mark.parametrize(
  ("workdir", "parts"),
  [
    ("", ["--workdir", "''"]),
    ("None", ["--workdir", "'None'"]),
    ("~no-such-user/run", ["--workdir", "~no-such-user"]),
    ("/proc/run", ["workdir", "/proc/run"]),
    ("/tmp/" + 300 * "x", [os.strerror(errno.ENAMETOOLONG)]),
    ("/dev/null/run", ["/dev/null/run"]),
  ],
  ids=["empty", "None", "user", "read-only", "long", "file"],
)
def test_a_workdir_that_cannot_be_is_refused(command_line, workdir, parts):
  refused(command_line(*tiny.flags(workdir)), *parts)


@pytest.mark.parametrize(
  ("content", "part"),
  [
    (b"def get_config(:", "line 1"),
    (b"import no_such_module", "no_such_module"),
    (b"x = 1", "get_config"),
    (b"def get_config():\n  return undefined", "'undefined' is not defined"),
    (b"\xff\xfe", "cannot be read"),
  ],
  ids=["syntax", "import", "empty", "name", "binary"],
)
def test_a_configuration_with_a_mistake_is_one_line(
  command_line, tmp_path, content, part
):
  path = tmp_path / "mine.py"
  path.write_bytes(content)
  flags = [f"--config={path}", f"--workdir={tmp_path / 'run'}"]
  refused(command_line(*flags), "--config", part)


def test_other_commands_refuse_an_empty_out(tmp_path):
  module = [sys.executable, "-m", "atat_jax.report"]
  refused(run(*module, tmp_path, "--out="), "out: ''")
  refused(run(*module, "", "--out=x"), "workdirs: ''")


def test_explain_does_not_write_into_a_run(tmp_path):
  from atat_jax import explain

  (tmp_path / files.CONFIG).write_text("{}")
  with pytest.raises(UserError, match=r"^out: .* holds a run"):
    explain.main(["runs/at", f"--out={tmp_path}"])


# --- Figures -----------------------------------------------------------------

_DRAW = """
import pathlib, sys
from atat_jax.drawing import style
with style.context():
  figure = style.new_figure(3, 2)
  axes = figure.add_subplot()
  axes.plot([0, 1], label="a_b"); axes.set_title("a_b – é"); style.legend(figure, axes)
  style.save(figure, pathlib.Path(sys.argv[1]))
"""


def test_figures_do_not_depend_on_the_users_matplotlib(tmp_path):
  """Backend of a notebook, settings, styles, a folder that is not there."""
  settings = tmp_path / "settings"
  (settings / "stylelib").mkdir(parents=True)
  (settings / "matplotlibrc").write_text(
    "backend: nonsense\ntext.usetex: True\nfont.family: fantasy\n"
    "figure.dpi: 33\nsavefig.bbox: tight\naxes.prop_cycle: cycler(color=['r'])\n"
  )
  (settings / "stylelib" / "default.mplstyle").write_bytes(b"font.size: \xff\n")
  environments = {
    "plain": {},
    "notebook": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    "wrong": {"MPLBACKEND": "no such backend", "DISPLAY": ":77"},
    "settings": {"MPLCONFIGDIR": str(settings)},
    "read-only": {"MPLCONFIGDIR": "/proc", "HOME": "/proc"},
  }
  for name, env in environments.items():
    path = tmp_path / f"{name}.png"
    status, _, errors = run(sys.executable, "-c", _DRAW, path, env=env)
    assert status == 0, errors
    for suffix in (".png", ".pdf"):
      drawn = path.with_suffix(suffix).read_bytes()
      assert drawn == (tmp_path / f"plain{suffix}").read_bytes(), name


# --- Streams and errors ------------------------------------------------------


def test_a_full_stdout_is_an_error():
  with open("/dev/full", "w") as full:
    outcome = command("print('results')", stdout=full)
  refused(outcome, "stdout", "No space left")


def test_a_reader_of_stdout_that_leaves_ends_no_work(tmp_path):
  read, write = os.pipe()
  os.close(read)
  body = f"""
  for _ in range(9):
    print(9999 * "results"); sys.stderr.write(9999 * "bar")
  open({str(tmp_path / "done")!r}, "w").close()
  """
  assert command(body, stdout=write)[0] == 0
  assert (tmp_path / "done").exists()
  (tmp_path / "done").unlink()
  assert command(body, stdout=write, stderr=write)[0] == 0
  assert (tmp_path / "done").exists()
  os.close(write)


def test_a_closed_stream_is_not_a_file_of_the_run(tmp_path):
  """The next file opened would get its number, and what others print."""
  body = f"""
  with open({str(tmp_path / "file")!r}, "w") as file:
    assert file.fileno() > 2
    os.write(1, b"from C"); os.write(2, b"from C"); print("out")
    print("error", file=sys.stderr); file.write("mine")
  """
  script = 'exec "$@" <&- >&- 2>&-'
  assert command(body, wrapper=["bash", "-c", script, "-"])[0] == 0
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
  "env",
  [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  ],
  ids=["ascii", "C"],
)
def test_a_dash_is_printed_in_every_locale(env):
  status, out, errors = command(r"print('a \u2013 b \udcff')", env=env)
  assert (status, errors) == (0, "")
  assert out.startswith("a ") and out.endswith("\n")


def test_a_thread_whose_disk_is_full_ends_the_process():
  """TensorBoard's writer; the main thread would wait for it for ever."""
  body = """
  import threading, time
  stops.started()
  def write(): raise OSError(28, "No space left on device", "/run/events")
  with stops.hold():
    threading.Thread(target=write, daemon=True).start()
    time.sleep(60)
  """
  code = "stops.GRACE_SECONDS = 0.2\n" + textwrap.dedent(body)
  refused(command(code), "/run/events: No space left on device")


def test_a_thread_that_failed_at_the_end_is_an_error_too():
  body = """
  import threading
  def write(): raise OSError(28, "No space left on device", "/run/events")
  thread = threading.Thread(target=write)
  thread.start()
  thread.join()
  """
  refused(command(body), "/run/events: No space left on device")


def test_a_log_that_cannot_be_written_prints_no_traceback():
  body = """
  import logging
  with open("/dev/full", "w") as full:
    logging.getLogger("a").addHandler(logging.StreamHandler(full))
    logging.getLogger("a").warning("text")
    os.dup2(1, full.fileno())
  """
  assert command(body) == (0, "text\n", "")


def test_warnings_of_other_packages_end_nothing():
  body = """
  import warnings
  warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module="other")
  warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="atat_jax.x")
  """
  status, _, errors = command(body, "-W", "error")
  assert status == 1
  assert "UserWarning: ours" in errors and "old" not in errors


_TENSORSTORE = (
  'RESOURCE_EXHAUSTED: Error writing "params/0" in OCDBT database at local file'
  ' "/runs/a/checkpoints/5/d/": Failed to write 3148 bytes to file 13: No space'
  " left on device [os_error_code='28']"
)
_XLA = "RESOURCE_EXHAUSTED: Out of memory allocating 12884901888 bytes."


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (UserError("a: 1;\n allowed: 2"), r"a: 1;\n"),
    (OSError(28, "No space left on device"), "runs/a: No space left on device"),
    (PermissionError(13, "Permission denied", "/x\ny"), r"/x\ny: Permission"),
    (FileNotFoundError(2, "No such file", b"/x"), "/x: No such file"),
    (OSError("custom"), "runs/a: custom"),
    (
      OSError(28, "No space left", f"/r/.results.{32 * 'a'}.tmp.json"),
      "/r/results.json: No space left",
    ),
    (ValueError(_TENSORSTORE), "runs/a: No space left on device"),
    (RuntimeError(_TENSORSTORE), "runs/a: No space left on device"),
    (MemoryError(), "out of memory; a smaller batch_size"),
    (RuntimeError(_XLA), "out of memory (12884901888 bytes more were needed)"),
    (
      np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(int)),
      "out of",
    ),
  ],
)
def test_an_error_from_outside_is_one_line(error, line):
  found = commands.describe(error, "runs/a")
  assert found.startswith(line)
  assert found.isprintable()


def test_the_cause_of_an_error_counts():
  try:
    try:
      raise OSError(5, "Input/output error", "/x")
    except OSError as error:
      raise RuntimeError("the checkpoint could not be read") from error
  except RuntimeError as error:
    assert commands.describe(error) == "/x: Input/output error"


@pytest.mark.parametrize(
  "error",
  [KeyError("x"), ValueError("shape"), TypeError(), RuntimeError("bug")],
)
def test_an_internal_error_keeps_its_traceback(error):
  assert commands.describe(error, "runs/a") is None


def test_no_assert_carries_behaviour():
  """`python -O` leaves them out: they may only tell a type."""
  for path in [ROOT / "main.py", *PACKAGE.rglob("*.py")]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Assert):
        text = ast.unparse(node.test)
        assert text.endswith(" is not None"), f"{path}:{node.lineno}: {text}"
        assert not any(
          isinstance(part, ast.Call | ast.NamedExpr)
          for part in ast.walk(node.test)
        ), f"{path}:{node.lineno}: {text}"


# --- Provenance --------------------------------------------------------------

NASTY = [
  "a b",
  "a\nb; rm -rf /",
  "it's",
  "$(reboot) `reboot` $HOME",
  "\x1b[31m\t\r\x07",
  "é – 漢",
  "\u202egnp.exe",
  os.fsdecode(b"\xff\xfe"),
  "\\'\n\\x41",
  "",
  "-n",
  "!history",
]


def test_a_command_that_is_shown_can_be_pasted():
  text = provenance.join(["printf", r"%s\0", *NASTY])
  assert text.isprintable() and "\n" not in text
  made = subprocess.run(["bash", "-c", text], capture_output=True, check=True)
  assert made.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in NASTY]


def test_plain_words_are_quoted_as_always():
  words = ["python", "main.py", "--workdir=a b", "--x=é"]
  assert provenance.join(words) == shlex.join(words)


def test_a_module_is_shown_as_a_module(monkeypatch, tmp_path):
  code = (
    "from atat_jax.runs import provenance\nprint(provenance.command(), end='')"
  )
  (tmp_path / "shown.py").write_text(code)
  env = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
  python = [sys.executable, "-O"]
  assert run(*python, "-m", "shown", "a b", env=env)[1] == (
    "python -m shown 'a b'"
  )
  assert run(*python, "shown.py", "a", cwd=tmp_path)[1] == "python shown.py a"


def copy_package(folder):
  """The part of the package that finds its own commit."""
  place = folder / "atat_jax" / "runs"
  place.mkdir(parents=True)
  shutil.copy(PACKAGE / "runs" / "provenance.py", place)
  for directory in (place, place.parent):
    (directory / "__init__.py").write_text('"""."""\n')
  return folder


def commit_of(folder, **env):
  code = "from atat_jax.runs import provenance as p; print(p.commit())"
  words = [sys.executable, "-c", code]
  # The environment's own copy of the package must not be found.
  outcome = run(*words, cwd=folder, env={"PYTHONPATH": str(folder), **env})
  assert outcome[::2] == (0, ""), outcome
  return outcome[1].strip()


def git(folder, *words):
  made = run(
    "git", "-c", "user.name=a", "-c", "user.email=a", *words, cwd=folder
  )
  assert made[0] == 0, made
  return made[1].strip()


def test_the_commit_is_that_of_the_package_and_no_other(tmp_path):
  folder = copy_package(tmp_path / "project")
  assert commit_of(folder) == "None"
  assert commit_of(folder, ATAT_JAX_COMMIT="abc") == "abc"
  assert commit_of(folder, PATH="/nowhere") == "None"  # no git
  git(folder, "init", "-q")
  git(folder, "commit", "-q", "--allow-empty", "-m", "a")
  # Installed inside another project, which does not track it.
  assert commit_of(folder) == "None"
  git(folder, "add", "--all")
  git(folder, "commit", "-q", "-m", "b")
  head = git(folder, "rev-parse", "--short=12", "HEAD")
  assert commit_of(folder) == head
  # Within a hook of another repository.
  assert (
    commit_of(folder, GIT_DIR=str(ROOT / ".git"), GIT_WORK_TREE="/") == head
  )
  (folder / "atat_jax" / "__init__.py").write_text('"""Changed."""\n')
  assert commit_of(folder) == f"{head}-dirty"


@pytest.mark.skipif(os.getuid() != 0, reason="changes the owner of a folder")
def test_a_repository_of_another_owner_prints_nothing(tmp_path):
  folder = copy_package(tmp_path / "project")
  git(folder, "init", "-q")
  git(folder, "add", "--all")
  git(folder, "commit", "-q", "-m", "a")
  os.chown(folder, 12345, 12345)
  os.chown(folder / ".git", 12345, 12345)
  assert commit_of(folder, HOME=str(tmp_path)) == "None"


def test_a_package_without_metadata_has_no_version(monkeypatch):
  def missing(name):
    raise provenance.importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(provenance.importlib.metadata, "version", missing)
  assert provenance.record([])["versions"] == {}
  assert provenance.facts(provenance.record([]))["Versions"] == ""


# --- Locks -------------------------------------------------------------------

_HOLD = """
import pathlib, sys, time
from atat_jax.runs import lock
with lock.directory("workdir", pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(900)
"""


@contextlib.contextmanager
def holder(path):
  """Another process that holds the lock of a directory."""
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(path)],
    env={**_SHELL, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "held\n"
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path):
  path = tmp_path / "run"
  with holder(path) as first:
    with pytest.raises(UserError) as refusal, lock.directory("workdir", path):
      pass
    for part in (f"workdir: {path}", first.pid, os.uname().nodename, "since 2"):
      assert str(part) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert files.read_json(path / files.CONFIG) is None  # readers go on
  # Killed: the file is left, its lock is not.
  assert [entry.name for entry in path.iterdir()] == [".lock"]
  with lock.directory("workdir", path):
    holder_now = json.loads((path / ".lock").read_text())
    assert holder_now["pid"] == os.getpid()
  assert not list(path.iterdir())


def test_a_folder_made_for_nothing_is_removed(tmp_path):
  with lock.directory("workdir", tmp_path / "a" / "b"):
    pass
  assert not list(tmp_path.iterdir())
  with lock.directory("workdir", tmp_path / "a"):
    (tmp_path / "a" / "kept").write_text("")
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_whoever_waited_does_not_get_a_removed_lock(tmp_path, monkeypatch):
  """Between opening the file and locking it, its holder may remove it."""
  path, try_lock = tmp_path / "lock", lock._try_lock
  tries = []

  def removed_meanwhile(descriptor, where):
    tries.append(descriptor)
    if len(tries) == 1:
      path.unlink()
    return try_lock(descriptor, where)

  monkeypatch.setattr(lock, "_try_lock", removed_meanwhile)
  with lock.file("x", path, path):
    assert len(tries) == 2
    monkeypatch.setattr(lock, "_try_lock", try_lock)
    with pytest.raises(UserError, match="in use"), lock.file("x", path, path):
      pass


@pytest.mark.parametrize("kind", ["network disk", "Windows"])
def test_without_locks_work_goes_on_and_says_so(
  tmp_path, monkeypatch, caplog, kind
):
  monkeypatch.setattr(logging.getLogger("atat_jax"), "propagate", True)
  if kind == "Windows":
    monkeypatch.setattr(lock, "fcntl", None)
  else:

    def flock(*_):
      raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
  with lock.directory("workdir", tmp_path / "run"):
    pass
  assert "no locks" in caplog.text


def test_a_folder_that_vanishes_is_noticed(tmp_path):
  with lock.directory("workdir", tmp_path / "run") as held:
    held.check()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="removed or replaced"):
      held.check()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="removed or replaced"):
      held.check()


def test_a_second_run_in_a_workdir_is_refused(command_line, tmp_path):
  workdir = tmp_path / "run"
  with holder(workdir) as first:
    before = tiny.snapshot(workdir)
    for mode in ("run", "train"):
      outcome = command_line(*tiny.flags(workdir, mode=mode))
      refused(outcome, "workdir", workdir, first.pid, "stop it")
    assert tiny.snapshot(workdir) == before


@pytest.mark.slow
def test_a_second_evaluation_is_refused_and_a_reader_is_not(
  command_line, finished, tmp_path
):
  workdir = finished.copy(tmp_path / "run")
  with holder(workdir) as first:
    before = tiny.snapshot(workdir)
    outcome = command_line(*tiny.flags(workdir, mode="evaluate"))
    refused(outcome, "workdir", workdir, first.pid, "stop it")
    assert tiny.snapshot(workdir) == before
    # Drawing reads results, and may run beside a training.
    assert command_line(*tiny.flags(workdir, mode="figures")).status == 0
  arguments = [workdir, f"--out={tmp_path / 'out'}", "--figures=steps"]
  with holder(tmp_path / "out"), holder(workdir):
    outcome = run(sys.executable, "-m", "atat_jax.explain", *arguments)
    refused(outcome, "out", tmp_path / "out", "in use")


def test_one_autoattack_at_a_time_on_a_state(tmp_path):
  from atat_jax.attacks.autoattack.progress import Store

  path = tmp_path / "state.npz"
  with Store(path, "a").lock():
    with pytest.raises(UserError, match=r"^state_path: .*in use by process"):
      Store(path, "a").lock().__enter__()
  with Store(path, "a").lock():
    pass
  assert not list(tmp_path.iterdir())


# --- Whole processes ---------------------------------------------------------


def entry(kind, folder, runs):
  """A command in its own process, and what it prints when it is done."""
  python = [sys.executable]
  if kind == "main":
    workdir = folder / "run"
    flags = tiny.flags(workdir, method="standard")
    return [*python, "main.py", *flags], "done in"
  if kind == "explain":
    out = [f"--out={folder / 'explained'}", "--figures=attention,steps"]
    small = ["--num-examples=20", "--num-steps=3", "--num-images=2"]
    words = ["-m", "atat_jax.explain", runs, *out, *small]
    return [*python, *words], "page:"
  if kind == "report":
    words = ["-m", "atat_jax.report", runs, f"--out={folder / 'compared'}"]
    return [*python, *words], "comparison:"
  archive = folder / "cifar-10-binary.tar.gz"
  write_archive(archive)
  words = ["-m", "atat_jax.data.prepare", "cifar10", f"--archive={archive}"]
  return [*python, *words, f"--data_dir={folder / 'tfds'}"], "is ready"


# Whatever this session ignores, as under nohup.
LISTENING = ["env", "--default-signal=INT,TERM,HUP"]


def listens(process):
  """Whether a process has its handlers: Python by itself has none of SIGTERM."""
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  (caught,) = re.findall(r"(?m)^SigCgt:\s*(\w+)$", status)
  return int(caught, 16) >> (signal.SIGTERM - 1) & 1


def stop(words, done, delay, signum):
  """Stops a command some time after it listens; whether it was still at work."""
  process = subprocess.Popen(
    [*LISTENING, *map(str, words)],
    cwd=ROOT,
    env={**_SHELL, **tiny.QUICK, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    while process.poll() is None and not listens(process):
      time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=300)
  finally:
    process.kill()
  told = f"{signum.name} after {delay:.2f} s: {process.returncode}\n{output}"
  assert "Traceback" not in output, told
  if process.returncode == 0:
    assert done in output, told
    return False
  assert process.returncode == 128 + signum, told
  assert output.count("stopped") == 1, told
  assert "stopped" in output.strip().splitlines()[-1], told
  return True


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize(
  ("delay", "signum"),
  list(zip((0.0, 0.8, 2.1), SIGNALS, strict=True)),
  ids=lambda value: getattr(value, "name", value),
)
def test_a_stop_is_one_line(tmp_path, delay, signum):
  assert stop(*entry("main", tmp_path, None), delay, signum)


def storm(kind, folder, runs, number, seconds, seed=0):
  """Stops a command at random times; returns how often it was at work."""
  print(f"{kind}: seed {seed}")
  draw, stopped = random.Random(seed), 0
  for i in range(number):
    place = folder / str(i)
    place.mkdir()
    delay = seconds * (i + draw.random()) / number
    words, done = entry(kind, place, runs)
    stopped += stop(words, done, delay, draw.choice(SIGNALS))
  return stopped


@pytest.mark.slow
def test_27_stops_of_the_first_seconds(tmp_path):
  assert storm("main", tmp_path, None, 27, 3.5) == 27


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "number", "seconds"),
  [("main", 12, 20), ("explain", 8, 12), ("report", 6, 2), ("prepare", 6, 2)],
)
def test_stops_over_a_whole_life(tmp_path, finished, kind, number, seconds):
  assert storm(kind, tmp_path, finished.workdir, number, seconds)


def results(workdir):
  """Rows of the results without their times."""
  rows = json.loads((workdir / "results.json").read_text())["rows"]
  return [
    {k: v for k, v in row.items() if k not in ("seconds", "attacks")}
    for row in rows
  ]


def main(workdir, *words, python=(), wrapper=(), **options):
  """Runs `main.py` on the tiny configuration in a process of its own."""
  options.setdefault("cwd", ROOT)
  env = {**tiny.QUICK, **options.pop("env", {})}
  return run(
    *wrapper,
    sys.executable,
    *python,
    ROOT / "main.py",
    *(
      flag.replace("=configs/", f"={ROOT}/configs/")
      for flag in tiny.flags(workdir, *words, method="standard")
    ),
    env=env,
    **options,
  )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """A run on an ordinary machine."""
  workdir = tmp_path_factory.mktemp("plain") / "run"
  outcome = main(workdir)
  assert outcome[0] == 0, outcome
  return workdir


# As nobody that the system knows, by a link, with stdin closed.
_STRANGE = """
umask 077
mkdir "$0" && chown 12345 "$0" && ln -s "$0" "$1" && shift && exec "$@" <&-
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_run_in_a_strange_place(plain):
  """Much at once; the parts are tested alone above."""
  folder = pathlib.Path(f"/tmp/strange-{os.getpid()}")  # others may enter it
  folder.mkdir()
  folder.chmod(0o777)
  real = folder / ("m\xe4 x\ny" + 200 * "l")
  env = {
    "TZ": "Nowhere/Nothing",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "MPLCONFIGDIR": "/proc",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONIOENCODING": "ascii",
    "LC_ALL": "C",
  }
  unset = "HOME XDG_CACHE_HOME JAX_COMPILATION_CACHE_DIR TERM COLUMNS DISPLAY"
  nobody = [*AS_NOBODY, "--inh-caps=-all", "--bounding-set=-all"]
  wrapper = ["bash", "-c", _STRANGE, real, folder / "link"]
  wrapper += ["env", *(f"-u{name}" for name in unset.split()), *nobody]
  try:
    status, _, errors = main(
      folder / "link" / "run",
      python=("-O", "-W", "error"),
      wrapper=wrapper,
      env=env,
    )
    assert status == 0, errors
    assert "Traceback" not in errors
    assert errors.count("no cache") == 1
    assert results(real / "run") == results(plain)
    assert (real / "run" / "config.json").stat().st_mode & 0o777 == 0o600
  finally:
    shutil.rmtree(folder)


@contextlib.contextmanager
def small_disk(folder, size):
  """A file system that is soon full."""
  folder.mkdir()
  made = run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder)
  if made[0]:
    pytest.skip(f"mounts are not allowed: {made[2]}")
  try:
    yield folder
  finally:
    run("umount", "--lazy", folder)


def ended_in_a_line(outcome, *parts):
  """Checks the end of a command whose bars come before its one line."""
  status, _, errors = outcome
  assert status == 1, errors
  assert "Traceback" not in errors, errors
  assert errors.count("error") == 1, errors
  last = errors.strip().splitlines()[-1]
  assert last.startswith("error: "), errors
  for part in parts:
    assert str(part) in last, errors


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "40k", "300k", "600k", "1m", "2m"])
def test_a_full_disk_is_one_line(tmp_path, size):
  with small_disk(tmp_path / "disk", size) as disk:
    outcome = main(disk / "run")
    ended_in_a_line(outcome, disk / "run", "No space left on device")
    # With room again, the same command goes on and ends well.
    run("mount", "-o", "remount,size=64m", disk)
    status, _, errors = main(disk / "run")
    assert status == 0, errors


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path):
  """Like a quota: a limit of the process."""
  outcome = main(tmp_path / "run", wrapper=["prlimit", "--fsize=20000"])
  ended_in_a_line(outcome, os.strerror(errno.EFBIG))


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_no_permission_is_one_line(plain):
  folder = pathlib.Path(f"/tmp/owned-{os.getpid()}")
  shutil.copytree(plain, folder)
  nobody = [*AS_NOBODY, "--inh-caps=-all", "--bounding-set=-all"]
  try:
    outcome = main(folder, wrapper=nobody)
    refused(outcome, folder, os.strerror(errno.EACCES))
    outcome = main(folder, "--mode=figures", wrapper=nobody)
    refused(outcome, folder, os.strerror(errno.EACCES))
  finally:
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["metrics.jsonl", "results.json"])
def test_a_workdir_that_vanishes_is_an_error(tmp_path, moment):
  workdir = tmp_path / "run"
  process = subprocess.Popen(
    [sys.executable, "main.py", *tiny.flags(workdir, method="standard")],
    cwd=ROOT,
    env={**_SHELL, **tiny.QUICK},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not (workdir / moment).exists():
    assert process.poll() is None
    time.sleep(0.02)
  os.rename(workdir, tmp_path / "gone")
  out, errors = process.communicate(timeout=600)
  ended_in_a_line((process.returncode, out, errors), workdir)


@pytest.mark.slow
def test_a_deleted_current_folder_and_a_broken_pipe(tmp_path, plain):
  script = 'mkdir gone && cd gone && rmdir ../gone && "$@" 2>&1 | head -n 1'
  workdir = tmp_path / "run"
  wrapper = ["bash", "-c", script, "-"]
  # TensorBoard's package would import it, and its libraries need a folder.
  (tmp_path / "hidden").mkdir()
  (tmp_path / "hidden" / "torch.py").write_text("raise ImportError\n")
  env = {"PYTHONPATH": f"{tmp_path / 'hidden'}:{ROOT}"}
  status, out, _ = main(workdir, wrapper=wrapper, cwd=tmp_path, env=env)
  assert status == 0 and out.count("\n") == 1, out
  assert results(workdir) == results(plain)


@pytest.mark.slow
def test_a_copy_with_windows_line_ends(tmp_path, plain):
  copy = tmp_path / "copy"
  copy.mkdir()
  for path in ("configs", "atat_jax"):
    shutil.copytree(
      ROOT / path, copy / path, ignore=shutil.ignore_patterns("__pycache__")
    )
  shutil.copy(ROOT / "main.py", copy)
  for path in (copy / "main.py", *(copy / "configs").glob("*.py")):
    path.write_bytes(
      b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")
    )
  for path in (copy, *copy.rglob("*")):
    path.chmod(0o555 if path.is_dir() else 0o444)
  workdir = tmp_path / "run"
  flags = tiny.flags(workdir, method="standard")
  status, _, errors = run(
    *(sys.executable, "main.py", *flags),
    cwd=copy,
    env={**tiny.QUICK, "PYTHONPATH": str(copy)},
  )
  assert status == 0, errors
  assert results(workdir) == results(plain)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_processes_of_a_job_stop_at_the_same_step(tmp_path, signum):
  """The signal goes to one of them."""
  workdir = tmp_path / "run"
  words = tiny.flags(workdir, method="standard", mode="train")
  words += ["--config.train.num_epochs=400", "--distributed"]
  words += ["--config.train.validate_every_epochs=400"]
  processes = [
    subprocess.Popen(
      [*LISTENING, sys.executable, "main.py", *words],
      cwd=ROOT,
      env={
        **_SHELL,
        **tiny.QUICK,
        "JAX_PLATFORMS": "cpu",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for rank in range(2)
  ]
  path = workdir / "metrics.jsonl"
  while not path.exists() or path.read_text().count("\n") < 2:
    assert [process.poll() for process in processes] == [None, None]
    time.sleep(0.1)
  processes[signum == signal.SIGTERM].send_signal(signum)
  outputs = [process.communicate(timeout=600)[0] for process in processes]
  lasts = {output.strip().splitlines()[-1] for output in outputs}
  assert len(lasts) == 1 and "stopped at step" in lasts.pop(), outputs
  statuses = {process.returncode for process in processes}
  assert statuses <= {128 + signum, 128 + signal.SIGTERM}


@pytest.mark.slow
def test_a_clock_that_was_set_back_leaves_no_old_page(
  finished, tmp_path, monkeypatch
):
  workdir = finished.copy(tmp_path / "run")
  os.utime(workdir / "report.html", (2**31, 2**31))
  written = []
  monkeypatch.setattr(report, "write_report", written.append)
  more = tiny.config(evaluation__attacks="nominal,fgsm,pgd2,ifgsm2")
  for _ in range(2):  # the second time nothing is new
    tiny.run(workdir, "run", more)
    assert written == [workdir]
