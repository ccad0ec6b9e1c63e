"""Tables, flags and statistics of the benchmarks."""

import argparse
import contextlib
import importlib
import json
import pathlib
import time

import numpy as np
import pytest

from atat_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)


# --- The tables --------------------------------------------------------------


def _side(robust, accuracy, seconds, everything):
  from benchmarks.support.comparison import Side

  return Side(
    robust=np.array(robust, bool),
    adversarial=np.zeros((len(robust), 1, 1, 1)),
    accuracy=accuracy,
    seconds=seconds,
    everything=everything,
  )


@pytest.fixture
def made_up():
  from benchmarks.support.comparison import Comparison

  ours = _side(
    [1, 1, 1, 0, 0, 0, 0, 0],
    {"clean": 0.875, "apgd-ce": 0.5, "square": 0.375},
    {"apgd-ce": 4.0, "square": 5.0},
    10.0,
  )
  warm = _side(
    [1, 1, 1, 0, 0, 0, 0, 0],
    ours.accuracy,
    {"apgd-ce": 2.0, "square": 2.5},
    5.0,
  )
  reference = _side(
    [0, 0, 1, 1, 0, 0, 0, 0],
    {"clean": 0.875, "apgd-ce": 0.25},
    {"apgd-ce": 8.0},
    20.0,
  )
  return Comparison("student", "linf", 8 / 255, ours, reference, warm)


def _cells(table):
  lines = [line.strip("|").split("|") for line in table.splitlines()]
  assert len({len(line) for line in lines}) == 1
  assert len({len(line) for line in table.splitlines()}) == 1
  return [[cell.strip() for cell in line] for line in lines]


def test_parity_table(made_up):
  from benchmarks.support.comparison import parity_table

  header, rule, row = _cells(parity_table([made_up]))
  assert header == [
    "network",
    "norm",
    "epsilon",
    "n",
    "clean (%)",
    "ours (%)",
    "reference (%)",
    "difference (points)",
    "robust by ours only",
    "by the reference only",
  ]
  assert [cell.endswith(":") for cell in rule] == 2 * [False] + 8 * [True]
  expected = "student linf 8/255 8 87.50 37.50 25.00 +12.50 2 1"
  assert row == expected.split()
  assert made_up.ours_only.tolist() == [0, 1]
  assert made_up.reference_only.tolist() == [3]


def test_parity_table_shows_two_clean_accuracies_that_differ(made_up):
  from benchmarks.support.comparison import parity_table

  made_up.ours.accuracy["clean"] = 0.75
  assert _cells(parity_table([made_up, made_up]))[3][4] == "75.00 / 87.50"


def test_attack_table(made_up):
  from benchmarks.support.comparison import attack_table

  assert _cells(attack_table([made_up]))[2:] == [
    ["student", "clean", "87.50", "87.50", "+0.00"],
    ["student", "apgd-ce", "50.00", "25.00", "+25.00"],
    ["student", "square", "37.50", "-", "-"],
  ]


def test_speed_table(made_up):
  from benchmarks.support.comparison import speed_table

  assert _cells(speed_table([made_up]))[2:] == [
    ["student", "apgd-ce", "4.00", "2.00", "8.00", "2.00", "4.00"],
    ["student", "square", "5.00", "2.50", "-", "-", "-"],
    ["student", "everything", "10.00", "5.00", "20.00", "2.00", "4.00"],
  ]


def test_a_comparison_is_plain_json(made_up):
  found = json.loads(json.dumps(made_up.as_json(), allow_nan=False))
  assert found["difference_points"] == 12.5
  assert found["ours"]["robust"] == "11100000"
  assert found["ratios"]["everything"] == {"first": 2.0, "warm": 4.0}
  assert found["ratios"]["square"] == {"first": None, "warm": None}


# --- Flags -------------------------------------------------------------------


def test_flags():
  from benchmarks import autoattack
  from benchmarks.support import machine

  args = autoattack.parser().parse_args(
    ["--workdir=a=runs/x", "--workdir=runs/y=1/teacher", "--epsilon=8/255"]
  )
  assert args.workdir == [("a", "runs/x"), ("teacher", "runs/y=1/teacher")]
  assert args.epsilon == 8 / 255
  for text in ("0", "-1", "a", "1/0", "inf", "nan", "1/2/3"):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed"):
      machine.number(text)
  for text in ("0", "-1", "1.5", "a"):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed"):
      machine.whole(text)


def test_a_missing_reference_is_told_with_how_to_get_it(tmp_path):
  from benchmarks.support import original

  with pytest.raises(UserError, match=r"no package autoattack.*git clone"):
    original.load(str(tmp_path))


# --- Statistics --------------------------------------------------------------


def test_flops_of_a_step():
  from atat_jax import objectives
  from benchmarks.support import flops

  def passes(method, num_steps):
    return flops.passes(objectives.create(method), num_steps)

  assert passes("standard", 0) == 3
  assert passes("at", 7) == 14 + 3
  assert passes("alp", 7) == passes("mart", 7) == 14 + 6
  assert passes("trades", 10) == 20 + 6 + 1
  assert passes("atat", 7) == passes("atat_released", 7) == 14 + 6 + 1


def test_pairs_are_compared_run_by_run():
  from benchmarks.support import timing

  # The machine was slow in the second pair: that falls on both sides.
  found = timing.summary([[1.0, 4.0, 1.0], [2.0, 8.0, 2.0]])
  assert (found["ratio"], found["ratio_spread"]) == (2.0, 0.0)
  assert (found["seconds"], found["peer_seconds"]) == (1.0, 2.0)


def test_short_functions_are_timed_in_bursts():
  from benchmarks.support import timing

  now, calls = [0.0], []

  def side(name, seconds):
    def run():
      calls.append(name)
      now[0] += seconds

    return run

  sides = [side("long", 1.0), side("short", 0.0625)]
  times = timing.run_in_turn(sides, repeats=2, clock=lambda: now[0])
  assert times == [[1.0, 1.0], [0.0625, 0.0625]]
  assert calls == (["long"] + ["short"] * 5) * 2  # one, and four in 0.2 s


def test_a_line_is_fitted_to_a_curve():
  from benchmarks import scaling

  work = np.array([1.0, 2.0, 5.0, 10.0])
  found = scaling.fit(work, 3 + 0.5 * work)
  assert found["constant"] == pytest.approx(3)
  assert found["slope"] == pytest.approx(0.5)
  assert found["worst"] == pytest.approx(0, abs=1e-9)
  bent = scaling.fit(work, work**2)
  assert bent["worst"] > 0.2


def test_a_worse_ratio_is_flagged(tmp_path, capsys):
  from benchmarks import compare

  def write(name, ratios):
    path = tmp_path / name
    path.write_text(json.dumps({"ratios": ratios}))
    return str(path)

  stored = write("stored.json", {"a": 2.0, "b": 1.0})
  compare.main([stored, write("same.json", {"a": 1.81, "b": 1.5, "c": 1.0})])
  assert "worse" not in capsys.readouterr().out
  for name, ratios in (
    ("slow.json", {"a": 1.79, "b": 1.0}),
    ("missing.json", {"a": 2.0}),
  ):
    with pytest.raises(SystemExit, match="1 of 2 ratios are worse"):
      compare.main([stored, write(name, ratios)])
    assert "| worse |" in capsys.readouterr().out
  for name in (str(tmp_path / "none.json"), write("empty.json", {})):
    with pytest.raises(SystemExit, match=r"error: .*allowed"):
      compare.main([stored, name])


# --- Pages -------------------------------------------------------------------


def test_tables_are_written_from_files(tmp_path):
  from benchmarks import tables

  (tmp_path / "cpu").mkdir()
  (tmp_path / "cpu" / "attacks.json").write_text(
    json.dumps(
      {
        "command": "python -m benchmarks.attacks",
        "commit": "abc",
        "date": "2026-01-02T03:04:05",
        "machine": {
          "cores_used": [0, 1],
          "cpu": "a CPU",
          "device": "cpu",
          "python": "3.11",
          "jax": "0.10",
          "torch": None,
        },
        "rows": [
          {
            "name": "fgsm/wrn-8-1/b4",
            "seconds": 0.0125,
            "spread": 0.001,
            "peer_seconds": 0.025,
            "peer_spread": 0.002,
            "ratio": 2.0,
            "ratio_spread": 0.1,
            "first_seconds": 1.5,
            "peer_first_seconds": 0.03,
            "first_ratio": 0.02,
          }
        ],
      }
    )
  )
  page = "before\n<!-- generated: attacks -->\nold\n<!-- end -->\nafter\n"

  def generate(text):
    return tables.generate(text, "performance.md", tmp_path)

  made = generate(page)
  assert "old" not in made
  assert made.startswith("before\n") and made.endswith("<!-- end -->\nafter\n")
  assert "| fgsm/wrn-8-1/b4 |" in made and " 2.00 |" in made
  assert "commit `abc`, 2026-01-02, 2 cores, a CPU" in made
  assert generate(made) == made
  page = page.replace("attacks", "step")
  assert "Not measured with committed code" in generate(page)
  for other in ("other", "versions"):  # unknown, and of another page
    with pytest.raises(UserError, match=f"generated: '{other}'; allowed: att"):
      generate(page.replace("step", other))


def test_pages_show_the_committed_results():
  """What they quote comes from the files, and those from committed code."""
  from benchmarks import tables

  for page in tables.PAGES:
    text = (tables.DOCS / page).read_text(encoding="utf-8")
    assert tables.generate(text, page, tables.RESULTS) == text
    for name in tables.parts(page):
      if (tables.RESULTS / tables.PARTS[name].file).exists():
        assert text.count(f"<!-- generated: {name} -->") == 1, name


def test_a_stopped_benchmark_says_what_is_missing_and_goes_on(
  tmp_path, monkeypatch
):
  from benchmarks.support import machine

  commit = ["abc"]
  monkeypatch.setattr(machine, "start", lambda *_, **__: [0])
  monkeypatch.setattr(machine.provenance, "commit", lambda: commit[0])
  out = tmp_path / "out.json"
  args = argparse.Namespace(out=out, threads=None)
  made = []

  def rows(names):
    for name in names:
      if len(made) == 2 or len(made) == 5:
        raise KeyboardInterrupt
      made.append(name)
      yield {"name": name, "value": len(made)}

  def call():
    machine.run(
      args,
      rows,
      lambda found: str(len(found)),
      line=lambda row: row["name"],
      names=["a", "b", "c"],
    )
    return json.loads(out.read_text())

  with pytest.raises(KeyboardInterrupt):
    call()
  assert json.loads(out.read_text())["missing"] == ["c"]
  made.append("stopped")
  found = call()
  assert made == ["a", "b", "stopped", "c"] and "missing" not in found
  assert [row["value"] for row in found["rows"]] == [1, 2, 4]
  commit[0] = "def"  # other code measures everything itself
  made.append("other")
  with pytest.raises(KeyboardInterrupt):
    call()
  assert not made[5:]
  commit[0] = "abc-dirty"
  for _ in range(2):  # and so does code that is not committed
    made.clear()
    with pytest.raises(KeyboardInterrupt):
      call()
    assert made == ["a", "b"]


def test_results_of_uncommitted_code_are_not_shown(tmp_path):
  from benchmarks import tables

  path = tmp_path / "one.json"
  for commit in ("abc-dirty", "unknown"):
    path.write_text(json.dumps({"commit": commit}))
    with pytest.raises(UserError, match="allowed: results of committed code"):
      tables.read(path)


def _event(process, thread, name, duration, **more):
  return {
    "ph": "X",
    "pid": process,
    "tid": thread,
    "name": name,
    "dur": duration,
    **more,
  }


def _name(kind, process, thread, name):
  return {
    "ph": "M",
    "pid": process,
    "tid": thread,
    "name": f"{kind}_name",
    "args": {"name": name},
  }


def test_a_profile_counts_each_kernel_of_a_stream_once():
  kernels = importlib.import_module("benchmarks.kernels")
  host = _event(1, 1, "op", 9.0, args={"hlo_op": "op"})
  device = [
    _event(2, 5, "conv", 2.0),
    _event(2, 5, "add", 1.0),
    _event(2, 5, "conv", 3.0),
    _event(2, 6, "XLA Modules tell it again", 6.0),
  ]
  names = [
    _name("process", 1, 0, "/host:CPU"),
    _name("process", 2, 0, "/device:GPU:0 Fast 1"),
    _name("thread", 2, 5, "Stream #13(Compute)"),
    _name("thread", 2, 6, "XLA Modules"),
  ]
  found = kernels.kernel_times([*names, host, *device])
  assert list(found) == ["conv", "add"]
  assert found == pytest.approx({"conv": 5e-6, "add": 1e-6})
  # Without a GPU the operations of XLA count.
  rest = [host, _event(1, 1, "python", 50.0)]
  assert kernels.kernel_times([*names, *rest]) == pytest.approx({"op": 9e-6})


def test_a_comparison_is_read_as_it_was_written(made_up):
  from benchmarks.support import comparison

  found = comparison.Comparison.from_json(made_up.as_json())
  for table in ("parity_table", "attack_table", "speed_table"):
    make = getattr(comparison, table)
    assert make([found]) == make([made_up])


PROGRAM = """
HloModule jit_f, is_scheduled=true

%inner (p: bf16[4,8]) -> (f32[8], f32[8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %sum = (f32[8]{0}, f32[8]{0}) reduce(%p, %p), dimensions={0}
}

%body (carry: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %carry = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%carry), index=1
  %sums = (f32[8]{0}, /*index=1*/f32[8]{0}) fusion(%x), kind=kInput, calls=%inner
  ROOT %more = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

ENTRY %main (a: bf16[4,8], k: bf16[3,3]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %k = bf16[3,3]{1,0} parameter(1)
  %conv = (bf16[4,8]{1,0}, u8[0]{0}) custom-call(%a, %k), custom_call_target="__cudnn$convForward"
  %y = bf16[4,8]{1,0} get-tuple-element(%conv), index=0
  %loop = (s32[], bf16[4,8]{1,0}) while(%start), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %z = f32[4,8]{1,0} fusion(%y), kind=kLoop, calls=%other
}
"""


def test_traffic_counts_operands_and_results_of_each_iteration():
  traffic = importlib.import_module("benchmarks.traffic")
  found = {one.name: one for one in traffic.kernels(PROGRAM)}
  assert set(found) == {"conv", "sums", "z"}
  assert found["conv"] == traffic.Kernel("conv", "convolutions", 2 * 73, 1)
  assert found["sums"] == traffic.Kernel("sums", "reductions", 64 + 64, 7)
  assert found["z"] == traffic.Kernel("z", "elementwise", 64 + 128, 1)


def test_the_difference_of_two_precisions_is_paired():
  precision = importlib.import_module("benchmarks.precision")
  generator = np.random.default_rng(0)
  full = generator.random(200) < 0.6
  half = np.where(generator.random(200) < 0.1, ~full, full)
  row = {
    "name": "pgd20/n200",
    "num_examples": 200,
    "float32": full.mean(),
    "bfloat16": half.mean(),
    "float32_only": int((full & ~half).sum()),
    "bfloat16_only": int((half & ~full).sum()),
  }
  gaps = half.astype(float) - full
  expected = gaps.std() / np.sqrt(200)
  assert precision.paired_error(row) == pytest.approx(expected)
  line = precision.table([row]).splitlines()[-1]
  assert f" {100 * gaps.mean():+.2f} |" in line
  assert f" {100 * expected:.2f} |" in line


def test_the_answers_of_several_networks_are_pooled(monkeypatch):
  precision = importlib.import_module("benchmarks.precision")
  answers = {
    ("a", "float32"): [True, True, False],
    ("a", "bfloat16"): [True, False, False],
    ("b", "float32"): [True, False, False],
    ("b", "bfloat16"): [True, True, True],
  }

  class Fake:
    data = "digits"

    def __init__(self, name):
      self._name = name

    def correct(self, args, attack, dtype):
      del args, attack
      return np.array(answers[self._name, dtype])

  monkeypatch.setattr(precision, "load", lambda args, path: Fake(path.name))
  flags = ["--workdir", "x/a", "x/b", "--attacks=pgd20"]
  *rows, pooled = precision._rows(precision.parser().parse_args(flags))
  assert [row["name"] for row in rows] == ["pgd20/x/a/n3", "pgd20/x/b/n3"]
  assert pooled["name"] == "pgd20/2 networks/n6"
  assert pooled["float32"] == pytest.approx(3 / 6)
  assert pooled["bfloat16"] == pytest.approx(4 / 6)
  assert (pooled["float32_only"], pooled["bfloat16_only"]) == (1, 2)


def test_first_calls_take_turns_in_processes_of_their_own(monkeypatch):
  first_call = importlib.import_module("benchmarks.first_call")
  made = []

  def call(*case):
    made.append(case)
    seconds = float(len(made))
    names = ("first (s)", "first, CPU (s)", "second (s)", "second, CPU (s)")
    return {"programs": 2.0, **dict.fromkeys(names, seconds)}

  monkeypatch.setattr(first_call, "_in_a_process", call)
  args = first_call.parser().parse_args(
    ["--network", "convnet", "--attack", "fgsm", "pgd", "--repeats", "3"]
  )
  rows = list(first_call._rows(args))
  assert made == [("convnet", "fgsm"), ("convnet", "pgd")] * 3
  assert [row["first, CPU (s)"] for row in rows] == [3, 4]
  assert rows[0]["spread"] == (1, 5)
  assert "| fgsm/convnet |" in first_call.table(rows)


@pytest.mark.parametrize(("step", "share"), [(0.01, 0.8), (0.25, 0.0)])
def test_an_accelerator_waits_as_long_as_reading_takes_longer_than_it(
  monkeypatch, step, share
):
  benchmark = importlib.import_module("benchmarks.input")

  class Reading(contextlib.nullcontext):
    def __enter__(self):
      return self

    def follow(self, number):
      time.sleep(0.05)

  monkeypatch.setattr(benchmark, "_stream", lambda *_, **__: Reading())
  found = benchmark.waits(
    ROOT, size=8, batch=2, batches=8, workers=0, seconds=step, left_out=4
  )
  assert found["waiting_share"] == pytest.approx(share, abs=0.15)
  assert found["steps_that_waited"] == (1 if share else 0)
