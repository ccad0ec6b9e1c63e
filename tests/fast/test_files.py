"""Reading and writing files: damage, hostile content, refusals of the system."""

import json
import logging
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from atat_jax.attacks.autoattack import progress, slots
from atat_jax.data import base, cifar
from atat_jax.errors import DamagedFileError, UserError
from atat_jax.runs import configuration, files
from atat_jax.training.writer import MetricsWriter

ROW = {
  "model": "student",
  "attack": "pgd20",
  "batch_norm": "running",
  "norm": "linf",
  "epsilon": 0.03,
  "num_examples": 100,
  "accuracy": 0.5312,
}


def refused(path, match, read=files.read_json):
  with pytest.raises(UserError, match=match) as error:
    read(path)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


# --- JSON --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (b"", "not valid JSON"),
    (b"\0" * 40, "not valid JSON"),
    (b'{"a": 1', "not valid JSON"),
    (b'{"a": "\xff"}', "not valid JSON"),
    (b'{"a": NaN}', "NaN is no number"),
    (b'{"a": -Infinity}', "Infinity is no number"),
    (b'{"a": 1e999}', "too large"),
    (b'{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b"[1]", "must hold a JSON object, not a list"),
    (b"\xff\xfe{\0}\0", "not valid JSON"),  # UTF-16
  ],
)
def test_json_from_outside_is_one_line(tmp_path, content, match):
  path = tmp_path / "a.json"
  path.write_bytes(content)
  refused(path, match)


def test_line_ends_and_marks_of_other_systems_are_read(tmp_path):
  path = files.write_json(tmp_path / "a.json", {"a": "é"}, sealed=True)
  text = path.read_bytes().replace(b"\n", b"\r\n")
  path.write_bytes(b"\xef\xbb\xbf" + text)
  assert files.read_json(path) == {"a": "é"}


def test_a_pipe_a_folder_and_a_huge_file_are_no_json(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for name in ("pipe", "."):
    refused(tmp_path / name, "allowed: a file|a directory")
  path = tmp_path / "a.json"
  with path.open("wb") as file:
    file.truncate(files.MAX_JSON + 1)  # takes no space
  refused(path, "allowed: at most|larger than")


@pytest.mark.parametrize("run", [{}, {"run": {"commit": "0123"}}])
def test_a_changed_digit_of_a_result_is_found(tmp_path, run):
  path = tmp_path / files.RESULTS
  content = {"format": 1, **run, "rows": [ROW]}
  files.write_json(path, content, sealed=True)
  assert files.read_results(tmp_path) == content
  text = path.read_text()
  for old, new in (
    ("0.5312", "0.5322"),
    ("pgd20", "pgd10"),
    ('"checksum"', '"checksun"'),  # its value stands without its name
    ('"sha256:', '"sha257:'),
    ('"rows"', '"row5"'),
  ):
    assert old in text
    path.write_text(text.replace(old, new))
    refused(path, 'delete its entry "checksum"')
  # An honest edit: as the line says.
  edited = json.loads(text)
  (edited["run"] if run else edited).pop("checksum")
  edited["rows"][0]["accuracy"] = 0.25
  path.write_text(json.dumps(edited))
  assert files.read_results(tmp_path)["rows"][0]["accuracy"] == 0.25


@pytest.mark.parametrize(
  "rows",
  [
    None,
    {},
    [1],
    [{}],
    [{**ROW, "accuracy": "0.5"}],
    [{**ROW, "accuracy": True}],
    [{**ROW, "attack": None}],
    [{k: v for k, v in ROW.items() if k != "norm"}],
  ],
)
def test_rows_that_are_none_are_one_line(tmp_path, rows):
  files.write_json(tmp_path / files.RESULTS, {"format": 1, "rows": rows})
  with pytest.raises(DamagedFileError, match=r"not a results file \(.*move it"):
    files.read_results(tmp_path)


def test_a_changed_configuration_is_found_by_its_copy(tmp_path):
  tree = {"method": "at", "seed": 1, "evaluation": {"epsilon": 0.03}}
  configuration.write(tree, tmp_path)
  assert json.loads((tmp_path / files.CONFIG).read_text()) == tree
  record = {"format": 1, "run": {"config": tree}, "rows": []}
  files.write_json(tmp_path / files.RESULTS, record, sealed=True)
  assert configuration.read(tmp_path).attack == {"epsilon": 0.03}
  tree["evaluation"]["epsilon"] = 0.04
  configuration.write(tree, tmp_path)
  with pytest.raises(DamagedFileError, match=r"epsilon is 0.04, but 0.03 in"):
    configuration.read(tmp_path)


# --- Writing -----------------------------------------------------------------


def test_errors_of_the_system_are_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  for path, match in (
    (tmp_path / "file" / "a.json", "File exists|Not a directory"),
    (tmp_path / ("x" * 300), "File name too long"),
    (pathlib.Path("/proc/nothing/a.json"), "No such file"),
  ):
    refused(path, match, lambda p: files.write_json(p, {}))
  (tmp_path / "folder").mkdir()
  refused(tmp_path / "folder", "directory", lambda p: files.write_text(p, "x"))
  refused(tmp_path / "file" / "a.json", "Not a directory")
  assert [p.name for p in tmp_path.iterdir()] == ["file", "folder"]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
  path = tmp_path / ("é" * 120 + ".json")
  assert files.read_json(files.write_json(path, {"a": 1})) == {"a": 1}


_FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
import pathlib, numpy as np
from atat_jax.errors import UserError
from atat_jax.runs import files
folder = pathlib.Path(sys.argv[1])
for write, name, value in (
  (files.write_json, "a.json", {"a": "x" * 9000}),
  (files.write_arrays, "a.npz", {"a": np.zeros(9000)}),
):
  try:
    write(folder / name, value)
  except UserError as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path):
  files.write_json(tmp_path / "a.json", {"a": 1})
  files.write_arrays(tmp_path / "a.npz", {"a": np.ones(3)})
  lines = subprocess.run(
    [sys.executable, "-c", _FULL, str(tmp_path)],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  assert [line.split(": ")[0] for line in lines] == [
    str(tmp_path / "a.json"),
    str(tmp_path / "a.npz"),
  ]
  assert all("File too large" in line for line in lines)
  assert files.read_json(tmp_path / "a.json") == {"a": 1}
  assert files.read_arrays(tmp_path / "a.npz")["a"].tolist() == [1, 1, 1]
  assert sorted(os.listdir(tmp_path)) == ["a.json", "a.npz"]


_SLOW = """
import pathlib, sys
from atat_jax.runs import files
with files.replacing(pathlib.Path(sys.argv[1])) as temporary:
  temporary.write_bytes(b"half")
  print(flush=True)
  sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_removed_and_live_files_stay(tmp_path):
  dead, live = (
    subprocess.Popen(
      [sys.executable, "-c", _SLOW, str(tmp_path / "sub" / name)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    for name in ("dead", "live")
  )
  for process in (dead, live):
    process.stdout.readline()
  dead.kill()
  dead.communicate()
  (tmp_path / "sub" / ".hidden.tmp").write_text("of somebody else")
  files.remove_temporaries(tmp_path, below=False)
  assert len(os.listdir(tmp_path / "sub")) == 3
  files.remove_temporaries(tmp_path)
  assert len(os.listdir(tmp_path / "sub")) == 2
  live.communicate(b"\n")
  assert live.returncode == 0
  assert sorted(os.listdir(tmp_path / "sub")) == [".hidden.tmp", "live"]


def test_what_is_set_aside_takes_no_other_name(tmp_path):
  for number in range(3):
    path = tmp_path / "checkpoints" / "8"
    path.mkdir(parents=True)
    (path / "a").write_text(str(number))
    files.set_aside(path, tmp_path)
  found = {
    p.name: (p / "a").read_text() for p in (tmp_path / "damaged").iterdir()
  }
  assert found == {
    "checkpoints-8": "0",
    "checkpoints-8.1": "1",
    "checkpoints-8.2": "2",
  }


# --- Arrays ------------------------------------------------------------------


def rewrite(path, change):
  """Writes an archive again, without its member `checksums` or with it."""
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: archive.read(info) for info in archive.infolist()}
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in change(members).items():
      archive.writestr(name, content)


def test_arrays_are_all_there_and_those_that_were_written(tmp_path):
  path = tmp_path / "a.npz"
  arrays = {"x": np.arange(3), "y": np.arange(3.0)}

  def without(name):
    return lambda m: {k: v for k, v in m.items() if k != name}

  def exchanged(m):
    return {**m, "x.npy": m["y.npy"], "y.npy": m["x.npy"]}

  for change in (without("x.npy"), exchanged):
    files.write_arrays(path, arrays)
    rewrite(path, change)  # every CRC-32 fits
    refused(path, "checksums differ", files.read_arrays)
  # What numpy or an earlier version wrote has no list.
  files.write_arrays(path, arrays)
  rewrite(path, without("checksums.npy"))
  assert set(files.read_arrays(path)) == {"x", "y"}


def test_an_array_is_as_long_as_its_header_says(tmp_path):
  path = tmp_path / "a.npz"
  for length in (99_999_999_999_999, 3):
    np.savez(path, x=np.arange(10))

    text = f"({length},), }}".encode().ljust(8)

    def other(members, text=text):
      start, end, rest = members["x.npy"].partition(b"(10,), }")
      return {"x.npy": start + text + rest[len(text) - len(end) :]}

    rewrite(path, other)
    refused(path, "cannot be read", files.read_arrays)
  np.savez(path, x=np.array([{}], object))
  refused(path, "cannot be read", files.read_arrays)


def test_a_bomb_is_not_unpacked(tmp_path):
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    with archive.open("x.npy", "w", force_zip64=True) as member:
      for _ in range(60):
        member.write(bytes(2**20))
  refused(path, "unpacks to", files.read_arrays)


# --- Metrics -----------------------------------------------------------------


def test_a_bad_line_of_the_metrics_takes_no_other_with_it(tmp_path, caplog):
  path = tmp_path / files.METRICS
  good = [
    f'{{"split": "train", "step": {step}, "loss": NaN}}'
    for step in (1, 3, 5, 7)
  ]
  bad = ['{"split": "train", "st', "[1]", '{"split": "train", "step": "4"}']
  text = "\r\n".join(
    [good[0], bad[0], good[1], *bad[1:], good[2], good[3][:20]]
  )
  path.write_text(text)
  lines = files.read_lines(path)
  assert [line["step"] for _, line in lines.found] == [1, 3, 5]
  assert lines.bad == [2, 4, 5]
  found = files.read_metrics(path)["train"]
  assert [line["step"] for line in found] == [1, 3, 5]
  with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path, 3) as writer:
    writer.write("train", 4, {"loss": 0.5})
  assert "damaged, left out: line 2, 4, 5" in caplog.text
  kept = [json.loads(line)["step"] for line in path.read_text().splitlines()]
  assert kept == [1, 3, 4]
  (copy,) = (tmp_path / "damaged").iterdir()
  assert copy.read_bytes() == text.encode()


def test_a_line_that_is_too_long_is_left_out(tmp_path):
  path = tmp_path / files.METRICS
  long = f'{{"split": "train", "step": 1, "x": "{"y" * 3 * files.MAX_LINE}"}}\n'
  path.write_text(long + '{"split": "train", "step": 2}\n')
  assert files.read_lines(path).bad == [1]
  assert [x["step"] for x in files.read_metrics(path)["train"]] == [2]


_FULL_METRICS = """
import pathlib, resource, sys
from atat_jax.errors import UserError
from atat_jax.training.writer import MetricsWriter
folder, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
try:
  with MetricsWriter(folder, 0) as writer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for step in range(1, 200):
      writer.write("train", step, {f"value{n}": 1.0 for n in range(9)})
except UserError as error:
  print(error)
"""


def test_a_disk_that_is_full_ends_a_training_in_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", _FULL_METRICS, str(tmp_path), "2900"],
    capture_output=True,
    text=True,
    timeout=600,
    check=True,
  )
  assert done.stdout == f"{tmp_path / files.TENSORBOARD}: File too large\n"
  assert done.stderr == ""
  # What was cut off does not stop the next start.
  with MetricsWriter(tmp_path, 2) as writer:
    writer.write("train", 3, {"loss": 0.5})
  lines = (tmp_path / files.METRICS).read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


# --- Decoded copies and states -----------------------------------------------


def test_a_damaged_copy_is_said(tmp_path, caplog):
  path = tmp_path / "copy.npz"
  split = base.Split(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int32))
  base.write_cache(path, cifar.CIFAR10, split, split, origin={})
  content = bytearray(path.read_bytes())
  content[4000] ^= 1
  path.write_bytes(content)
  with pytest.raises(DamagedFileError, match="Bad CRC"):
    base.read_cache(path, cifar.CIFAR10)


JOBS = [slots.Job("apgd-ce", None, 100)]


def make_fresh(logits=None):
  generator = np.random.default_rng(0)
  drawn = generator.normal(size=(8, 3)).astype(np.float32)
  return progress.EnsembleProgress.fresh(
    generator.uniform(size=(8, 4, 4, 1)).astype(np.float32),
    drawn if logits is None else logits,
    generator.integers(0, 3, 8),
    JOBS,
  )


def changed(where, value):
  logits = make_fresh().logits.copy()
  logits[where] = value
  return logits


@pytest.mark.parametrize(
  ("stored", "found", "same"),
  [
    (changed(0, np.nan), changed(0, np.nan), True),
    (changed((0, 0), np.inf), changed((0, 0), np.inf), True),
    (changed((0, 0), np.inf), changed((0, 0), -np.inf), False),
    (changed((0, 0), np.nan), None, False),
    (None, changed((0, 0), np.nan), False),
    (changed(slice(None), np.nan), None, False),
    (changed((0, 0), 9.0), None, False),
    (None, None, True),
  ],
)
def test_a_state_with_logits_that_are_not_finite_is_compared(
  tmp_path, stored, found, same
):
  store = progress.Store(tmp_path / "state.npz", "a test")
  store.save(make_fresh(stored))
  if same:
    assert store.restore(make_fresh(found)).robust.shape == (8,)
  else:
    with pytest.raises(UserError, match="another classifier"):
      store.restore(make_fresh(found))


@pytest.mark.parametrize(
  "change",
  [
    {"robust": np.ones(7, bool)},
    {"claimed": np.zeros(8)},
    {"fallen": np.full((1, 4, 4, 1), np.nan, np.float32)},
    {"fallen": np.zeros((1, 4, 4, 1), np.float32)},
    {"done/apgd-ce": np.zeros((8, 2), bool)},
    {"done/square": np.zeros((8, 1), bool)},
    {"in_flight/runs": np.zeros(1)},
    {"logits": np.array("x")},
  ],
)
def test_a_state_that_does_not_fit_is_one_line(tmp_path, change):
  path = tmp_path / "state.npz"
  store = progress.Store(path, "a test")
  store.save(make_fresh())
  files.write_arrays(path, {**files.load_arrays(path), **change})
  before = path.read_bytes()
  with pytest.raises(UserError, match=r"state_path: .*move it away") as error:
    store.restore(make_fresh())
  assert "\n" not in str(error.value)
  assert path.read_bytes() == before
